"""Clients of different depth, where the shallow ones learn from the next deeper."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prufed_plugins.aggregators.streaming import aggregate
from prufed_plugins.api import GlobalState, Update
from prufed_plugins.discover import build
from prufed_plugins.errors import UpdateError
from prufed_plugins.testing.federation import random_state, random_update

few = settings(max_examples=30, deadline=None)


def module_of(layer: int) -> str:
    return f"model.layers.{layer}.self_attn.q_proj"


def state_of(layers: int, value: float = 0.0) -> GlobalState:
    tensors = {}
    for layer in range(layers):
        tensors[f"{module_of(layer)}.lora_A.weight"] = torch.full((1, 2), value)
        tensors[f"{module_of(layer)}.lora_B.weight"] = torch.full((3, 1), value)
    return GlobalState(tensors, 1, 1.0, layers)


def changed(client: str, changes: list[float], *, start: float = 0.0, samples: int = 1) -> Update:
    """Return a client that has the first layers, each moved by one number."""
    tensors = {}
    for layer, change in enumerate(changes):
        tensors[f"{module_of(layer)}.lora_A.weight"] = torch.full((1, 2), start + change)
        tensors[f"{module_of(layer)}.lora_B.weight"] = torch.full((3, 1), start + change)
    return Update(client, tensors, None, samples, 1, 1.0, tuple(range(len(changes))))


def layers_of(updates: list[Update], state: GlobalState, **values: Any) -> list[float]:
    result = aggregate(build("aggregator", "inclusivefl", values), updates, state).state.tensors
    for layer in range(state.layers):
        a, b = (result[f"{module_of(layer)}.lora_{factor}.weight"] for factor in "AB")
        assert a.unique().tolist() == b.unique().tolist()
    return [
        result[f"{module_of(layer)}.lora_A.weight"][0, 0].item() for layer in range(state.layers)
    ]


@pytest.mark.parametrize("start", [0.0, 7.0])
def test_the_last_layer_learns_from_the_deeper_layers(start: float) -> None:
    """Deeper changes 1, 2, 3 and its own 10 make .2 · 2 + .8 · 10 = 8.4, averaged with the 1."""
    updates = [changed("deep", [1, 2, 3], start=start), changed("shallow", [10], start=start)]
    result = layers_of(updates, state_of(3, start))
    assert result == pytest.approx([start + (1 + 8.4) / 2, start + 2, start + 3], abs=1e-6)


def test_only_the_next_deeper_group_teaches_and_its_clients_weigh_by_samples() -> None:
    """Depths 1, 2 and 3; the two of depth 2 have changes 4 and 8, three samples to one."""
    updates = [
        changed("c", [0, 0, 90]),
        changed("b1", [4, 4], samples=3),
        changed("b2", [8, 8], samples=1),
        changed("a", [0]),
    ]
    first = 0.2 * 5  # what depth 2 did on average in layers 1 and 2
    second = [0.2 * 45 + 0.8 * 4, 0.2 * 45 + 0.8 * 8]  # depth 3 did 0 and 90 in layers 2 and 3
    expected = [
        (0 + 3 * 4 + 8 + first) / 6,
        (0 + 3 * second[0] + second[1]) / 5,
        90.0,
    ]
    assert layers_of(updates, state_of(3)) == pytest.approx(expected, abs=1e-5)


def test_without_momentum_it_is_the_mean_of_the_layers() -> None:
    updates = [changed("deep", [1, 2, 3], samples=3), changed("shallow", [10], samples=1)]
    assert layers_of(updates, state_of(3), momentum=0) == [3.25, 2.0, 3.0]


@few
@given(st.integers(0, 99), st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_equal_depths_and_modules_outside_the_layers_are_those_of_heteagg_layer(
    seed: int, depths: list[int]
) -> None:
    state = random_state(layers=3, seed=seed)
    updates = [
        random_update(
            state,
            f"c{index}",
            seed=seed + index,
            density=(None, 0.5)[index % 2],
            kept_layers=range(depth),
            samples=index + 1,
        )
        for index, depth in enumerate(depths)
    ]
    result, plain = (
        aggregate(build("aggregator", method, {"beta": 1}), updates, state).state.tensors
        for method in ("inclusivefl", "heteagg-layer")
    )
    lasts = {depth - 1 for depth in depths if depth < max(depths)}
    for name in state.tensors:
        if not any(f"layers.{last}." in name for last in lasts):
            assert torch.equal(result[name], plain[name])


def test_masked_entries_of_a_shallow_client_do_not_count() -> None:
    state = random_state(layers=2, seed=3)
    deep = random_update(state, "deep", seed=1)
    shallow = random_update(state, "shallow", seed=2, density=0.5, kept_layers=(0,))
    result = aggregate(build("aggregator", "inclusivefl", {}), [deep, shallow], state).state.tensors
    for name, mask in (shallow.masks or {}).items():
        torch.testing.assert_close(result[name][~mask], deep.tensors[name][~mask])


def test_other_layers_than_the_first_are_refused() -> None:
    state = random_state(layers=3)
    updates = [
        random_update(state, "deep", seed=0),
        random_update(state, "holes", seed=1, kept_layers=(0, 2)),
    ]
    with pytest.raises(UpdateError, match=r"client holes: has layers \[0, 2\]") as refusal:
        build("aggregator", "inclusivefl", {}).prepare(updates, state)
    assert "heteagg-layer" in (refusal.value.hint or "")
