"""What the driver refuses, what it leaves out, and that neither leaves a trace in the result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from prufed_plugins.aggregators.fedavg import FedAvg
from prufed_plugins.aggregators.heteagg import HeteAgg
from prufed_plugins.aggregators.streaming import aggregate
from prufed_plugins.api import GlobalState, Merged, Update
from prufed_plugins.errors import MethodError, UpdateError
from prufed_plugins.params import FedAvgParams, HeteAggParams
from prufed_plugins.tensor_files import TensorFile
from prufed_plugins.testing.federation import random_state, random_update

STATE = random_state(seed=1)
LAST = list(STATE.tensors)[-1]


def method() -> HeteAgg:
    return HeteAgg(HeteAggParams(include_global=False))


def clients(*names: str) -> list[Update]:
    return [random_update(STATE, name, seed=index, density=0.6) for index, name in enumerate(names)]


def spoiled(update: Update, name: str, value: float) -> Update:
    tensor = update.tensors[name].clone()
    masks = update.masks or {}
    tensor.view(-1)[masks[name].flatten().nonzero()[0]] = value
    return replace(update, tensors={**update.tensors, name: tensor})


def assert_same(one: GlobalState, other: GlobalState) -> None:
    assert list(one.tensors) == list(other.tensors)
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor, other.tensors[name])


def test_two_updates_of_one_client_are_always_refused() -> None:
    twice = clients("a", "b", "a")
    for on_invalid in ("raise", "exclude"):
        with pytest.raises(UpdateError, match="client a: sent two updates"):
            aggregate(method(), twice, STATE, on_invalid=on_invalid)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 0}, "samples is 0"),
        ({"weight": float("nan")}, "weight is nan"),
        ({"scaling": -2.0}, "scaling is -2.0"),
        ({"rank": 3}, "rank 3 is not the global rank 2"),
        ({"kept_layers": (0, 2)}, "kept layer 2 is not one of the 2 layers"),
        ({"kept_layers": (0, 0)}, r"kept layers \[0, 0\] repeat"),
        ({"tensors": {}}, "has no tensor lm_head.lora_A.weight and 5 more"),
        ({"kept_layers": (0,)}, r"sent an unknown tensor model.layers.1.*lora_A.weight and 1 more"),
    ],
)
def test_the_error_names_client_and_value(change: dict[str, Any], message: str) -> None:
    one, other = clients("a", "b")
    with pytest.raises(UpdateError, match=f"client b: {message}") as caught:
        aggregate(method(), [one, replace(other, **change)], STATE)
    assert caught.value.hint


def test_excluding_a_client_gives_what_the_others_give_alone() -> None:
    a, b, c, d, e = clients("a", "b", "c", "d", "e")
    bad = [
        a,
        spoiled(b, LAST, float("nan")),
        replace(c, samples=-1),
        d,
        replace(e, tensors={**e.tensors, LAST: e.tensors[LAST][:1]}),
    ]
    result = aggregate(method(), bad, STATE, on_invalid="exclude")
    assert list(result.excluded) == ["b", "c", "e"]
    assert "1 entries that are NaN or infinite" in result.excluded["b"]
    assert result.excluded["c"] == "samples is -1"
    assert "has shape" in result.excluded["e"]
    alone = aggregate(method(), [a, d], STATE)
    assert_same(result.state, alone.state)
    assert result.diagnostics == alone.diagnostics
    assert result.diagnostics["lm_head"]["clients"] == 2


def test_if_everyone_is_excluded_the_state_stays() -> None:
    bad = [spoiled(update, LAST, float("inf")) for update in clients("a", "b")]
    result = aggregate(method(), bad, STATE, on_invalid="exclude")
    assert set(result.excluded) == {"a", "b"}
    assert result.diagnostics == {}
    assert_same(result.state, STATE)


def test_finite_numbers_whose_sum_is_not_are_accepted() -> None:
    state = replace(STATE, tensors={n: torch.full_like(t, 3e38) for n, t in STATE.tensors.items()})
    updates = [
        replace(update, tensors=dict(state.tensors), masks=None) for update in clients("a", "b")
    ]
    assert_same(aggregate(method(), updates, state).state, state)


def test_a_method_may_refuse_a_client_and_it_is_left_out() -> None:
    a, b = clients("a", "b")
    shallow = random_update(STATE, "c", seed=5, density=0.6, kept_layers=(1,))
    fedavg = FedAvg(FedAvgParams())
    with pytest.raises(UpdateError, match="client c: has other layers than client a"):
        aggregate(fedavg, [a, b, shallow], STATE)
    result = aggregate(fedavg, [a, b, shallow], STATE, on_invalid="exclude")
    assert set(result.excluded) == {"c"}
    assert_same(result.state, aggregate(fedavg, [a, b], STATE).state)


class CountedReads(Mapping[str, Tensor]):
    """Tensors that note how often each is read."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self.reads = dict.fromkeys(tensors, 0)

    def __getitem__(self, name: str) -> Tensor:
        self.reads[name] += 1
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def test_every_tensor_and_every_mask_is_read_once() -> None:
    counted = []
    updates = []
    for update in clients("a", "b", "c"):
        tensors, masks = CountedReads(update.tensors), CountedReads(update.masks or {})
        counted += [tensors, masks]
        updates.append(replace(update, tensors=tensors, masks=masks))
    aggregate(method(), updates, STATE)
    assert all(set(mapping.reads.values()) == {1} for mapping in counted)


def test_after_any_number_of_faults_nothing_is_read_more_than_three_times() -> None:
    good = CountedReads(clients("a")[0].tensors)
    bad = [spoiled(update, LAST, float("nan")) for update in clients("b", "c", "d", "e")]
    updates = [replace(clients("a")[0], tensors=good), *bad]
    result = aggregate(method(), updates, STATE, on_invalid="exclude")
    assert len(result.excluded) == 4
    assert max(good.reads.values()) <= 3


def test_a_truncated_file_names_the_client(tmp_path: Path) -> None:
    a, b = clients("a", "b")
    path = tmp_path / "b.safetensors"
    save_file(dict(b.tensors), path)
    from_file = replace(b, tensors=TensorFile(path))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UpdateError, match=r"client b: cannot read .* from .*b\.safetensors"):
        aggregate(method(), [a, from_file], STATE)


class Careless:
    """A method whose result does not fit."""

    def __init__(self, change: Any) -> None:
        self._change = change

    def prepare(self, updates: object, state: object) -> None:
        pass

    def merge(self, module: str, parts: object, current: Mapping[str, Tensor]) -> Merged:
        return Merged(self._change(dict(current)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {"lora_A.weight": t["lora_A.weight"]}, "other tensors of .*: lora_B.weight"),
        (lambda t: {key: value.double() for key, value in t.items()}, "as torch.float64"),
        (lambda t: {key: value[:1] for key, value in t.items()}, "of shape"),
        (lambda t: {key: value / 0 for key, value in t.items()}, "NaN or infinity"),
    ],
)
def test_a_result_that_does_not_fit_is_the_methods_fault(change: Any, message: str) -> None:
    with pytest.raises(MethodError, match=f"Careless returned .*{message}") as caught:
        aggregate(Careless(change), clients("a"), STATE, on_invalid="exclude")
    assert not isinstance(caught.value, UpdateError)
