"""Several sub-models from one calibration: each inside the one before, each exact."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prufed_plugins.api import PrunedMatrix, PruneTarget
from prufed_plugins.discover import build
from prufed_plugins.errors import MethodError
from prufed_plugins.pruners import sparsegpt
from prufed_plugins.pruners.hessian import factorize
from prufed_plugins.pruners.selection import pruned_count
from prufed_plugins.testing.pruner import TinyDecoder, tokens
from tests.pruners.whole_models import open_decoder

METHODS = ["magnitude", "wanda", "sparsegpt"]
SPARSITIES = st.lists(st.floats(0, 0.999), min_size=1, max_size=4).map(sorted)


def nested(
    method: str,
    sparsities: list[float],
    decoder: Any = None,
    calibration: list[Tensor] | None = None,
    **options: Any,
) -> list[tuple[PrunedMatrix, ...]]:
    pruner = build("pruner", method, options)
    targets = [PruneTarget(sparsity=sparsity) for sparsity in sparsities]
    run = pruner.prune_nested(
        decoder or TinyDecoder(2), calibration or tokens(), targets, lambda *_: None
    )
    return list(run)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(METHODS), SPARSITIES, st.sampled_from(["uniform", "owl"]))
def test_masks_are_nested_whatever_the_sparsities(
    method: str, sparsities: list[float], layer_ratio: str
) -> None:
    for results in nested(method, sparsities, layer_ratio=layer_ratio):
        for smaller, larger in pairwise(results):
            assert bool((larger.mask <= smaller.mask).all())
            assert not larger.weight[~larger.mask].any()


@settings(max_examples=25, deadline=None)
@given(SPARSITIES, st.integers(1, 20))
def test_every_block_of_columns_loses_exactly_its_share(
    sparsities: list[float], block: int
) -> None:
    for results in nested("sparsegpt", sparsities, block_size=block):
        for sparsity, result in zip(sparsities, results, strict=True):
            for columns in result.mask.split(block, dim=1):
                assert int((~columns).sum()) == pruned_count(sparsity, columns.numel())


@settings(max_examples=25, deadline=None)
@given(SPARSITIES)
def test_every_row_or_matrix_loses_exactly_its_share(sparsities: list[float]) -> None:
    for results in nested("wanda", sparsities):
        for sparsity, result in zip(sparsities, results, strict=True):
            rows, columns = result.mask.shape
            assert (~result.mask).sum(1).tolist() == [pruned_count(sparsity, columns)] * rows
    for results in nested("magnitude", sparsities):
        for sparsity, result in zip(sparsities, results, strict=True):
            assert int((~result.mask).sum()) == pruned_count(sparsity, result.mask.numel())


@pytest.mark.parametrize("method", METHODS)
def test_the_first_sub_model_of_the_first_block_is_what_pruning_alone_makes(method: str) -> None:
    alone = build("pruner", method, {}).prune(
        TinyDecoder(1), tokens(), PruneTarget(sparsity=0.3), lambda *_: None
    )
    for (first, _), single in zip(nested(method, [0.3, 0.6], TinyDecoder(1)), alone, strict=True):
        assert torch.equal(first.mask, single.mask)
        assert torch.equal(first.weight, single.weight)


def test_sparsegpt_makes_each_from_the_dense_weights_with_the_former_entries_gone() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(300, 40, generator=generator) @ torch.randn(40, 40, generator=generator)
    factor = factorize(2 * inputs.t() @ inputs / 300, 0.01)
    weight = torch.randn(12, 40, generator=generator)
    quarter = sparsegpt.choose(weight, factor, PruneTarget(sparsity=0.25), 16)
    half = sparsegpt.choose(weight, factor, PruneTarget(sparsity=0.5), 16, forced=quarter.pruned)
    free = sparsegpt.choose(weight, factor, PruneTarget(sparsity=0.5), 16)
    assert bool((quarter.pruned <= half.pruned).all())
    assert not torch.equal(half.pruned, free.pruned)
    # the same mask, forced whole, gives the same weights: they depend on the mask and the dense
    # weights alone
    again = sparsegpt.choose(weight, factor, PruneTarget(sparsity=0.5), 16, forced=half.pruned)
    assert torch.equal(again.pruned, half.pruned)
    assert again.weight is not None
    assert half.weight is not None
    assert torch.equal(again.weight, half.weight)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_every_block_is_calibrated_with_dense_activations(
    method: str, llama: Any, ids: Tensor
) -> None:
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    targets = [PruneTarget(sparsity=0.9)]
    run = build("pruner", method, {}).prune_nested(
        open_decoder(llama), [ids], targets, lambda *_: None
    )
    last = {result.name: result for (result,) in run}["model.layers.5.mlp.down_proj.weight"]
    for name, value in llama.state_dict().items():
        assert torch.equal(value, before[name]), name
    seen: list[Tensor] = []
    handle = llama.model.layers[5].mlp.down_proj.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].reshape(-1, args[0].shape[-1]))
    )
    with torch.no_grad():
        llama(ids)
    handle.remove()
    weight = before[last.name].float()
    if method == "wanda":
        scores = weight.abs() * seen[0].norm(dim=0)
        expected = scores.argsort(dim=1, stable=True)[:, : pruned_count(0.9, weight.shape[1])]
        assert not last.mask.gather(1, expected).any()
    else:
        change = (weight - last.weight.float()) @ seen[0].t()
        error = float(change.square().sum() / (weight @ seen[0].t()).square().sum())
        assert last.report["error"] == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize(
    ("method", "options"),
    [("wanda", {"layer_ratio": "owl"}), ("magnitude", {"group": "global"}), ("wanda", {})],
)
def test_one_survey_serves_every_target(method: str, options: dict[str, str]) -> None:
    pruner = build("pruner", method, options)
    targets = [PruneTarget(sparsity=sparsity) for sparsity in (0.2, 0.4, 0.8)]
    calls: list[int] = []

    def progress(what: str, done: int, total: int) -> None:
        calls.append(done)

    together = pruner.survey_nested(TinyDecoder(), tokens(), targets, progress)
    seen = len(calls)
    alone = [pruner.survey(TinyDecoder(), tokens(), target, progress) for target in targets]
    assert list(together) == alone
    assert len(calls) == seen + 3 * seen
    assert (together[0].per_matrix is None) == (not options)
    given = pruner.prune_nested(TinyDecoder(), tokens(), together, lambda *_: None)
    asked = pruner.prune_nested(TinyDecoder(), tokens(), targets, lambda *_: None)
    for one, other in zip(given, asked, strict=True):
        assert all(torch.equal(a.mask, b.mask) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sparsities", [[0.25, 0.5], [0.5]])
def test_the_model_stays_dense_whatever_its_layout(
    method: str, sparsities: list[float], gpt2: Any, ids: Tensor
) -> None:
    before = {name: value.clone() for name, value in gpt2.state_dict().items()}
    assert nested(method, sparsities, open_decoder(gpt2), calibration=[ids])
    assert all(torch.equal(value, before[name]) for name, value in gpt2.state_dict().items())


@pytest.mark.parametrize("shape", [(1, 40), (40, 1), (9, 40)])
def test_the_weight_that_sparsegpt_is_given_stays(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    factor = factorize(2 * torch.eye(shape[1]), 0.01)
    for one in (weight, weight.t().contiguous().t()):
        before = one.clone()
        choice = sparsegpt.choose(one, factor, PruneTarget(sparsity=0.5))
        assert choice.pruned.any()
        assert torch.equal(one, before)


@pytest.mark.parametrize("method", METHODS)
def test_conv1d_in_half_precision_keeps_its_layout_and_dtype(
    method: str, gpt2: Any, ids: Tensor
) -> None:
    gpt2.to(torch.bfloat16)
    before = {name: value.clone() for name, value in gpt2.state_dict().items()}
    targets = [PruneTarget(sparsity=sparsity) for sparsity in (0.0, 0.25, 0.5)]
    run = build("pruner", method, {}).prune_nested(
        open_decoder(gpt2), [ids], targets, lambda *_: None
    )
    for dense, quarter, half in run:
        assert dense.mask.all()
        assert torch.equal(dense.weight, before[dense.name])
        assert half.weight.dtype == torch.bfloat16
        assert half.weight.shape == half.mask.shape == before[half.name].shape
        assert bool((half.mask <= quarter.mask).all())
        assert 2 * int(half.mask.sum()) == half.mask.numel()


@pytest.mark.parametrize(
    "targets",
    [
        [],
        [PruneTarget(sparsity=0.5), PruneTarget(sparsity=0.25)],
        [PruneTarget(pattern=(2, 4))],
        [PruneTarget(sparsity=0.5), PruneTarget(layers=2)],
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_targets_that_cannot_be_nested_are_refused(method: str, targets: list[PruneTarget]) -> None:
    with pytest.raises(MethodError, match="ascending sparsities"):
        list(
            build("pruner", method, {}).prune_nested(
                TinyDecoder(), tokens(), targets, lambda *_: None
            )
        )
