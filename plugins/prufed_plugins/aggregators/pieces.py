"""The coverage-normalised mean of tensors that are read piece by piece.

Sums are additive, so any split of a tensor gives the same result: they are taken over pieces that
stay in the processor's cache from one client to the next.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Final, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from prufed_plugins.aggregators.coverage_sum import MOST_IN_A_BYTE, CoverageSum, Mean, as_float
from prufed_plugins.memory import scratch
from prufed_plugins.tensor_files import Buffer

RUN: Final = 2**16
"""Entries of a piece: their sums, in float64, and what one client sends of them."""

_ROOM: Final = 2**22
"""Bytes of counts that are asked of the system at once: what stays between rounds is not to lie
between pieces of memory that come and go."""

Buffers = tuple[Buffer, Buffer]
"""Where the entries of a piece and their mask are read into."""


class Reader(Protocol):
    """Reads one client's share of one tensor, piece by piece, otherwise as in ``Part``."""

    @property
    def client(self) -> str:
        """The client's name."""

    @property
    def name(self) -> str:
        """The tensor's global name."""

    @property
    def masked(self) -> bool:
        """Whether the client lacks entries."""

    @property
    def masks_digest(self) -> str | None:
        """The digest of the client's masks, as in ``Update``."""

    def read(
        self,
        start: int,
        stop: int,
        buffers: Buffers | None = None,
        *,
        checked: bool = True,
        with_mask: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the entries from ``start`` to before ``stop`` and their mask, both flat.

        Args:
            start: the first entry, in row-major order.
            stop: the entry after the last.
            buffers: for the entries and for their mask, each large enough.
            checked: False leaves NaN and infinity in.
            with_mask: False reads no mask and returns None for it.

        Raises:
            UpdateError: an entry that exists is NaN or infinite.
        """


@runtime_checkable
class InPieces(Protocol):
    """Parts of a module that can be read piece by piece too."""

    def readers(self, key: str) -> Sequence[Reader] | None:
        """Return a reader per client; None where some client's tensor can only be had whole."""


class Counts:
    """How many clients have each entry, kept from one round to the next.

    Where the clients of a tensor send the masks of last time, and nothing but zeros outside them,
    those masks need not be read: the sums are those of whole tensors, and the counts are known. A
    byte per entry is kept, of tensors that are masked.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[tuple[tuple[str, str | None], ...], Tensor]] = {}
        self._room = torch.empty(0, dtype=torch.uint8)

    def of(self, readers: Sequence[Reader]) -> Tensor | None:
        """Return N (entries,) of a tensor's clients; None where it is not known."""
        masks, count = self._known.get(readers[0].name, ((), None))
        return count if masks == _masks(readers) else None

    def place(self, readers: Sequence[Reader], entries: int) -> Tensor:
        """Return where N of a tensor's clients can be written to, uint8 (entries,)."""
        _, old = self._known.pop(readers[0].name, (None, None))
        if old is not None and len(old) == entries:
            return old
        if len(self._room) < entries:
            self._room = torch.frombuffer(mmap.mmap(-1, max(entries, _ROOM)), dtype=torch.uint8)
        place, self._room = self._room[:entries], self._room[entries:]
        return place

    def keep(self, readers: Sequence[Reader], count: Tensor) -> None:
        """Take what was written there."""
        self._known[readers[0].name] = (_masks(readers), count)

    @staticmethod
    def can_be_kept(readers: Sequence[Reader]) -> bool:
        """Return whether the clients' masks are told apart by their digests, and worth it."""
        masked = [reader for reader in readers if reader.masked]
        return len(masked) > 0 and len(readers) <= MOST_IN_A_BYTE and all(map(_vouched, masked))


def _masks(readers: Sequence[Reader]) -> tuple[tuple[str, str | None], ...]:
    return tuple((reader.client, reader.masks_digest) for reader in readers)


def _vouched(reader: Reader) -> bool:
    """Return whether all entries outside a client's mask are known to be 0."""
    return not reader.masked or reader.masks_digest is not None


def mean_in_pieces(
    mean: Mean, key: str, readers: Sequence[Reader], current: Tensor, counts: Counts | None
) -> tuple[Tensor, Tensor | None]:
    """Return the mean of one tensor, in the dtype of ``current``, and where it is covered.

    Args:
        mean: what it is of.
        key: of the tensor in its module.
        readers: of the clients that have it.
        current: the global tensor before the round.
        counts: what is known from the rounds before, and noted for the next.
    """
    old = current.contiguous().reshape(-1)
    new = torch.from_numpy(scratch([old.nbytes], np.uint8)).view(old.dtype)
    share = mean.include_global
    present = share.masks.get(key) if share else None
    known, noted = _known_counts(mean, readers, old.numel(), counts)
    coverage: list[Tensor | None] = []
    total: CoverageSum | None = None
    longest = min(RUN, old.numel())
    buffers = Buffer(8 * longest), Buffer(longest)
    for start in range(0, old.numel(), RUN):
        run = slice(start, min(start + RUN, old.numel()))
        shape = (run.stop - run.start,)
        total = total if total is not None and total.shape == shape else CoverageSum(shape)
        _sum_up(mean, total, readers, run, buffers, None if known is None else known[run])
        if noted is not None:
            noted[run] = total.counts()
        if share is not None:
            mask = None if present is None else present.reshape(-1)[run]
            total.add(as_float(old[run]), mask, share.weight, client=False)
        fallback = as_float(old[run]) if mean.fallback == "keep" else None
        direct = new[run] if new.dtype in (torch.float32, torch.float64) else None
        found, covered = total.mean(fallback, mean.min_count, direct)
        if direct is None:
            new[run] = found
        coverage.append(covered)
    if noted is not None and counts is not None:
        counts.keep(readers, noted)
    return new.reshape(current.shape), _joined(coverage, current)


def _known_counts(
    mean: Mean, readers: Sequence[Reader], entries: int, counts: Counts | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return what is known of the counts, and where to note them if nothing is and they can be."""
    equal = all(mean.weights[reader.client] == 1.0 for reader in readers)
    if counts is None or not equal or mean.absent_as_zero or not counts.can_be_kept(readers):
        return None, None
    known = counts.of(readers)
    return known, counts.place(readers, entries) if known is None else None


def _sum_up(
    mean: Mean,
    total: CoverageSum,
    readers: Sequence[Reader],
    run: slice,
    buffers: Buffers,
    known: Tensor | None,
) -> None:
    """Set ``total`` to what all clients have of one piece.

    They are added unseen: NaN and infinity show in the sum. Only then is each one looked at.
    """
    for checked in (False, True):
        total.clear()
        unread = known is not None and not checked
        for reader in readers:
            without = unread or (mean.absent_as_zero and not checked and _vouched(reader))
            values, mask = reader.read(
                run.start, run.stop, buffers, checked=checked, with_mask=not without
            )
            mean.add(total, reader.client, values, mask, cleared=not checked and _vouched(reader))
        if unread and known is not None:
            total.set_counts(known)
        if total.is_finite():
            return


def _joined(coverage: Sequence[Tensor | None], current: Tensor) -> Tensor | None:
    """Return the coverage of a tensor from that of its pieces; None where it is every entry."""
    if all(piece is None for piece in coverage):
        return None
    if len(coverage) == 1 and coverage[0] is not None:
        return coverage[0].reshape(current.shape)
    joined = torch.ones(current.numel(), dtype=torch.bool)
    for index, piece in enumerate(coverage):
        if piece is not None:
            joined[index * RUN : index * RUN + piece.numel()] = piece
    return joined.reshape(current.shape)
