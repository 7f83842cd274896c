"""The conformance kit on the methods of the literature: what each gives up, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prufed_plugins.api import Update
from prufed_plugins.discover import build
from prufed_plugins.errors import UpdateError
from prufed_plugins.testing import check_aggregator
from prufed_plugins.testing.federation import random_state, random_update

PRODUCT = "c1 c4 c5 c7 c9 c12 c14"

GIVEN_UP: list[tuple[str, dict[str, Any], str]] = [
    ("fedit", {}, "c1 c5"),
    ("hetlora", {}, "c1 c4 c5 c12"),
    ("hetlora", {"normalize": "coverage"}, "c4 c12"),
    ("hetlora", {"normalize": "coverage", "weights": "samples"}, ""),
    ("flexlora", {}, PRODUCT),
    ("flexlora", {"split": "balanced", "beta": 0}, PRODUCT.replace("c9", "")),
    ("raflora", {}, PRODUCT),
    ("flora", {}, "c1 c4 c5 c14"),
    ("fedex", {}, ""),
    ("fedex", {"residual_rank": 1}, ""),
    ("median", {}, "c4"),
    ("trimmed-mean", {}, ""),
    ("trimmed-mean", {"trim": 0.4}, "c4"),
    ("krum", {}, "c4 c7 c12"),
    ("krum", {"byzantine": 0}, "c4 c7 c12"),
    ("multi-krum", {}, "c4 c7"),
    ("fltrust", {}, "c1 c4 c7 c12"),
    ("ties", {}, "c1 c4 c7 c12"),
    ("ties", {"density": 1}, "c4"),
    ("dare", {}, "c1 c4 c7 c9 c12 c13"),
    ("dare", {"then": "ties"}, "c1 c4 c7 c9 c12 c13"),
    ("dare", {"drop": 0}, ""),
    ("lora-fair", {}, "c1 c4 c5 c12"),
    ("fjord", {}, ""),
    ("fedrolex", {}, ""),
    ("user-centric", {}, ""),
    ("fedsa", {}, ""),
    ("fedsa", {"global_b": "keep"}, "c1 c4 c7"),
    ("inclusivefl", {}, ""),
    ("heteagg-ls", {}, "c1 c4 c7 c12"),
    ("heteagg-ls", {"refine": "both"}, "c1 c4 c7 c12"),
]


@pytest.mark.parametrize(("method", "values", "given_up"), GIVEN_UP)
def test_each_method_gives_up_what_it_says(
    method: str, values: dict[str, Any], given_up: str
) -> None:
    outcome = check_aggregator(lambda: build("aggregator", method, values))
    outcome.require()
    excused = {c.name.split("_")[0] for c in outcome.checks if c.excuse}
    assert excused == set(given_up.split())


@pytest.mark.parametrize("method", ["fedavg", "fedit", "lora-fair"])
def test_a_plain_mean_refuses_clients_of_unequal_depth(method: str) -> None:
    state = random_state(layers=2)
    updates: list[Update] = [
        random_update(state, "deep", seed=0),
        random_update(state, "shallow", seed=1, kept_layers=(0,)),
    ]
    with pytest.raises(UpdateError, match=f"client deep, which {method} cannot average"):
        build("aggregator", method, {}).prepare(updates, state)


def test_fedit_is_fedavg() -> None:
    from prufed_plugins.aggregators.streaming import aggregate

    state = random_state(seed=1)
    updates = [random_update(state, f"c{i}", seed=i, samples=i + 1) for i in range(3)]
    one, other = (
        aggregate(build("aggregator", method, {}), updates, state).state.tensors
        for method in ("fedit", "fedavg")
    )
    assert all(torch.equal(one[name], other[name]) for name in state.tensors)
