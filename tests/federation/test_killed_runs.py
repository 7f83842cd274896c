"""A run killed anywhere and resumed ends with the same bytes as one that was not."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prufed_cli.config.documents import validated
from prufed_cli.errors import PrufedError
from prufed_cli.federation import journal
from prufed_cli.federation.federate import federate
from prufed_registry import Registry


def run(home: Path, document: dict[str, Any]) -> None:
    federate(config=validated(document), registry=Registry(home / "registry"), runs=home / "runs")


def resume(home: Path, run_id: str) -> None:
    federate(resume=run_id, registry=Registry(home / "registry"), runs=home / "runs")


def adapters(home: Path) -> dict[str, str]:
    """Return name and version of every adapter, with its digest."""
    return {
        artifact.ref: artifact.digest
        for artifact in Registry(home / "registry").list()
        if artifact.name.startswith("fed")
    }


def start_and_kill(
    home: Path, document: dict[str, Any], when: Callable[[Path], bool], patience: float = 120
) -> None:
    """Run in a process of its own and kill it with SIGKILL as soon as ``when`` is true."""
    _kill(
        multiprocessing.get_context("fork").Process(target=run, args=(home, document)),
        *(home, when, patience),
    )


def resume_and_kill(home: Path, when: Callable[[Path], bool], patience: float = 120) -> None:
    """Resume in a process of its own and kill it likewise."""
    process = multiprocessing.get_context("fork").Process(target=resume, args=(home, "fed-1"))
    _kill(process, home, when, patience)


def _kill(process: Any, home: Path, when: Callable[[Path], bool], patience: float) -> None:
    process.start()
    deadline = time.monotonic() + patience
    while process.is_alive() and not when(home) and time.monotonic() < deadline:
        time.sleep(0.002)
    assert process.pid is not None
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL, "the run ended before it could be killed"


def events(home: Path) -> int:
    files = list((home / "runs").glob("*/events.jsonl"))
    return files[0].read_bytes().count(b"\n") if files else 0


def journalled(home: Path, kind: str) -> int:
    """Return how many events of this kind the journal has."""
    files = list((home / "runs").glob("*/events.jsonl"))
    return files[0].read_bytes().count(f'"event":"{kind}"'.encode()) if files else 0


def published(home: Path, count: int) -> bool:
    """Whether so many client adapters exist, journalled or not."""
    return len(list((home / "registry" / "artifacts").glob("fed.*/v*"))) >= count


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory,
    base_directory: Path,
    data_file: Path,
    calibration_file: Path,
    shared_configuration: Any,
) -> dict[str, str]:
    home = tmp_path_factory.mktemp("uninterrupted")
    run(home, shared_configuration(base_directory, data_file, calibration_file))
    return adapters(home)


@pytest.mark.slow
@pytest.mark.parametrize(
    "when",
    [
        pytest.param(lambda home: events(home) >= 1, id="before-the-first-client"),
        pytest.param(lambda home: published(home, 2), id="between-publishing-and-the-journal"),
        pytest.param(lambda home: events(home) >= 7, id="between-rounds"),
        pytest.param(lambda home: events(home) >= 13, id="while-writing-back"),
    ],
)
def test_killed_and_resumed_ends_with_the_same_bytes(
    tmp_path: Path,
    configuration: dict[str, Any],
    uninterrupted: dict[str, str],
    when: Callable[[Path], bool],
) -> None:
    start_and_kill(tmp_path, configuration, when)
    registry = Registry(tmp_path / "registry")
    assert registry.verify() == []
    resume(tmp_path, "fed-1")
    assert adapters(tmp_path) == uninterrupted
    assert registry.verify() == []
    assert journal.load(tmp_path / "runs", "fed-1").finished


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedavgm", "fedadam"])
def test_the_server_optimizer_goes_on_where_it_was(
    tmp_path: Path, configuration: dict[str, Any], name: str
) -> None:
    configuration["server_optimizer"] = {"name": name, "lr": 0.05}
    configuration["rounds"] = 3
    configuration["clients"] = configuration["clients"][:2]
    run(tmp_path / "whole", configuration)

    def merged(count: int) -> Callable[[Path], bool]:
        return lambda home: journalled(home, "merged") >= count

    start_and_kill(tmp_path / "killed", configuration, merged(1))
    resume_and_kill(tmp_path / "killed", merged(2))
    resume(tmp_path / "killed", "fed-1")
    assert adapters(tmp_path / "killed") == adapters(tmp_path / "whole")
    states = [
        [(path.name, path.read_bytes()) for path in (home / "runs" / "fed-1").glob("optimizer-*")]
        for home in (tmp_path / "killed", tmp_path / "whole")
    ]
    assert states[0] == states[1]
    assert [state_name for state_name, _ in states[0]] == ["optimizer-2.safetensors"]


@pytest.mark.slow
def test_pruned_ranks_are_the_same_after_a_kill(
    tmp_path: Path, configuration: dict[str, Any]
) -> None:
    configuration["tuner"] |= {"name": "hetlora", "lam": 3.0, "epochs": 2}
    configuration |= {"rounds": 3, "aggregator": {"name": "hetlora"}}
    configuration["clients"] = configuration["clients"][:2]
    run(tmp_path / "whole", configuration)
    start_and_kill(tmp_path / "killed", configuration, lambda home: journalled(home, "client") >= 3)
    resume_and_kill(tmp_path / "killed", lambda home: published(home, 5))
    resume(tmp_path / "killed", "fed-1")
    assert adapters(tmp_path / "killed") == adapters(tmp_path / "whole")
    ended = journal.load(tmp_path / "killed" / "runs", "fed-1")
    assert min(event["rank"] for event in ended.select("client")) < 4


@pytest.mark.slow
@pytest.mark.parametrize("aggregator", ["fedex", "fltrust", "user-centric"])
def test_what_a_method_keeps_beside_the_global_adapter_goes_on_where_it_was(
    tmp_path: Path, configuration: dict[str, Any], aggregator: str
) -> None:
    configuration |= {"aggregator": {"name": aggregator}, "rounds": 3}
    configuration["server_data"] = configuration["data"]["path"]
    configuration["clients"] = configuration["clients"][:3]
    run(tmp_path / "whole", configuration)
    start_and_kill(tmp_path / "killed", configuration, lambda home: journalled(home, "merged") >= 1)
    resume_and_kill(tmp_path / "killed", lambda home: journalled(home, "merged") >= 2)
    resume(tmp_path / "killed", "fed-1")
    assert adapters(tmp_path / "killed") == adapters(tmp_path / "whole")


def test_a_lost_state_of_the_server_optimizer_is_noticed(
    tmp_path: Path, configuration: dict[str, Any]
) -> None:
    configuration |= {"server_optimizer": "fedadam", "rounds": 1}
    configuration["clients"] = configuration["clients"][:1]
    run(tmp_path, configuration)
    (state,) = (tmp_path / "runs" / "fed-1").glob("optimizer-*")
    content = bytearray(state.read_bytes())
    content[-1] ^= 1
    state.write_bytes(content)
    with pytest.raises(PrufedError, match="is damaged, so the server optimizer cannot go on"):
        resume(tmp_path, "fed-1")
    state.unlink()
    with pytest.raises(PrufedError, match="is missing"):
        resume(tmp_path, "fed-1")


def test_resuming_a_finished_run_changes_nothing(
    tmp_path: Path, configuration: dict[str, Any]
) -> None:
    configuration["rounds"] = 1
    run(tmp_path, configuration)
    before = adapters(tmp_path)
    resume(tmp_path, "fed-1")
    assert adapters(tmp_path) == before


def test_a_journal_line_cut_short_is_dropped(tmp_path: Path) -> None:
    created = journal.create(tmp_path, "fed", {"configuration": {}})
    created.record("started", clients={})
    file = created.directory / "events.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"event":"client","rou')
    again = journal.load(tmp_path, "fed-1")
    assert [event["event"] for event in again.events] == ["started"]
    again.record("round", round=0)
    assert [e["event"] for e in journal.load(tmp_path, "fed-1").events] == ["started", "round"]


def test_a_damaged_journal_is_refused(tmp_path: Path) -> None:
    created = journal.create(tmp_path, "fed", {})
    (created.directory / "events.jsonl").write_bytes(b"nonsense\n")
    with pytest.raises(PrufedError, match="line 1"):
        journal.load(tmp_path, "fed-1")


def test_run_numbers_are_never_shared(tmp_path: Path) -> None:
    ids = [journal.create(tmp_path, "fed", {}).id for _ in range(3)]
    assert ids == ["fed-1", "fed-2", "fed-3"]
    assert [found.id for found in journal.list_runs(tmp_path)] == ids


def test_two_processes_do_not_share_a_run(tmp_path: Path) -> None:
    created = journal.create(tmp_path, "fed", {})
    with created.locked(), pytest.raises(PrufedError, match="in use"):
        journal.load(tmp_path, "fed-1").locked().__enter__()


def test_changed_data_is_noticed(
    tmp_path: Path, configuration: dict[str, Any], data_file: Path
) -> None:
    mine = tmp_path / "mine.jsonl"
    mine.write_text(data_file.read_text())
    configuration["data"]["path"] = str(mine)
    configuration["rounds"] = 1
    configuration["clients"] = configuration["clients"][:1]
    run(tmp_path, configuration)
    mine.write_text("\n".join(data_file.read_text().splitlines()[1:]))
    with pytest.raises(PrufedError, match="data of client dense has changed"):
        resume(tmp_path, "fed-1")
