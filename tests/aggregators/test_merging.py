"""TIES and DARE: changes trimmed or dropped, signs elected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prufed_plugins.aggregators.streaming import aggregate
from prufed_plugins.aggregators.ties import elected_mean
from prufed_plugins.api import GlobalState, Update
from prufed_plugins.discover import build

MODULE = "model.layers.0.self_attn.q_proj"
A, B = f"{MODULE}.lora_A.weight", f"{MODULE}.lora_B.weight"

few = settings(max_examples=60, deadline=None)

CHANGES = [[0.9, -0.1, 0.4], [-0.8, 0.5, 0.3], [0.7, 0.6, -0.05]]


def state_of(values: Tensor) -> GlobalState:
    return GlobalState({A: values, B: torch.zeros(1, 1)}, 1, 1.0, 1)


def updates_of(state: GlobalState, changes: Sequence[Sequence[float]]) -> list[Update]:
    hidden = torch.zeros(1, 1, dtype=torch.bool)
    return [
        Update(
            f"c{index}",
            {A: state.tensors[A] + torch.tensor([change]), B: torch.zeros(1, 1)},
            {B: hidden},
            1,
            1,
            1.0,
            (0,),
        )
        for index, change in enumerate(changes)
    ]


def merged(method: str, state: GlobalState, updates: Sequence[Update], **values: Any) -> Tensor:
    return aggregate(build("aggregator", method, values), updates, state).state.tensors[A]


def test_ties_trims_elects_and_averages() -> None:
    """Two of three kept each: (.9, .4), (-.8, .5), (.7, .6); the -.8 is outvoted."""
    state = state_of(torch.zeros(1, 3))
    result = merged("ties", state, updates_of(state, CHANGES), density=2 / 3)
    torch.testing.assert_close(result, torch.tensor([[0.8, 0.55, 0.4]]))


def test_ties_moves_the_global_adapter_by_the_elected_change() -> None:
    state = state_of(torch.tensor([[5.0, -1.0, 2.0]]))
    updates = updates_of(state, CHANGES)
    for scale in (1.0, 0.5):
        result = merged("ties", state, updates, density=2 / 3, scale=scale)
        expected = state.tensors[A] + scale * torch.tensor([[0.8, 0.55, 0.4]])
        torch.testing.assert_close(result, expected)


def test_ties_counts_what_is_large_among_the_entries_that_a_client_has() -> None:
    state = state_of(torch.zeros(1, 4))
    (update,) = updates_of(state, [[3.0, 2.0, 9.0, 1.0]])
    masks = {**(update.masks or {}), A: torch.tensor([[True, True, False, True]])}
    result = merged("ties", state, [replace(update, masks=masks)], density=2 / 3)
    assert result.tolist() == [[3.0, 2.0, 0.0, 0.0]]


changes_of = st.lists(
    st.lists(st.floats(-9, 9, width=32), min_size=3, max_size=3), min_size=1, max_size=6
)


@few
@given(changes_of, st.randoms(use_true_random=False))
def test_the_elected_sign_is_that_of_the_sum_and_its_mean_lies_among_those_who_agree(
    rows: list[list[float]], random: Any
) -> None:
    changes = torch.tensor(rows, dtype=torch.float64)
    kept = torch.tensor([[random.random() < 0.7 for _ in row] for row in rows])
    result = elected_mean(changes, kept, torch.ones(len(rows), dtype=torch.float64))
    for place in range(3):
        there = [row[place] for row, keeps in zip(rows, kept[:, place], strict=True) if keeps]
        sign = 1 if sum(there) >= 0 else -1
        agreeing = [value for value in there if value * sign > 0]
        expected = sum(agreeing) / len(agreeing) if agreeing else 0.0
        assert float(result[place]) == pytest.approx(expected, abs=1e-9)


def test_dare_leaves_every_change_what_it_was_in_expectation() -> None:
    state = state_of(torch.full((1, 2000), 3.0))
    updates = updates_of(state, [[1.0] * 2000, [-2.0] * 2000])
    result = merged("dare", state, updates, drop=0.75) - 3.0
    # each is 0 or four times its change; the mean over both is any of four values
    assert set(result.unique().tolist()) == {-4.0, -2.0, 0.0, 2.0}
    assert result.mean().item() == pytest.approx(-0.5, abs=0.2)  # four standard errors
    outvoted = merged("dare", state, updates, drop=0.75, then="ties") - 3.0
    assert set(outvoted.unique().tolist()) == {-8.0, 0.0, 4.0}


def test_dare_draws_anew_for_each_round_and_seed_and_the_same_for_the_same() -> None:
    state = state_of(torch.zeros(1, 200))
    updates = updates_of(state, [[1.0] * 200])
    first = merged("dare", state, updates)
    assert torch.equal(first, merged("dare", state, updates))
    assert not torch.equal(first, merged("dare", state, updates, seed=1))
    later = [replace(update, base_round=1) for update in updates]
    assert not torch.equal(first, merged("dare", state, later))


def test_dare_that_drops_nothing_is_the_mean() -> None:
    state = state_of(torch.full((1, 3), 2.0))
    result = merged("dare", state, updates_of(state, CHANGES), drop=0)
    expected = 2.0 + torch.tensor(CHANGES).mean(dim=0, keepdim=True)
    torch.testing.assert_close(result, expected)
