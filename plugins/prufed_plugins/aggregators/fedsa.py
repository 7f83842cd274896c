"""FedSA-LoRA: A is shared, B stays with each client.

Guo et al., "Selective Aggregation for Low-Rank Adaptation in Federated Learning",
https://arxiv.org/abs/2410.01463: A learns what clients have in common, B what is each one's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from prufed_plugins.aggregators.coverage import coverage_mean
from prufed_plugins.aggregators.products import B
from prufed_plugins.aggregators.ranks import padded
from prufed_plugins.aggregators.weights import client_weights
from prufed_plugins.api import GlobalState, Merged, Part, Update
from prufed_plugins.params import FedSaParams


class FedSA:
    """A' = Σ w_i A_i / Σ w_i over the clients that have the entry; every client keeps its B_i.

    Write-back gives clients A' alone, also those that did not train in the round; one that has
    never trained has the first B, zero. There is no global model in the paper: the global adapter's
    B is the mean of the round's B_i, for evaluation, or with ``global_b: keep`` stays as it was. No
    client is ever given it. Ranks, layers and masks may differ.
    """

    mixes_ranks = True
    personal = frozenset({"B"})

    def __init__(self, params: FedSaParams) -> None:
        self._params = params
        self._weights: dict[str, float] = {}
        self.breaks: dict[str, str] = {}
        if params.global_b == "keep":
            self.breaks = dict.fromkeys(("C1", "C4", "C7"), "B is never merged")

    def prepare(self, updates: Sequence[Update], state: GlobalState) -> None:
        """Take the weights."""
        self._weights = client_weights(updates, self._params.beta)

    def merge(self, module: str, parts: Iterable[Part], current: Mapping[str, Tensor]) -> Merged:
        """Return the mean of A, and of B where it is wanted."""
        merged = coverage_mean(padded(parts, current), current, self._weights)
        if self._params.global_b == "mean":
            return merged
        return replace(merged, tensors={**merged.tensors, B: current[B]})
