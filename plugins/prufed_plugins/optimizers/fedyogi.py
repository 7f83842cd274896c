"""FedYogi (Reddi et al. 2020, https://arxiv.org/abs/2003.00295, Algorithm 2)."""

from __future__ import annotations

from torch import Tensor

from prufed_plugins.optimizers.adaptive import AdaptiveOptimizer
from prufed_plugins.params import FedYogiParams


class FedYogi(AdaptiveOptimizer):
    """``v ← v − (1 − β₂) Δ² sign(v − Δ²)``: v follows Δ² by steps of Δ², never of v."""

    def __init__(self, params: FedYogiParams) -> None:
        super().__init__(**params.model_dump())

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        """Return v − (1 − β₂) Δ² sign(v − Δ²)."""
        return v - (1 - self._beta2) * square * (v - square).sign()
