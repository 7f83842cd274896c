"""The coordinate-wise trimmed mean.

Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates",
https://arxiv.org/abs/1803.01498, Definition 2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from prufed_plugins.aggregators.stacking import Stack, assemble, stack
from prufed_plugins.api import GlobalState, Merged, Part, Update
from prufed_plugins.params import TrimmedMeanParams


class TrimmedMean:
    """g'[e] = the mean without the ⌊βN⌋ smallest and largest of the N clients that have e.

    With β N < 1, as of three clients at the default of 0.2, nothing is trimmed: the diagnostic
    ``untrimmed`` is the share of covered entries where that is so. Weights and samples do not
    count. Ranks, layers and masks may differ.
    """

    mixes_ranks = True
    breaks: ClassVar[Mapping[str, str]] = {"C4": "the extremes are left out of the mean"}

    def __init__(self, params: TrimmedMeanParams) -> None:
        self._params = params

    def prepare(self, updates: Sequence[Update], state: GlobalState) -> None:
        """Nothing to look at: any clients can be mixed."""

    def merge(self, module: str, parts: Iterable[Part], current: Mapping[str, Tensor]) -> Merged:
        """Return the trimmed means."""
        _, stacks = stack(parts, current)
        trimmed = {key: _counts(one, self._params.trim) for key, one in stacks.items()}
        values = {key: _mean(one, trimmed[key]) for key, one in stacks.items()}
        merged = assemble(values, stacks, current)
        covered = [stacks[key].present.any(dim=0) for key in stacks]
        whole = [trimmed[key] == 0 for key in stacks]
        untrimmed = sum(int((a & b).sum()) for a, b in zip(covered, whole, strict=True))
        entries = max(1, sum(int(mask.sum()) for mask in covered))
        return Merged(
            merged.tensors,
            {**merged.diagnostics, "untrimmed": untrimmed / entries},
            merged.covered,
        )


def _counts(stacked: Stack, trim: float) -> Tensor:
    """Return ⌊βN⌋ of every entry."""
    # the margin lets 0.2 of 5 be 1, which floating point makes 0.9999…
    return (stacked.present.sum(dim=0) * trim + 1e-9).floor().long()


def _mean(stacked: Stack, cut: Tensor) -> Tensor:
    """Return the mean without ``cut`` values at either end; undefined where no client has one."""
    ordered = stacked.values.where(stacked.present, torch.inf).sort(dim=0).values
    count = stacked.present.sum(dim=0)
    place = torch.arange(len(ordered)).reshape(-1, *[1] * cut.dim())
    inside = (place >= cut) & (place < count - cut)
    return ordered.where(inside, 0.0).sum(dim=0) / (count - 2 * cut).clamp(min=1)
