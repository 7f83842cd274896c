"""TIES: trim small changes, elect a sign for every entry, average the clients that agree.

Yadav et al., "TIES-Merging: Resolving Interference When Merging Models",
https://arxiv.org/abs/2306.01708, Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from prufed_plugins.aggregators.stacking import assemble, deltas, stack
from prufed_plugins.aggregators.weights import client_weights
from prufed_plugins.aggregators.whole import module_parts
from prufed_plugins.api import GlobalState, Merged, Part, Update
from prufed_plugins.params import TiesParams
from prufed_plugins.quickselect import kth_smallest


class Ties:
    """g' = g + λ · mean of the trimmed Δ_i whose sign is that of Σ w_i Δ_i.

    Each client keeps the ``density`` largest changes of the entries that it has, over the whole
    adapter. An entry that no client keeps stays. Signs of factors can be compared because the
    clients of a round start from the same A and B. Ranks, layers and masks may differ.
    """

    mixes_ranks = True
    breaks: ClassVar[Mapping[str, str]] = {
        "C1": "small changes are trimmed, and the clients that disagree are left out",
        "C4": "small changes are trimmed, and the clients that disagree are left out",
        "C7": "small changes are trimmed",
        "C12": "what is small is decided over the whole update",
    }

    def __init__(self, params: TiesParams) -> None:
        self._params = params
        self._updates: Sequence[Update] = ()
        self._thresholds: Callable[[], dict[str, float]] = dict

    def prepare(self, updates: Sequence[Update], state: GlobalState) -> None:
        """Note the updates; what is small is found out at the first merge."""
        self._updates = updates
        self._thresholds = cache(
            lambda: {u.client: threshold(u, state, self._params.density) for u in updates}
        )

    def merge(self, module: str, parts: Iterable[Part], current: Mapping[str, Tensor]) -> Merged:
        """Return the old tensors plus the elected means."""
        least = self._thresholds()
        clients, stacks = stack(parts, current)
        weights = client_weights(self._updates, 0.0)
        column = torch.tensor([weights[client] for client in clients], dtype=torch.float64)
        cut = torch.tensor([least[client] for client in clients], dtype=torch.float64)
        values = {}
        for key, one in stacks.items():
            changes = deltas(one, current[key])
            kept = one.present & (changes.abs() >= _like(cut, changes))
            step = elected_mean(changes, kept, column)
            values[key] = current[key].double() + self._params.scale * step
        return assemble(values, stacks, current)


def threshold(update: Update, state: GlobalState, density: float) -> float:
    """Return the least |Δ| among the ``density`` largest of the entries that a client has.

    Equal magnitudes are kept together. Memory is one adapter.
    """
    sizes = []
    for _, current, parts in module_parts([update], state):
        _, stacks = stack(parts, current)
        sizes += [
            deltas(one, current[key])[one.present].abs().numpy() for key, one in stacks.items()
        ]
    everything = np.concatenate(sizes) if sizes else np.zeros(0)
    # the margin lets 2/3 of 3 be 2, whatever the floating point says
    kept = max(1, int(density * everything.size + 1e-9))
    if kept >= everything.size:
        return 0.0
    return float(kth_smallest(everything, everything.size - kept + 1))


def elected_mean(changes: Tensor, kept: Tensor, weights: Tensor) -> Tensor:
    """Return the mean over the clients whose change has the elected sign; 0 where there is none.

    Args:
        changes: Δ_i, (n, ...) float64.
        kept: (n, ...) bool, the changes that survived.
        weights: w_i, (n,).

    The sign of an entry is that of Σ w_i Δ_i over what survived. Where they cancel, it is positive.
    """
    scale = _like(weights, changes)
    survivors = torch.where(kept, changes, 0.0)
    positive = (survivors * scale).sum(dim=0) >= 0
    agreeing = kept & torch.where(positive, survivors > 0, survivors < 0)
    total = torch.where(agreeing, survivors * scale, 0.0).sum(dim=0)
    share = torch.where(agreeing, scale.expand_as(changes), 0.0).sum(dim=0)
    return torch.where(share > 0, total / torch.where(share > 0, share, 1.0), 0.0)


def _like(vector: Tensor, tensor: Tensor) -> Tensor:
    """Return a vector (n,) as (n, 1, …), to go with a tensor (n, …)."""
    return vector.reshape(-1, *[1] * (tensor.dim() - 1))
