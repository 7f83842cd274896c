"""The coverage-normalised mean: one formula, many papers.

For each entry e, over clients i with weight w_i, mask m_i and value θ_i::

    S[e] = Σ w_i m_i[e] θ_i[e]      C[e] = Σ w_i m_i[e]      N[e] = Σ m_i[e]
    g'[e] = S[e] / C[e]  where N[e] ≥ min_count, else the fallback

LEGO's HeteAgg (2410.18287, Algorithm 2), PruFed, FedSpaLLM's ℓ0 mean (2410.14852, Eq. 5), FedRolex
and HetLoRA are this formula under different masks, weights and fallbacks.

Sums are float64 whatever the clients send and are cast once at the end. They are additive, so
memory does not depend on the number of clients, and any split of a tensor gives the same result:
where the clients' files can be read piece by piece, sums are taken over pieces that stay in the
processor's cache from one client to the next.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from prufed_plugins.api import Merged, Part
from prufed_plugins.entries import is_finite
from prufed_plugins.memory import scratch
from prufed_plugins.tensor_files import Buffer

Fallback = Literal["keep", "zero"]
"""What an entry that too few clients have becomes: its old value, or 0 as in Algorithm 2."""

RUN: Final = 2**15
"""Entries of a piece: their sums, in float64, and what one client sends of them."""

_MOST_IN_A_BYTE: Final = 255
"""Up to so many clients are counted in bytes: several times faster to add to than int32."""

_BITS: Final = {torch.float32: torch.int32, torch.float64: torch.int64}


Buffers = tuple[Buffer, Buffer]
"""Where the entries of a piece and their mask are read into."""


@dataclass(frozen=True)
class GlobalShare:
    """The global adapter as one more party to the mean.

    It fills the entries it is given a mask for, but is no client: ``min_count`` ignores it.

    Attributes:
        weight: w_g.
        masks: bool tensors by key; a key that is absent, or None, means every entry.
    """

    weight: float
    masks: Mapping[str, Tensor | None]


class Reader(Protocol):
    """Reads one client's share of one tensor, piece by piece, otherwise as in :class:`Part`."""

    @property
    def client(self) -> str:
        """The client's name."""

    def read(
        self, start: int, stop: int, buffers: Buffers | None = None, *, checked: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Return the entries from ``start`` to before ``stop`` and their mask, both flat.

        Args:
            start: the first entry, in row-major order.
            stop: the entry after the last.
            buffers: for the entries and for their mask, each large enough.
            checked: False leaves NaN and infinity in.

        Raises:
            UpdateError: an entry that exists is NaN or infinite.
        """


@runtime_checkable
class InPieces(Protocol):
    """Parts of a module that can be read piece by piece too."""

    def readers(self, key: str) -> Sequence[Reader] | None:
        """Return a reader per client; None where some client's tensor can only be had whole."""


@dataclass(frozen=True)
class _Mean:
    """What the mean is of: the arguments of :func:`coverage_mean` by those names."""

    weights: Mapping[str, float]
    min_count: int
    fallback: Fallback
    include_global: GlobalShare | None
    absent_as_zero: bool

    def add(self, total: CoverageSum, client: str, values: Tensor, mask: Tensor | None) -> None:
        """Add one client's entries."""
        if self.absent_as_zero and mask is not None:
            values, mask = select(values, mask), None
        total.add(values, mask, self.weights[client])


class CoverageSum:
    """S, C and N of one tensor, or of one piece of it after the other in the same memory.

    Attributes:
        shape: of the tensor.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self._sum = torch.from_numpy(scratch(shape, np.float64))  # S
        self._wide = torch.from_numpy(scratch(shape, np.float64))  # one client's share of S or C
        self._count: Tensor | None = None  # N of the masked clients
        self._weight: Tensor | None = None  # their C, where it differs from N
        self._present: Tensor | None = None  # one client's mask as 0 and 1, in its entries' dtype
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self._added = 0
        self._masked = False  # whether any of them had a mask
        self._clients = 0  # clients that had
        self._weighted = False  # whether their C differs from N
        self._dense_count = 0  # N and C of the others: the same for every entry
        self._dense_weight = 0.0

    def add(
        self, tensor: Tensor, mask: Tensor | None, weight: float = 1.0, *, client: bool = True
    ) -> None:
        """Add one client, or the global adapter.

        Args:
            tensor: θ_i of this sum's shape, float32 or float64. NaN and infinity spoil the sum even
                where they are masked out; see :meth:`is_finite`.
            mask: m_i, bool, of the same shape; None means every entry.
            weight: w_i > 0.
            client: False for the global adapter, which counts in S and C but not in N.
        """
        if mask is None:
            self._dense_count += client
            self._dense_weight += weight
        else:
            present = mask.contiguous().view(torch.uint8)
            self._add_mask(present, weight, client)
            tensor = self._cleared(tensor, present)
        target = self._wide if self._added else self._sum
        target.copy_(tensor)
        if weight != 1.0:
            target.mul_(weight)
        if self._added:
            self._sum.add_(self._wide)
        self._added += 1

    def is_finite(self) -> bool:
        """Return whether every entry that was added is finite, those masked out included."""
        return not self._added or is_finite(self._sum)

    def mean(self, fallback: Tensor | None, min_count: int = 1) -> tuple[Tensor, Tensor | None]:
        """Return S / C where N ≥ min_count, else ``fallback`` (None: 0), as float64.

        The result is in the memory of the sum: nothing can be added after it.

        Returns:
            The mean, and a bool tensor of where N ≥ min_count; None where that is every entry.
        """
        covered = self._covered(min_count)
        if not self._added:
            mean = self._sum.zero_()
        else:
            mean = self._sum.div_(self._total() if self._masked else self._dense_weight)
        if covered is not None:
            # as indices: mostly few, and many still cost less than choosing by a mask
            missing = np.flatnonzero(~covered.numpy())
            if fallback is None:
                mean.numpy().reshape(-1)[missing] = 0.0
            else:
                mean.numpy().reshape(-1)[missing] = fallback.numpy().reshape(-1)[missing]
        return mean, covered

    def _covered(self, min_count: int) -> Tensor | None:
        if self._dense_count >= min_count:
            return None
        if not self._masked or self._count is None:
            return torch.zeros(self.shape, dtype=torch.bool)
        covered = self._count >= min_count - self._dense_count
        return None if covered.numpy().all() else covered

    def _total(self) -> Tensor:
        """Return C of every entry."""
        known = self._weight if self._weighted else self._count
        assert known is not None
        total = self._wide.copy_(known)
        return total.add_(self._dense_weight) if self._dense_weight else total

    def _add_mask(self, present: Tensor, weight: float, client: bool) -> None:
        if self._count is None:
            self._count = torch.from_numpy(scratch(self.shape, np.uint8))
        if not self._masked:
            self._masked = True
            self._count.zero_()
        if not self._weighted and (weight != 1.0 or not client):
            self._weighted = True  # so far each counted one
            if self._weight is None:
                self._weight = torch.from_numpy(scratch(self.shape, np.float64))
            self._weight.copy_(self._count)
        if self._weighted:
            assert self._weight is not None
            self._weight.add_(self._wide.copy_(present).mul_(weight))
        if client:
            self._clients += 1
            if self._clients > _MOST_IN_A_BYTE:
                self._count = self._count.int()
            self._count.add_(present)

    def _cleared(self, tensor: Tensor, present: Tensor) -> Tensor:
        """Return the entries with zeros where the client has none."""
        if self._present is None or self._present.dtype != tensor.dtype:
            self._present = torch.from_numpy(scratch(self.shape, tensor.numpy().dtype))
        return torch.mul(tensor, self._present.copy_(present), out=self._present)


def select(tensor: Tensor, mask: Tensor) -> Tensor:
    """Return ``where(mask, tensor, 0)`` for float32 or float64.

    Multiplying the bit patterns by 0 or 1 keeps or clears them whatever they are, NaN included,
    and is eight times faster on a CPU than ``torch.where``.
    """
    kept = torch.empty_like(tensor)
    bits = _BITS[tensor.dtype]
    np.multiply(tensor.contiguous().view(bits).numpy(), _bytes(mask), out=kept.view(bits).numpy())
    return kept


def coverage_mean(
    parts: Iterable[Part],
    current: Mapping[str, Tensor],
    weights: Mapping[str, float],
    *,
    min_count: int = 1,
    fallback: Fallback = "keep",
    include_global: GlobalShare | None = None,
    absent_as_zero: bool = False,
) -> Merged:
    """Return the coverage-normalised mean of one module.

    Args:
        parts: the clients' shares of the module; iterated once, or read piece by piece.
        current: the global tensors before the round, by key.
        weights: w_i > 0 by client name.
        min_count: clients an entry needs to move.
        fallback: what the others become. Where the global adapter takes part they keep its value.
        include_global: lets the global adapter take part.
        absent_as_zero: an entry that a client lacks counts, as 0.
    """
    if include_global is not None:
        fallback = "keep"
    mean = _Mean(weights, min_count, fallback, include_global, absent_as_zero)
    if isinstance(parts, InPieces):
        readers = {key: parts.readers(key) for key in current}
        if None not in readers.values():
            done = {
                key: _mean_in_pieces(mean, key, readers[key] or (), old)
                for key, old in current.items()
            }
            tensors = {key: tensor for key, (tensor, _) in done.items()}
            return _merged(tensors, {key: covered for key, (_, covered) in done.items()})
    sums = {key: CoverageSum(tuple(tensor.shape)) for key, tensor in current.items()}
    for part in parts:
        for key, total in sums.items():
            mean.add(total, part.client, part.tensors[key], part.masks[key])
    if include_global is not None:
        for key, total in sums.items():
            mask = include_global.masks.get(key)
            total.add(as_float(current[key]), mask, include_global.weight, client=False)
    return finish(sums, current, min_count=min_count, fallback=fallback)


def _mean_in_pieces(
    mean: _Mean, key: str, readers: Sequence[Reader], current: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return the mean of one tensor, in the dtype of ``current``, and where it is covered."""
    old = current.contiguous().reshape(-1)
    new = torch.from_numpy(scratch([old.nbytes], np.uint8)).view(old.dtype)
    coverage: list[Tensor | None] = []
    share = mean.include_global
    present = share.masks.get(key) if share else None
    total: CoverageSum | None = None
    longest = min(RUN, old.numel())
    buffers = Buffer(8 * longest), Buffer(longest)
    for start in range(0, old.numel(), RUN):
        run = slice(start, min(start + RUN, old.numel()))
        shape = (run.stop - run.start,)
        total = total if total is not None and total.shape == shape else CoverageSum(shape)
        _sum_up(mean, total, readers, run, buffers)
        if share is not None:
            mask = None if present is None else present.reshape(-1)[run]
            total.add(as_float(old[run]), mask, share.weight, client=False)
        fallback = as_float(old[run]) if mean.fallback == "keep" else None
        found, covered = total.mean(fallback, mean.min_count)
        new[run] = found
        coverage.append(covered)
    return new.reshape(current.shape), _joined(coverage, current)


def _sum_up(
    mean: _Mean, total: CoverageSum, readers: Sequence[Reader], run: slice, buffers: Buffers
) -> None:
    """Set ``total`` to what all clients have of one piece.

    They are added unseen: NaN and infinity show in the sum. Only then is each one looked at.
    """
    for checked in (False, True):
        total.clear()
        for reader in readers:
            entries = reader.read(run.start, run.stop, buffers, checked=checked)
            mean.add(total, reader.client, *entries)
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


def finish(
    sums: Mapping[str, CoverageSum],
    current: Mapping[str, Tensor],
    *,
    min_count: int = 1,
    fallback: Fallback = "keep",
) -> Merged:
    """Return the means of ``sums``, cast to the dtypes of ``current``, and their coverage."""
    tensors: dict[str, Tensor] = {}
    covered: dict[str, Tensor | None] = {}
    for key, total in sums.items():
        old = current[key]
        mean, covered[key] = total.mean(as_float(old) if fallback == "keep" else None, min_count)
        tensors[key] = mean.to(old.dtype)
    return _merged(tensors, covered)


def _merged(tensors: dict[str, Tensor], covered: dict[str, Tensor | None]) -> Merged:
    """Return the result, and as a diagnostic the share of entries that are covered."""
    entries = sum(tensor.numel() for tensor in tensors.values())
    present = sum(
        tensors[key].numel() if mask is None else np.count_nonzero(mask.numpy())
        for key, mask in covered.items()
    )
    coverage = present / entries if entries else 1.0
    return Merged(tensors, {"coverage": coverage}, covered)


def as_float(tensor: Tensor) -> Tensor:
    """Return the tensor as float64 if it is float64, else as float32: both lose nothing."""
    return tensor if tensor.dtype in _BITS else tensor.float()


def _bytes(mask: Tensor) -> np.ndarray[Any, Any]:
    """Return a bool mask as 0 and 1 in uint8, without a copy."""
    return mask.contiguous().view(torch.uint8).numpy()
