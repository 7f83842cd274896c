"""FedOpt, the adaptive server step that Adagrad, Yogi and Adam share.

Reddi et al., "Adaptive Federated Optimization", Algorithm 2, https://arxiv.org/abs/2003.00295::

    Δ = aggregate − g
    m ← β₁ m + (1 − β₁) Δ
    v ← second(v, Δ²)              v starts at τ²
    g ← g + η m / (√v + τ)

The paper corrects no bias. With ``bias_correction``, m and v start at 0 and are divided by 1 − β₁ᵗ
and 1 − β₂ᵗ as in Adam (1412.6980), with t the rounds in which the entry was covered.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor

from prufed_plugins.optimizers.moments import Moments, where_covered


class AdaptiveOptimizer(ABC):
    """A server optimizer with two moments; a subclass says how the second one grows."""

    def __init__(
        self,
        *,
        lr: float,
        beta1: float,
        beta2: float,
        tau: float,
        bias_correction: bool,
    ) -> None:
        self._lr, self._beta1, self._beta2, self._tau = lr, beta1, beta2, tau
        self._corrects = bias_correction
        self._moments = Moments()

    @abstractmethod
    def second(self, v: Tensor, square: Tensor) -> Tensor:
        """Return the new second moment from the old one and Δ², all float64."""

    def step(self, name: str, old: Tensor, aggregate: Tensor, covered: Tensor | None) -> Tensor:
        """Return the new global tensor; entries that are not covered keep value and moments."""
        delta = aggregate.double() - old.double()
        first = self._moments.get("m", name, old, 0.0)
        second = self._moments.get("v", name, old, 0.0 if self._corrects else self._tau**2)
        m = self._beta1 * first + (1 - self._beta1) * delta
        v = self.second(second, delta.square())
        self._moments.put("m", name, first, m, covered)
        self._moments.put("v", name, second, v, covered)
        if self._corrects:
            before = self._moments.get("t", name, old, 0.0)
            t = before + 1
            self._moments.put("t", name, before, t, covered)
            m, v = m / (1 - self._beta1**t), v / (1 - self._beta2**t)
        new = old.double() + self._lr * m / (v.sqrt() + self._tau)
        return where_covered(covered, new.to(old.dtype), old)

    def state(self) -> Mapping[str, Tensor]:
        """Return the moments by ``m/<name>`` and ``v/<name>``, and t where bias is corrected."""
        return self._moments.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what :meth:`state` returned."""
        self._moments.load(state)
