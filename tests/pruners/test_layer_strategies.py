"""Which layers each strategy drops, and how many."""

from __future__ import annotations

import pytest

from prufed_plugins.api import KeptLayers, PruneTarget
from prufed_plugins.discover import build, catalog
from prufed_plugins.errors import MethodError
from prufed_plugins.testing.pruner import TinyDecoder

POSITIONAL = ["top", "bottom", "odd-alternate", "even-alternate", "top-alternate", "symmetric"]
SCORING = ["parameter", "magnitude-layers", "contribution", "angular"]


def kept(method: str, settings: dict[str, object], target: PruneTarget, layers: int) -> list[int]:
    decoder = TinyDecoder(layers=layers, width=2, inner=2)
    results = list(build("pruner", method, settings).prune(decoder, None, target, lambda *_: None))
    assert len(results) == 1
    assert isinstance(results[0], KeptLayers)
    return list(results[0].layers)


def dropped(method: str, layers: int, count: int) -> list[int]:
    left = kept(method, {"drop": count}, PruneTarget(), layers)
    return [index for index in range(layers) if index not in left]


@pytest.mark.parametrize(
    ("method", "of_twelve", "of_thirty_two"),
    [
        ("top", [9, 10, 11, 12], list(range(24, 32))),
        ("bottom", [1, 2, 3, 4], list(range(8))),
        ("odd-alternate", [5, 7, 9, 11], list(range(16, 31, 2))),
        ("even-alternate", [6, 8, 10, 12], list(range(17, 32, 2))),
        ("top-alternate", [6, 8, 10, 12], list(range(17, 32, 2))),
        ("symmetric", [5, 6, 7, 8], list(range(12, 20))),
    ],
)
def test_the_published_tables(method: str, of_twelve: list[int], of_thirty_two: list[int]) -> None:
    assert [index + 1 for index in dropped(method, 12, 4)] == of_twelve
    assert dropped(method, 32, 8) == of_thirty_two


def test_alternate_starts_at_the_highest_layer_of_its_parity_when_the_depth_is_odd() -> None:
    assert dropped("odd-alternate", 5, 2) == [2, 4]
    assert dropped("even-alternate", 5, 2) == [1, 3]


def test_an_alias_says_what_it_stands_for() -> None:
    alias, meant = (catalog().get("pruner", f"{name}-alternate") for name in ("top", "even"))
    assert alias.method.alias_of == meant.method.name
    assert catalog().canonical("pruner", "top_alternate") == "even-alternate"
    assert catalog().canonical("pruner", "symmetric") == "symmetric"
    assert alias.method.target == meant.method.target
    assert alias.method.params is meant.method.params


def test_symmetric_drops_the_middle_half() -> None:
    assert [index + 1 for index in dropped("symmetric", 12, 6)] == [4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("method", POSITIONAL)
@pytest.mark.parametrize("layers", [2, 3, 5, 7])
def test_counts_at_their_bounds(method: str, layers: int) -> None:
    assert dropped(method, layers, 0) == []
    most = {"odd-alternate": (layers + 1) // 2, "even-alternate": layers // 2}
    bound = min(most.get(method.replace("top-", "even-"), layers), layers - 2)
    assert len(dropped(method, layers, bound)) == bound
    with pytest.raises(MethodError, match=r"cannot drop|leaves fewer than 2"):
        dropped(method, layers, bound + 1)


@pytest.mark.parametrize("method", [*POSITIONAL, *SCORING])
@pytest.mark.parametrize("count", [0, 1])
def test_a_model_of_one_layer_is_refused_in_its_own_words(method: str, count: int) -> None:
    with pytest.raises(MethodError, match="has 1 decoder layer, so none can be dropped") as refusal:
        kept(method, {"drop": count}, PruneTarget(), 1)
    assert "magnitude" in str(refusal.value.hint)


def test_symmetric_keeps_the_extra_layer_on_top() -> None:
    assert kept("symmetric", {"keep": 3}, PruneTarget(), 5) == [0, 3, 4]
    assert kept("symmetric", {"keep": 3}, PruneTarget(), 6) == [0, 4, 5]


@pytest.mark.parametrize(
    ("settings", "target", "left"),
    [
        ({"keep": 5}, PruneTarget(), 5),
        ({"drop": 5}, PruneTarget(), 7),
        ({}, PruneTarget(layers=5), 7),
        ({}, PruneTarget(sparsity=0.3), 8),  # round(3.6) = 4
        ({}, PruneTarget(sparsity=0.0), 12),
    ],
)
def test_the_count_comes_from_a_setting_or_the_target(
    settings: dict[str, object], target: PruneTarget, left: int
) -> None:
    assert len(kept("top", settings, target, 12)) == left


def test_explicit_lists() -> None:
    assert kept("explicit", {"layers": [5, 0, 2]}, PruneTarget(), 6) == [0, 2, 5]
    assert kept("explicit", {"drop_layers": [0, 4]}, PruneTarget(), 6) == [1, 2, 3, 5]


@pytest.mark.parametrize(
    ("method", "settings", "target", "message"),
    [
        ("top", {}, PruneTarget(), "nothing says how many layers"),
        ("top", {"keep": 3}, PruneTarget(sparsity=0.5), "keep and sparsity both say"),
        ("top", {"keep": 3, "drop": 3}, PruneTarget(), "drop and keep both say"),
        ("top", {}, PruneTarget(pattern=(2, 4)), "pattern 2:4"),
        ("top", {"drop": 5}, PruneTarget(), "dropping 5 of 6 layers leaves fewer than 2"),
        ("top", {}, PruneTarget(sparsity=0.9), "dropping 5 of 6 layers"),
        ("symmetric", {"keep": 7}, PruneTarget(), "cannot keep 7 layers of a model that has 6"),
        ("odd-alternate", {"drop": 4}, PruneTarget(), "cannot drop 4 of the 3 odd layers"),
        ("explicit", {}, PruneTarget(), "give one list"),
        ("explicit", {"layers": [0, 1], "drop_layers": [2]}, PruneTarget(), "give one list"),
        ("explicit", {"layers": [0, 6]}, PruneTarget(), "layer 6 does not exist"),
        ("explicit", {"layers": [-1, 2]}, PruneTarget(), "layer -1 does not exist"),
        ("explicit", {"layers": [1, 1, 2]}, PruneTarget(), "layer 1 is listed twice"),
        ("explicit", {"layers": [3]}, PruneTarget(), "dropping 5 of 6 layers"),
        ("explicit", {"layers": [0, 3]}, PruneTarget(layers=4), "one answer too many"),
    ],
)
def test_what_is_refused(
    method: str, settings: dict[str, object], target: PruneTarget, message: str
) -> None:
    with pytest.raises(MethodError, match=message) as refusal:
        kept(method, settings, target, 6)
    assert refusal.value.hint
