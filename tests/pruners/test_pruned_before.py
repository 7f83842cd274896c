"""Sub-models that are pruned once more: what is gone counts, and goes first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from torch import Tensor

from prufed_cli.pruning import PruneRequest
from prufed_cli.pruning import prune as prune_model
from prufed_plugins.api import PrunedMatrix, PruneTarget
from prufed_plugins.discover import build
from prufed_plugins.pruners import magnitude, sparsegpt, wanda
from prufed_plugins.pruners.hessian import InputHessian, InputNorms
from prufed_plugins.pruners.selection import pruned_count
from prufed_plugins.testing.pruner import TinyDecoder, tokens
from prufed_registry import Registry

CPU = torch.device("cpu")
METHODS = ["magnitude", "wanda", "sparsegpt"]
ROWS, COLUMNS = 12, 40


def prune(method: str, decoder: TinyDecoder, target: PruneTarget) -> dict[str, PrunedMatrix]:
    results = build("pruner", method, {}).prune(decoder, tokens(), target, lambda *_: None)
    return {result.name: result for result in results}


def pruned_before(target: PruneTarget) -> TinyDecoder:
    """Return a decoder that Wanda has pruned, with the masks."""
    decoder = TinyDecoder(2)
    decoder.masks = {name: one.mask for name, one in prune("wanda", decoder, target).items()}
    return decoder


@pytest.mark.parametrize("method", METHODS)
def test_every_group_loses_what_the_pattern_says_and_no_more(method: str) -> None:
    decoder = pruned_before(PruneTarget(pattern=(2, 4)))
    for name, result in prune(method, decoder, PruneTarget(pattern=(3, 4))).items():
        gone = (~result.mask).reshape(-1, 4)
        assert (gone.sum(dim=1) == 3).all()
        assert not (result.mask & ~decoder.masks[name]).any()
        assert not result.weight[~result.mask].any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("share", [0.25, 0.5, 0.7])
def test_a_share_counts_what_is_gone(method: str, share: float) -> None:
    """At half of it, and at less, a sub-model that has lost half stays as sparse as it is."""
    decoder = pruned_before(PruneTarget(sparsity=0.5))
    for name, result in prune(method, decoder, PruneTarget(sparsity=share)).items():
        before = decoder.masks[name]
        assert not (result.mask & ~before).any()
        gone, had = int((~result.mask).sum()), int((~before).sum())
        if share <= 0.5:
            assert gone == had
        else:
            rows, columns = result.mask.shape
            by_row = rows * pruned_count(share, columns)
            assert gone == (by_row if method == "wanda" else pruned_count(share, rows * columns))


@pytest.mark.parametrize("method", METHODS)
def test_silent_inputs_do_not_go_in_the_place_of_what_is_gone(method: str) -> None:
    """Both score nothing: by index alone, more than the share would be gone."""
    torch.manual_seed(0)
    inputs = torch.randn(60, COLUMNS)
    inputs[:, :8] = 0.0
    weight = torch.randn(ROWS, COLUMNS)
    forced = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
    forced[:, COLUMNS // 2 :] = True
    weight[forced] = 0.0
    chosen = choose(method, weight, inputs, PruneTarget(sparsity=0.5), forced)
    assert torch.equal(chosen, forced)


def choose(
    method: str, weight: Tensor, inputs: Tensor, target: PruneTarget, forced: Tensor | None
) -> Tensor:
    if method == "magnitude":
        return magnitude.choose(weight, target, "row", forced=forced)
    statistic: Any = (InputNorms if method == "wanda" else InputHessian)(COLUMNS, CPU)
    statistic.add(inputs)
    if method == "wanda":
        return wanda.choose(weight, statistic, target, forced=forced).pruned
    return sparsegpt.choose(weight, statistic.factor, target, forced=forced).pruned


@budget(max_examples=60, deadline=None)
@given(
    method=st.sampled_from(METHODS),
    share=st.floats(0, 0.99),
    before=st.floats(0, 1),
    pattern=st.sampled_from([None, (2, 4), (1, 3), (5, 7)]),
    seed=st.integers(0, 1000),
)
def test_what_is_gone_goes_first_whatever_the_target(
    method: str, share: float, before: float, pattern: tuple[int, int] | None, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(ROWS, COLUMNS, generator=generator)
    forced = torch.rand(ROWS, COLUMNS, generator=generator) < before
    weight[forced] = 0.0
    inputs = torch.randn(80, COLUMNS, generator=generator)
    target = PruneTarget(sparsity=None if pattern else share, pattern=pattern)
    chosen = choose(method, weight, inputs, target, forced)
    assert not (forced & ~chosen).any()
    if pattern:
        n, m = pattern
        groups = [(chosen[:, at : at + m], forced[:, at : at + m]) for at in range(0, COLUMNS, m)]
        for gone, had in groups:
            least = min(n, gone.shape[1])
            assert torch.equal(gone.sum(1), had.sum(1).clamp(min=least))
    elif method == "sparsegpt":
        count = pruned_count(share, ROWS * COLUMNS)
        assert int(chosen.sum()) == max(count, int(forced.sum()))
    else:
        count = pruned_count(share, COLUMNS)
        assert torch.equal(chosen.sum(1), forced.sum(1).clamp(min=count))


def test_sparsegpt_makes_up_for_what_it_brings_back() -> None:
    """An entry that is gone is pushed errors too; they go on to later columns, and are counted."""
    torch.manual_seed(0)
    inputs = torch.randn(300, COLUMNS) @ torch.randn(COLUMNS, COLUMNS)
    hessian = InputHessian(COLUMNS, CPU)
    hessian.add(inputs)
    factor = hessian.factor
    forced = torch.rand(ROWS, COLUMNS) < 0.5
    weight = torch.randn(ROWS, COLUMNS).masked_fill(forced, 0.0)
    target = PruneTarget(sparsity=0.75)
    together = sparsegpt.choose(weight, factor, target, 8, forced=forced)
    assert together.weight is not None
    assert together.squared_error is not None
    change = weight - together.weight.masked_fill(together.pruned, 0.0)
    exact = float((inputs @ change.t()).square().sum()) / len(inputs)
    assert together.squared_error == pytest.approx(exact, rel=1e-3)
    apart = sparsegpt.choose(weight, factor, target, 8)
    assert apart.weight is not None
    gone = apart.pruned | forced
    worse = weight - apart.weight.masked_fill(gone, 0.0)
    assert exact < float((inputs @ worse.t()).square().sum()) / len(inputs)


def test_zeros_that_are_kept_come_after_those_that_are_gone_in_the_whole_model(
    llama: Any, saved: Callable[..., Path], prufed_home: Path
) -> None:
    """They are equal; given out in the order of matrices, both would be removed."""
    registry = Registry(prufed_home / "registry")
    with torch.no_grad():
        for name, parameter in llama.named_parameters():
            if "layers.0.mlp" in name:
                parameter[:, ::2] = 0.0
    ask = PruneRequest(base=str(saved(llama)), method="magnitude", sparsity=0.3)
    rows = prune_model(replace(ask, settings={"group": "row"}), registry=registry).artifact
    more = replace(ask, base=rows.ref, sparsity=0.31, settings={"group": "global"})
    details = prune_model(more, registry=registry).artifact.manifest.details
    assert details["sparsity"] == pytest.approx(0.31, abs=1e-4)
