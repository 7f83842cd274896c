"""Methods that average the factors and then mend what the mean of factors gets wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prufed_plugins.aggregators.streaming import Aggregated, aggregate
from prufed_plugins.api import GlobalState, Update
from prufed_plugins.discover import build

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
