"""PruFed's HeteAgg: every decoder layer is the mean over the clients that have it.

Bhansali et al., "PruFed: Federated Fine-Tuning of Pruned LLMs"; InclusiveFL
(https://arxiv.org/abs/2202.08028) merges the shared layers of models of different depth alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from prufed_plugins.aggregators.coverage import coverage_mean, finish
from prufed_plugins.aggregators.coverage_sum import CoverageSum
from prufed_plugins.aggregators.weights import client_weights
from prufed_plugins.api import GlobalState, Merged, Part, Update
from prufed_plugins.params import HeteAggLayerParams


class HeteAggLayer:
    """g'[ℓ] = Σ w_i θ_i[ℓ] / Σ w_i over the clients that kept layer ℓ; g[ℓ] where none did.

    Modules outside the layers are shared by all. A client that also has explicit masks counts only
    where they are True. With ``group_weighting: group``, clients of equal depth are averaged first
    and the depths then count alike.
    """

    def __init__(self, params: HeteAggLayerParams) -> None:
        self._params = params
        self._weights: dict[str, float] = {}
        self._depths: dict[str, int] = {}

    def prepare(self, updates: Sequence[Update], state: GlobalState) -> None:
        """Take the weights and the depths."""
        self._weights = client_weights(updates, self._params.beta)
        self._depths = {update.client: len(update.kept_layers) for update in updates}

    def merge(self, module: str, parts: Iterable[Part], current: Mapping[str, Tensor]) -> Merged:
        """Return the mean over the clients, or over the depths, that have the module."""
        if self._params.group_weighting == "client":
            return coverage_mean(parts, current, self._weights)
        shapes = {key: tuple(tensor.shape) for key, tensor in current.items()}
        groups: dict[int, dict[str, CoverageSum]] = {}
        for part in parts:
            depth = self._depths[part.client]
            if depth not in groups:
                groups[depth] = {key: CoverageSum(shape) for key, shape in shapes.items()}
            for key, total in groups[depth].items():
                total.add(part.tensors[key], part.masks[key], self._weights[part.client])
        means = {key: CoverageSum(shape) for key, shape in shapes.items()}
        for depth in sorted(groups):
            for key, total in groups[depth].items():
                means[key].add(*total.mean(None))
        return finish(means, current)
