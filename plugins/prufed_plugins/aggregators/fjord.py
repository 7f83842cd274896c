"""FjORD on ranks: every rank is the mean, by samples, over the clients wide enough to have it.

Horváth et al., "FjORD: Fair and Accurate Federated Learning under heterogeneous targets with
Ordered Dropout", https://arxiv.org/abs/2102.13451. The paper drops units of every
layer; on a frozen base what can be ordered is the rank of the adapter. PreLort (2606.15963) takes
the same mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from prufed_plugins.aggregators.coverage import coverage_mean
from prufed_plugins.aggregators.ranks import padded
from prufed_plugins.aggregators.weights import client_weights
from prufed_plugins.api import GlobalState, Merged, Part, Update
from prufed_plugins.params import FjordParams


class Fjord:
    """g'[h] = Σ_{i: r_i ≥ h} w_i θ_i[h] / Σ_{i: r_i ≥ h} w_i for every rank h; g[h] if none has it.

    This is the server's half. The clients' half, dropping the last ranks at random in every step,
    is a tuner's: with the tuner ``lora`` each client trains all of its r_i ranks.
    """

    mixes_ranks = True

    def __init__(self, params: FjordParams) -> None:
        self._params = params
        self._weights: dict[str, float] = {}

    def prepare(self, updates: Sequence[Update], state: GlobalState) -> None:
        """Take the weights."""
        self._weights = client_weights(updates, self._params.beta)

    def merge(self, module: str, parts: Iterable[Part], current: Mapping[str, Tensor]) -> Merged:
        """Return the mean over the clients that have each rank."""
        return coverage_mean(padded(parts, current), current, self._weights)
