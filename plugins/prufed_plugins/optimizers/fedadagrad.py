"""FedAdagrad (Reddi et al. 2020, https://arxiv.org/abs/2003.00295, Algorithm 2)."""

from __future__ import annotations

from torch import Tensor

from prufed_plugins.optimizers.adaptive import AdaptiveOptimizer
from prufed_plugins.params import FedAdagradParams


class FedAdagrad(AdaptiveOptimizer):
    """``v ← v + Δ²``; the paper runs it without momentum, β₁ = 0."""

    def __init__(self, params: FedAdagradParams) -> None:
        super().__init__(
            lr=params.lr, beta1=params.beta1, beta2=0.0, tau=params.tau, bias_correction=False
        )

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        """Return v + Δ²."""
        return v + square
