"""FedSpaLLM: merge what clients pruned on text of their own (Bai et al., NAACL 2025).

https://arxiv.org/abs/2410.14852

Every client prunes the same base on text that it keeps, and sends its sub-model. With M_i the mask
of client i, True where an entry exists, and W_i its weights, the merged matrix is the mean over
those who kept an entry (equation 5):

    W = Σ M_i·W_i / Σ M_i, and 0 where nobody kept it

Clients agree in part, so few entries are gone from all of them. Expansion (equations 6 and 7)
removes those that most clients removed until ⌈s·n⌉ of the matrix's n entries are gone. Who did not
prune a matrix has no say in it: layers may be dealt out among clients.

``values: base`` takes the base's own weights instead of the mean, so that masks are all that the
clients decide: FedPrLLM's comparison within a matrix (2505.13547).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

import torch

from prufed_plugins.entries import count, is_finite
from prufed_plugins.errors import MethodError
from prufed_plugins.pruners.matrices import Choice, apply, as_matrix, float_matrix, keep, oriented
from prufed_plugins.pruners.selection import (
    check_pattern,
    check_target,
    smallest,
    smallest_of_groups,
)
from prufed_plugins.pruners.sub_models import SubModel
from prufed_plugins.tensor_files import Entries
from prufed_plugins.threads import one_thread

if TYPE_CHECKING:
    from torch import Tensor, nn

    from prufed_plugins.api import Decoder, Progress, PrunedMatrix, PruneTarget
    from prufed_plugins.params import FedSpaLLMParams

PIECE: Final = 2**16
"""Entries of a matrix that are merged at once, so that the sums stay in the cache."""


class FedSpaLLM:
    """Merges the sub-models of clients, one matrix at a time.

    Without a target nothing is expanded: what goes is what every client removed.

    Attributes:
        result: ``masked``.
        needs_calibration: no; the clients calibrated.
        needs_target: no.
    """

    result: Literal["masked"] = "masked"
    needs_calibration = False
    needs_target = False

    def __init__(self, params: FedSpaLLMParams) -> None:
        self._values = params.values
        self._directories = params.clients

    def check(self, decoder: Decoder, targets: Sequence[PruneTarget]) -> None:
        """Refuse clients whose masks do not fit the model, and targets that cannot be met.

        Raises:
            MethodError: as said.
        """
        self._clients(decoder)
        for target in targets:
            _check_target(decoder, target)

    def statistic_bytes(self, columns: int) -> int:
        """Return 0: nothing is gathered of inputs."""
        return 0

    def prune(
        self,
        decoder: Decoder,
        calibration: Sequence[Tensor] | None,
        target: PruneTarget,
        progress: Progress,
    ) -> Iterator[PrunedMatrix]:
        """Yield the merged matrices in block order; see :meth:`prufed_plugins.api.Pruner.prune`.

        A matrix that no client pruned stays as it is, with ``uncovered`` in its report. Of the
        others the report says how many ``clients`` pruned it, and the ``unanimous`` share of its
        entries, on which all of them agree.

        Raises:
            MethodError: as :meth:`check`, or a client's weights are not what its mask says.
        """
        clients = self._clients(decoder)
        _check_target(decoder, target)
        total = len(decoder.blocks)
        for index in range(decoder.start, total):
            for name, module in decoder.linears(index).items():
                with one_thread():
                    result = self._merge(name, module, clients, decoder, target)
                yield result
            progress("block", index + 1, total)

    def _clients(self, decoder: Decoder) -> list[SubModel]:
        clients = [SubModel(directory) for directory in self._directories]
        for client in clients:
            client.check(decoder)
        return clients

    def _merge(
        self,
        name: str,
        module: nn.Module,
        clients: Sequence[SubModel],
        decoder: Decoder,
        target: PruneTarget,
    ) -> PrunedMatrix:
        started = time.perf_counter()
        parameter = f"{name}.weight"
        votes = _votes(parameter, clients, decoder)
        if not votes:
            return keep(name, module, decoder.masks, "uncovered")
        shape = module.get_parameter("weight").shape
        mean, kept = mean_of_kept(parameter, votes)
        values, kept = (oriented(module, each.reshape(shape)) for each in (mean, kept))
        if self._values == "base":
            values = float_matrix(name, module)
        device = as_matrix(module).device
        choice = Choice(
            removed_by(kept, values.cpu(), target).to(device),
            None if self._values == "base" else values.to(device),
        )
        unanimous = (kept.numel() - count((kept > 0) & (kept < len(votes)))) / kept.numel()
        report = {
            "clients": float(len(votes)),
            "unanimous": unanimous,
            "seconds": time.perf_counter() - started,
        }
        if target.pattern is not None and (rest := values.shape[1] % target.pattern[1]):
            report["partial_group"] = float(rest)
        return apply(name, module, choice, decoder.stored_dtype(parameter), report, in_place=True)


class Vote(NamedTuple):
    """One client's part in a matrix, to be read piece by piece.

    Attributes:
        client: whose it is, as errors call it.
        mask: bool, True where an entry exists.
        weight: floating-point, of the same shape.
    """

    client: str
    mask: Entries
    weight: Entries


def _votes(parameter: str, clients: Sequence[SubModel], decoder: Decoder) -> list[Vote]:
    """Return the votes of the clients that pruned a matrix.

    Whoever has all entries that the base has did not prune it.
    """
    before = decoder.masks.get(parameter)
    masks = ((client, client.mask(parameter)) for client in clients)
    return [
        Vote(str(client.directory), mask, client.weight(parameter))
        for client, mask in masks
        if mask is not None and _removes_any(mask, None if before is None else before.flatten())
    ]


def _removes_any(mask: Entries, before: Tensor | None) -> bool:
    """Return whether a mask lacks entries that there were before, bool (n,); None for all."""
    for part in _pieces(math.prod(mask.shape)):
        flags = mask.read(part.start, part.stop, None)
        if not bool(flags.all() if before is None else torch.equal(flags, before[part])):
            return True
    return False


def mean_of_kept(parameter: str, votes: Sequence[Vote]) -> tuple[Tensor, Tensor]:
    """Return the mean of each entry over the clients that kept it (equation 5), and their number.

    Args:
        parameter: the name of the matrix.
        votes: of n entries each, at least one.

    Returns:
        float32 (n,), 0 where nobody kept the entry, and int16 (n,).

    Raises:
        MethodError: a weight is not finite, or not 0 outside its mask.
    """
    entries = math.prod(votes[0].mask.shape)
    mean, kept = torch.empty(entries), torch.zeros(entries, dtype=torch.int16)
    for part in _pieces(entries):
        total = torch.zeros(part.stop - part.start, dtype=torch.float64)
        for vote in votes:
            flags = vote.mask.read(part.start, part.stop, None)
            values = vote.weight.read(part.start, part.stop, None)
            if not is_finite(values):
                raise _wrong(vote, f"{parameter} holds NaN or infinity")
            if count(values.bool() > flags):
                raise _wrong(vote, f"{parameter} is not 0 outside its mask")
            total += values
            kept[part] += flags
        mean[part] = total.div_(kept[part].clamp(min=1))
    return mean, kept


def removed_by(kept: Tensor, values: Tensor, target: PruneTarget) -> Tensor:
    """Return what goes: all that nobody kept, and then what most clients removed (equation 6, 7).

    Among entries that as many clients removed, the smallest of ``values`` go first, then the
    lowest index.

    Args:
        kept: int16 (rows, columns), how many clients kept each entry.
        values: float32 (rows, columns), what an entry will be if it stays.
        target: ⌈s·n⌉ of all entries go, or n of every m in a row, or, without either, nothing
            besides what nobody kept. More go where more were kept by nobody.
    """
    gone = kept == 0
    if target.pattern is not None:
        rows = max(PIECE // kept.shape[1], 1)
        parts = zip(torch.split(kept, rows), torch.split(values, rows), strict=True)
        for some, (votes, magnitudes) in zip(torch.split(gone, rows), parts, strict=True):
            # votes in the upper half, and in the lower the bits of a value, which order as it does
            keys = votes.long().bitwise_left_shift_(32)
            keys.bitwise_or_(magnitudes.abs().view(torch.int32))
            some.logical_or_(smallest_of_groups(keys, target.pattern))
        return gone
    if target.sparsity is None:
        return gone
    wanted = math.ceil(Fraction(repr(target.sparsity)) * kept.numel()) - count(gone)
    if wanted <= 0:
        return gone
    # all entries that fewer clients kept than the last ones that go, and some of the latter
    reached = _histogram(kept)[1:].cumsum(0)
    last = int(torch.searchsorted(reached, wanted)) + 1
    wanted -= int(reached[last - 2]) if last > 1 else 0
    scores = values.abs()
    torch.where(kept == last, scores, torch.tensor(torch.inf), out=scores)
    gone = kept < last
    return gone.logical_or_(smallest(scores.reshape(1, -1), wanted).reshape(gone.shape))


def _histogram(kept: Tensor) -> Tensor:
    """Return how many entries no client kept, one, two, and so on."""
    entries, most = kept.flatten(), int(kept.max())
    counts = torch.zeros(most + 1, dtype=torch.int64)
    for part in _pieces(len(entries)):
        counts += torch.bincount(entries[part], minlength=most + 1)
    return counts


def _check_target(decoder: Decoder, target: PruneTarget) -> None:
    if target.sparsity is None and target.pattern is None and target.layers is None:
        return
    check_target(target)
    if target.pattern is not None:
        for index in range(len(decoder.blocks)):
            for name, (_, columns) in decoder.shapes(index).items():
                check_pattern(name, columns, target.pattern)


def _pieces(entries: int) -> Iterator[slice]:
    for start in range(0, entries, PIECE):
        yield slice(start, min(start + PIECE, entries))


def _wrong(vote: Vote, what: str) -> MethodError:
    return MethodError(f"{vote.client}: {what}", "ask that client for its sub-model again")
