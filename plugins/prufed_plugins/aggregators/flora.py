"""FLoRA: the clients' factors stacked, so that the product is their exact mean.

Wang et al., "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank
Adaptations", https://arxiv.org/abs/2409.05976.

In the paper every client merges the stack into its base and starts a new adapter each round. A
prufed federation leaves its bases as they are, so the stack itself is the global adapter, for one
round.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from prufed_plugins.aggregators.products import A, B, stacked
from prufed_plugins.aggregators.weights import client_weights
from prufed_plugins.api import GlobalState, Merged, Part, Update
from prufed_plugins.errors import MethodError, UpdateError
from prufed_plugins.params import FloraParams


class FLoRA:
    """B' = [B_1 … B_n], A' = [p_1 A_1; … ; p_n A_n]: B' A' = Σ p_i B_i A_i exactly.

    The global rank must hold all of them, Σ r_i; ranks left over get zeros in B and keep their A.
    Ranks, and layers, may differ.
    """

    mixes_ranks = True
    new_factors = True
    stacks = True
    breaks: ClassVar[Mapping[str, str]] = {
        "C1": "products of masked factors are averaged with their zeros",
        "C4": "the mean is taken of the products, not of the factors",
        "C5": "every client's factors stand beside the others', zeros included",
        "C14": "the copies stand side by side",
    }

    def __init__(self, params: FloraParams) -> None:
        self._params = params
        self._weights: dict[str, float] = {}

    def prepare(self, updates: Sequence[Update], state: GlobalState) -> None:
        """Take the weights.

        Raises:
            UpdateError: a client started from a stack.
            MethodError: the stack does not fit the global rank.
        """
        for update in updates:
            if update.base_round > 0:
                raise UpdateError(
                    update.client,
                    f"trains in round {update.base_round + 1}, and flora stacks once: its clients "
                    "would merge the stack into their bases, which a federation never changes",
                    "set rounds to 1, or choose the aggregator flexlora",
                )
        ranks = sum(update.rank for update in updates)
        if ranks > state.rank:
            raise MethodError(
                f"the clients' ranks add up to {ranks}, more than the global rank {state.rank}",
                f"set adapter.r to {ranks} and each client's own r in its adapter",
            )
        self._weights = client_weights(updates, self._params.beta)

    def merge(self, module: str, parts: Iterable[Part], current: Mapping[str, Tensor]) -> Merged:
        """Return the stack."""
        left, right = stacked(parts, self._weights)
        ranks = len(right)
        new_a = current[A].double().clone()
        new_b = torch.zeros_like(current[B], dtype=torch.float64)
        new_a[:ranks], new_b[:, :ranks] = right, left
        tensors = {A: new_a.to(current[A].dtype), B: new_b.to(current[B].dtype)}
        return Merged(tensors, {"product_rank": float(ranks)}, {A: None, B: None})
