"""FedRolex on ranks: clients of lower rank train a window of ranks that rolls on with the rounds.

Alam et al., "FedRolex: Model-Heterogeneous Federated Learning with Rolling Sub-Model Extraction",
https://arxiv.org/abs/2212.01548. The paper rolls over the units of every layer; rolling over hidden
units would break a frozen base's residual stream, so here it rolls over the adapter's ranks. A
published implementation discards its aggregate; this is the paper's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from prufed_plugins.aggregators.coverage import coverage_mean
from prufed_plugins.aggregators.ranks import padded
from prufed_plugins.aggregators.weights import client_weights
from prufed_plugins.api import GlobalState, Merged, Part, Update
from prufed_plugins.params import FedRolexParams


class FedRolex:
    """Every rank is the mean over the clients whose window held it; a rank that none held stays.

    In round t, counted from 0, a client of rank r_i has the ranks t, t + 1, …, t + r_i - 1 modulo
    the global rank r, so that after r rounds it has trained every rank r_i times. One of the full
    rank has them all, in their order: rolled, its masks would wander over the global adapter.
    """

    mixes_ranks = True

    def __init__(self, params: FedRolexParams) -> None:
        self._params = params
        self._weights: dict[str, float] = {}
        self._windows: dict[str, Sequence[int]] = {}

    def window(self, round_index: int, rank: int, global_rank: int) -> Sequence[int]:
        """Return the global ranks that a client of ``rank`` has in a round, in its order."""
        first = round_index if rank < global_rank else 0
        return [(first + offset) % global_rank for offset in range(rank)]

    def prepare(self, updates: Sequence[Update], state: GlobalState) -> None:
        """Take the weights and the windows of the round."""
        self._weights = client_weights(updates, self._params.beta)
        self._windows = {
            update.client: self.window(update.base_round, update.rank, state.rank)
            for update in updates
        }

    def merge(self, module: str, parts: Iterable[Part], current: Mapping[str, Tensor]) -> Merged:
        """Return the mean over the clients whose window held each rank."""
        return coverage_mean(padded(parts, current, self._windows), current, self._weights)
