"""HetLoRA: clients of unequal rank, padded with zeros and weighted by the norm of their update.

Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models",
https://arxiv.org/abs/2401.06432. Truncation is write-back's, self-pruning of ranks is the tuner's
(:mod:`prufed_plugins.tuners.hetlora`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial

from torch import Tensor

from prufed_plugins.aggregators.coverage import coverage_mean
from prufed_plugins.aggregators.norms import norm_weights
from prufed_plugins.aggregators.ranks import padded
from prufed_plugins.aggregators.weights import client_weights
from prufed_plugins.api import GlobalState, Merged, Part, Update
from prufed_plugins.params import HetLoraParams


class HetLoRA:
    """g' = Σ p_i pad(θ_i) with p_i ∝ ‖B_i A_i‖_F over the whole adapter.

    Padding with zeros dilutes the ranks that few clients have; ``normalize: coverage`` divides
    each rank by the weight of the clients that have it. A layer is averaged over the clients that
    have it. Clients that have all not moved from B = 0 have no norms, and weigh alike.
    """

    mixes_ranks = True

    def __init__(self, params: HetLoraParams) -> None:
        self._params = params
        self._weights: Callable[[], dict[str, float]] = dict
        self.breaks = _breaks(params)

    def prepare(self, updates: Sequence[Update], state: GlobalState) -> None:
        """Note the updates; their norms are taken at the first merge."""
        if self._params.weights == "samples":
            self._weights = partial(client_weights, updates, 1.0)
        else:
            self._weights = cache(partial(norm_weights, updates, state))

    def merge(self, module: str, parts: Iterable[Part], current: Mapping[str, Tensor]) -> Merged:
        """Return the weighted mean at the global rank."""
        return coverage_mean(
            padded(parts, current),
            current,
            self._weights(),
            absent_as_zero=self._params.normalize == "zeros",
        )


def _breaks(params: HetLoraParams) -> dict[str, str]:
    breaks: dict[str, str] = {}
    if params.weights == "norm":
        breaks |= {
            "C4": "clients weigh by the norm of their update",
            "C12": "the norm is that of the whole update",
        }
    if params.normalize == "zeros":
        breaks |= {
            "C1": "absent entries are averaged as zeros",
            "C5": "an entry that no client has becomes zero",
        }
    return breaks
