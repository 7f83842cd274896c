"""Small cases whose answer is known by hand or in closed form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prufed_plugins.api import PruneTarget
from prufed_plugins.discover import build
from prufed_plugins.errors import MethodError
from prufed_plugins.pruners import sparsegpt, wanda
from prufed_plugins.pruners.hessian import InputHessian, InputNorms, factorize
from prufed_plugins.testing.pruner import TinyDecoder

CPU = torch.device("cpu")


def norms_of(values: list[float]) -> InputNorms:
    norms = InputNorms(len(values), CPU)
    norms.add(torch.tensor([values]))
    return norms


def correlated(tokens: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = (
        torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator) / columns**0.5
    )
    return torch.randn(tokens, columns, generator=generator) @ mixing


def hessian_of(inputs: Tensor) -> Tensor:
    return 2 * inputs.t() @ inputs / len(inputs)


def output_error(weight: Tensor, changed: Tensor, inputs: Tensor) -> float:
    return float((inputs @ (weight - changed).t()).square().sum())


def test_wanda_weighs_by_the_input_norm() -> None:
    weight = torch.tensor([[4.0, 1.0], [1.0, 2.0]])
    choice = wanda.choose(weight, norms_of([1.0, 8.0]), PruneTarget(sparsity=0.5))
    assert choice.pruned.tolist() == [[True, False], [True, False]]
    assert choice.weight is None


def test_wandas_error_is_that_of_a_sample_of_the_inputs() -> None:
    """Of all tokens where there are few; close to that of all where there are many."""
    weight, inputs = torch.randn(6, 8, generator=torch.manual_seed(3)), correlated(4000, 8, seed=3)
    target = PruneTarget(sparsity=0.5)
    for tokens, tolerance in ((10, 1e-5), (4000, 0.15)):
        norms = InputNorms(8, CPU, wanda.SAMPLED)
        for batch in inputs[:tokens].split(500):
            norms.add(batch)
        choice = wanda.choose(weight, norms, target)
        assert choice.squared_error is not None
        assert choice.energy is not None
        assert len(norms.sample) == min(tokens, wanda.SAMPLED)
        changed = weight.masked_fill(choice.pruned, 0.0)
        error = output_error(weight, changed, inputs[:tokens])
        energy = output_error(weight, torch.zeros_like(weight), inputs[:tokens])
        expected = pytest.approx(error / energy, rel=tolerance)
        assert choice.squared_error / choice.energy == expected


@pytest.mark.parametrize("statistic", [InputNorms, InputHessian])
def test_collecting_leaves_the_inputs_as_they_are(statistic: type) -> None:
    inputs = correlated(60, 5)
    before = inputs.clone()
    statistic(5, CPU).add(inputs)
    assert torch.equal(inputs, before)


def test_wanda_norms_do_not_depend_on_the_batches() -> None:
    inputs = correlated(60, 5)
    whole, pieces = InputNorms(5, CPU), InputNorms(5, CPU)
    whole.add(inputs)
    for piece in inputs.split(7):
        pieces.add(piece)
    torch.testing.assert_close(pieces.second_moments(), whole.second_moments())
    torch.testing.assert_close(whole.second_moments(), inputs.square().mean(0))


@pytest.mark.parametrize("columns", [19, 700])  # one panel, and more than one
def test_the_hessian_is_two_xxt_over_n(columns: int) -> None:
    inputs = correlated(1000, columns)
    hessian = InputHessian(columns, CPU)
    for batch in inputs.split(37):
        hessian.add(batch)
    upper = hessian.factor.upper.triu().double()
    expected = hessian_of(inputs.double()) + hessian.factor.added * torch.eye(columns)
    torch.testing.assert_close(upper @ upper.t(), expected, rtol=1e-5, atol=1e-5)


def test_the_factor_is_the_inverse_of_the_cholesky_factor_of_the_inverse() -> None:
    hessian = hessian_of(correlated(300, 24)).double()
    factor = factorize(hessian.clone(), 0.01)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(24)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    torch.testing.assert_close(torch.linalg.inv(factor.upper.triu()), expected)


def test_sparsegpt_on_uncorrelated_inputs_is_magnitude_in_the_block() -> None:
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(2))
    factor = factorize(2.0 * torch.eye(16), 0.01)
    choice = sparsegpt.choose(weight, factor, PruneTarget(sparsity=0.5), block_size=8)
    for block in (slice(0, 8), slice(8, 16)):
        limit = weight[:, block].abs().flatten().sort().values[24]
        assert torch.equal(choice.pruned[:, block], weight[:, block].abs() < limit)
    assert choice.weight is not None
    assert torch.equal(choice.weight[~choice.pruned], weight[~choice.pruned])


@pytest.mark.parametrize("target", [PruneTarget(sparsity=0.6), PruneTarget(pattern=(2, 4))])
def test_the_update_lowers_the_output_error_of_its_own_mask(target: PruneTarget) -> None:
    inputs = correlated(500, 40)
    weight = torch.randn(12, 40, generator=torch.Generator().manual_seed(3))
    choice = sparsegpt.choose(weight, factorize(hessian_of(inputs), 0.01), target, 16)
    assert choice.weight is not None
    pruned = choice.weight.masked_fill(choice.pruned, 0.0)
    masked = weight.masked_fill(choice.pruned, 0.0)
    assert output_error(weight, pruned, inputs) < 0.95 * output_error(weight, masked, inputs)


@pytest.mark.parametrize("target", [PruneTarget(sparsity=0.6), PruneTarget(pattern=(3, 7))])
def test_the_squared_error_is_that_of_the_outputs_on_the_calibration(target: PruneTarget) -> None:
    inputs = correlated(500, 40)
    weight = torch.randn(12, 40, generator=torch.Generator().manual_seed(3))
    choice = sparsegpt.choose(weight, factorize(hessian_of(inputs), 0.01), target, 16)
    assert choice.weight is not None
    pruned = choice.weight.masked_fill(choice.pruned, 0.0)
    expected = output_error(weight, pruned, inputs) / 500
    assert choice.squared_error == pytest.approx(expected, rel=1e-4)


def test_the_energy_of_the_outputs_leaves_out_silent_channels_and_the_damping() -> None:
    inputs = correlated(1500, 600)  # more columns than one panel
    inputs[:, [3, 577]] = 0.0
    weight = torch.randn(7, 600, generator=torch.Generator().manual_seed(3))
    expected = float((inputs @ weight.t()).square().sum()) / 1500
    assert factorize(hessian_of(inputs), 0.5).energy(weight) == pytest.approx(expected, rel=1e-4)


def test_one_pruned_weight_moves_later_columns_by_the_closed_form() -> None:
    hessian = hessian_of(correlated(200, 6))
    weight = torch.tensor([[3.0, 2.0, 0.01, 4.0, 5.0, 6.0]])
    choice = sparsegpt.choose(weight, factorize(hessian.clone(), 0.01), PruneTarget(sparsity=0.17))
    assert choice.weight is not None
    assert choice.pruned.tolist() == [[False, False, True, False, False, False]]
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(6)
    later = torch.linalg.inv(damped[2:, 2:])  # earlier columns are fixed when column 2 goes
    expected = weight.clone()
    expected[0, 2:] -= weight[0, 2] * later[:, 0] / later[0, 0]
    torch.testing.assert_close(choice.weight, expected, atol=1e-6, rtol=1e-5)


def test_every_block_of_columns_loses_exactly_its_share() -> None:
    weight = torch.randn(7, 20, generator=torch.Generator().manual_seed(4))
    factor = factorize(hessian_of(correlated(100, 20)), 0.01)
    pruned = sparsegpt.choose(weight, factor, PruneTarget(sparsity=0.3), block_size=8).pruned
    counts = [int(pruned[:, block].sum()) for block in (slice(0, 8), slice(8, 16), slice(16, 20))]
    assert counts == [int(0.3 * 56), int(0.3 * 56), int(0.3 * 28)]


@pytest.mark.parametrize("target", [PruneTarget(sparsity=0.5), PruneTarget(pattern=(2, 4))])
def test_silent_channels_go_first_but_not_beyond_the_target(target: PruneTarget) -> None:
    inputs = correlated(200, 12)
    inputs[:, :9] = 0.0
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(4))
    factor = factorize(hessian_of(inputs), 0.01)
    choice = sparsegpt.choose(weight, factor, target)
    assert int(choice.pruned.sum()) == 30
    assert choice.report["dead_channels"] == 9
    assert choice.weight is not None
    silent_and_kept = ~choice.pruned
    silent_and_kept[:, 9:] = False
    assert silent_and_kept.any()
    assert torch.equal(choice.weight[silent_and_kept], weight[silent_and_kept])
    if target.pattern is None:
        assert not choice.pruned[:, 9:].any()
        assert choice.squared_error == 0


def test_the_published_code_wipes_silent_channels_and_so_does_its_mode() -> None:
    inputs = correlated(200, 12)
    inputs[:, :9] = 0.0
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(4))
    factor = factorize(hessian_of(inputs), 0.01)
    choice = sparsegpt.choose(weight, factor, PruneTarget(sparsity=0.5), threshold="reference")
    assert choice.pruned[:, :9].all()
    assert not choice.pruned[:, 9:].any()
    assert choice.weight is not None
    assert not choice.weight[:, :9].any()


def test_damping_rises_until_the_factor_exists_and_is_reported() -> None:
    indefinite = torch.eye(8)
    indefinite[0, 0] = -0.05
    factor = factorize(indefinite, 0.01)
    assert factor.damping == pytest.approx(0.1)
    assert factor.retries == 1


@pytest.mark.parametrize("failing", [690, 300, 10])
def test_the_factor_after_a_retry_is_that_of_its_damping(failing: int) -> None:
    hessian = hessian_of(correlated(2000, 700))
    hessian[failing, failing] = -0.05 * hessian.diagonal().mean()  # all after it is factored first
    raised = factorize(hessian.clone(), 1e-4)
    straight = factorize(hessian.clone(), raised.damping)
    assert raised.retries > 0
    assert straight.retries == 0
    assert torch.equal(raised.upper.triu(), straight.upper.triu())
    product = straight.upper.triu().double() @ straight.upper.triu().double().t()
    expected = hessian.double() + straight.added * torch.eye(700)
    torch.testing.assert_close(product, expected, rtol=1e-5, atol=1e-5)


def test_a_hessian_that_no_damping_mends_is_refused() -> None:
    with pytest.raises(MethodError, match="not positive definite even with a damping of 1"):
        factorize(torch.diag(torch.tensor([1.0, -9.0, 10.0])), 0.01)


@pytest.mark.parametrize("group", ["layer", "row", "global"])
def test_magnitude_removes_the_smallest_of_its_group(group: str) -> None:
    decoder = TinyDecoder()
    before = decoder.parameters()
    pruner = build("pruner", "magnitude", {"group": group})
    results = list(pruner.prune(decoder, None, PruneTarget(sparsity=0.3), lambda *_: None))
    magnitudes = {result.name: before[result.name].abs() for result in results}
    if group == "global":
        everything = torch.cat([one.flatten() for one in magnitudes.values()])
        limit = everything.sort().values[int(0.3 * everything.numel())]
        for result in results:
            assert torch.equal(result.mask, magnitudes[result.name] >= limit)
        return
    for result in results:
        scores = magnitudes[result.name]
        scores = scores if group == "row" else scores.reshape(1, -1)
        limit = scores.sort(dim=1).values[:, int(0.3 * scores.shape[1]), None]
        assert torch.equal(result.mask, (scores >= limit).reshape(result.mask.shape))
