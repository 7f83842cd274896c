"""User-centric aggregation: who counts for whom, and the mean that each client gets."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prufed_plugins.aggregators.streaming import aggregate
from prufed_plugins.aggregators.user_centric import UserCentric
from prufed_plugins.api import FirstGradient, GlobalState, Update
from prufed_plugins.params import UserCentricParams
from prufed_plugins.testing import check_aggregator
from prufed_plugins.testing.federation import random_state, random_update
from prufed_plugins.write_back import with_own, write_back

MODULE = "model.layers.0.self_attn.q_proj"
A, B = f"{MODULE}.lora_A.weight", f"{MODULE}.lora_B.weight"

few = settings(max_examples=40, deadline=None)


def method(**values: Any) -> UserCentric:
    return UserCentric(UserCentricParams(**values))


def state_of(k: int) -> GlobalState:
    return GlobalState({A: torch.ones(1, k), B: torch.ones(2, 1)}, 1, 1.0, 1)


def gradient_of(
    name: str, row: Sequence[float], variance: float, mask: Sequence[bool] | None = None
) -> FirstGradient:
    masks = None if mask is None else {A: torch.tensor([list(mask)])}
    tensors = {A: torch.tensor([list(row)]), B: torch.zeros(2, 1)}
    return FirstGradient(Update(name, tensors, masks, 1, 1, 1.0, (0,)), variance)


def random_gradients(seed: int, number: int) -> tuple[GlobalState, list[FirstGradient]]:
    state = random_state(seed=seed)
    return state, [
        FirstGradient(random_update(state, f"c{i}", seed=seed + i, density=0.7), 1.0 + i)
        for i in range(number)
    ]


def test_by_hand() -> None:
    """Δ_ab = 9, σ_a σ_b = 2 · 1: exp(-9/4) beside 1. Nobody is near c."""
    gradients = [
        gradient_of("b", [3.0, 0.0], 1.0),
        gradient_of("a", [0.0, 0.0], 4.0),
        gradient_of("c", [0.0, 1000.0], 1.0),
    ]
    weights = method().similarities(gradients, state_of(2))
    near = math.exp(-9 / 4)
    assert list(weights) == ["a", "b", "c"]
    assert weights["a"] == pytest.approx({"a": 1 / (1 + near), "b": near / (1 + near), "c": 0.0})
    assert weights["b"] == pytest.approx({"a": near / (1 + near), "b": 1 / (1 + near), "c": 0.0})
    assert weights["c"] == {"a": 0.0, "b": 0.0, "c": 1.0}


@few
@given(st.integers(1, 5), st.integers(0, 99))
def test_rows_sum_to_one_and_nobody_counts_more_than_the_client_itself(
    number: int, seed: int
) -> None:
    state, gradients = random_gradients(seed, number)
    weights = method().similarities(gradients, state)
    assert len(weights) == number
    for client, row in weights.items():
        assert sum(row.values()) == pytest.approx(1.0)
        assert row[client] == max(row.values())


def test_clients_that_are_alike_share_alike() -> None:
    gradients = [gradient_of(name, [1.0, -2.0, 0.5], 0.3) for name in "abcd"]
    for row in method().similarities(gradients, state_of(3)).values():
        assert row == pytest.approx(dict.fromkeys("abcd", 0.25))


def test_without_noise_every_client_stands_alone() -> None:
    gradients = [gradient_of(name, [float(i), 0.0], 0.0) for i, name in enumerate("abc")]
    weights = method().similarities(gradients, state_of(2))
    assert weights == {one: {other: float(one == other) for other in "abc"} for one in "abc"}


def test_clients_of_one_stream_share_a_mean() -> None:
    """Two pairs that pull apart, each a little apart in itself: two streams, or one."""
    rows = [[0.0, 0.0], [0.5, 0.0], [9.0, 0.0], [9.5, 0.0]]
    gradients = [gradient_of(name, row, 1.0) for name, row in zip("abcd", rows, strict=True)]
    near = math.exp(-(0.5**2) / 2)
    alone = method().similarities(gradients, state_of(2))
    assert alone["a"] == pytest.approx(
        {"a": 1 / (1 + near), "b": near / (1 + near), "c": 0, "d": 0}
    )
    for streams in (2, "auto"):
        found = method(streams=streams).similarities(gradients, state_of(2))
        assert found["a"] == found["b"] == pytest.approx({"a": 0.5, "b": 0.5, "c": 0, "d": 0})
        assert found["c"] == found["d"] == pytest.approx({"a": 0, "b": 0, "c": 0.5, "d": 0.5})
    for row in method(streams=1).similarities(gradients, state_of(2)).values():
        assert row == pytest.approx(dict.fromkeys("abcd", 0.25))
    for streams in (4, 9):
        assert method(streams=streams).similarities(gradients, state_of(2)) == alone


@few
@given(st.integers(1, 6), st.integers(0, 99), st.sampled_from([1, 2, 3, 50, "auto"]))
def test_streams_are_at_most_as_many_as_asked_and_rows_still_sum_to_one(
    number: int, seed: int, streams: int | str
) -> None:
    state, gradients = random_gradients(seed, number)
    weights = method(streams=streams).similarities(gradients, state)
    assert all(sum(row.values()) == pytest.approx(1.0) for row in weights.values())
    different = {tuple(row.values()) for row in weights.values()}
    assert len(different) <= (number if streams == "auto" else min(int(streams), number))
    assert weights == method(streams=streams).similarities(gradients[::-1], state)


@pytest.mark.parametrize("alike", [1, 2, 5])
def test_streams_of_clients_that_are_all_alike_are_one(alike: int) -> None:
    gradients = [gradient_of(f"c{i}", [1.0, 2.0], 0.5) for i in range(alike)]
    for streams in (3, "auto"):
        for row in method(streams=streams).similarities(gradients, state_of(2)).values():
            assert row == pytest.approx({f"c{i}": 1 / alike for i in range(alike)})


def test_masked_clients_are_compared_on_what_they_share_at_one_scale() -> None:
    """Halving what is looked at halves Δ and σ² alike, so nothing changes."""
    pattern = [1.0, -1.0] * 8
    whole = [gradient_of("a", pattern, 2.0), gradient_of("b", [0.0] * 16, 2.0)]
    state = GlobalState({A: torch.ones(1, 16), B: torch.ones(2, 1)}, 1, 1.0, 1)
    expected = method().similarities(whole, state)["a"]["b"]
    half = [True] * 8 + [False] * 8
    share = 10 / 18  # of all entries, those of B included
    masked = [
        gradient_of("a", pattern, 2.0 * share, half),
        gradient_of("b", [0.0] * 16, 2.0 * share, half),
    ]
    found = method().similarities(masked, state)["a"]["b"]
    # Δ of 8 of 18 entries stands for 8 / 10 · 18, not 16: B is in the overlap and is alike
    exact = math.exp(-(8 * 18 / 10) / 4)
    assert found == pytest.approx(exact / (1 + exact))
    assert expected == pytest.approx(math.exp(-4) / (1 + math.exp(-4)))


def test_clients_without_entries_in_common_count_nothing_for_one_another() -> None:
    state = random_state(layers=2, seed=3)
    tensors = {n: t for n, t in state.tensors.items() if "lm_head" not in n}
    state = replace(state, tensors=tensors)
    gradients = [
        FirstGradient(random_update(state, f"c{layer}", seed=layer, kept_layers=(layer,)), 1e9)
        for layer in (0, 1)
    ]
    assert method().similarities(gradients, state)["c0"] == {"c0": 1.0, "c1": 0.0}


@few
@given(st.integers(1, 4), st.integers(0, 99), st.sampled_from([0.0, 1.0]))
def test_a_client_gets_the_mean_by_its_row(number: int, seed: int, beta: float) -> None:
    state, gradients = random_gradients(seed, number)
    updates = [
        replace(random_update(state, f"c{i}", seed=50 + seed + i), samples=i + 1)
        for i in range(number)
    ]
    rows = method().similarities(gradients, state)
    row = rows["c0"]
    found = aggregate(method(beta=beta).for_client(row), updates, state).state.tensors
    weights = torch.tensor([row[u.client] * u.samples**beta for u in updates]).double()
    for name in state.tensors:
        stacked = torch.stack([update.tensors[name].double() for update in updates], dim=-1)
        expected = (stacked * (weights / weights.sum())).sum(dim=-1)
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-5, atol=1e-6)


def test_what_no_similar_client_has_stays() -> None:
    state = random_state(seed=8)
    updates = [random_update(state, f"c{i}", seed=i, density=0.5) for i in range(3)]
    found = aggregate(method().for_client({"c0": 1.0, "c1": 0.0, "c2": 0.0}), updates, state)
    masks = updates[0].masks or {}
    for name, old in state.tensors.items():
        expected = torch.where(masks[name], updates[0].tensors[name], old)
        assert torch.equal(found.state.tensors[name], expected)
    nobody = aggregate(method().for_client(dict.fromkeys(["c0", "c1", "c2"], 0.0)), updates, state)
    assert all(torch.equal(nobody.state.tensors[n], t) for n, t in state.tensors.items())


def test_a_client_s_own_mean_keeps_every_contract() -> None:
    outcome = check_aggregator(lambda: method().for_client(defaultdict(lambda: 0.5)))
    outcome.require()
    assert not any(check.excuse for check in outcome.checks)


@pytest.mark.parametrize(("rank", "scaling"), [(3, 1.0), (2, 4.0)])
def test_taking_a_client_s_adapter_in_and_writing_it_back_changes_nothing(
    rank: int, scaling: float
) -> None:
    state = random_state(layers=2, rank=3, seed=5)
    kept = {"masks": None, "kept_layers": (1,), "scaling": scaling, "rank": rank}
    own = {n: t + 1.0 for n, t in write_back(state, **kept).items()}
    taken = with_own(state, own, scaling=scaling, rank=rank)
    for name, tensor in write_back(taken, **kept).items():
        torch.testing.assert_close(tensor, own[name])
    for name, tensor in state.tensors.items():
        if ".layers.0." in name:
            assert torch.equal(taken.tensors[name], tensor)
    if rank < 3:
        assert torch.equal(
            taken.tensors["lm_head.lora_A.weight"][2], state.tensors["lm_head.lora_A.weight"][2]
        )
