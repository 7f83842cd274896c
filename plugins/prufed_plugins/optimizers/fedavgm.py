"""FedAvgM: momentum on the server (Hsu et al. 2019, https://arxiv.org/abs/1909.06335)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from prufed_plugins.optimizers.moments import Moments, where_covered
from prufed_plugins.params import FedAvgMParams


class FedAvgM:
    """``m ← β m + Δ,  g ← g + η m`` with Δ = aggregate − g; β = 0 and η = 1 take the aggregate."""

    def __init__(self, params: FedAvgMParams) -> None:
        self._params = params
        self._moments = Moments()

    def step(self, name: str, old: Tensor, aggregate: Tensor, covered: Tensor | None) -> Tensor:
        """Return the new global tensor; entries that are not covered keep value and momentum."""
        before = self._moments.get("m", name, old, 0.0)
        m = self._params.momentum * before + (aggregate.double() - old.double())
        self._moments.put("m", name, before, m, covered)
        return where_covered(covered, (old.double() + self._params.lr * m).to(old.dtype), old)

    def state(self) -> Mapping[str, Tensor]:
        """Return m by ``m/<name>``."""
        return self._moments.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what :meth:`state` returned."""
        self._moments.load(state)
