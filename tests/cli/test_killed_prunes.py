"""A prune killed with SIGKILL after any block goes on there, and ends with the same bytes."""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from prufed_cli.home import prunes_directory
from prufed_cli.pruning import PruneRequest, prune
from prufed_cli.pruning.work import KEPT_SECONDS
from prufed_registry import Registry, RegistryError

Call = Callable[..., Any]
Start = Callable[..., Any]


@pytest.fixture(scope="session")
def long_text(tmp_path_factory: pytest.TempPathFactory, calibration_file: Path) -> Path:
    """Enough text to calibrate with for seconds."""
    path = tmp_path_factory.mktemp("text") / "long.txt"
    path.write_text((calibration_file.read_text() + "\n") * 25)
    return path


@pytest.fixture
def registry(prufed_home: Path, base_directory: Path) -> Registry:
    registry = Registry(prufed_home / "registry")
    registry.import_directory(base_directory, name="tiny")
    return registry


@pytest.fixture
def slow(long_text: Path) -> tuple[object, ...]:
    """The arguments of a prune that takes its time over each of four blocks."""
    wanted = ("--base", "tiny", "--method", "sparsegpt", "--sparsity", "0.5", "--device", "cpu")
    return ("prune", *wanted, "--samples", "600", "--calibration", long_text)


def finished(home: Path) -> int:
    return len(list(home.glob("prunes/*/00-0*.json")))


def wait_for(child: Any, happened: Callable[[], bool], patience: float = 60) -> None:
    deadline = time.monotonic() + patience
    while not happened():
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.002)


def kill(child: Any) -> None:
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL


