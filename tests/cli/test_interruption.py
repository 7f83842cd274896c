"""Ctrl-C and SIGTERM at any moment: one line, exit code 130, nothing broken, and a way to go on."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from prufed_registry import Registry

Process = Any  # a Popen, or a Fork of this process
Start = Callable[..., Process]
Call = Callable[..., Any]

LONG = ("--method", "wanda", "--sparsity", "0.5", "--samples", "4000", "--device", "cpu")


def wait_for(process: Process, happened: Callable[[], bool], patience: float = 90) -> None:
    deadline = time.monotonic() + patience
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.005)


def interrupted(process: Process, number: int = signal.SIGINT) -> str:
    """Send the signal and return what the process wrote on stderr."""
    process.send_signal(number)
    return assert_interrupted(process, number)


def assert_interrupted(process: Process, number: int = signal.SIGINT) -> str:
    """Wait until the process has ended by the signal; return what it wrote on stderr."""
    out, err = process.communicate(timeout=60)
    assert out == ""
    assert "Traceback" not in err
    if number == signal.SIGINT:
        assert process.returncode == 130, err
        assert err.splitlines()[-1].startswith("interrupted"), err
        assert err.count("interrupted") == 1
    else:
        assert process.returncode == -number, err
    return err


def loaded(process: Process, library: str) -> bool:
    """Say whether a process has mapped a shared library."""
    return library in Path(f"/proc/{process.pid}/maps").read_text()


def events(home: Path) -> int:
    return sum(file.read_bytes().count(b"\n") for file in home.glob("runs/*/events.jsonl"))


@pytest.fixture
def registry(prufed_home: Path, base_directory: Path) -> Registry:
    registry = Registry(prufed_home / "registry")
    registry.import_directory(base_directory, name="tiny")
    return registry


@pytest.fixture(scope="session")
def long_text(tmp_path_factory: pytest.TempPathFactory, calibration_file: Path) -> Path:
    """Enough text to calibrate with for seconds."""
    path = tmp_path_factory.mktemp("text") / "long.txt"
    path.write_text((calibration_file.read_text() + "\n") * 100)
    return path


def sound(registry: Registry, *, garbage: bool = False) -> None:
    assert registry.verify() == []
    assert garbage or registry.gc(dry_run=True).items == ()


PRUNE_MOMENTS = {
    "starting": lambda process: loaded(process, "_json"),
    "importing-torch": lambda process: loaded(process, "libtorch_cpu"),
}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
@pytest.mark.parametrize("moment", PRUNE_MOMENTS)
def test_prune_interrupted_while_it_starts(
    process: Start, registry: Registry, long_text: Path, moment: str
) -> None:
    child = process("prune", "--base", "tiny", *LONG, "--calibration", long_text)
    wait_for(child, lambda: PRUNE_MOMENTS[moment](child))
    interrupted(child)
    assert [artifact.ref for artifact in registry.list()] == ["tiny@v1"]
    sound(registry)


@pytest.mark.parametrize("after", [0.0, 0.1, 0.2, 0.4, 0.8])
def test_prune_interrupted_while_it_works(
    fork: Start, registry: Registry, long_text: Path, after: float
) -> None:
    child = fork("prune", "--base", "tiny", *LONG, "--calibration", long_text)
    time.sleep(0.05 + after)
    interrupted(child)
    assert [artifact.ref for artifact in registry.list()] == ["tiny@v1"]
    sound(registry)


@pytest.fixture
def large_base(tmp_path: Path, base_directory: Path) -> Path:
    """The tiny model with so much beside it that publishing takes its time."""
    directory = tmp_path / "large"
    shutil.copytree(base_directory, directory)
    for number in range(400):
        (directory / f"notes-{number}.txt").write_text(f"{number}")
    return directory


def test_prune_interrupted_while_it_publishes(
    fork: Start, prufed: Call, registry: Registry, prufed_home: Path, large_base: Path
) -> None:
    prufed("import", large_base)
    arguments = ("prune", "--base", "large", "--method", "magnitude", "--sparsity", "0.5", "-q")
    # While another writer commits, this one can copy but not finish before the signal comes.
    with FileLock(prufed_home / "registry" / "prufed-registry.lock"):
        child = fork(*arguments)
        wait_for(child, lambda: any((prufed_home / "registry" / "tmp").glob("*/notes-9.txt")))
        child.send_signal(signal.SIGINT)
    assert_interrupted(child)
    assert [artifact.ref for artifact in registry.list()] == ["large@v1", "tiny@v1"]
    sound(registry)
    assert prufed(*arguments).out == "large-magnitude-50@v1\n"


@pytest.fixture
def clients(configuration: dict[str, Any], clients_file: Callable[..., Path]) -> Path:
    """More rounds than are waited for, over the tiny model."""
    return clients_file({**configuration, "base": "tiny", "rounds": 40})


def test_federate_interrupted_before_anything_is_trained(
    fork: Start, registry: Registry, prufed_home: Path, clients: Path
) -> None:
    # While another writer commits, this one cannot publish the sub-model it has to train.
    with FileLock(prufed_home / "registry" / "prufed-registry.lock"):
        child = fork("federate", "--clients", clients)
        wait_for(child, lambda: any((prufed_home / "registry" / "tmp").glob("*/config.json")))
        assert any(prufed_home.glob("runs/fed-1"))
        child.send_signal(signal.SIGINT)
    err = assert_interrupted(child)
    assert "--resume" not in err
    assert list((prufed_home / "runs").iterdir()) == []
    sound(registry)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8])
def test_federate_interrupted_says_how_it_goes_on(
    fork: Start, prufed: Call, registry: Registry, prufed_home: Path, clients: Path, count: int
) -> None:
    """After 2 events the first client trains, after 4 the adapters are merged; 8 is a later round.

    At the moment of the second, the first thing to be resumed, the run may still be given up.
    """
    child = fork("federate", "--clients", clients, "--set", "rounds=4")
    wait_for(child, lambda: events(prufed_home) >= count)
    last = interrupted(child).splitlines()[-1]
    sound(registry)
    if count == 2 and last == "interrupted":
        assert list((prufed_home / "runs").iterdir()) == []
        return
    assert last == "interrupted; `prufed federate --resume fed-1` goes on"
    assert prufed("federate", "--resume", "fed-1", "-q").out == "fed@v4\n"
    sound(registry)


@pytest.mark.slow
def test_a_process_of_its_own_interrupted_and_resumed_twice(
    process: Start, fork: Start, prufed: Call, registry: Registry, prufed_home: Path, clients: Path
) -> None:
    child = process("federate", "--clients", clients, "--set", "rounds=4", "-q")
    for count in (4, 9):
        wait_for(child, lambda count=count: events(prufed_home) >= count)
        assert interrupted(child) == "interrupted; `prufed federate --resume fed-1` goes on\n"
        sound(registry)
        child = fork("federate", "--resume", "fed-1", "-q")
    assert child.communicate() == ("fed@v4\n", "")


def test_sigterm_leaves_nothing_broken(
    fork: Start, prufed: Call, registry: Registry, prufed_home: Path, clients: Path
) -> None:
    child = fork("federate", "--clients", clients, "--set", "rounds=3")
    wait_for(child, lambda: events(prufed_home) >= 4)
    interrupted(child, signal.SIGTERM)
    sound(registry, garbage=True)
    assert "unfinished" in prufed("runs", "list").out
    assert prufed("federate", "--resume", "fed-1", "-q").out == "fed@v3\n"
    assert prufed("gc").code == 0
    sound(registry)


@pytest.mark.parametrize("arguments", [["list"], ["--help"], ["show", "tiny"]])
def test_output_that_nobody_reads(process: Start, registry: Registry, arguments: list[str]) -> None:
    child = process(*arguments)
    child.stdout.close()
    assert child.stderr.read() == ""
    assert child.wait(timeout=60) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize("arguments", [["list"], ["--help"], ["--version"], ["show", "tiny"]])
def test_output_that_does_not_fit(registry: Registry, arguments: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "prufed_cli", *arguments],
            stdout=full, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert ended.returncode == 1
    assert ended.stderr == "error: cannot write to standard output: no space left on device\n"


@pytest.mark.parametrize(
    ("arguments", "closed"),
    [
        ("list --json", ">&-"),
        ("--help", ">&- 2>&-"),
        ("prune --method top --set drop=2", "<&- >&- 2>&-"),
    ],
)
def test_output_that_was_closed(registry: Registry, arguments: str, closed: str) -> None:
    """What is said goes nowhere, and not into the files that are opened next."""
    command = f"{sys.executable} -m prufed_cli {arguments} {closed}"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert ended.returncode == 0
    assert "Traceback" not in ended.stderr
    if arguments.startswith("prune"):
        sound(registry, garbage=True)
        assert len(registry.list(kind="pruned")) == 1


def test_list_into_head(registry: Registry, base_directory: Path) -> None:
    for number in range(20):
        registry.import_directory(base_directory, name=f"copy-{number}")
    command = f"{sys.executable} -m prufed_cli list | head -1"
    piped = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert piped.returncode == 0
    assert piped.stderr == ""
