"""The plan that is printed before a run: every choice, the weight of every client, and warnings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prufed_cli.config.documents import validated
from prufed_cli.errors import PrufedError
from prufed_cli.federation.federate import set_values
from prufed_cli.federation.plan import Plan, make_plan
from prufed_cli.federation.plan_report import (
    correlation,
    describe,
    heading,
    warnings,
    weight_shares,
)
from prufed_cli.main import main
from prufed_plugins.aggregators.streaming import aggregate
from prufed_plugins.api import Update
from prufed_plugins.builtin import prufed_aggregators
from prufed_plugins.discover import build, catalog
from prufed_plugins.testing.federation import random_state, random_update
from prufed_plugins.weighting import Weighting, by_samples, weighting_of
from prufed_registry import Registry

Document = dict[str, Any]


def plan_of(home: Path, document: Document) -> Plan:
    return make_plan(validated(document), Registry(home / "registry"))


def unequal(document: Document, tmp_path: Path, sizes: list[int], **more: Any) -> Document:
    """Return a federation of the tiers 0, 25, 50 and 75 % with so many rows each."""
    clients = []
    for index, size in enumerate(sizes):
        path = tmp_path / f"rows-{index}.jsonl"
        path.write_text("".join('{"instruction": "a", "response": "b"}\n' for _ in range(size)))
        clients.append({"name": f"c{index}", "sparsity": 0.25 * index, "data": str(path)})
    return {**document, "clients": clients, **more}


# --- weights -------------------------------------------------------------------------------------


@given(
    weights=st.lists(st.floats(0.01, 100), min_size=3, max_size=3),
    samples=st.lists(st.integers(1, 10_000), min_size=3, max_size=3),
    beta=st.floats(0, 2),
    scale=st.floats(0.1, 10),
)
def test_shares_add_up_and_do_not_depend_on_the_scale_of_the_weights(
    weights: list[float], samples: list[int], beta: float, scale: float
) -> None:
    shares = by_samples(beta).shares(weights, samples)
    assert shares is not None
    assert sum(shares) == pytest.approx(1)
    again = by_samples(beta).shares([scale * weight for weight in weights], samples)
    assert again == pytest.approx(shares)
    for one, other in ((0, 1), (1, 2)):
        ratio = weights[one] / weights[other] * (samples[one] / samples[other]) ** beta
        assert shares[one] / shares[other] == pytest.approx(ratio)


LINEAR = [
    ("fedavg", {}),
    ("fedavg", {"beta": 0}),
    ("fedit", {}),
    ("heteagg", {}),
    ("heteagg", {"beta": 0.5}),
    ("heteagg-layer", {"beta": 1}),
    ("inclusivefl", {}),
    ("hetlora", {"weights": "samples"}),
    ("fedsa", {}),
    ("fjord", {}),
    ("fedrolex", {"beta": 2}),
    ("multi-krum", {"byzantine": 0, "select": 3}),
    ("dare", {"drop": 0}),
]


@pytest.mark.parametrize(("method", "settings"), LINEAR)
def test_the_shares_are_those_that_the_method_merges_with(
    method: str, settings: dict[str, Any]
) -> None:
    state = random_state(seed=1)
    sent: list[Update] = []
    for index, (samples, weight) in enumerate(((10, 1.0), (30, 2.0), (200, 0.5))):
        update = random_update(state, f"c{index}", seed=index, samples=samples)
        tensors = {n: torch.full_like(t, 10.0**index) for n, t in update.tensors.items()}
        sent.append(Update(**{**vars(update), "tensors": tensors, "weight": weight}))
    params = catalog().get("aggregator", method).method.params.model_validate(settings)
    shares = weighting_of(params).shares([u.weight for u in sent], [u.samples for u in sent])
    assert shares is not None
    expected = sum(share * 10.0**index for index, share in enumerate(shares))
    merged = aggregate(build("aggregator", method, settings), sent, state)
    for name, tensor in merged.state.tensors.items():
        assert torch.allclose(tensor, torch.full_like(tensor, expected), rtol=1e-5), name


def test_every_built_in_aggregator_says_how_it_weighs() -> None:
    unknown = Weighting("found by the method in each round")
    for method in prufed_aggregators():
        assert weighting_of(method.params()) != unknown, method.name


@pytest.mark.parametrize("method", ["median", "trimmed-mean", "krum"])
def test_what_does_not_weigh_says_so_where_somebody_expects_it_to(
    tmp_path: Path, configuration: Document, method: str
) -> None:
    document = {**configuration, "aggregator": {"name": method}}
    assert not any("does not weigh" in said for said in warnings(plan_of(tmp_path, document)))
    document["clients"][1]["weight"] = 3.0
    plan = plan_of(tmp_path, document)
    assert any(f"{method} does not weigh" in said for said in warnings(plan))
    assert weight_shares(plan) is None


def test_tier_weights_are_the_inverse_of_the_density(
    tmp_path: Path, configuration: Document
) -> None:
    document = {**configuration, "tier_weight": "inverse-density"}
    plan = plan_of(tmp_path, document)
    assert [client.submodel.density for client in plan.clients] == [1.0, 0.5, 0.5, 0.5]
    assert [client.weight for client in plan.clients] == [1.0, 2.0, 2.0, 2.0]
    assert weight_shares(plan) == pytest.approx(
        {"dense": 1 / 7, "half": 2 / 7, "pattern": 2 / 7, "shallow": 2 / 7}
    )
    assert any("times 1 / density by tier" in line for line in heading(plan))


def test_weights_by_the_norm_are_not_known_before_the_round(
    tmp_path: Path, configuration: Document
) -> None:
    document = {**configuration, "tier_weight": "update-norm"}
    plan = plan_of(tmp_path, document)
    assert weight_shares(plan) is None
    assert any("times the norm of each update's product" in line for line in heading(plan))
    assert not any("does not weigh" in said for said in warnings(plan))
    document["aggregator"] = {"name": "median"}
    assert any("does not weigh" in said for said in warnings(plan_of(tmp_path, document)))


# --- warnings ------------------------------------------------------------------------------------


def test_tiers_and_rows_that_go_together_are_warned_of(
    tmp_path: Path, configuration: Document
) -> None:
    """ρ of densities 1, .75, .5, .25 with rows 40, 30, 20, 10 is 1; with 10, 40, 40, 10 it is 0."""
    dense = plan_of(tmp_path, unequal(configuration, tmp_path, [40, 30, 20, 10]))
    assert correlation(dense) == pytest.approx(1)
    [said] = warnings(dense)
    assert said.startswith("the dense clients have the most rows (ρ = 1.00 between")
    sparse = plan_of(tmp_path, unequal(configuration, tmp_path, [10, 20, 30, 40]))
    assert next(warnings(sparse)).startswith("the sparse clients have the most rows (ρ = -1.00")
    even = plan_of(tmp_path, unequal(configuration, tmp_path, [10, 40, 40, 10]))
    assert correlation(even) == pytest.approx(0, abs=1e-12)
    assert list(warnings(even)) == []


def test_equal_rows_or_two_clients_have_no_correlation(
    tmp_path: Path, configuration: Document
) -> None:
    assert correlation(plan_of(tmp_path, unequal(configuration, tmp_path, [9, 9, 9]))) is None
    assert correlation(plan_of(tmp_path, unequal(configuration, tmp_path, [9, 1]))) is None


# --- what is said --------------------------------------------------------------------------------


def test_every_choice_stands_in_the_plan(tmp_path: Path, configuration: Document) -> None:
    document = unequal(
        configuration,
        tmp_path,
        [10, 20, 30],
        sampler={"name": "sequential", "fraction": 0.34},
        aggregator={"name": "heteagg", "beta": 1, "min_count": 2},
        server_optimizer={"name": "fedavgm", "momentum": 0.5},
        write_back={"share": 0.25},
        screen={"clip": "median", "outlier": 50},
    )
    document["clients"][1]["tuner"] = {"lr": 0.02}
    plan = plan_of(tmp_path, document)
    said = "\n".join(heading(plan))
    for words in (
        "min_count=2",
        "fallback=keep",
        "the global adapter joins in 2 of 2 rounds",
        "by rows, w = weight · n^1; no tier weights",
        "shares are of all clients, of whom 1 train in a round",
        "fedavgm (lr=1, momentum=0.5)",
        "outliers above 50 times the others' median, clipped to median",
        "mix(0.25): clients keep 25% of their own adapter",
    ):
        assert words in said
    found = json.loads(json.dumps(describe(plan)))
    assert found["aggregator"]["include_global"] == "auto"
    assert found["sampled"] == [["c0"], ["c1"]]
    assert found["weights"]["beta"] == 1
    assert [client["weight_share"] for client in found["clients"]] == pytest.approx(
        [1 / 6, 1 / 3, 1 / 2], rel=1e-5
    )
    assert [client["tuner"]["lr"] for client in found["clients"]] == [0.01, 0.02, 0.01]


@pytest.mark.parametrize("method", [method.name for method in prufed_aggregators()])
def test_every_aggregator_is_chosen_on_the_command_line(
    configuration: Document,
    write_configuration: Callable[[Document], Path],
    capsys: pytest.CaptureFixture[str],
    method: str,
) -> None:
    settings = {"krum": ["byzantine=0"], "multi-krum": ["byzantine=0"], "flora": []}
    configuration["server_data"] = configuration["data"]["path"]
    configuration["clients"] = configuration["clients"][:3]
    if method == "flora":
        configuration |= {"rounds": 1, "adapter": {**configuration["adapter"], "r": 6}}
        configuration["clients"] = [{**c, "adapter": {"r": 2}} for c in configuration["clients"]]
    command = ["federate", "--clients", str(write_configuration(configuration)), "--dry-run"]
    options = [f"aggregator={method}", *(f"aggregator.{s}" for s in settings.get(method, []))]
    for option in options:
        command += ["--set", option]
    assert main([*command, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["aggregator"]["name"] == method
    assert plan["weights"]["rule"]


# --- --set ---------------------------------------------------------------------------------------


def test_a_method_and_its_parameters_may_be_set_in_either_order(configuration: Document) -> None:
    config = validated(configuration)
    for settings in (
        {"aggregator": "fedavg", "aggregator.beta": 0},
        {"aggregator.beta": 0, "aggregator": "fedavg"},
    ):
        changed = set_values(config, settings)
        assert (changed.aggregator.name, changed.aggregator.settings) == ("fedavg", {"beta": 0})
    stepped = set_values(config, {"server_optimizer.lr": 0.1, "server_optimizer": "fedadam"})
    assert stepped.server_optimizer is not None
    assert stepped.server_optimizer.settings == {"lr": 0.1}


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("aggregator.betta", "aggregator.betta: unknown key for the aggregator heteagg; did you"),
        ("nosuch.key", "nosuch: unknown key"),
        ("clients.0.sparsity", "clients is a list, of which --set cannot change one entry"),
        ("tuner.lr.high", "tuner.lr is not a section"),
    ],
)
def test_a_setting_that_does_not_exist_is_one_clear_sentence(
    configuration: Document, key: str, said: str
) -> None:
    with pytest.raises(PrufedError) as caught:
        set_values(validated(configuration), {key: 1})
    assert said in caught.value.message
    assert caught.value.hint
    assert caught.value.exit_code == 2


# --- lists of layers -----------------------------------------------------------------------------


@pytest.mark.parametrize(("listed", "left"), [({"layers": [0, 1]}, 2), ({"drop_layers": [2]}, 3)])
def test_a_list_of_layers_is_as_long_as_the_client_says(
    tmp_path: Path, configuration: Document, listed: Document, left: int
) -> None:
    def asking(keep: int) -> Document:
        own = {"name": "a", "keep_layers": keep, "pruner": {"name": "explicit", **listed}}
        return {**configuration, "clients": [own]}

    assert plan_of(tmp_path, asking(left)).clients[0].submodel.layers == left
    with pytest.raises(PrufedError, match=rf"a keeps 4 layers, but its list leaves {left}"):
        plan_of(tmp_path, asking(4))
