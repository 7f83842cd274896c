"""LoRA-FAIR: FedIT whose B is corrected towards the mean of the products; A stays the mean.

Bian et al., "LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization
Refinement", https://arxiv.org/abs/2411.14961. The paper descends on a similarity of the two
products; here it is the Frobenius distance, which has the minimum in closed form.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from prufed_plugins.aggregators.products import A, B, factors
from prufed_plugins.aggregators.refusals import refuse_depths
from prufed_plugins.aggregators.weights import client_weights
from prufed_plugins.api import GlobalState, Merged, Part, Update
from prufed_plugins.params import LoraFairParams


class LoraFair:
    """A' = Ā, B' = B̄ + argmin_D ‖Σ p_i B_i A_i - (B̄ + D) Ā‖² + λ ‖D‖².

    With R = Σ p_i B_i A_i - B̄ Ā, the minimum is D = R Āᵀ (Ā Āᵀ + λ I)⁻¹. Nothing of d x k is
    formed: R Āᵀ = Σ p_i B_i (A_i Āᵀ) - B̄ Ā Āᵀ. As λ grows, B' goes to FedIT's B̄.

    It weighs by samples, takes absent entries as zeros, and refuses clients of unequal rank or
    depth. The diagnostic ``residual`` is ‖(R - D Ā) Āᵀ‖ / ‖R Āᵀ‖: what the ridge leaves
    uncorrected of what Ā could correct.
    """

    breaks: ClassVar[Mapping[str, str]] = {
        "C1": "absent entries are averaged as zeros",
        "C4": "B is corrected towards the mean of the products",
        "C5": "an entry that no client has becomes zero, and is corrected",
        "C12": "the correction belongs to the whole matrix",
    }

    def __init__(self, params: LoraFairParams) -> None:
        self._params = params
        self._weights: dict[str, float] = {}

    def prepare(self, updates: Sequence[Update], state: GlobalState) -> None:
        """Take the weights.

        Raises:
            UpdateError: the clients do not all have the same layers.
        """
        refuse_depths(updates, "lora-fair")
        self._weights = client_weights(updates, self._params.beta)

    def merge(self, module: str, parts: Iterable[Part], current: Mapping[str, Tensor]) -> Merged:
        """Return the mean of A and the corrected B; the parts are read twice."""
        mean_a = torch.zeros(current[A].shape, dtype=torch.float64)
        mean_b = torch.zeros(current[B].shape, dtype=torch.float64)
        total = 0.0
        for part in parts:
            one, weight = factors(part), self._weights[part.client]
            mean_a += weight * one.right
            mean_b += weight * one.left
            total += weight
        mean_a, mean_b = mean_a / total, mean_b / total
        gram = mean_a @ mean_a.mT  # (r, r)
        target = torch.zeros_like(mean_b)  # Σ p_i B_i A_i Āᵀ
        for part in parts:
            one = factors(part)
            share = self._weights[part.client] / total
            target += share * one.left @ (one.right @ mean_a.mT)
        missing = target - mean_b @ gram  # R Āᵀ (d, r)
        ridge = self._params.ridge * torch.eye(len(gram), dtype=torch.float64)
        step = torch.linalg.lstsq(gram + ridge, missing.mT, driver="gelsd").solution.mT
        left = missing - step @ gram
        size = float(missing.norm())
        return Merged(
            {A: mean_a.to(current[A].dtype), B: (mean_b + step).to(current[B].dtype)},
            {"residual": float(left.norm()) / size if size else 0.0},
            {A: None, B: None},
        )