@contextmanager
def largest_file(limit: int) -> Iterator[None]:
    """Let no file of this process grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def digest(registry: Registry, reference: str) -> str:
    return registry.resolve(reference.strip()).digest


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [1, 3])
def test_killed_after_a_block(
    fork: Start,
    prufed: Call,
    registry: Registry,
    prufed_home: Path,
    slow: tuple[object, ...],
    blocks: int,
) -> None:
    child = fork(*slow)
    wait_for(child, lambda: finished(prufed_home) >= blocks)
    kill(child)
    done = finished(prufed_home)
    if blocks == 1:
        assert json.loads(prufed(*slow, "--dry-run", "--json").out)["finished_blocks"] == done
    resumed = prufed(*slow)
    assert resumed.code == 0, resumed.err
    assert f"resuming after block {done} of 4" in resumed.err
    assert not (prufed_home / "prunes").exists()
    anew = prufed(*slow, "--force")
    assert "resuming" not in anew.err
    assert resumed.out != anew.out
    assert digest(registry, resumed.out) == digest(registry, anew.out)
    assert registry.verify() == []


def test_a_forced_prune_goes_on_where_it_was_cut_off_itself(
    fork: Start, prufed: Call, registry: Registry, prufed_home: Path, slow: tuple[object, ...]
) -> None:
    child = fork(*slow)
    wait_for(child, lambda: finished(prufed_home) >= 1)
    kill(child)
    child = fork(*slow, "--force")
    wait_for(child, lambda: any(prufed_home.glob("prunes/*/begun-anew.json")))
    wait_for(child, lambda: finished(prufed_home) >= 1)
    kill(child)
    done = finished(prufed_home)
    assert f"resuming after block {done} of 4" in prufed(*slow, "--force").err
    assert "was made by the same recipe" in prufed(*slow, "--dry-run").err


@pytest.mark.slow
def test_killed_again_and_again(
    fork: Start, prufed: Call, registry: Registry, prufed_home: Path, slow: tuple[object, ...]
) -> None:
    """Also between two blocks, where a file may be half written."""
    for moment in (0.0, 0.05, 0.2):
        child = fork(*slow)
        before = finished(prufed_home)
        wait_for(child, lambda before=before: finished(prufed_home) > before)
        time.sleep(moment)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        if child.returncode == 0:  # it was over before
            break
    made = prufed(*slow)
    assert digest(registry, made.out) == digest(registry, prufed(*slow, "--force").out)
    assert not (prufed_home / "prunes").exists()


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits no other process here")
def test_a_prune_that_runs_out_of_memory_says_so_and_goes_on(
    fork: Start, prufed: Call, registry: Registry, prufed_home: Path, slow: tuple[object, ...]
) -> None:
    child = fork(*slow)
    wait_for(child, lambda: finished(prufed_home) >= 1)
    resource.prlimit(child.pid, resource.RLIMIT_AS, (2**20, 2**20))
    _, err = child.communicate(timeout=60)
    done = finished(prufed_home)
    assert child.returncode == 1, err
    assert "error: out of memory\n" in err
    assert f"; the same command goes on after block {done} of 4" in err
    assert "Traceback" not in err
    assert f"resuming after block {done} of 4" in prufed(*slow).err


def flip(content: bytes) -> bytes:
    """Flip a bit in the last tensor, or in the last number."""
    place = len(content) - 5
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.fixture
def unpublished(registry: Registry, prufed: Call, prufed_home: Path) -> tuple[object, ...]:
    """The arguments of a prune that was cut off when all four blocks were finished."""
    wanted = ("prune", "--base", "tiny", "--method", "magnitude", "--nested")
    wanted = (*wanted, "--sparsity", "0.25,0.5")
    with largest_file(100_000):
        assert prufed(*wanted).code == 1
    assert finished(prufed_home) == 4
    return wanted


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("00-00000.json", lambda content: content[:20]),
        ("00-00000.safetensors", lambda content: content[:-1]),
        ("01-00000.masks.safetensors", lambda content: b""),
        ("00-00002.json", flip),
        ("01-00002.safetensors", flip),
        ("01-00002.masks.safetensors", flip),
    ],
)
def test_a_block_that_is_damaged_afterwards_is_pruned_again(
    prufed: Call,
    registry: Registry,
    prufed_home: Path,
    unpublished: tuple[object, ...],
    file: str,
    damage: Callable[[bytes], bytes],
) -> None:
    (spoilt,) = prufed_home.glob(f"prunes/*/{file}")
    spoilt.write_bytes(damage(spoilt.read_bytes()))
    sound = int(file[7])
    told = json.loads(prufed(*unpublished, "--dry-run", "--json").out)
    assert told["finished_blocks"] == sound
    made = prufed(*unpublished)
    assert made.code == 0, made.err
    assert f"block {sound + 1} of 4 has changed on disk since it was finished" in made.err
    assert ("resuming after block 2 of 4" in made.err) == (sound == 2)
    anew = prufed(*unpublished, "--force")
    assert "changed" not in anew.err
    for one, other in zip(made.out.split(), anew.out.split(), strict=True):
        assert digest(registry, one) == digest(registry, other)


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_work_whose_answers_are_damaged_begins_anew(
    prufed: Call, prufed_home: Path, unpublished: tuple[object, ...], force: tuple[str, ...]
) -> None:
    if force:
        with largest_file(100_000):
            assert prufed(*unpublished, *force).code == 1
    (answer,) = prufed_home.glob("prunes/*/threads.json")
    answer.write_bytes(flip(answer.read_bytes()))
    made = prufed(*unpublished, *force)
    assert made.code == 0, made.err
    assert "has changed on disk since; it begins anew" in made.err
    assert "resuming" not in made.err
    assert not (prufed_home / "prunes").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra",
    [
        ("--set", "layer_ratio=owl"),
        ("--nested", "--sparsity", "0.25,0.5"),
        ("--nested", "--sparsity", "0.25,0.5", "--set", "layer_ratio=owl"),
    ],
    ids=["owl", "nested", "nested-owl"],
)
def test_surveys_and_nested_sub_models_go_on_too(
    fork: Start,
    prufed: Call,
    registry: Registry,
    prufed_home: Path,
    slow: tuple[object, ...],
    extra: tuple[str, ...],
) -> None:
    child = fork(*slow, *extra)
    wait_for(child, lambda: finished(prufed_home) >= 2)
    kill(child)
    resumed = prufed(*slow, *extra)
    assert "resuming after block" in resumed.err
    anew = prufed(*slow, *extra, "--force")
    for one, other in zip(resumed.out.split(), anew.out.split(), strict=True):
        assert digest(registry, one) == digest(registry, other)


def test_other_arguments_begin_anew_and_are_not_mixed(
    fork: Start, prufed: Call, registry: Registry, prufed_home: Path, slow: tuple[object, ...]
) -> None:
    child = fork(*slow)
    wait_for(child, lambda: finished(prufed_home) >= 2)
    kill(child)
    prufed(*slow, "--max-memory", "1KB").refused(1, "more than the 1.0 kB there may be")
    assert finished(prufed_home) >= 2  # too little memory costs nothing that is finished
    other = [0.6 if argument == "0.5" else argument for argument in slow]
    made = prufed(*other)
    assert "resuming" not in made.err
    assert finished(prufed_home) >= 2  # what was begun is still there
    assert digest(registry, made.out) == digest(registry, prufed(*other, "--force").out)
    assert "resuming" in prufed(*slow).err


def test_interrupted_says_that_the_same_command_goes_on(
    fork: Start, prufed: Call, registry: Registry, prufed_home: Path, slow: tuple[object, ...]
) -> None:
    child = fork(*slow)
    wait_for(child, lambda: finished(prufed_home) >= 1)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate()
    assert (child.returncode, out) == (130, "")
    done = finished(prufed_home)
    last = f"interrupted; the same command goes on after block {done} of 4"
    assert err.splitlines()[-1] == last
    assert f"resuming after block {done} of 4" in prufed(*slow).err


def test_two_processes_do_not_make_the_same_sub_model_twice(
    fork: Start, prufed: Call, registry: Registry, prufed_home: Path, slow: tuple[object, ...]
) -> None:
    child = fork(*slow)
    wait_for(child, lambda: finished(prufed_home) >= 1)
    waited = prufed(*slow)
    assert "another process makes this sub-model right now; waiting for it" in waited.err
    assert "tiny-sparsegpt-50@v1 was made by the same recipe" in waited.err
    out, _ = child.communicate()
    assert out == waited.out == "tiny-sparsegpt-50@v1\n"
    assert len(registry.list(kind="pruned")) == 1


def test_a_process_goes_on_with_what_another_one_leaves_that_it_waits_for(
    fork: Start, prufed: Call, registry: Registry, prufed_home: Path, slow: tuple[object, ...]
) -> None:
    first = fork(*slow)
    wait_for(first, lambda: finished(prufed_home) >= 1)
    second = fork(*slow)
    kill(first)
    out, err = second.communicate()
    assert out == "tiny-sparsegpt-50@v1\n"
    assert "resuming after block" in err


def test_old_work_is_swept(
    fork: Start, prufed: Call, registry: Registry, prufed_home: Path, slow: tuple[object, ...]
) -> None:
    child = fork(*slow)
    wait_for(child, lambda: finished(prufed_home) >= 1)
    kill(child)
    (path,) = (prufed_home / "prunes").glob("*/")
    fresh = ("prune", "--base", "tiny", "--method", "magnitude", "--sparsity", "0.5")
    prufed(*fresh)
    assert path.is_dir()
    for file in (*path.iterdir(), path):
        then = time.time() - KEPT_SECONDS - 60
        os.utime(file, (then, then))
    assert prufed(*slow, "--dry-run").code == 0
    assert path.is_dir()
    prufed(*fresh, "--force")
    assert not path.exists()


def test_gc_deletes_unfinished_work_where_it_is_asked_to(
    fork: Start, prufed: Call, registry: Registry, prufed_home: Path, slow: tuple[object, ...]
) -> None:
    child = fork(*slow)
    wait_for(child, lambda: finished(prufed_home) >= 1)
    assert "kept for prunes" not in prufed("gc", "--unfinished").err  # a process holds it
    kill(child)
    (path,) = (prufed_home / "prunes").glob("*/")
    size = sum(file.stat().st_size for file in path.iterdir())
    first = prufed("gc")
    assert f"{size} bytes are kept for prunes that were cut off" in first.err
    assert "prunes/" not in first.out
    would = prufed("gc", "--unfinished", "--dry-run")
    assert f"unfinished prune  prunes/{path.name}  {size} bytes" in would.out
    assert path.is_dir()
    told = json.loads(prufed("gc", "--unfinished", "--json").out)
    assert told["items"] == [
        {"reason": "unfinished prune", "path": f"prunes/{path.name}", "bytes": size}
    ]
    assert not (prufed_home / "prunes").exists()
    assert prufed("gc").err == ""


def test_gc_looks_where_prune_leaves_work_of_a_registry_elsewhere(
    prufed: Call, base_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(tmp_path / "elsewhere" / "registry")
    wanted = PruneRequest(base=str(base_directory), method="magnitude", sparsity=0.5)
    registry.import_directory(base_directory)
    with largest_file(100_000), pytest.raises(RegistryError):
        prune(wanted, registry=registry)
    (left,) = prunes_directory(registry).glob("*/")
    theirs = left.with_name("theirs") / "thesis.tex"
    theirs.parent.mkdir()
    theirs.write_text("years of work")
    monkeypatch.setenv("PRUFED_HOME", str(tmp_path / "elsewhere"))
    told = json.loads(prufed("gc", "--unfinished", "--json").out)
    assert [item["path"] for item in told["items"]] == [f"prunes/{left.name}"]
    assert not left.exists()
    assert theirs.exists()


@pytest.mark.parametrize(("limit", "done"), [(20_000, 0), (100_000, 4)], ids=["block", "model"])
def test_a_file_that_may_not_grow_is_one_sentence_and_what_was_finished_stays(
    prufed: Call, registry: Registry, prufed_home: Path, limit: int, done: int
) -> None:
    """It fails halfway, as on a full disk."""
    wanted = ("prune", "--base", "tiny", "--method", "magnitude", "--sparsity", "0.5")
    with largest_file(limit):
        called = prufed(*wanted)
    called.refused(1, "a file would be larger than is allowed here", "ulimit -f")
    assert finished(prufed_home) == done
    assert [artifact.ref for artifact in registry.list()] == ["tiny@v1"]
    assert registry.gc(dry_run=True).items == ()
    made = prufed(*wanted)
    assert ("resuming after block 4 of 4" in made.err) == bool(done)
    assert digest(registry, made.out) == digest(registry, prufed(*wanted, "--force").out)
    assert not (prufed_home / "prunes").exists()


def test_a_method_that_fails_leaves_no_work(
    prufed: Call, registry: Registry, prufed_home: Path, calibration_file: Path
) -> None:
    wanted = ("--method", "sparsegpt", "--pattern", "2:4", "--set", "damping=nan")
    assert prufed("prune", "--base", "tiny", *wanted, "--calibration", calibration_file).code == 2
    assert not (prufed_home / "prunes").exists()
