"""Krum: the one update that lies closest to the others.

Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent",
https://arxiv.org/abs/1703.02757.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from typing import ClassVar

import torch
from torch import Tensor

from prufed_plugins.aggregators.coverage import coverage_mean
from prufed_plugins.aggregators.distances import pairwise_distances
from prufed_plugins.aggregators.ranks import padded
from prufed_plugins.aggregators.weights import client_weights
from prufed_plugins.api import GlobalState, Merged, Part, Update
from prufed_plugins.errors import MethodError
from prufed_plugins.params import KrumParams


class Krum:
    """g' = θ_i of the client with the least Σ of its n - f - 2 smallest ‖Δ_i - Δ_j‖².

    A and B of all modules count as one vector. Clients with masks, layers or ranks of their own
    are compared on what they share. The chosen client's entries are taken; the others stay. In a
    federation of several sparsities the majority's is the likelier choice.

    The diagnostic ``chosen.<client>`` is 1 for the clients that are merged, else 0.
    """

    name: ClassVar[str] = "krum"
    mixes_ranks = True
    breaks: Mapping[str, str] = {
        "C1": "one client is taken, with the entries that it has",
        "C4": "one client is taken, not the mean",
        "C7": "it takes 2 f + 3 clients",
        "C12": "distances are those of the whole update",
    }

    def __init__(self, params: KrumParams) -> None:
        self._byzantine = params.byzantine
        self.least_clients = 2 * params.byzantine + 3
        self._updates: Sequence[Update] = ()
        self._chosen: Callable[[], frozenset[str]] = frozenset

    def prepare(self, updates: Sequence[Update], state: GlobalState) -> None:
        """Note the updates; the choice is made at the first merge.

        Raises:
            MethodError: there are fewer than 2 f + 3 clients.
        """
        if len(updates) < self.least_clients:
            raise MethodError(
                f"{self.name} against {self._byzantine} bad clients needs "
                f"{self.least_clients} clients, and the round has {len(updates)}",
                "sample more clients, or set byzantine lower",
            )
        self._updates = updates
        self._chosen = cache(partial(closest, updates, state, self._byzantine, self._number()))

    def merge(self, module: str, parts: Iterable[Part], current: Mapping[str, Tensor]) -> Merged:
        """Return the mean of the chosen clients that have the module."""
        chosen = self._chosen()
        full = (part for part in padded(parts, current) if part.client in chosen)
        merged = coverage_mean(full, current, client_weights(self._updates, 0.0))
        flags = {f"chosen.{u.client}": float(u.client in chosen) for u in self._updates}
        return Merged(merged.tensors, {**merged.diagnostics, **flags}, merged.covered)

    def _number(self) -> int:
        """Return how many clients to choose."""
        return 1


def closest(
    updates: Sequence[Update], state: GlobalState, byzantine: int, number: int
) -> frozenset[str]:
    """Return the names of the ``number`` clients of least score; equal ones by name.

    Raises:
        MethodError: too few clients overlap with n - f - 2 others.
    """
    neighbours = len(updates) - byzantine - 2
    distances = pairwise_distances(updates, state).sort(dim=1).values
    scores = distances[:, :neighbours].sum(dim=1)
    if int(scores.isfinite().sum()) < number:
        raise MethodError(
            f"fewer than {number} clients share 5 % of the entries with {neighbours} others",
            "choose clients of similar sparsity and depth, or the aggregator median",
        )
    order = torch.argsort(scores, stable=True)
    return frozenset(updates[index].client for index in order[:number].tolist())
