"""The driver on good updates: common scale, absent layers, server optimizer, peak memory."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from prufed_plugins.aggregators.heteagg import HeteAgg
from prufed_plugins.aggregators.heteagg_layer import HeteAggLayer
from prufed_plugins.aggregators.streaming import aggregate
from prufed_plugins.names import layer_index
from prufed_plugins.params import HeteAggLayerParams, HeteAggParams
from prufed_plugins.testing.federation import random_state, random_update

MERGE = Path(__file__).parents[1] / "benchmarks" / "merge_files.py"


def method(min_count: int = 1) -> HeteAgg:
    return HeteAgg(HeteAggParams(include_global=False, min_count=min_count))


def test_clients_meet_in_the_common_scale() -> None:
    """The same update B A, written down with scalings 1, 4 and 1/4, counts as the same."""
    state = replace(random_state(seed=1), scaling=2.0)
    same = random_update(state, "a", seed=2)
    updates = []
    for scaling in (1.0, 4.0, 0.25):
        factor = (state.scaling / scaling) ** 0.5
        tensors = {name: tensor * factor for name, tensor in same.tensors.items()}
        updates.append(replace(same, client=f"c{scaling}", tensors=tensors, scaling=scaling))
    result = aggregate(method(), updates, state).state.tensors
    for name, tensor in same.tensors.items():
        torch.testing.assert_close(result[name], tensor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_global_dtype_is_kept_whatever_clients_send(dtype: torch.dtype) -> None:
    state = random_state(seed=1)
    updates = [random_update(state, name, seed=index) for index, name in enumerate("ab")]
    sent = [
        replace(update, tensors={n: t.to(dtype) for n, t in update.tensors.items()})
        for update in updates
    ]
    result = aggregate(method(), sent, state).state.tensors
    for name, tensor in result.items():
        mean = sum(update.tensors[name].double() for update in sent) / 2
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, mean.float())


def test_diagnostics_tell_clients_coverage_and_the_size_of_the_step() -> None:
    state = random_state(seed=1)
    deep = random_update(state, "a", seed=2)
    shallow = random_update(state, "b", seed=3, kept_layers=(1,), density=0.5)
    told = aggregate(method(), [deep, shallow], state).diagnostics
    first = "model.layers.0.self_attn.q_proj"
    assert told[first]["clients"] == 1
    assert told["model.layers.1.self_attn.q_proj"]["clients"] == 2
    change = sum(
        float((deep.tensors[name] - state.tensors[name]).square().sum())
        for name in state.tensors
        if name.startswith(first)
    )
    assert told[first]["update_norm"] == pytest.approx(change**0.5, rel=1e-6)
    alone = aggregate(method(), [shallow], state)
    masks = [mask for name, mask in (shallow.masks or {}).items() if "layers.1" in name]
    share = sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
    assert alone.diagnostics["model.layers.1.self_attn.q_proj"]["coverage"] == pytest.approx(share)
    assert first not in alone.diagnostics


class Tripled:
    """A server optimizer that steps three times as far, where it is told it may."""

    def __init__(self) -> None:
        self.steps: dict[str, Tensor | None] = {}

    def step(self, name: str, old: Tensor, aggregate: Tensor, covered: Tensor | None) -> Tensor:
        self.steps[name] = covered
        stepped = old + 3 * (aggregate - old)
        return stepped if covered is None else torch.where(covered, stepped, old)

    def state(self) -> Mapping[str, Tensor]:
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        pass


def test_the_optimizer_steps_once_per_tensor_and_sees_the_coverage() -> None:
    state = random_state(seed=1)
    updates = [
        random_update(state, "a", seed=2, density=0.3, kept_layers=(1,)),
        random_update(state, "b", seed=3, density=0.5, kept_layers=(1,)),
        replace(random_update(state, "c", seed=4, kept_layers=(1,)), samples=-1),
    ]
    optimizer = Tripled()
    plain = aggregate(method(2), updates[:2], state).state.tensors
    stepped = aggregate(method(2), updates, state, optimizer=optimizer, on_invalid="exclude")
    for name, old in state.tensors.items():
        if layer_index(name) == 0:
            assert name not in optimizer.steps
            assert torch.equal(stepped.state.tensors[name], old)
            continue
        both = updates[0].masks[name] & updates[1].masks[name]  # type: ignore[index]
        covered = optimizer.steps[name]
        assert covered is not None
        assert torch.equal(covered, both)
        expected = torch.where(both, old + 3 * (plain[name] - old), old)
        assert torch.equal(stepped.state.tensors[name], expected)


def test_coverage_is_taken_from_the_masks_when_a_method_does_not_tell_it() -> None:
    class Silent(HeteAggLayer):
        def merge(self, *args: object) -> object:  # type: ignore[override]
            return replace(super().merge(*args), covered={})  # type: ignore[arg-type]

    state = random_state(seed=1)
    updates = [
        random_update(state, "a", seed=2, density=0.3, kept_layers=(0, 1)),
        random_update(state, "b", seed=3, kept_layers=(1,)),
    ]
    optimizer = Tripled()
    aggregate(Silent(HeteAggLayerParams()), updates, state, optimizer=optimizer)  # type: ignore[arg-type]
    for name, covered in optimizer.steps.items():
        if layer_index(name) == 0:
            assert covered is not None
            assert torch.equal(covered, updates[0].masks[name])  # type: ignore[index]
        else:
            assert covered is None


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.3.self_attn.q_proj", 3),
        ("model.layers.31.self_attn.q_proj.lora_A.weight", 31),
        ("transformer.h.3.attn.c_attn", 3),
        ("model.decoder.layers.0.fc1", 0),
        ("model.layers.2.block_sparse_moe.experts.5.w1", 2),
        ("model.embed_tokens", None),
        ("lm_head", None),
        ("fc2.lora_B.weight", None),
    ],
)
def test_the_layer_of_a_module_is_its_first_number(name: str, layer: int | None) -> None:
    assert layer_index(name) == layer


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("density", [1.0, 0.5])
def test_peak_memory_does_not_grow_with_the_number_of_clients(
    tmp_path: Path, density: float
) -> None:
    adapter = 4 * 2**20
    runpy.run_path(str(MERGE))["write"](tmp_path, 32, 2, 4096, density)
    command = [sys.executable, str(MERGE), "merge", str(tmp_path), "4", "32"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    few, many = (json.loads(line) for line in output.splitlines())
    assert many["clients"] == 32
    assert many["peak"] - few["peak"] < adapter / 2
