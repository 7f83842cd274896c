"""The faster formulation makes the published algorithm's decisions, and the published code's."""

from __future__ import annotations

import copy
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from prufed_plugins.api import PruneTarget
from prufed_plugins.discover import build
from prufed_plugins.pruners import magnitude, sparsegpt, wanda
from prufed_plugins.pruners.hessian import InputHessian, InputNorms, factorize
from prufed_plugins.pruners.selection import pruned_count
from tests.pruners.whole_models import open_decoder

SPARSITIES = [PruneTarget(sparsity=sparsity) for sparsity in (0.0, 0.25, 0.5, 0.75)]
PATTERNS = [PruneTarget(pattern=pattern) for pattern in ((2, 4), (4, 8), (1, 3), (5, 7))]
ROWS, COLUMNS = 160, 309  # a last block that is not full, and partial groups in it


def problem(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return a weight (160, 309) and the Hessian of correlated inputs, two of them silent."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(COLUMNS, COLUMNS, generator=generator) / COLUMNS**0.5
    scale = torch.rand(COLUMNS, generator=generator) + 0.1
    inputs = torch.randn(1500, COLUMNS, generator=generator) * scale
    inputs = inputs @ (torch.eye(COLUMNS) + 0.4 * mixing)
    inputs[:, [17, 300]] = 0.0
    hessian = 2 * inputs.t() @ inputs / len(inputs)
    return 0.02 * torch.randn(ROWS, COLUMNS, generator=generator), hessian


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("target", [PruneTarget(sparsity=0.5), PruneTarget(pattern=(2, 4))])
def test_silent_inputs_weigh_as_much_in_the_damping(
    plain: ModuleType, target: PruneTarget, batch: int
) -> None:
    """The published code divides by sequences before it sets H_jj of a silent channel to 1."""
    torch.manual_seed(0)
    sequences, length, columns = 8, 50, 96
    inputs = 0.05 * torch.randn(sequences, length, columns) @ torch.randn(columns, columns) / 10
    inputs[..., ::3] = 0.0
    hessian = InputHessian(columns, torch.device("cpu"))
    for some in inputs.split(batch):
        hessian.add(some.flatten(0, 1), len(some))
    flat = inputs.flatten(0, 1)
    weight = torch.randn(64, columns)
    expected, pruned = plain.plain_sparsegpt(
        weight, 2 / sequences * flat.t() @ flat, target.sparsity or 0.0, target.pattern, exact=False
    )
    choice = sparsegpt.choose(weight, hessian.factor, target, threshold="reference")
    assert torch.equal(choice.pruned, pruned)
    assert choice.weight is not None
    found = choice.weight.masked_fill(choice.pruned, 0.0)
    assert float((found - expected).abs().max()) <= 1e-4


@pytest.mark.parametrize("threshold", ["exact", "reference"])
@pytest.mark.parametrize("target", [*SPARSITIES, *PATTERNS], ids=str)
def test_masks_and_weights_agree(plain: ModuleType, target: PruneTarget, threshold: Any) -> None:
    weight, hessian = problem()
    m = target.pattern[1] if target.pattern else 1
    expected, pruned = plain.plain_sparsegpt(
        weight,
        hessian,
        target.sparsity or 0.0,
        target.pattern,
        128 // m * m,
        exact=threshold == "exact",
    )
    choice = sparsegpt.choose(weight, factorize(hessian.clone(), 0.01), target, threshold=threshold)
    agreement = float((choice.pruned == pruned).float().mean())
    assert agreement >= 0.9999
    found = weight if choice.weight is None else choice.weight.masked_fill(choice.pruned, 0.0)
    if agreement == 1:
        assert float((found - expected).abs().max()) <= 5e-5
    error = [float(((weight - one) @ hessian * (weight - one)).sum()) for one in (found, expected)]
    assert error[0] == pytest.approx(error[1], rel=1e-4)


def test_the_published_count_is_one_more_per_block_even_at_sparsity_zero(
    plain: ModuleType,
) -> None:
    weight, hessian = problem()
    hessian += torch.diag((hessian.diagonal() == 0).float())  # no silent channel
    for sparsity in (0.0, 0.5):
        choice = sparsegpt.choose(
            weight,
            factorize(hessian.clone(), 0.01),
            PruneTarget(sparsity=sparsity),
            threshold="reference",
        )
        counts = [int(block.sum()) for block in choice.pruned.split(128, dim=1)]
        assert counts == [int(ROWS * width * sparsity) + 1 for width in (128, 128, 53)]


def published_magnitude(weight: Tensor, sparsity: float) -> Tensor:
    scores = weight.abs()
    return scores <= scores.flatten().sort().values[int(weight.numel() * sparsity)]


def published_wanda(weight: Tensor, norms: Tensor, sparsity: float) -> Tensor:
    scores = weight.abs() * norms
    order = torch.sort(scores, dim=-1, stable=True).indices[:, : int(scores.shape[1] * sparsity)]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)


