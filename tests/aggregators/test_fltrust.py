"""FLTrust: what the clients send, held against an update of the server's own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prufed_plugins.aggregators.fltrust import FLTrust
from prufed_plugins.aggregators.streaming import Aggregated, aggregate
from prufed_plugins.api import GlobalState, Update
from prufed_plugins.errors import MethodError, UpdateError
from prufed_plugins.params import FLTrustParams
from prufed_plugins.testing.federation import random_state, random_update

MODULE = "model.layers.0.self_attn.q_proj"
A, B = f"{MODULE}.lora_A.weight", f"{MODULE}.lora_B.weight"

few = settings(max_examples=40, deadline=None)


def state_of(row: Sequence[float]) -> GlobalState:
    return GlobalState({A: torch.tensor([row]), B: torch.zeros(2, 1)}, 1, 1.0, 1)


def update_of(
    name: str, row: Sequence[float], mask: Sequence[bool] | None = None, weight: float = 1.0
) -> Update:
    masks = None if mask is None else {A: torch.tensor([list(mask)])}
    tensors = {A: torch.tensor([list(row)]), B: torch.zeros(2, 1)}
    return Update(name, tensors, masks, 1, 1, 1.0, (0,), weight=weight)


def merge(updates: Sequence[Update], state: GlobalState, root: Update) -> Aggregated:
    method = FLTrust(FLTrustParams())
    method.trust(root)
    return aggregate(method, updates, state)


def row(updates: Sequence[Update], state: GlobalState, root: Update) -> Tensor:
    return merge(updates, state, root).state.tensors[A][0]


def test_by_hand() -> None:
    """From g = (1, 1), Δ_0 = (2, 0). Δ_a = (1, 1) agrees by 1/√2, Δ_b = (6, 0) wholly."""
    state, root = state_of([1.0, 1.0]), update_of("root", [3.0, 1.0])
    found = merge([update_of("a", [2.0, 2.0]), update_of("b", [7.0, 1.0])], state, root)
    trust = 1 / math.sqrt(2)
    expected = [
        1 + (trust * math.sqrt(2) + 2) / (trust + 1),
        1 + trust * math.sqrt(2) / (trust + 1),
    ]
    torch.testing.assert_close(found.state.tensors[A][0], torch.tensor(expected))
    assert found.diagnostics[MODULE]["trust.a"] == pytest.approx(trust)
    assert found.diagnostics[MODULE]["trust.b"] == pytest.approx(1.0)


def test_a_scaled_copy_counts_as_what_it_copies() -> None:
    """The scaling attack of the paper: a thousand times an honest change is that change."""
    state, root = state_of([0.0, 0.0]), update_of("root", [1.0, 2.0])
    honest = [update_of(f"c{index}", [1.0, 2.0]) for index in range(2)]
    attack = update_of("x", [1000.0, 2000.0])
    torch.testing.assert_close(row([*honest, attack], state, root), torch.tensor([1.0, 2.0]))


def test_who_goes_the_other_way_does_not_count() -> None:
    state, root = state_of([0.0, 0.0]), update_of("root", [1.0, 0.0])
    updates = [update_of("good", [2.0, 0.0]), update_of("flipped", [-1.0, 5.0])]
    assert torch.equal(row(updates, state, root), torch.tensor([1.0, 0.0]))


def test_where_nobody_is_trusted_nothing_changes() -> None:
    state, root = state_of([0.5, 0.25]), update_of("root", [1.0, 1.0])
    away = [update_of("a", [0.0, 0.0]), update_of("still", [0.5, 0.25])]
    assert torch.equal(row(away, state, root), state.tensors[A][0])
    idle = update_of("root", [0.5, 0.25])
    assert torch.equal(row([update_of("a", [9.0, 9.0])], state, idle), state.tensors[A][0])


def test_a_masked_client_is_held_against_the_root_on_what_it_has() -> None:
    """It has the first entry alone, on which it agrees; the root's second one is no reproach."""
    state, root = state_of([0.0, 0.0]), update_of("root", [3.0, -4.0])
    part = update_of("part", [9.0, 0.0], [True, False])
    found = merge([part], state, root)
    assert torch.equal(found.state.tensors[A][0], torch.tensor([3.0, 0.0]))
    assert found.diagnostics[MODULE]["trust.part"] == 1.0
    hidden = replace(part, tensors={**part.tensors, A: torch.tensor([[9.0, float("nan")]])})
    assert torch.equal(row([hidden], state, root), torch.tensor([3.0, 0.0]))


def test_the_extra_weight_counts_beside_the_trust() -> None:
    state, root = state_of([0.0, 0.0]), update_of("root", [1.0, 1.0])
    updates = [update_of("a", [1.0, 0.0], weight=3.0), update_of("b", [0.0, 1.0])]
    expected = torch.tensor([0.75, 0.25]) * math.sqrt(2)
    torch.testing.assert_close(row(updates, state, root), expected)


@few
@given(st.integers(1, 5), st.integers(0, 99), st.sampled_from([None, 0.5]))
def test_the_step_is_no_longer_than_the_server_s(
    number: int, seed: int, density: float | None
) -> None:
    """Whatever is sent, entry by entry it is a mean of changes of at most the root's length."""
    state = random_state(seed=seed)
    root = random_update(state, "root", seed=seed + 1)
    updates = [
        random_update(state, f"c{index}", seed=seed + 2 + index, density=density)
        for index in range(number)
    ]
    new = merge(updates, state, root).state.tensors
    length = sum(float((root.tensors[n] - g).square().sum()) for n, g in state.tensors.items())
    moved = sum(float((new[n] - g).square().sum()) for n, g in state.tensors.items())
    clients = 1 if density is None else number
    assert moved <= clients * length * (1 + 1e-5)


def test_layers_and_ranks_may_differ() -> None:
    state = random_state(layers=2, rank=3, seed=1)
    root = random_update(state, "root", seed=2)
    narrow = replace(state, tensors=random_state(layers=2, rank=2, seed=3).tensors, rank=2)
    updates = [
        random_update(state, "whole", seed=2),
        random_update(narrow, "narrow", seed=4, kept_layers=(1,)),
    ]
    found = merge(updates, state, root)
    assert found.diagnostics[MODULE]["trust.whole"] == pytest.approx(1.0)
    for name in (A, B):  # which the narrow client does not have
        torch.testing.assert_close(found.state.tensors[name], root.tensors[name])


def test_without_an_update_of_the_server_s_it_does_not_merge() -> None:
    with pytest.raises(MethodError, match="no update of the server's own"):
        aggregate(FLTrust(FLTrustParams()), [update_of("a", [1.0, 1.0])], state_of([0.0, 0.0]))


def test_a_faulty_update_of_the_server_s_is_not_the_clients_fault() -> None:
    root = update_of("root", [float("nan"), 1.0])
    method = FLTrust(FLTrustParams())
    method.trust(root)
    with pytest.raises(UpdateError, match=r"client root: .* NaN"):
        aggregate(method, [update_of("a", [1.0, 1.0])], state_of([0.0, 0.0]), on_invalid="exclude")
