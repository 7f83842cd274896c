"""InclusiveFL: models of different depth, the shallow ones taught by the next deeper.

Liu et al., "No One Left Behind: Inclusive Federated Learning over Heterogeneous Devices",
https://arxiv.org/abs/2202.08028: layer-wise aggregation and momentum knowledge distillation. The
published code overwrites the momentum before it is used; this is the equation.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from prufed_plugins.aggregators.coverage import coverage_mean
from prufed_plugins.aggregators.coverage_sum import CoverageSum
from prufed_plugins.aggregators.validation import load_part
from prufed_plugins.aggregators.weights import client_weights
from prufed_plugins.api import GlobalState, Merged, Part, Update
from prufed_plugins.errors import UpdateError
from prufed_plugins.names import by_module, layer_index
from prufed_plugins.params import InclusiveFlParams


class InclusiveFL:
    """Every layer is the mean by samples over the clients that have it, the last ones distilled.

    A client of depth l, whose next deeper group has depth l', enters the mean of its last layer not
    with its own change Δ but with::

        β / (l' - l + 1) · Σ_{j = l}^{l'} Δ_j^{(l')} + (1 - β) Δ_l

    where Δ_j^{(l')} is the deeper group's mean change of layer j: what the deeper model does in
    l' - l + 1 layers, the shallow one must do in its last. Layers count from 1 here.

    The paper keeps a last layer for each depth apart. A federation has one global adapter, so here
    the distilled last layer joins the mean that all depths share. Every client's layers must be the
    first of the full model.
    """

    breaks: ClassVar[Mapping[str, str]] = {
        "C1": "a shallow client's last layer takes on the deeper layers of others",
        "C13": "which layer is a client's last is its number",
    }

    def __init__(self, params: InclusiveFlParams) -> None:
        self._params = params
        self._weights: dict[str, float] = {}
        self._deeper: dict[int, list[Update]] = {}
        self._depth: dict[str, int] = {}
        self._state: GlobalState  # from prepare on

    def prepare(self, updates: Sequence[Update], state: GlobalState) -> None:
        """Take the weights, and for each depth the clients of the next deeper one.

        Raises:
            UpdateError: a client's layers are not the first of the full model.
        """
        for update in updates:
            if sorted(update.kept_layers) != list(range(len(update.kept_layers))):
                raise UpdateError(
                    update.client,
                    f"has layers {list(update.kept_layers)}, and inclusivefl needs the first ones",
                    "prune with top, or choose the aggregator heteagg-layer",
                )
        self._state = state
        self._weights = client_weights(updates, self._params.beta)
        self._depth = {update.client: len(update.kept_layers) for update in updates}
        depths = sorted(set(self._depth.values()))
        self._deeper = {
            depth: [update for update in updates if len(update.kept_layers) == deeper]
            for depth, deeper in itertools.pairwise(depths)
        }

    def merge(self, module: str, parts: Iterable[Part], current: Mapping[str, Tensor]) -> Merged:
        """Return the mean of the layer."""
        layer = layer_index(module)
        deeper = self._deeper.get(layer + 1, []) if layer is not None else []
        if layer is None or not deeper or self._params.momentum == 0:
            return coverage_mean(parts, current, self._weights)
        taught = self._teaching(module, layer, deeper)
        return coverage_mean(self._distilled(parts, layer, current, taught), current, self._weights)

    def _distilled(
        self,
        parts: Iterable[Part],
        layer: int,
        current: Mapping[str, Tensor],
        taught: Mapping[str, tuple[Tensor, Tensor]],
    ) -> Iterator[Part]:
        """Yield the parts; those of clients whose last layer this is, with the distilled change."""
        momentum = self._params.momentum
        for part in parts:
            if self._depth[part.client] != layer + 1:
                yield part
                continue
            tensors = {}
            for key, tensor in part.tensors.items():
                change, known = taught[key]
                old, own = current[key].double(), tensor.double()
                mixed = old + momentum * change + (1 - momentum) * (own - old)
                tensors[key] = torch.where(known, mixed, own)
            yield replace(part, tensors=tensors)

    def _teaching(
        self, module: str, layer: int, deeper: Sequence[Update]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the mean change of the deeper group's layers from ``layer`` on, by key.

        Each comes with a bool tensor, True where any of them has the entry.
        """
        modules = by_module(self._state.tensors)
        sums: dict[str, CoverageSum] = {}
        for index in range(layer, len(deeper[0].kept_layers)):
            sibling = module.replace(f".{layer}.", f".{index}.", 1)
            if sibling not in modules:
                continue
            names = modules[sibling]
            current = {key: self._state.tensors[name] for key, name in names.items()}
            parts = (load_part(update, names, self._state) for update in deeper)
            mean = coverage_mean(parts, current, self._weights)
            for key, tensor in mean.tensors.items():
                total = sums.setdefault(key, CoverageSum(tuple(tensor.shape)))
                total.add(tensor.double() - current[key].double(), mean.covered[key])
        changes = {}
        for key, total in sums.items():
            change, known = total.mean(None)
            everywhere = torch.ones(total.shape, dtype=torch.bool)
            changes[key] = (change, everywhere if known is None else known)
        return changes
