"""Magnitude pruning: the smallest |weight| goes (Han et al., 1506.02626).

https://arxiv.org/abs/1506.02626
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import torch

from prufed_plugins.pruners.selection import pruned_count, smallest, smallest_of_groups
from prufed_plugins.pruners.sequential import (
    Choice,
    as_matrix,
    check_matrices,
    float_matrix,
    write,
)

if TYPE_CHECKING:
    from torch import Tensor

    from prufed_plugins.api import Decoder, Progress, PrunedMatrix, PruneTarget
    from prufed_plugins.params import MagnitudeParams

BINS = 1 << 16


class Magnitude:
    """Prune ⌊s·n⌋ entries of every matrix, row, or of all matrices together; or n of every m."""

    result: Literal["masked"] = "masked"
    needs_calibration = False

    def __init__(self, params: MagnitudeParams) -> None:
        self._group = params.group

    def prune(
        self,
        decoder: Decoder,
        calibration: Sequence[Tensor] | None,
        target: PruneTarget,
        progress: Progress,
    ) -> Iterator[PrunedMatrix]:
        """Yield the pruned matrices; see :meth:`prufed_plugins.api.Pruner.prune`."""
        check_matrices(decoder, target)
        select = self._selection(decoder, target)
        total = len(decoder.blocks)
        for index in range(decoder.start, total):
            for name, module in decoder.linears(index).items():
                started = time.perf_counter()
                choice = Choice(select(float_matrix(name, module).abs()))
                yield write(name, module, choice, decoder.dtype, time.perf_counter() - started)
            progress("block", index + 1, total)

    def _selection(self, decoder: Decoder, target: PruneTarget) -> Callable[[Tensor], Tensor]:
        pattern, sparsity = target.pattern, target.sparsity or 0.0
        if pattern is not None:
            return lambda scores: smallest_of_groups(scores, pattern)
        if self._group == "row":
            return lambda scores: smallest(scores, pruned_count(sparsity, scores.shape[1]))
        if self._group == "global":
            return GlobalThreshold(lambda: _magnitudes(decoder), sparsity)
        return lambda scores: smallest(
            scores.reshape(1, -1), pruned_count(sparsity, scores.numel())
        ).reshape(scores.shape)


class GlobalThreshold:
    """The ⌊s·n⌋ smallest of all matrices together, found without holding them together.

    The bits of a non-negative float order like the float, so two histograms of 16 bits each give
    the exact threshold. Entries at the threshold go in the order of the matrices and their index.
    """

    def __init__(self, scores: Callable[[], Iterator[Tensor]], sparsity: float) -> None:
        count = pruned_count(sparsity, sum(one.numel() for one in scores()))
        high = low = 0
        if count:
            high, count = _bin(scores, lambda bits: bits >> 16, count)
            low, count = _bin(scores, lambda bits: bits[bits >> 16 == high] & 0xFFFF, count)
        self._threshold = high << 16 | low
        self._ties = count

    def __call__(self, scores: Tensor) -> Tensor:
        """Mark what goes of the next matrix; called once for each, in their order."""
        bits = _bits(scores)
        tied = (bits == self._threshold).flatten()
        tied &= tied.cumsum(0) <= self._ties
        self._ties -= int(tied.sum())
        return (bits < self._threshold) | tied.reshape(scores.shape)


def _bin(
    scores: Callable[[], Iterator[Tensor]], key: Callable[[Tensor], Tensor], count: int
) -> tuple[int, int]:
    """Return the bin of the ``count``-th smallest key and its rank inside that bin."""
    histogram = sum(
        torch.bincount(key(_bits(one)).flatten(), minlength=BINS).cpu() for one in scores()
    )
    cumulative = torch.as_tensor(histogram).cumsum(0)
    found = int(torch.searchsorted(cumulative, count))
    return found, count - (int(cumulative[found - 1]) if found else 0)


def _bits(scores: Tensor) -> Tensor:
    return scores.contiguous().view(torch.int32)


def _magnitudes(decoder: Decoder) -> Iterator[Tensor]:
    for index in range(len(decoder.blocks)):
        for module in decoder.linears(index).values():
            yield as_matrix(module).float().abs()
