"""raFLoRA: FlexLoRA whose every rank is the mean over the clients that have it.

"raFLoRA", https://arxiv.org/abs/2602.13486: with one weight per client, ranks beyond the smallest
are diluted by clients that do not have them, round after round, until nothing is left of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from prufed_plugins.aggregators.flexlora import product_breaks
from prufed_plugins.aggregators.products import factors, truncated
from prufed_plugins.aggregators.weights import client_weights
from prufed_plugins.api import GlobalState, Merged, Part, Update
from prufed_plugins.params import FlexLoraParams


class RaFLoRA:
    """B' A' = SVD_r of Σ_h Σ_{i: r_i ≥ h} (w_i / Σ_{j: r_j ≥ h} w_j) B_i[:, h] A_i[h, :].

    With equal ranks it is FlexLoRA.
    """

    mixes_ranks = True
    new_factors = True

    def __init__(self, params: FlexLoraParams) -> None:
        self._params = params
        self._weights: dict[str, float] = {}
        self.breaks = product_breaks(params)

    def prepare(self, updates: Sequence[Update], state: GlobalState) -> None:
        """Take the weights."""
        self._weights = client_weights(updates, self._params.beta)

    def merge(self, module: str, parts: Iterable[Part], current: Mapping[str, Tensor]) -> Merged:
        """Return the truncated sum of the ranks' means."""
        clients = [factors(part) for part in parts]
        widest = max(len(client.right) for client in clients)
        totals = torch.zeros(widest, dtype=torch.float64)  # Σ w_j over the clients that have rank h
        for client in clients:
            totals[: len(client.right)] += self._weights[client.client]
        left = torch.cat([client.left for client in clients], dim=1)
        right = torch.cat(
            [
                client.right * (self._weights[client.client] / totals[: len(client.right), None])
                for client in clients
            ]
        )
        return truncated(left, right, current, self._params.split)
