"""FLTrust in real runs: the server trains on rows of its own and holds the clients against that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prufed_cli.config import ConfigError
from prufed_cli.config.documents import validated
from prufed_cli.errors import INTEGRITY, PrufedError
from prufed_cli.federation.artifacts import read_tensors
from prufed_cli.federation.federate import FederateResult, federate
from prufed_cli.federation.measured import essentials
from prufed_cli.federation.plan import make_plan
from prufed_cli.federation.plan_report import describe
from prufed_cli.main import main
from prufed_registry import Registry

Document = dict[str, Any]
CLIENTS = [{"name": "dense"}, {"name": "half", "sparsity": 0.5}, {"name": "other"}]


def run(home: Path, document: Document) -> FederateResult:
    registry = Registry(home / "registry")
    return federate(config=validated(document), registry=registry, runs=home / "runs")


@pytest.fixture
def trusted(tmp_path: Path, data_file: Path) -> Path:
    path = tmp_path / "trusted.jsonl"
    path.write_text("\n".join(data_file.read_text().splitlines()[::4]))
    return path


@pytest.fixture
def document(configuration: Document, trusted: Path) -> Document:
    return {
        **configuration,
        "aggregator": {"name": "fltrust"},
        "server_data": str(trusted),
        "clients": CLIENTS,
    }


def test_the_server_trains_in_every_round_from_the_global_adapter(
    tmp_path: Path, document: Document
) -> None:
    result = run(tmp_path, {**document, "sampler": {"name": "sequential", "fraction": 0.67}})
    registry = Registry(tmp_path / "registry")
    own = registry.list("fed.root")
    assert [artifact.manifest.details["round"] for artifact in own] == [0, 1]
    assert all(artifact.manifest.details["samples"] == 20 for artifact in own)
    assert [parent.ref for parent in own[1].manifest.parents] == ["tiny@v1", "fed@v1"]
    for event in result.run.select("merged"):
        assert "root" not in event["clients"]
        assert f"trust in {event['clients'][0]} 0." in essentials(event)
        for module in event["diagnostics"].values():
            given = [module[key] for key in module if key.startswith("trust.")]
            assert len(given) == 2
            assert all(0 < trust <= 1 for trust in given)
    assert {"fed.root@v2", "fed@v1"} <= {p.ref for p in result.artifact.manifest.parents}
    assert registry.verify() == []


def test_no_client_moves_the_global_adapter_further_than_the_server(
    tmp_path: Path, document: Document
) -> None:
    """One client has a learning rate a hundred times the others'."""
    document |= {"rounds": 1, "adapter": {**document["adapter"], "preset": "dense"}}
    document["clients"] = [{"name": "a"}, {"name": "wild", "tuner": {"lr": 1.0}}]
    result = run(tmp_path, document)
    registry = Registry(tmp_path / "registry")
    new, root, wild = (
        {n: t for n, t in read_tensors(artifact).items() if "lora_B" in n}
        for artifact in (
            result.artifact,
            registry.resolve("fed.root"),
            registry.resolve("fed.wild@v1"),
        )
    )  # B is zero before the first round: its entries are its change
    sizes = [
        sum(float(tensor.square().sum()) for tensor in tensors.values()) ** 0.5
        for tensors in (new, root, wild)
    ]
    assert sizes[2] > 10 * sizes[1]
    assert sizes[0] < 2 * sizes[1]


def test_it_is_refused_without_rows_before_anything_is_made(
    tmp_path: Path, document: Document
) -> None:
    del document["server_data"]
    with pytest.raises(ConfigError, match="fltrust needs rows that the server trusts"):
        run(tmp_path, document)
    assert not (tmp_path / "registry").exists()


def test_other_aggregators_leave_the_server_s_rows_alone(
    tmp_path: Path, document: Document
) -> None:
    document |= {"aggregator": {"name": "heteagg"}, "rounds": 1, "clients": CLIENTS[:1]}
    run(tmp_path, document)
    assert Registry(tmp_path / "registry").list("fed.root") == []


def test_shares_of_own_values_are_refused(tmp_path: Path, document: Document) -> None:
    with pytest.raises(PrufedError, match=r"write_back.share 0.5 lets clients start elsewhere"):
        run(tmp_path, {**document, "write_back": {"share": 0.5}})


def test_a_server_that_cannot_train_stops_the_run(tmp_path: Path, document: Document) -> None:
    document["tuner"]["lr"] = 1e30  # its adapter is not finite after one round or, by rounding, two
    document["clients"] = [{"name": "a", "tuner": {"lr": 0.01}}]
    with pytest.raises(PrufedError, match=r"round [12] has no update of the server's") as caught:
        run(tmp_path, document)
    before = ["fed@v1"] if "round 2" in caught.value.message else []
    assert [artifact.ref for artifact in Registry(tmp_path / "registry").list("fed")] == before


def test_changed_rows_of_the_server_are_noticed(
    tmp_path: Path, document: Document, trusted: Path
) -> None:
    document |= {"rounds": 1, "clients": CLIENTS[:1]}
    result = run(tmp_path, document)
    trusted.write_text("\n".join(trusted.read_text().splitlines()[1:]))
    with pytest.raises(PrufedError, match="the data of the server has changed") as caught:
        federate(
            resume=result.run.id, registry=Registry(tmp_path / "registry"), runs=tmp_path / "runs"
        )
    assert caught.value.exit_code == INTEGRITY


def test_the_plan_says_whether_the_server_trains(
    prufed_home: Path,
    document: Document,
    write_configuration: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = str(write_configuration(document))
    assert main(["federate", "--clients", path, "--dry-run"]) == 0
    assert "server data 20 rows, on which the server trains too" in capsys.readouterr().out
    assert main(["federate", "--clients", path, "--dry-run", "--set", "aggregator=fedavg"]) == 0
    assert "server data not used by fedavg" in capsys.readouterr().out


def test_the_server_s_rows_are_part_of_the_plan(tmp_path: Path, document: Document) -> None:
    registry = Registry(tmp_path / "registry")
    plan = make_plan(validated(document), registry)
    assert describe(plan)["server"]["rows"] == 20
    other = make_plan(validated({**document, "aggregator": {"name": "fedavg"}}), registry)
    assert describe(other)["server"] is None
    assert plan.digest != other.digest
