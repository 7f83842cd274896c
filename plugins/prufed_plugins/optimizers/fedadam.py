"""FedAdam (Reddi et al. 2020, https://arxiv.org/abs/2003.00295, Algorithm 2)."""

from __future__ import annotations

from torch import Tensor

from prufed_plugins.optimizers.adaptive import AdaptiveOptimizer
from prufed_plugins.params import FedAdamParams


class FedAdam(AdaptiveOptimizer):
    """``v ← β₂ v + (1 − β₂) Δ²``."""

    def __init__(self, params: FedAdamParams) -> None:
        super().__init__(**params.model_dump())

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        """Return β₂ v + (1 − β₂) Δ²."""
        return self._beta2 * v + (1 - self._beta2) * square
