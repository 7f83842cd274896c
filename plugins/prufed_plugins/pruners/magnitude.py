"""Magnitude pruning: the smallest |weight| goes (Han et al., 1506.02626).

https://arxiv.org/abs/1506.02626
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Literal

import torch

from prufed_plugins.errors import MethodError
from prufed_plugins.pruners.matrices import Choice, absent, float_matrix
from prufed_plugins.pruners.selection import (
    at_most_threshold,
    pruned_count,
    smallest,
    smallest_of_groups,
)
from prufed_plugins.pruners.sequential import ElementPruner

if TYPE_CHECKING:
    from torch import Tensor

    from prufed_plugins.api import Decoder, Progress, PruneTarget
    from prufed_plugins.params import MagnitudeParams, Threshold
    from prufed_plugins.pruners.collecting import Observed
    from prufed_plugins.pruners.hessian import InputNorms

BINS: Final = 1 << 16


class Magnitude(ElementPruner["InputNorms"]):
    """Prune ⌊s·n⌋ entries of every matrix, row, or of all matrices together; or n of every m.

    All matrices together: a survey of the dense model finds how many of the smallest lie in each.
    """

    looks_at_inputs = False

    def __init__(self, params: MagnitudeParams) -> None:
        super().__init__(params)
        self._group = params.group
        self._varies |= params.group == "global"

    def choose(
        self,
        weight: Tensor,
        observed: Observed[InputNorms] | None,
        target: PruneTarget,
        forced: Tensor | None,
    ) -> Choice:
        """Return what goes of one matrix; see :func:`choose`."""
        return Choice(choose(weight, target, self._group, self._params.threshold, forced))

    def check(self, decoder: Decoder, targets: Sequence[PruneTarget]) -> None:
        """Refuse what cannot be met; see :meth:`ElementPruner.check`.

        Raises:
            MethodError: as there, and a pattern for other groups than its own.
        """
        super().check(decoder, targets)
        if self._group != "layer" and any(target.pattern for target in targets):
            raise MethodError(
                f"group {self._group} is for a sparsity; a pattern has groups of its own",
                "leave group out, or pass --sparsity",
            )

    def _vary(
        self,
        decoder: Decoder,
        calibration: Sequence[Tensor] | None,
        names: frozenset[str],
        targets: Sequence[PruneTarget],
        progress: Progress,
    ) -> Sequence[PruneTarget]:
        if self._group != "global":
            return super()._vary(decoder, calibration, names, targets, progress)
        sizes = {
            name: rows * columns
            for index in range(len(decoder.blocks))
            for name, (rows, columns) in decoder.shapes(index).items()
            if name in names
        }
        counts = [pruned_count(one.sparsity or 0.0, sum(sizes.values())) for one in targets]
        shares = smallest_overall(lambda: _magnitudes(decoder, names, progress), counts)
        # half an entry more keeps the count through the division and the rounding down
        return [
            replace(
                target,
                per_matrix={
                    name: min((count + 0.5) / size, 1.0)
                    for count, (name, size) in zip(share, sizes.items(), strict=True)
                },
            )
            for target, share in zip(targets, shares, strict=True)
        ]


def choose(
    weight: Tensor,
    target: PruneTarget,
    group: Literal["layer", "row", "global"] = "layer",
    threshold: Threshold = "exact",
    forced: Tensor | None = None,
) -> Tensor:
    """Return what to prune of a float32 weight (rows, columns), bool of its shape.

    Entries that are ``forced`` (bool, likewise) go first and are counted.
    """
    scores = weight.abs()
    if forced is None:
        return _smallest(scores, target, group, threshold)
    chosen = _smallest(scores.masked_fill_(forced, -1.0), target, group, threshold)
    return chosen.logical_or_(forced)  # where there are more of them than the target asks for


def _smallest(
    scores: Tensor,
    target: PruneTarget,
    group: Literal["layer", "row", "global"],
    threshold: Threshold,
) -> Tensor:
    sparsity = target.sparsity or 0.0
    if target.pattern is not None:
        return smallest_of_groups(scores, target.pattern)
    if threshold == "reference":
        return at_most_threshold(scores, sparsity)
    if group == "row":
        return smallest(scores, pruned_count(sparsity, scores.shape[1]))
    count = pruned_count(sparsity, scores.numel())
    return smallest(scores.reshape(1, -1), count).reshape(scores.shape)


def smallest_overall(
    scores: Callable[[], Iterator[Tensor]], counts: Sequence[int]
) -> list[list[int]]:
    """Return how many of the smallest entries of all tensors together lie in each of them.

    The tensors are never held together. The bits of a non-negative float order like the float, so
    two histograms of 16 bits each give the exact threshold.

    Args:
        scores: starts an iteration over the tensors, float32 and non-negative; called three times.
        counts: how many entries to take; one answer for each.

    Returns:
        For each count, a number per tensor. Entries at the threshold are taken in the order of the
        tensors.
    """
    whole = _histogram(bits >> 16 for bits in map(_bits, scores()))
    highs = [_bin(whole, count) for count in counts]
    parts = {high: torch.zeros(BINS, dtype=torch.int64) for high, _ in highs}
    for bits in map(_bits, scores()):
        for high, part in parts.items():
            part += _histogram([bits[bits >> 16 == high] & 0xFFFF])
    lows = [_bin(parts[high], rank) for high, rank in highs]
    thresholds = [high << 16 | low for (high, _), (low, _) in zip(highs, lows, strict=True)]
    left = [rank for _, rank in lows]
    found: list[list[int]] = [[] for _ in counts]
    for bits in map(_bits, scores()):
        for position, threshold in enumerate(thresholds):
            ties = min(int((bits == threshold).sum()), left[position])
            left[position] -= ties
            found[position].append(int((bits < threshold).sum()) + ties)
    return found


def _histogram(keys: Iterable[Tensor]) -> Tensor:
    counts = torch.zeros(BINS, dtype=torch.int64)
    for one in keys:
        counts += torch.bincount(one.flatten(), minlength=BINS).cpu()
    return counts


def _bin(histogram: Tensor, count: int) -> tuple[int, int]:
    """Return the bin of the ``count``-th smallest key and its rank inside that bin."""
    cumulative = histogram.cumsum(0)
    found = int(torch.searchsorted(cumulative, count))
    return found, count - (int(cumulative[found - 1]) if found else 0)


def _bits(scores: Tensor) -> Tensor:
    return scores.contiguous().view(torch.int32)


def _magnitudes(decoder: Decoder, names: frozenset[str], progress: Progress) -> Iterator[Tensor]:
    """Yield |W| of what is pruned; entries that an earlier prune removed are below all others."""
    least = torch.finfo(torch.float32).smallest_normal
    total = len(decoder.blocks)
    for index in range(total):
        for name, module in decoder.linears(index).items():
            if name not in names:
                continue
            magnitudes = float_matrix(name, module).abs()
            if decoder.masks:
                magnitudes.clamp_(min=least)
            gone = absent(name, module, decoder.masks)
            yield magnitudes if gone is None else magnitudes.masked_fill_(gone, 0.0)
        progress("survey of block", index + 1, total)
