"""FlexLoRA: the mean of the clients' products, cut to rank by its singular values.

Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client
Resources", https://arxiv.org/abs/2402.11505.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from prufed_plugins.aggregators.products import stacked, truncated
from prufed_plugins.aggregators.weights import client_weights
from prufed_plugins.api import GlobalState, Merged, Part, Update
from prufed_plugins.params import FlexLoraParams


class FlexLoRA:
    """B' A' = the best rank-r approximation of Σ p_i B_i A_i, p_i = w_i / Σ w_j over the module.

    With U Σ Vᵀ the singular value decomposition of that mean, B' = U Σ and A' = Vᵀ as in the
    paper, or with ``split: balanced`` the root of Σ in either. A client of rank r_i gets the
    first r_i ranks, the best approximation of its rank. Ranks, and layers, may differ.
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
        """Return the truncated mean of the products."""
        left, right = stacked(parts, self._weights)
        return truncated(left, right, current, self._params.split)


def product_breaks(params: FlexLoraParams) -> dict[str, str]:
    """Return what a method gives up that makes new factors from the mean of the products."""
    breaks = {
        "C1": "products of masked factors are averaged with their zeros",
        "C4": "the mean is taken of the products, not of the factors",
        "C5": "the factors are made anew from the product",
        "C7": "the product comes back, in other factors",
        "C12": "a singular value belongs to the whole matrix",
        "C14": "the product comes back, in other factors",
    }
    if params.split == "left":
        breaks["C9"] = "B holds the singular values, which may be too large for float16"
    return breaks
