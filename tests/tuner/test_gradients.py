"""The gradient of an adapter on a client's rows, against autograd on the whole of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from prufed_plugins.api import AdaptedModel, TrainingData
from prufed_plugins.errors import MethodError
from prufed_plugins.tuners.gradients import mean_gradient
from prufed_plugins.tuners.training import collate, summed_loss


def rows_of(number: int, length: int = 6) -> TrainingData:
    """Rows of equal length, so that a mini-batch's mean loss is that of its rows."""
    draw = torch.randint(2, 48, (number, length), generator=torch.Generator().manual_seed(3))
    ids = [row.tolist() for row in draw]
    return TrainingData(ids, ids)


def gradient(model: AdaptedModel, data: TrainingData, rows: list[int]) -> dict[str, Tensor]:
    loss, tokens = summed_loss(model.module, *collate(data, rows, 0))
    found = torch.autograd.grad(loss / tokens, list(model.parameters.values()))
    return {
        name: one.masked_fill(~model.masks[name], 0) if name in model.masks else one
        for name, one in zip(model.parameters, found, strict=True)
    }


def take(model: AdaptedModel, data: TrainingData, **values: Any) -> tuple[dict[str, Tensor], float]:
    options = {"batch_size": 2, "batches": None, "seed": 1, "pad_token_id": 0, **values}
    return mean_gradient(model, data, **options)


def test_the_mean_is_the_gradient_of_all_rows_and_the_variance_that_of_the_batches(
    adapted: AdaptedModel,
) -> None:
    data = rows_of(6)
    mean, variance = take(adapted, data)
    for name, whole in gradient(adapted, data, list(range(6))).items():
        torch.testing.assert_close(mean[name], whole, rtol=1e-4, atol=1e-7)
    alone, spread = take(adapted, data, batch_size=1)
    each = [gradient(adapted, data, [row]) for row in range(6)]
    expected = sum(
        float((one[name] - alone[name]).double().square().sum()) for one in each for name in one
    )
    assert spread == pytest.approx(expected / 6, rel=1e-4)
    assert 0 < variance < spread
    for name, mask in adapted.masks.items():
        assert not mean[name][~mask].any()


def test_it_leaves_the_model_as_it_was(adapted: AdaptedModel) -> None:
    before = adapted.state()
    take(adapted, rows_of(4))
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapted.state().items())
    assert all(parameter.grad is None for parameter in adapted.parameters.values())
    assert not adapted.module.training


def test_fewer_batches_look_at_fewer_rows(adapted: AdaptedModel) -> None:
    data = rows_of(8)
    some, _ = take(adapted, data, batches=2)
    again, _ = take(adapted, data, batches=2)
    every, _ = take(adapted, data, batches=99)
    assert all(torch.equal(some[name], again[name]) for name in some)
    assert any(not torch.equal(some[name], every[name]) for name in some)


def test_one_batch_does_not_vary(adapted: AdaptedModel) -> None:
    with pytest.raises(MethodError, match="2 rows are one mini-batch of 2"):
        take(adapted, rows_of(2))
