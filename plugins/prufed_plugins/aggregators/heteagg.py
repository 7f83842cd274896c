"""LEGO's HeteAgg: every entry is the mean over the clients that have it.

Bhansali et al., "LEGO: Language Model Building Blocks", Algorithm 2,
https://arxiv.org/abs/2410.18287.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from prufed_plugins.aggregators.coverage import coverage_mean
from prufed_plugins.aggregators.coverage_sum import GlobalShare
from prufed_plugins.aggregators.pieces import Counts
from prufed_plugins.aggregators.weights import client_weights
from prufed_plugins.api import GlobalState, Merged, Part, Update
from prufed_plugins.params import HeteAggParams


class HeteAgg:
    """g'[e] = Σ w_i m_i[e] θ_i[e] / Σ w_i m_i[e]; the global adapter may join as one more client.

    With full masks and n equal clients, joining is a damped step (n = 1: half of it)::

        g' = g + n/(n+1) · mean(θ_i - g)
    """

    def __init__(self, params: HeteAggParams) -> None:
        self._params = params
        self._weights: dict[str, float] = {}
        self._counts = Counts()
        self._global_weight: float | None = None
        self.breaks = _breaks(params)

    def prepare(self, updates: Sequence[Update], state: GlobalState) -> None:
        """Take the weights; decide whether the global adapter joins.

        ``auto`` goes by the updates that are merged: those of clients left out do not count.
        """
        self._weights = client_weights(updates, self._params.beta)
        joins = self._params.include_global
        if joins == "auto":
            joins = len(updates) == 1
        # relative to the clients: rescaling all weights must change nothing
        mean = sum(self._weights.values()) / len(self._weights)
        self._global_weight = self._params.global_weight * mean if joins else None

    def merge(self, module: str, parts: Iterable[Part], current: Mapping[str, Tensor]) -> Merged:
        """Return the mean over the clients, and the global adapter, that have each entry."""
        literal = self._params.mask == "nonzero"
        lost: list[int] = []
        share = None
        if self._global_weight is not None:
            masks = {key: tensor != 0 for key, tensor in current.items()} if literal else {}
            share = GlobalShare(self._global_weight, masks)
        merged = coverage_mean(
            _nonzero(parts, lost) if literal else parts,
            current,
            self._weights,
            min_count=self._params.min_count,
            fallback=self._params.fallback,
            include_global=share,
            counts=self._counts,
        )
        if not literal:
            return merged
        return replace(
            merged, diagnostics={**merged.diagnostics, "zeros_taken_as_absent": float(sum(lost))}
        )


def _nonzero(parts: Iterable[Part], lost: list[int]) -> Iterator[Part]:
    """Take ``p ≠ 0`` for the mask, as Algorithm 2 does; note how many entries of B that loses.

    An entry of B that exists but is still 0, as all are before training, is taken as absent.
    """
    for part in parts:
        masks: dict[str, Tensor | None] = {}
        for key, tensor in part.tensors.items():
            mask = part.masks[key]
            present = torch.ones_like(tensor, dtype=torch.bool) if mask is None else mask
            masks[key] = present & (tensor != 0)
            if key == "lora_B.weight":
                lost.append(int((present & (tensor == 0)).sum()))
        yield replace(part, masks=masks)


def _breaks(params: HeteAggParams) -> dict[str, str]:
    """Return the contracts that these parameters give up, and why."""
    breaks = {}
    if params.include_global is not False:
        breaks["C7"] = "a single client is averaged with the global adapter"
    if params.include_global is True:
        for contract in ("C1", "C4"):
            breaks[contract] = "the global adapter is one of the averaged"
    if params.fallback == "zero" and params.include_global is not True:
        breaks["C5"] = "an entry that no client has becomes zero, as in Algorithm 2"
    if params.mask == "nonzero":
        breaks["C4"] = "zeros are taken as absent, as in Algorithm 2"
    if params.min_count > 1:
        for contract in ("C1", "C7"):
            breaks[contract] = f"an entry moves only if {params.min_count} clients have it"
    return breaks
