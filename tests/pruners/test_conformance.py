"""The built-in pruners keep the contract that the conformance kit holds strangers to."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prufed_plugins.api import PrunedMatrix
from prufed_plugins.discover import build
from prufed_plugins.entries import clear
from prufed_plugins.params import SparseGPTParams
from prufed_plugins.pruners.sparsegpt import SparseGPT
from prufed_plugins.testing import check_pruner


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("magnitude", {}),
        ("magnitude", {"group": "row"}),
        ("magnitude", {"group": "global"}),
        ("wanda", {}),
        ("magnitude", {"layer_ratio": "owl"}),
        ("wanda", {"layer_ratio": "owl"}),
        ("wanda", {"threshold": "reference"}),
        ("sparsegpt", {}),
        ("sparsegpt", {"layer_ratio": "owl", "owl_lambda": 0.2}),
        ("sparsegpt", {"block_size": 5}),
        ("top", {}),
        ("bottom", {}),
        ("odd-alternate", {}),
        ("even-alternate", {}),
        ("symmetric", {}),
        ("top-alternate", {}),
        ("parameter", {}),
        ("parameter", {"score": "variance"}),
        ("magnitude-layers", {}),
        ("contribution", {}),
        ("contribution", {"threshold": 0.989}),
        ("angular", {}),
    ],
)
def test_built_in_pruner_conforms(name: str, settings: dict[str, object]) -> None:
    check_pruner(lambda: build("pruner", name, settings)).require()


@pytest.mark.parametrize("settings", [{"layers": [0, 2, 5]}, {"drop_layers": [1]}, {"keep": 3}])
def test_a_pruner_that_knows_its_layers_conforms(settings: dict[str, object]) -> None:
    name = "symmetric" if "keep" in settings else "explicit"
    check_pruner(lambda: build("pruner", name, settings)).require()


def test_a_pruner_that_breaks_the_contract_is_told_where() -> None:
    class Off(type(build("pruner", "magnitude", {}))):  # type: ignore[misc]
        def prune(self, *args: object) -> object:
            for result in super().prune(*args):
                result.weight.add_(1.0)
                yield result

    outcome = check_pruner(lambda: Off(build_params()))
    failed = {check.name for check in outcome.checks if not check.passed}
    assert {"pruned_entries_are_zero", "sparsity_zero_changes_nothing"} <= failed
    assert "sparsity_is_met" not in failed


def build_params() -> object:
    from prufed_plugins.params import MagnitudeParams

    return MagnitudeParams()


class NeverRounds(SparseGPT):
    def _prune_matrix(self, *args: Any, **options: Any) -> Any:
        name, module, observed, targets, _, gone = args
        return super()._prune_matrix(
            name, module, observed, targets, torch.float32, gone, **options
        )


class ForgetsEarlierPrunes(SparseGPT):
    def _prune_matrix(self, *args: Any, **options: Any) -> Any:
        return super()._prune_matrix(*args[:-1], None, **options)


class ReadsOutputsByInputs(SparseGPT):
    """One that takes every weight to be (outputs, inputs)."""

    @torch.no_grad()
    def _prune_matrix(self, *args: Any, dense: bool) -> Any:
        name, module, observed, targets, dtype, gone = args
        if isinstance(module, torch.nn.Linear):
            return super()._prune_matrix(*args, dense=dense)
        found, results = observed.pop(name), []
        for target in targets:
            weight = module.weight.clone() if dense else module.weight
            choice = self.choose(module.weight.float(), found, target, gone)
            gone = choice.pruned.contiguous()
            if choice.weight is not None:
                weight.copy_(choice.weight.to(dtype))
            clear(weight, ~gone)
            results.append(PrunedMatrix(f"{name}.weight", weight, ~gone))
        return tuple(results)


class RepeatsItself(SparseGPT):
    def _run(self, *args: Any, **options: Any) -> Any:
        for results in super()._run(*args, **options):
            yield results
            if results[0].name.endswith("0.up.weight"):
                yield results


@pytest.mark.parametrize(
    ("broken", "failures"),
    [
        (
            NeverRounds,
            {
                "new_weights_can_be_stored": "is not rounded to torch.bfloat16, which it is stored",
                "goes_on_where_it_was_stopped": "differs, in a model stored in bfloat16",
            },
        ),
        (
            ForgetsEarlierPrunes,
            {
                "what_is_gone_goes_first": "has entries again that an earlier prune removed",
                "nested_masks_lack_what_is_gone": "has entries again that an earlier prune removed",
            },
        ),
        (
            RepeatsItself,
            {
                "every_matrix_once_in_block_order": "layers.0.up.weight came more than once",
                "nested_masks_are_nested": "layers.0.up.weight came more than once",
            },
        ),
        (
            ReadsOutputsByInputs,
            {
                "pattern_is_met_or_refused": "gate.weight break 2:4, in a model of Conv1D",
                "weights_keep_their_layout": "RuntimeError",
            },
        ),
    ],
)
def test_a_pruner_that_breaks_one_clause_fails_there_alone(
    broken: Any, failures: dict[str, str]
) -> None:
    outcome = check_pruner(lambda: broken(SparseGPTParams()))
    found = {check.name: check.failure or "" for check in outcome.checks if not check.passed}
    assert found.keys() == failures.keys()
    for name, words in failures.items():
        assert words in found[name]


def test_weights_given_back_in_another_layout_are_found() -> None:
    class Turned(SparseGPT):
        def prune(self, *args: Any) -> Any:
            for result in super().prune(*args):
                turned = result.weight.t() if len(args[0].blocks) < 6 else result.weight
                yield PrunedMatrix(result.name, turned, result.mask, result.report)

    outcome = check_pruner(lambda: Turned(SparseGPTParams()))
    [failure] = [one.failure for one in outcome.checks if one.name == "weights_keep_their_layout"]
    assert failure == "the weight of model.layers.0.gate.weight is [24, 16], not [16, 24]"
