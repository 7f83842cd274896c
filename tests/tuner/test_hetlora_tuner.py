"""HetLoRA's self-pruning of ranks: the penalty on the last ones, and when they go."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from prufed_cli.models.adapters import AttachedAdapter
from prufed_plugins.api import TrainingData, TuneResult
from prufed_plugins.discover import build
from prufed_plugins.testing import check_tuner
from prufed_plugins.tuners.hetlora import add_tail_gradient, kept_ranks, tail_size

SETTINGS = {"batch_size": 10, "micro_batch_size": 10, "lr": 1e-2}


def tune(name: str, model: AttachedAdapter, data: TrainingData, **settings: Any) -> TuneResult:
    result: TuneResult = build("tuner", name, {**SETTINGS, **settings}).tune(
        model, data, 0, lambda step: None, round_index=0, pad_token_id=0
    )
    return result


def fill(model: AttachedAdapter) -> None:
    """Make A and B something, as after a round."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    model.project()


@pytest.mark.parametrize("settings", [{}, {"lam": 1.0, "gamma": 0.5}])
def test_it_keeps_the_contract(settings: dict[str, Any]) -> None:
    check_tuner(lambda: build("tuner", "hetlora", {"batch_size": 8, **settings})).require()


@given(rank=st.integers(2, 200), gamma=st.floats(0.01, 0.999))
def test_a_tail_is_never_empty_by_rounding(rank: int, gamma: float) -> None:
    """The published round(γ r) is r for γ = 0.99 and every r up to 50: nothing is ever pruned."""
    kept = kept_ranks(rank, gamma, 1)
    assert 1 <= kept < rank
    assert kept <= max(1, gamma * rank)
    if rank <= 50:
        assert round(0.99 * rank) == rank or rank == 50
        assert kept_ranks(rank, 0.99, 1) == rank - 1


@given(rank=st.integers(1, 64), least=st.integers(1, 64), gamma=st.floats(0.01, 0.999))
def test_no_rank_goes_below_the_least(rank: int, least: int, gamma: float) -> None:
    kept = kept_ranks(rank, gamma, least)
    assert kept >= min(rank, least)
    assert kept <= rank


def test_the_gradient_of_the_tail_is_that_of_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "m.lora_A.weight": torch.randn(4, 5, generator=generator, dtype=torch.float64),
        "m.lora_B.weight": torch.randn(3, 4, generator=generator, dtype=torch.float64),
        "n.lora_A.weight": torch.randn(4, 2, generator=generator, dtype=torch.float64),
        "n.lora_B.weight": torch.randn(6, 4, generator=generator, dtype=torch.float64),
    }
    parameters = {name: nn.Parameter(tensor.clone()) for name, tensor in tensors.items()}
    add_tail_gradient(parameters, 3, 0.7)
    again = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    sizes = [
        again[f"{m}.lora_A.weight"][3:].norm() * again[f"{m}.lora_B.weight"][:, 3:].norm()
        for m in "mn"
    ]
    size = torch.stack(sizes).sum()
    assert size.item() == pytest.approx(tail_size(tensors, 3))
    (0.7 * size).backward()  # type: ignore[no-untyped-call]
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, again[name].grad)  # type: ignore[arg-type]


def test_a_tail_of_zeros_has_a_gradient_without_nan() -> None:
    A, B = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.zeros(4, 2))
    add_tail_gradient({"m.lora_A.weight": A, "m.lora_B.weight": B}, 1, 1.0)
    for parameter in (A, B):
        assert parameter.grad is None or not bool(parameter.grad.isnan().any())


def test_without_a_weight_it_trains_as_lora_to_the_bit(
    adapted: AttachedAdapter, data: TrainingData
) -> None:
    fill(adapted)
    start = adapted.state()
    plain = tune("lora", adapted, data).tensors
    with torch.no_grad():
        for name, parameter in adapted.parameters.items():
            parameter.copy_(start[name])
    same = tune("hetlora", adapted, data, lam=0.0).tensors
    assert all(torch.equal(plain[name], same[name]) for name in plain)


def test_a_tail_that_shrinks_goes_and_one_that_grows_stays(
    adapted: AttachedAdapter, data: TrainingData
) -> None:
    """Four ranks, of which γ = 1/2 keeps two; a strong λ shrinks the others, B = 0 only grows."""
    fresh = tune("hetlora", adapted, data, gamma=0.5)
    assert fresh.rank is None
    assert math.isfinite(tail_size(fresh.tensors, 2))
    fill(adapted)
    before = tail_size(adapted.parameters, 2)
    shrunk = tune("hetlora", adapted, data, gamma=0.5, lam=10.0, epochs=2)
    assert tail_size(shrunk.tensors, 2) < before
    assert shrunk.rank == 2
    assert tune("hetlora", adapted, data, gamma=0.5, lam=10.0, r_min=3).rank == 3
    assert tune("hetlora", adapted, data, gamma=0.5, lam=10.0, r_min=4).rank is None
