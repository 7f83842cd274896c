"""Methods that average the factors and then mend what the mean of factors gets wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prufed_plugins.aggregators.streaming import Aggregated, aggregate
from prufed_plugins.api import GlobalState, Update
from prufed_plugins.discover import build
from prufed_plugins.errors import UpdateError

MODULE = "model.layers.0.self_attn.q_proj"
A, B = f"{MODULE}.lora_A.weight", f"{MODULE}.lora_B.weight"

few = settings(max_examples=40, deadline=None)


def state_of(rank: int, d: int, k: int) -> GlobalState:
    return GlobalState({A: torch.zeros(rank, k), B: torch.zeros(d, rank)}, rank, 1.0, 1)


def random_clients(number: int, rank: int, d: int, k: int, seed: int) -> list[Update]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Update(
            f"c{index}",
            {
                A: torch.randn(rank, k, generator=generator),
                B: torch.randn(d, rank, generator=generator),
            },
            None,
            index + 1,
            rank,
            1.0,
            (0,),
        )
        for index in range(number)
    ]


def outcome(
    method: str, updates: Sequence[Update], state: GlobalState, **values: Any
) -> Aggregated:
    return aggregate(build("aggregator", method, values), updates, state)


def means(updates: Sequence[Update]) -> tuple[Tensor, Tensor, Tensor]:
    """Return (Σ p B A, Σ p A, Σ p B) by samples, in float64."""
    total = sum(update.samples for update in updates)
    share = [update.samples / total for update in updates]
    left = [update.tensors[B].double() for update in updates]
    right = [update.tensors[A].double() for update in updates]
    product = sum((p * b @ a for p, a, b in zip(share, right, left, strict=True)), torch.zeros(()))
    mean_a = sum((p * a for p, a in zip(share, right, strict=True)), torch.zeros(()))
    mean_b = sum((p * b for p, b in zip(share, left, strict=True)), torch.zeros(()))
    return product, mean_a, mean_b


@few
@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 99), st.sampled_from([0.01, 1.0, 50.0]))
def test_lora_fair_solves_the_ridge_problem(
    number: int, rank: int, seed: int, ridge: float
) -> None:
    """At the minimum the gradient is zero, with d ≠ k so that nothing transposed would pass."""
    updates = random_clients(number, rank, 6, 5, seed)
    result = outcome("lora-fair", updates, state_of(rank, 6, 5), ridge=ridge).state.tensors
    product, mean_a, mean_b = means(updates)
    torch.testing.assert_close(result[A].double(), mean_a, rtol=1e-5, atol=1e-5)
    step = result[B].double() - mean_b
    gradient = (result[B].double() @ mean_a - product) @ mean_a.mT + ridge * step
    scale = float((product @ mean_a.mT).norm()) + 1.0
    # float32 results times a Gram matrix that can be large
    assert float(gradient.norm()) <= 1e-5 * scale * (1 + ridge + float(mean_a.norm()) ** 2)


def test_lora_fair_is_nearer_to_the_mean_product_than_fedit() -> None:
    updates = random_clients(4, 3, 8, 6, 2)
    product, _, _ = means(updates)
    errors = []
    for method, values in (("fedit", {}), ("lora-fair", {}), ("lora-fair", {"ridge": 0})):
        tensors = outcome(method, updates, state_of(3, 8, 6), **values).state.tensors
        errors.append(float((tensors[B].double() @ tensors[A].double() - product).norm()))
    assert errors[2] <= errors[1] + 1e-5 < errors[0]


@pytest.mark.parametrize("ridge", [0.0, 0.01])
def test_with_one_a_for_all_there_is_nothing_to_correct(ridge: float) -> None:
    updates = random_clients(3, 2, 5, 4, 1)
    shared = updates[0].tensors[A]
    alike = [
        Update(u.client, {A: shared, B: u.tensors[B]}, None, u.samples, 2, 1.0, (0,))
        for u in updates
    ]
    result = outcome("lora-fair", alike, state_of(2, 5, 4), ridge=ridge).state.tensors
    torch.testing.assert_close(result[B].double(), means(alike)[2], rtol=1e-5, atol=1e-5)


def test_a_strong_ridge_is_fedit() -> None:
    updates = random_clients(3, 2, 5, 4, 1)
    result = outcome("lora-fair", updates, state_of(2, 5, 4), ridge=1e9)
    torch.testing.assert_close(
        result.state.tensors[B].double(), means(updates)[2], rtol=1e-5, atol=1e-5
    )
    assert result.diagnostics[MODULE]["residual"] == pytest.approx(1.0, abs=1e-6)


def test_lora_fair_takes_untrained_clients() -> None:
    """Where B is zero for everybody there is no residual; where A is too, no inverse."""
    nothing = Update("c", {A: torch.zeros(2, 4), B: torch.zeros(5, 2)}, None, 1, 2, 1.0, (0,))
    result = outcome("lora-fair", [nothing], state_of(2, 5, 4), ridge=0)
    assert not result.state.tensors[B].any()
    assert result.diagnostics[MODULE]["residual"] == 0.0


# --- heteagg-ls ----------------------------------------------------------------------------------


def masked(updates: Sequence[Update], masks: Sequence[Tensor]) -> list[Update]:
    """Return the updates with masks M_i (d, k) on their products."""
    return [
        replace(update, base_masks={f"{MODULE}.weight": mask})
        for update, mask in zip(updates, masks, strict=True)
    ]


def random_masks(number: int, d: int, k: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(d, k, generator=generator) < 1 - index / 4 for index in range(number)]


def weighted_error(updates: Sequence[Update], left: Tensor, right: Tensor) -> float:
    """Return Σ p_i ‖M_i ⊙ (B A - B_i A_i)‖², with equal weights."""
    total = 0.0
    for update in updates:
        theirs = update.tensors[B].double() @ update.tensors[A].double()
        mask = (update.base_masks or {})[f"{MODULE}.weight"]
        total += float((mask * (left.double() @ right.double() - theirs)).square().sum())
    return total / len(updates)


@few
@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 99), st.sampled_from([0.05, 2.0]))
def test_least_squares_solves_every_row(number: int, rank: int, seed: int, ridge: float) -> None:
    """Against the systems of the rows, written out one by one with their diagonal matrices."""
    d, k = 6, 5
    updates = masked(random_clients(number, rank, d, k, seed), random_masks(number, d, k, seed))
    result = outcome("heteagg-ls", updates, state_of(rank, d, k), ridge=ridge).state.tensors
    mean_a = torch.stack([u.tensors[A].double() for u in updates]).mean(dim=0)
    mean_b = torch.stack([u.tensors[B].double() for u in updates]).mean(dim=0)
    penalty = ridge * float((mean_a @ mean_a.T).trace()) / rank
    for row in range(d):
        system = penalty * torch.eye(rank, dtype=torch.float64)
        right = penalty * mean_b[row]
        for update in updates:
            diagonal = torch.diag((update.base_masks or {})[f"{MODULE}.weight"][row].double())
            theirs = update.tensors[B][row].double() @ update.tensors[A].double()
            system += mean_a @ diagonal @ mean_a.T / number
            right = right + theirs @ diagonal @ mean_a.T / number
        expected = right @ torch.linalg.inv(system)
        torch.testing.assert_close(result[B][row].double(), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(result[A].double(), mean_a, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ridge", [1e-6, 0.05, 10.0])
def test_without_masks_and_with_one_a_for_all_b_is_the_mean(ridge: float) -> None:
    updates = random_clients(3, 2, 5, 4, 1)
    shared = updates[0].tensors[A]
    alike = [replace(u, tensors={A: shared, B: u.tensors[B]}, samples=1) for u in updates]
    result = outcome("heteagg-ls", alike, state_of(2, 5, 4), ridge=ridge).state.tensors
    torch.testing.assert_close(result[B].double(), means(alike)[2], rtol=1e-4, atol=1e-5)


def test_without_masks_it_is_lora_fair() -> None:
    updates = random_clients(4, 3, 8, 6, 3)
    gram = means(updates)[1].square().sum() / 3
    fair = outcome("lora-fair", updates, state_of(3, 8, 6), ridge=0.05 * float(gram)).state
    result = outcome("heteagg-ls", updates, state_of(3, 8, 6), beta=1, ridge=0.05).state
    for name in (A, B):
        torch.testing.assert_close(result.tensors[name], fair.tensors[name], rtol=1e-4, atol=1e-5)


def test_with_whole_rows_masked_and_one_a_for_all_b_is_the_mean_of_those_who_have_the_row() -> None:
    rows = torch.tensor(
        [[True, True, True, False], [True, True, False, False], [True, False, True, False]]
    )
    updates = random_clients(3, 2, 4, 5, 7)
    shared = updates[0].tensors[A]
    alike = [replace(u, tensors={A: shared, B: u.tensors[B]}) for u in updates]
    updates = masked(alike, [row[:, None].expand(4, 5).contiguous() for row in rows])
    result = outcome("heteagg-ls", updates, state_of(2, 4, 5), ridge=1e-9).state.tensors[B]
    left = torch.stack([update.tensors[B] for update in updates])
    for row in range(3):
        expected = left[rows[:, row], row].mean(dim=0)
        torch.testing.assert_close(result[row], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result[3], left[:, 3].mean(dim=0))  # no row at all: HeteAgg's B


def test_with_whole_rows_masked_and_one_a_for_all_heteagg_is_exact() -> None:
    """Σ M_i ⊙ (B_i A) / Σ M_i = B̄ A where M_i keeps whole rows and B_i has those rows alone."""
    rows = torch.tensor([[True, True, True], [True, True, False], [True, False, True]])
    updates = random_clients(3, 2, 3, 5, 7)
    shared = updates[0].tensors[A]
    masks = [row[:, None].expand(3, 2).contiguous() for row in rows]
    sent = [
        replace(u, tensors={A: shared, B: torch.where(mask, u.tensors[B], 0.0)}, masks={B: mask})
        for u, mask in zip(updates, masks, strict=True)
    ]
    result = outcome("heteagg", sent, state_of(2, 3, 5)).state.tensors
    products = torch.stack([u.tensors[B] @ shared for u in sent]).double()
    expected = products.sum(dim=0) / rows.sum(dim=0)[:, None]
    product = result[B].double() @ result[A].double()
    torch.testing.assert_close(product, expected, rtol=1e-5, atol=1e-6)


def test_a_client_that_sends_what_it_got_leaves_masks_without_effect() -> None:
    """What every client realises is matched exactly, so nothing moves."""
    (one,) = random_clients(1, 2, 6, 5, 0)
    state = GlobalState(dict(one.tensors), 2, 1.0, 1)
    copies = [replace(one, client=f"c{index}") for index in range(3)]
    result = outcome("heteagg-ls", masked(copies, random_masks(3, 6, 5, 1)), state)
    for name in (A, B):
        torch.testing.assert_close(result.state.tensors[name], one.tensors[name])


def test_least_squares_takes_away_part_of_what_heteagg_gets_wrong() -> None:
    """Four clients of 0, 25, 50 and 75 % sparsity by magnitude; excess over the best full rank."""
    d, k, rank = 64, 48, 8
    generator = torch.Generator().manual_seed(0)
    start = random_clients(1, rank, d, k, 5)[0].tensors
    weights = torch.randn(d, k, generator=generator).abs()
    updates = []
    for index in range(4):
        drift = {
            name: tensor + 0.5 * torch.randn(tensor.shape, generator=generator)
            for name, tensor in start.items()
        }
        updates.append(Update(f"c{index}", drift, None, 1, rank, 1.0, (0,)))
    cut = [weights.flatten().kthvalue(max(1, int(d * k * s))).values for s in (0, 0.25, 0.5, 0.75)]
    updates = masked(updates, [weights >= least for least in cut])
    total = torch.stack([(u.base_masks or {})[f"{MODULE}.weight"] for u in updates]).sum(dim=0)
    target = torch.zeros(d, k, dtype=torch.float64)
    for u in updates:
        mask = (u.base_masks or {})[f"{MODULE}.weight"]
        target += mask * (u.tensors[B].double() @ u.tensors[A].double())
    floor = weighted_error(updates, target / total.clamp(min=1), torch.eye(k))
    state = state_of(rank, d, k)
    excess = []
    for method, values in (
        ("heteagg", {"include_global": False}),
        ("heteagg-ls", {}),
        ("heteagg-ls", {"refine": "both"}),
    ):
        tensors = outcome(method, updates, state, **values).state.tensors
        excess.append(weighted_error(updates, tensors[B], tensors[A]) - floor)
    assert 0.7 < excess[1] / excess[0] < 0.8
    assert 0.5 < excess[2] / excess[0] < 0.6


def test_a_base_mask_that_does_not_fit_names_the_client() -> None:
    updates = random_clients(2, 2, 6, 5, 0)
    wrong = [updates[0], *masked(updates[1:], [torch.ones(5, 6, dtype=torch.bool)])]
    with pytest.raises(UpdateError, match=r"client c1: the base's mask .* shape \[5, 6\]"):
        outcome("heteagg-ls", wrong, state_of(2, 6, 5))
    left_out = aggregate(
        build("aggregator", "heteagg-ls", {}), wrong, state_of(2, 6, 5), on_invalid="exclude"
    )
    assert set(left_out.excluded) == {"c1"}
