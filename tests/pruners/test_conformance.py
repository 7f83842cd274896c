"""The built-in pruners keep the contract that the conformance kit holds strangers to."""

from __future__ import annotations

import pytest

from prufed_plugins.discover import build
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
