"""FFA-LoRA, RoLoRA and FedProx: what each leaves alone, and what it adds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prufed_cli.models.adapters import AttachedAdapter
from prufed_plugins.api import TrainingData, TuneResult
from prufed_plugins.discover import build
from prufed_plugins.testing import check_tuner
from prufed_plugins.tuners.fedprox import add_pull

SETTINGS = {"batch_size": 10, "micro_batch_size": 10, "lr": 1e-2}


def tune(
    name: str, model: AttachedAdapter, data: TrainingData, round_index: int = 0, **settings: Any
) -> TuneResult:
    result: TuneResult = build("tuner", name, {**SETTINGS, **settings}).tune(
        model, data, 0, lambda step: None, round_index=round_index, pad_token_id=0
    )
    return result


def changed(before: dict[str, Tensor], result: TuneResult) -> set[str]:
    """Return the factors of which any tensor changed, and see that all of them did."""
    moved = {n: not torch.equal(before[n], tensor) for n, tensor in result.tensors.items()}
    by_factor = {f: {moved[n] for n in moved if f".lora_{f}." in n} for f in "AB"}
    assert all(len(found) == 1 for found in by_factor.values())
    return {factor for factor, found in by_factor.items() if found == {True}}


@pytest.mark.parametrize("name", ["ffa", "rolora", "fedprox"])
def test_they_keep_the_contract(name: str) -> None:
    settings = {"batch_size": 8, "weight_decay": 0.1}
    check_tuner(lambda: build("tuner", name, settings)).require()


def filled(model: AttachedAdapter) -> dict[str, Tensor]:
    """Make B something, so that A has a gradient; return the state."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    model.project()
    return model.state()


@pytest.mark.parametrize(
    ("name", "round_index", "expected"),
    [
        ("lora", 0, {"A", "B"}),
        ("fedprox", 0, {"A", "B"}),
        ("ffa", 0, {"B"}),
        ("ffa", 1, {"B"}),
        ("rolora", 0, {"B"}),
        ("rolora", 1, {"A"}),
        ("rolora", 2, {"B"}),
    ],
)
def test_only_the_factors_of_the_round_change(
    adapted: AttachedAdapter, data: TrainingData, name: str, round_index: int, expected: set[str]
) -> None:
    before = filled(adapted)
    # weight decay would shrink what is not trained, if it were given to the optimizer
    assert changed(before, tune(name, adapted, data, round_index, weight_decay=0.5)) == expected
    assert all(parameter.requires_grad for parameter in adapted.parameters.values())
    assert all(parameter.grad is None for parameter in adapted.parameters.values())


def test_ffa_learns(adapted: AttachedAdapter, data: TrainingData) -> None:
    losses = tune("ffa", adapted, data, epochs=6, lr=5e-2).losses
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_rolora_is_ffa_in_odd_rounds(adapted: AttachedAdapter, data: TrainingData) -> None:
    start = filled(adapted)
    first = tune("rolora", adapted, data).tensors
    with torch.no_grad():
        for name, parameter in adapted.parameters.items():
            parameter.copy_(start[name])
    second = tune("ffa", adapted, data).tensors
    assert all(torch.equal(first[name], second[name]) for name in first)


# --- FedProx -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("h", "c", "g", "mu"), [(1.0, 4.0, 0.0, 1.0), (0.5, -2.0, 3.0, 0.1)])
def test_a_quadratic_ends_between_its_optimum_and_the_global_value(
    h: float, c: float, g: float, mu: float
) -> None:
    # loss h/2 (x - c)^2 + mu/2 (x - g)^2 is least at (h c + mu g) / (h + mu)
    x = nn.Parameter(torch.tensor([g], dtype=torch.float64))
    start = {"x": x.detach().clone()}
    for _ in range(500):
        x.grad = h * (x.detach() - c)
        add_pull({"x": x}, start, mu)
        with torch.no_grad():
            x -= 0.1 * x.grad
    assert x.item() == pytest.approx((h * c + mu * g) / (h + mu), rel=1e-9)


def test_without_mu_it_is_lora_to_the_bit(adapted: AttachedAdapter, data: TrainingData) -> None:
    start = filled(adapted)
    plain = tune("lora", adapted, data).tensors
    with torch.no_grad():
        for name, parameter in adapted.parameters.items():
            parameter.copy_(start[name])
    pulled = tune("fedprox", adapted, data, mu=0.0).tensors
    assert all(torch.equal(plain[name], pulled[name]) for name in plain)


def test_a_stronger_pull_keeps_the_client_nearer(
    adapted: AttachedAdapter, data: TrainingData
) -> None:
    start = filled(adapted)
    distances = []
    for mu in (0.0, 1.0, 100.0):
        with torch.no_grad():
            for name, parameter in adapted.parameters.items():
                parameter.copy_(start[name])
        result = tune("fedprox", adapted, data, epochs=4, mu=mu).tensors
        distances.append(sum(float((result[n] - start[n]).square().sum()) for n in start) ** 0.5)
        for name, mask in adapted.masks.items():
            assert not result[name][~mask].any()
    assert distances == sorted(distances, reverse=True)
    assert distances[2] < 0.5 * distances[0]