@pytest.mark.parametrize("sparsity", [0.0, 0.29, 0.5, 0.75])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_magnitude_and_wanda_choose_what_the_published_code_chooses(
    sparsity: float, dtype: torch.dtype
) -> None:
    target = PruneTarget(sparsity=sparsity)
    weight = problem()[0][:, :100].to(dtype).float()  # bfloat16 leaves many equal magnitudes
    assert torch.equal(
        magnitude.choose(weight, target, threshold="reference"),
        published_magnitude(weight, sparsity),
    )
    norms = InputNorms(100, torch.device("cpu"))
    norms.add(torch.randn(50, 100, generator=torch.Generator().manual_seed(1)).round())
    assert torch.equal(
        wanda.choose(weight, norms, target, "reference").pruned,
        published_wanda(weight, norms.second_moments().sqrt(), sparsity),
    )
    exact = magnitude.choose(weight, target)
    assert int(exact.sum()) == pruned_count(sparsity, weight.numel())


@torch.no_grad()
def plainly_pruned(
    plain: ModuleType, model: Any, ids: Tensor, target: PruneTarget, *, exact: bool
) -> dict[str, Tensor]:
    """Prune a model in place, sequence by sequence and matrix by matrix; return what went."""
    decoder = open_decoder(model)
    states = decoder.embed(list(ids.split(1)))
    gone = {}
    for index in range(len(decoder.blocks)):
        hessians: dict[str, Tensor] = {}

        def collect(name: str, inputs: Tensor, found: dict[str, Tensor] = hessians) -> None:
            x = inputs.reshape(-1, inputs.shape[-1])
            found[name] = found.get(name, 0.0) + x.t() @ x * (2.0 / ids.numel())

        handles = [
            module.register_forward_pre_hook(lambda _, args, name=name: collect(name, args[0]))
            for name, module in decoder.linears(index).items()
        ]
        for hidden, arguments in states:
            decoder.run_block(index, hidden, arguments)
        for handle in handles:
            handle.remove()
        for name, module in decoder.linears(index).items():
            weight, gone[name] = plain.plain_sparsegpt(
                module.weight.data, hessians[name], target.sparsity, target.pattern, exact=exact
            )
            module.weight.data.copy_(weight)
        states = [(decoder.run_block(index, one, given), given) for one, given in states]
    return gone


@pytest.mark.parametrize("threshold", ["exact", "reference"])
@pytest.mark.parametrize("target", [PruneTarget(sparsity=0.5), PruneTarget(pattern=(2, 4))])
def test_whole_models_agree(
    plain: ModuleType, llama: Any, target: PruneTarget, threshold: str
) -> None:
    ids = torch.randint(0, 97, (8, 32), generator=torch.Generator().manual_seed(5))
    other = copy.deepcopy(llama)
    expected = plainly_pruned(plain, other, ids, target, exact=threshold == "exact")
    pruner = build("pruner", "sparsegpt", {"threshold": threshold})
    results = pruner.prune(open_decoder(llama), list(ids.split(3)), target, lambda *_: None)
    same = entries = 0
    for result in results:
        same += int((~result.mask == expected[result.name.removesuffix(".weight")]).sum())
        entries += result.mask.numel()
    assert same / entries >= 0.9999
    with torch.no_grad():
        expected_logits, logits = other(ids).logits, llama(ids).logits
    assert float((logits - expected_logits).abs().max()) <= 1e-3 * float(
        expected_logits.abs().max()
    )
