"""The faster formulation makes the published algorithm's decisions."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from prufed_plugins.api import PruneTarget
from prufed_plugins.pruners import sparsegpt
from prufed_plugins.pruners.hessian import InputHessian, factorize

TARGETS = [
    PruneTarget(sparsity=0.25),
    PruneTarget(sparsity=0.5),
    PruneTarget(sparsity=0.75),
    PruneTarget(pattern=(2, 4)),
    PruneTarget(pattern=(4, 8)),
    PruneTarget(pattern=(1, 3)),
]


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_masks_and_weights_agree(plain: ModuleType, target: PruneTarget) -> None:
    rows, columns = 160, 312  # a last block that is not full; 312 is divisible by 3, 4 and 8
    generator = torch.Generator().manual_seed(0)
    mixing = (
        torch.eye(columns) + 0.4 * torch.randn(columns, columns, generator=generator) / columns**0.5
    )
    scale = torch.rand(columns, generator=generator) + 0.1
    inputs = torch.randn(1500, columns, generator=generator) * scale @ mixing
    inputs[:, 17] = 0.0
    hessian = InputHessian(columns, torch.device("cpu"))
    hessian.add(inputs)
    matrix = hessian.matrix()
    weight = 0.02 * torch.randn(rows, columns, generator=generator)
    block = 126 if target.pattern == (1, 3) else 128
    expected, pruned = plain.plain_sparsegpt(
        weight, matrix, target.sparsity or 0.0, target.pattern, block
    )
    choice = sparsegpt.choose(weight, factorize(matrix.clone(), 0.01), target)
    agreement = float((choice.pruned == pruned).float().mean())
    assert agreement >= 0.9999
    assert choice.weight is not None
    found = choice.weight.masked_fill(choice.pruned, 0.0)
    if agreement == 1:
        assert float((found - expected).abs().max()) <= 5e-5
    error = [float(((weight - one) @ matrix * (weight - one)).sum()) for one in (found, expected)]
    assert error[0] == pytest.approx(error[1], rel=1e-4)
