"""The contracts C1 to C14: the conformance kit on the built-in methods, and on broken ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from prufed_plugins.aggregators.fedavg import FedAvg
from prufed_plugins.aggregators.heteagg import HeteAgg
from prufed_plugins.aggregators.heteagg_layer import HeteAggLayer
from prufed_plugins.api import Aggregator, GlobalState, Merged, Part, Update
from prufed_plugins.params import FedAvgParams, HeteAggLayerParams, HeteAggParams
from prufed_plugins.testing import check_aggregator


def heteagg(**settings: Any) -> Callable[[], Aggregator]:
    return lambda: HeteAgg(HeteAggParams(**settings))


def by_layer(**settings: Any) -> Callable[[], Aggregator]:
    return lambda: HeteAggLayer(HeteAggLayerParams(**settings))


METHODS: dict[str, Callable[[], Aggregator]] = {
    "fedavg": lambda: FedAvg(FedAvgParams()),
    "fedavg uniform": lambda: FedAvg(FedAvgParams(beta=0)),
    "heteagg": heteagg(),
    "heteagg clients only": heteagg(include_global=False),
    "heteagg joined": heteagg(include_global=True, global_weight=0.5),
    "heteagg by samples": heteagg(beta=1, include_global=False),
    "heteagg zero": heteagg(fallback="zero", include_global=False),
    "heteagg of two": heteagg(min_count=2),
    "heteagg literal": heteagg(compat="lego-alg2"),
    "heteagg-layer": by_layer(),
    "heteagg-layer by samples": by_layer(beta=1),
    "heteagg-layer by depth": by_layer(group_weighting="group"),
}


@pytest.mark.parametrize("name", METHODS)
def test_built_in_methods_keep_the_contracts(name: str) -> None:
    check_aggregator(METHODS[name]).require()


@pytest.mark.parametrize(
    ("name", "given_up"),
    [
        ("fedavg", {"c1", "c5"}),
        ("heteagg", {"c7"}),
        ("heteagg clients only", set()),
        ("heteagg joined", {"c1", "c4", "c7"}),
        ("heteagg-layer", set()),
        ("heteagg-layer by depth", set()),
    ],
)
def test_a_contract_that_is_given_up_is_named_with_its_reason(
    name: str, given_up: set[str]
) -> None:
    checks = check_aggregator(METHODS[name]).checks
    excused = {check.name.split("_")[0] for check in checks if check.excuse}
    assert excused == given_up


class Spoiled:
    """HeteAgg with one mistake, as a stranger might make it."""

    def __init__(self) -> None:
        self._method = HeteAgg(HeteAggParams(include_global=False))

    def prepare(self, updates: Sequence[Update], state: GlobalState) -> None:
        self._method.prepare(updates, state)

    def merge(self, module: str, parts: Iterable[Part], current: Mapping[str, Tensor]) -> Merged:
        return self._method.merge(module, parts, current)


class ForgetsMasks(Spoiled):
    def merge(self, module: str, parts: Iterable[Part], current: Mapping[str, Tensor]) -> Merged:
        blind = (replace(part, masks=dict.fromkeys(part.tensors)) for part in parts)
        return super().merge(module, blind, current)


class DividesByWeights(Spoiled):
    def prepare(self, updates: Sequence[Update], state: GlobalState) -> None:
        super().prepare(updates, state)
        self._total = sum(update.weight for update in updates)

    def merge(self, module: str, parts: Iterable[Part], current: Mapping[str, Tensor]) -> Merged:
        merged = super().merge(module, parts, current)
        shrunk = {
            key: tensor * (len(current) / self._total) for key, tensor in merged.tensors.items()
        }
        return replace(merged, tensors=shrunk)


class SumsInHalf(Spoiled):
    def merge(self, module: str, parts: Iterable[Part], current: Mapping[str, Tensor]) -> Merged:
        total = {key: torch.zeros_like(tensor) for key, tensor in current.items()}
        count = 0
        for part in parts:
            count += 1
            for key in total:
                total[key] += part.tensors[key].to(total[key].dtype)
        return Merged({key: tensor / count for key, tensor in total.items()})


class WritesIntoTheState(Spoiled):
    def merge(self, module: str, parts: Iterable[Part], current: Mapping[str, Tensor]) -> Merged:
        merged = super().merge(module, parts, current)
        for key, tensor in current.items():
            tensor.copy_(merged.tensors[key])
        return merged


class KnowsLayersByPlace(Spoiled):
    def merge(self, module: str, parts: Iterable[Part], current: Mapping[str, Tensor]) -> Merged:
        merged = super().merge(module, parts, current)
        if ".1." not in module:
            return merged
        return replace(merged, tensors={key: tensor.clone() for key, tensor in current.items()})


@pytest.mark.parametrize(
    ("broken", "contracts"),
    [
        (ForgetsMasks, {"c1", "c5"}),
        (DividesByWeights, {"c3", "c4", "c14"}),
        (SumsInHalf, {"c1", "c5", "c9"}),
        (WritesIntoTheState, {"inputs"}),
        (KnowsLayersByPlace, {"c1", "c4", "c13"}),
    ],
)
def test_the_kit_catches_a_broken_method(broken: type[Spoiled], contracts: set[str]) -> None:
    outcome = check_aggregator(broken)
    failed = {check.name.split("_")[0] for check in outcome.checks if not check.passed}
    assert contracts <= failed
    with pytest.raises(AssertionError, match="contract broken"):
        outcome.require()
