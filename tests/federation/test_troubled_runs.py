"""Clients that fail, requests that cannot be met, and what is left behind: nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prufed_cli.config.documents import validated
from prufed_cli.errors import PrufedError
from prufed_cli.federation.federate import FederateResult, federate, set_values
from prufed_cli.federation.plan import make_plan
from prufed_cli.main import main
from prufed_cli.pruning import PruneRequest, prune
from prufed_plugins.errors import MethodError
from prufed_registry import Registry

Document = dict[str, Any]


def run(home: Path, document: Document) -> FederateResult:
    registry = Registry(home / "registry")
    return federate(config=validated(document), registry=registry, runs=home / "runs")


def small(document: Document, *clients: Document) -> Document:
    return {**document, "rounds": 1, "clients": list(clients)}


def test_a_client_that_diverges_is_excluded(tmp_path: Path, configuration: Document) -> None:
    wild = {"name": "wild", "tuner": {"lr": 1e30}}
    result = run(tmp_path, small(configuration, {"name": "calm"}, wild))
    failed = result.run.select("client_failed")
    assert [event["client"] for event in failed] == ["wild"]
    assert "nan" in failed[0]["reason"].lower() or "inf" in failed[0]["reason"].lower()
    assert result.run.find("merged")["clients"] == ["calm"]  # type: ignore[index]
    tuned = [a.ref for a in Registry(tmp_path / "registry").list("fed.wild")]
    assert tuned == ["fed.wild@v1"]  # the write-back alone; nothing it trained


def test_too_few_clients_end_the_run(tmp_path: Path, configuration: Document) -> None:
    wild = {"name": "wild", "tuner": {"lr": 1e30}}
    document = {**small(configuration, {"name": "calm"}, wild), "min_clients": 2}
    with pytest.raises(PrufedError, match="has 1 adapter of 2 clients, and 2 are needed"):
        run(tmp_path, document)
    assert Registry(tmp_path / "registry").list("fed") == []


def test_what_a_method_cannot_mix_is_refused_before_training(
    tmp_path: Path, configuration: Document
) -> None:
    odd = {"name": "odd", "adapter": {"r": 2}}
    with pytest.raises(MethodError, match="odd"):
        run(tmp_path, small(configuration, {"name": "even"}, odd))
    shallow = {"name": "shallow", "keep_layers": 2}
    mixed = {**small(configuration, {"name": "deep"}, shallow), "aggregator": {"name": "fedavg"}}
    with pytest.raises(MethodError, match="other layers"):
        run(tmp_path / "depths", mixed)
    assert Registry(tmp_path / "registry").list("fed.even") == []
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_share_of_its_own_values_stays_with_the_client(
    tmp_path: Path, configuration: Document
) -> None:
    from prufed_cli.federation.artifacts import read_tensors

    document = {
        **small(configuration, {"name": "a"}, {"name": "b"}),
        "write_back": {"share": 1.0},
    }
    run(tmp_path, document)
    registry = Registry(tmp_path / "registry")
    tuned, written = (read_tensors(registry.resolve(f"fed.a@v{v}")) for v in (1, 2))
    assert all((tuned[name] - written[name]).abs().max() < 1e-6 for name in tuned)


def test_a_foreign_sub_model_is_refused(
    tmp_path: Path, configuration: Document, base_directory: Path, calibration_file: Path
) -> None:
    import shutil

    registry = Registry(tmp_path / "registry")
    other = tmp_path / "other"
    shutil.copytree(base_directory, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    request = PruneRequest(base=str(other), method="magnitude", sparsity=0.5)
    foreign = prune(request, registry=registry, device="cpu").artifact
    with pytest.raises(PrufedError, match="was not made from"):
        run(tmp_path, small(configuration, {"name": "a", "base": foreign.ref}))


def test_too_many_layers_are_refused_in_the_plan(tmp_path: Path, configuration: Document) -> None:
    document = small(configuration, {"name": "a", "keep_layers": 9})
    with pytest.raises(PrufedError, match="has only 4"):
        make_plan(validated(document), Registry(tmp_path / "registry"))


def test_dry_run_prints_the_plan_and_writes_nothing(
    configuration: Document,
    write_configuration: Callable[[Document], Path],
    prufed_home: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_configuration(configuration)
    assert main(["federate", "--clients", str(path), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["schema"] == 1
    assert [client["submodel"] for client in plan["clients"]] == [
        "dense",
        "sparsegpt 50%",
        "sparsegpt 2:4",
        "bottom, 2 layers",
    ]
    assert {client["rows"] for client in plan["clients"]} == {20}
    assert list(prufed_home.iterdir()) == []


def test_set_replaces_values_and_is_checked(configuration: Document) -> None:
    config = validated(configuration)
    changed = set_values(config, {"rounds": 5, "tuner.lr": 1e-4, "aggregator": "fedavg"})
    assert (changed.rounds, changed.aggregator.name) == (5, "fedavg")
    assert changed.tuner.settings["lr"] == 1e-4
    with pytest.raises(PrufedError, match="rounds"):
        set_values(config, {"rounds": 0})
    with pytest.raises(PrufedError, match="heteag"):
        set_values(config, {"aggregator": "heteag"})


@pytest.mark.parametrize("sampler", ["all", "uniform", "sequential", "by-sparsity", "by-depth"])
@pytest.mark.parametrize("aggregator", ["fedavg", "heteagg", "heteagg-layer"])
def test_plan_accepts_every_built_in(
    tmp_path: Path, configuration: Document, sampler: str, aggregator: str
) -> None:
    config = set_values(validated(configuration), {"sampler": sampler, "aggregator": aggregator})
    assert len(make_plan(config, Registry(tmp_path / "registry")).clients) == 4


@pytest.mark.parametrize("factor_mask", ["magnitude", "structured", "rank", "none"])
def test_every_factor_mask_runs_two_rounds(
    tmp_path: Path, configuration: Document, factor_mask: str
) -> None:
    configuration["adapter"] |= {"factor_mask": factor_mask}
    document = {
        **configuration,
        "clients": [{"name": "dense"}, {"name": "half", "sparsity": 0.5}],
    }
    result = run(tmp_path, document)
    assert result.artifact.version == 2
    from prufed_cli.federation.artifacts import read_masks, read_tensors

    artifact = Registry(tmp_path / "registry").resolve("fed.half@v2")
    masks, tensors = read_masks(artifact), read_tensors(artifact)
    assert bool(masks) == (factor_mask != "none")
    assert all(not tensors[name][~mask].any() for name, mask in masks.items())
