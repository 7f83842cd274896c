"""A run keeps what does not belong in the merge out of it, and says so in journal and on screen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prufed_cli.config.documents import validated
from prufed_cli.errors import PrufedError
from prufed_cli.federation.federate import FederateResult, federate
from prufed_cli.main import main
from prufed_cli.models.adapter_files import load_adapter
from prufed_cli.progress import Reporter
from prufed_registry import Registry


class Told(Reporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, message: str) -> None:
        self.lines.append(message)

    def warn(self, message: str) -> None:
        self.lines.append(f"warning: {message}")


def run(home: Path, document: dict[str, Any], told: Reporter) -> FederateResult:
    return federate(
        config=validated(document),
        registry=Registry(home / "registry"),
        runs=home / "runs",
        reporter=told,
    )


@pytest.fixture
def wild(configuration: dict[str, Any]) -> dict[str, Any]:
    """Return a federation whose client ``pattern`` trains a thousand times too fast."""
    configuration["rounds"] = 1
    configuration["tuner"] |= {"lr": 1e-3, "max_steps": 1}
    configuration["clients"][2]["tuner"] = {"lr": 1.0}
    return configuration


def test_an_outlier_is_excluded_and_seen(
    prufed_home: Path, wild: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    wild["screen"] = {"outlier": 100}
    told = Told()
    result = run(prufed_home, wild, told)
    (merged,) = result.run.select("merged")
    assert merged["clients"] == ["dense", "half", "shallow"]
    assert "times the median of the others" in merged["excluded"]["pattern"]
    assert merged["updates"].keys() == {"dense", "half", "shallow"}
    assert any(
        line.startswith("warning: client pattern is excluded from the merge") for line in told.lines
    )
    capsys.readouterr()
    assert main(["runs", "show", "fed-1"]) == 0
    shown = capsys.readouterr().out
    assert "excluded: its update has norm" in shown
    assert "round 1 merged: coverage 100.0%, change " in shown
    assert "cross term " in shown


def test_clipping_is_journalled_and_keeps_every_change_below_the_limit(
    prufed_home: Path, wild: dict[str, Any]
) -> None:
    wild["screen"] = {"clip": "median", "outlier": 0}
    told = Told()
    (merged,) = run(prufed_home, wild, told).run.select("merged")
    assert merged["excluded"] == {}
    norms = {name: said["norm"] for name, said in merged["updates"].items()}
    clipped = {name for name, said in merged["updates"].items() if "clipped" in said}
    assert "pattern" in clipped
    assert len({round(norms[name], 4) for name in clipped}) == 1
    assert max(norms.values()) == pytest.approx(norms["pattern"], rel=1e-4)
    assert any(line.startswith("client pattern: its change is scaled by") for line in told.lines)


def test_every_module_and_client_is_described(
    prufed_home: Path, configuration: dict[str, Any]
) -> None:
    merged = run(prufed_home, configuration, Told()).run.select("merged")
    for event in merged:
        assert json.loads(json.dumps(event)) == event
        for name, module in event["diagnostics"].items():
            deep = ".layers.0." in name or ".layers.1." in name  # which `shallow` does not have
            assert len(module["coverage_histogram"]) == (4 if deep else 5)
            assert module["norm_min"] <= module["norm_mean"] <= module["norm_max"]
            assert -1 <= module["cosine_min"] <= module["cosine_mean"] <= 1
            assert module["update_norm"] > 0
        assert all(-1 <= said["cosine"] <= 1 for said in event["updates"].values())
    # before the second round B is not zero, so there is a product to lose something of
    assert all(module["cross_term"] > 0 for module in merged[1]["diagnostics"].values())


def test_too_few_that_pass_stop_the_run(prufed_home: Path, wild: dict[str, Any]) -> None:
    wild |= {"screen": {"outlier": 100}, "min_clients": 4}
    with pytest.raises(PrufedError, match="round 1 has 3 usable updates of 4, and 4 are needed"):
        run(prufed_home, wild, Told())


def test_clients_may_weigh_by_the_norm_of_their_products(
    prufed_home: Path, configuration: dict[str, Any]
) -> None:
    configuration |= {"tier_weight": "update-norm", "rounds": 1}
    configuration["clients"] = [{"name": "far"}, {"name": "near", "tuner": {"lr": 1e-4}}]
    configuration["aggregator"] = {"name": "heteagg", "include_global": False}
    journal = run(prufed_home, configuration, Told()).run
    [event] = journal.select("merged")
    weights = {name: said["weight"] for name, said in event["updates"].items()}
    assert weights["far"] > 10 * weights["near"] > 0

    def tensors(ref: str) -> dict[str, Tensor]:
        return load_adapter(Registry(prufed_home / "registry").resolve(ref).path)[0]

    sent = {one["client"]: tensors(one["ref"]) for one in journal.select("client")}
    for name, merged in tensors(event["ref"]).items():
        expected = sum(weight * sent[client][name] for client, weight in weights.items())
        torch.testing.assert_close(merged, expected / sum(weights.values()), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("aggregator", ["fedrolex", "fedsa"])
def test_changes_are_measured_from_what_each_client_was_sent(
    prufed_home: Path, configuration: dict[str, Any], aggregator: str
) -> None:
    configuration["aggregator"] = {"name": aggregator}
    configuration["adapter"] |= {"preset": "dense", "r": 6}
    configuration["tuner"]["lr"] = 1e-6  # nobody moves by more than this, whatever it began with
    configuration["rounds"] = 3
    configuration["clients"] = [{"name": "whole"}, {"name": "part", "adapter": {"r": 4}}]
    merged = run(prufed_home, configuration, Told()).run.select("merged")
    assert len(merged) == 3
    for event in merged:
        assert all(0 < said["norm"] < 1e-3 for said in event["updates"].values())
