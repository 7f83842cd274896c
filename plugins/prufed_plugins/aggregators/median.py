"""The coordinate-wise median.

Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates",
https://arxiv.org/abs/1803.01498, Definition 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from prufed_plugins.aggregators.stacking import Stack, assemble, stack
from prufed_plugins.api import GlobalState, Merged, Part, Update
from prufed_plugins.params import MedianParams


class Median:
    """g'[e] = the median over the clients that have e; g[e] where none has it.

    Of an even number, the mean of the middle two: of two clients it is their mean, so an entry is
    only protected where at least three have it. Weights and samples do not count. Ranks, layers
    and masks may differ.
    """

    mixes_ranks = True
    breaks: ClassVar[Mapping[str, str]] = {"C4": "a median is not a mean"}

    def __init__(self, params: MedianParams) -> None:
        pass

    def prepare(self, updates: Sequence[Update], state: GlobalState) -> None:
        """Nothing to look at: any clients can be mixed."""

    def merge(self, module: str, parts: Iterable[Part], current: Mapping[str, Tensor]) -> Merged:
        """Return the medians."""
        _, stacks = stack(parts, current)
        return assemble({key: _median(one) for key, one in stacks.items()}, stacks, current)


def _median(stacked: Stack) -> Tensor:
    """Return the median over the clients that have each entry; undefined where none has."""
    ordered = stacked.values.where(stacked.present, torch.inf).sort(dim=0).values
    count = stacked.present.sum(dim=0, keepdim=True)
    low = ordered.gather(0, ((count - 1) // 2).clamp(min=0))
    high = ordered.gather(0, (count // 2).clamp(max=len(ordered) - 1))
    return (low / 2 + high / 2).squeeze(0)
