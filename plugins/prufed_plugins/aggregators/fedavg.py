"""FedAvg on adapters: the weighted mean of A and of B, entry by entry.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
https://arxiv.org/abs/1602.05629; on LoRA adapters it is FedIT, https://arxiv.org/abs/2305.05644.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from prufed_plugins.aggregators.coverage import coverage_mean
from prufed_plugins.aggregators.refusals import refuse_depths
from prufed_plugins.aggregators.weights import client_weights
from prufed_plugins.api import GlobalState, Merged, Part, Update
from prufed_plugins.params import FedAvgParams


class FedAvg:
    """g' = Σ w_i θ_i / Σ w_i with w_i = n_i^β; an entry that a client lacks counts as 0.

    On masked adapters entries therefore shrink with their coverage: that is the baseline which
    HeteAgg mends.
    """

    name: ClassVar[str] = "fedavg"
    breaks: ClassVar[Mapping[str, str]] = {
        "C1": "absent entries are averaged as zeros",
        "C5": "an entry that no client has becomes zero",
    }

    def __init__(self, params: FedAvgParams) -> None:
        self._params = params
        self._weights: dict[str, float] = {}

    def prepare(self, updates: Sequence[Update], state: GlobalState) -> None:
        """Take the weights.

        Raises:
            UpdateError: the clients do not all have the same layers.
        """
        refuse_depths(updates, self.name)
        self._weights = client_weights(updates, self._params.beta)

    def merge(self, module: str, parts: Iterable[Part], current: Mapping[str, Tensor]) -> Merged:
        """Return the weighted mean."""
        return coverage_mean(parts, current, self._weights, absent_as_zero=True)
