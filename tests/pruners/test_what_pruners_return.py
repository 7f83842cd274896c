"""What a pruner returns is published only if it is as the contract says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from prufed_cli.pruning import PruneRequest
from prufed_cli.pruning.passes import run_pass
from prufed_cli.pruning.submodels import _job
from prufed_plugins.api import PrunedMatrix
from prufed_plugins.errors import MethodError
from prufed_registry import Registry

Save = Callable[..., Path]

UP = "model.layers.0.mlp.up_proj.weight"
ZEROS = torch.zeros(48, 32)
ALL = torch.ones(48, 32, dtype=torch.bool)
ONE_ABSENT = ALL.clone()
ONE_ABSENT[47, 31] = False


class Answers:
    """A pruner of matrices that says what it was told to say, for one sub-model or several."""

    result = "masked"
    needs_calibration = False

    def __init__(self, answers: list[Any]) -> None:
        self._answers = answers

    def prune(self, *_: Any) -> Iterator[Any]:
        yield from self._answers

    def prune_nested(self, *_: Any) -> Iterator[Any]:
        yield from self._answers


@pytest.fixture
def registry(prufed_home: Path) -> Registry:
    return Registry(prufed_home / "registry")


def magnitude(base: Path, sparsity: float = 0.5) -> PruneRequest:
    return PruneRequest(base=str(base), method="magnitude", sparsity=sparsity)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            PrunedMatrix(UP, ZEROS[0, 0], ALL),
            r"a weight of shape \[\] for model.layers.0.mlp.up_proj.weight, which is stored",
        ),
        (PrunedMatrix(UP, ZEROS.t(), ALL), r"a weight of shape \[32, 48\] for .* as \[48, 32\]"),
        (PrunedMatrix(UP, ZEROS, ALL.t()), r"a mask of shape \[32, 48\] for .* as \[48, 32\]"),
        (PrunedMatrix(UP, ZEROS, ALL[0]), r"a mask of shape \[32\] for .* as \[48, 32\]"),
        (PrunedMatrix(UP, ZEROS, ALL.float()), "a mask of torch.float32 for .*up_proj.weight"),
        (PrunedMatrix(UP, ZEROS + 1, ONE_ABSENT), "mask of .*up_proj.weight calls entries absent"),
        (
            PrunedMatrix("model.layers.0.input_layernorm.weight", ZEROS[0], ALL[0]),
            "returned model.layers.0.input_layernorm.weight, which is no matrix of the model",
        ),
        (PrunedMatrix("model.norm.weight", ZEROS[0], ALL[0]), "which is no matrix of the model"),
        (PrunedMatrix("model.layers.one.weight", ZEROS, ALL), "which is no matrix of the model"),
    ],
)
def test_a_matrix_that_is_not_as_the_contract_says_is_not_published(
    answer: PrunedMatrix, words: str, llama: Any, saved: Save, registry: Registry
) -> None:
    job = _job([magnitude(saved(llama))], {"registry": registry})
    with pytest.raises(MethodError, match=words) as refused:
        run_pass(replace(job, pruner=Answers([answer])), [0])
    assert refused.value.hint is not None
    assert "prufed plugins check" in refused.value.hint
    assert [each.kind for each in registry.list()] == ["base"]


@pytest.mark.parametrize("between", [(), ("gate",)])
def test_a_matrix_that_comes_twice_is_refused(
    between: tuple[str, ...], llama: Any, saved: Save, registry: Registry
) -> None:
    job = _job([magnitude(saved(llama))], {"registry": registry})
    names = [UP, *(UP.replace("up", other) for other in between), UP]
    answers = Answers([PrunedMatrix(name, ZEROS, ALL, {"sparsity": 0.0}) for name in names])
    with pytest.raises(MethodError, match=f"returned {UP} twice"):
        run_pass(replace(job, pruner=answers), [0])
    assert [each.kind for each in registry.list()] == ["base"]


def test_a_zero_outside_the_mask_may_have_either_sign(
    llama: Any, saved: Save, registry: Registry
) -> None:
    job = _job([magnitude(saved(llama))], {"registry": registry})
    weight = (ZEROS - 1) * ONE_ABSENT
    answers = Answers([PrunedMatrix(UP, weight, ONE_ABSENT, {"sparsity": 1 / 1536})])
    [(artifact, _)] = run_pass(replace(job, pruner=answers), [0])
    assert torch.equal(load_file(artifact.path / "model.safetensors")[UP], weight)


def test_a_conv1d_is_published_in_the_layout_it_is_stored_in(
    gpt2: Any, saved: Save, registry: Registry
) -> None:
    name = "transformer.h.0.mlp.c_fc.weight"  # (inputs, outputs)
    weight, mask = torch.ones(32, 128), torch.ones(32, 128, dtype=torch.bool)
    job = _job([magnitude(saved(gpt2))], {"registry": registry})
    turned = Answers([PrunedMatrix(name, weight.t(), mask.t())])
    with pytest.raises(MethodError, match=r"shape \[128, 32\] for .* as \[32, 128\]"):
        run_pass(replace(job, pruner=turned), [0])
    right = Answers([PrunedMatrix(name, weight, mask, {"sparsity": 0.0})])
    [(artifact, _)] = run_pass(replace(job, pruner=right), [0])
    assert torch.equal(load_file(artifact.path / "model.safetensors")[name], weight)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([UP], "returned .*up_proj.weight at once, not one matrix of 2 sub-models"),
        ([UP, UP.replace("up", "gate")], "returned .*up_proj.weight, .*gate_proj.weight at once"),
        ([], "returned nothing at once"),
    ],
)
def test_sub_models_that_are_given_different_matrices_are_refused(
    names: list[str], words: str, llama: Any, saved: Save, registry: Registry
) -> None:
    path = saved(llama)
    requests = [magnitude(path), magnitude(path, sparsity=0.75)]
    job = _job(requests, {"registry": registry, "nested": True})
    answers = Answers([tuple(PrunedMatrix(name, ZEROS, ALL) for name in names)])
    with pytest.raises(MethodError, match=words):
        run_pass(replace(job, pruner=answers), [0, 1])
