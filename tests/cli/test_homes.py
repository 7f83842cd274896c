"""Where prufed keeps its files: somebody else's directory, read-only, full, or not a directory."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from prufed_registry import Registry

Call = Callable[..., Any]
PRUNE = ("--method", "magnitude", "--sparsity", "0.5", "--device", "cpu", "--quiet")


def test_a_registry_directory_that_is_not_ours(
    prufed: Call, prune: Call, prufed_home: Path
) -> None:
    theirs = prufed_home / "registry"
    theirs.mkdir()
    (theirs / "thesis.tex").write_text("years of work")
    for called in (
        prufed("list"),
        prufed("gc"),
        prufed("verify"),
        prune("--sparsity", "0.5"),
    ):
        called.refused(2, f"{theirs} holds files but is not a prufed registry")
    assert [path.name for path in theirs.iterdir()] == ["thesis.tex"]


def test_a_registry_of_a_newer_prufed(prufed: Call, prune: Call, prufed_home: Path) -> None:
    (prufed_home / "registry").mkdir()
    marker = prufed_home / "registry" / "prufed-registry.json"
    marker.write_text('{"layout": 99}')
    prufed("list").refused(2, "layout 99", "upgrade prufed")
    prune("--sparsity", "0.5").refused(2, "layout 99")
    marker.write_text('{"layout"')
    prufed("list").refused(5, "prufed-registry.json")
    assert [path.name for path in (prufed_home / "registry").iterdir()] == [marker.name]


def test_a_home_that_is_a_file(
    prufed: Call, prune: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text("not a directory")
    monkeypatch.setenv("PRUFED_HOME", str(file))
    prune("--sparsity", "0.5").refused(1, str(file))
    assert file.read_text() == "not a directory"


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A disk of its own as PRUFED_HOME, 64 MB large; only root may make one."""
    directory = tmp_path / "disk"
    directory.mkdir()
    options = ["-t", "tmpfs", "-o", "size=64m", "prufed-test"]
    made = subprocess.run(["mount", *options, directory], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {made.stderr.strip()}")
    monkeypatch.setenv("PRUFED_HOME", str(directory))
    yield directory
    subprocess.run(["umount", directory], check=True)


def resize(disk: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", disk], check=True)


def used(disk: Path) -> int:
    """Return the disk's used bytes."""
    import shutil

    return shutil.disk_usage(disk).used


def test_a_home_that_is_read_only(
    prufed: Call,
    prune: Call,
    disk: Path,
    configuration: dict[str, Any],
    clients_file: Callable[[dict[str, Any]], Path],
    base_directory: Path,
) -> None:
    prufed("import", base_directory)
    federate = ("federate", "--clients", clients_file({**configuration, "base": "tiny"}), "-q")
    resize(disk, "ro")
    assert prufed("list").code == 0
    prune("--sparsity", "0.5").refused(1, "read-only", str(disk))
    prufed(*federate).refused(1, "read-only", str(disk))
    prufed("rm", "tiny").refused(1, "read-only", str(disk))
    resize(disk, "rw")
    assert prufed("verify").code == 0
    assert prufed(*federate).code == 0


def fill(disk: Path, left: int) -> Path:
    """Leave so many bytes free."""
    import shutil

    ballast = disk / "ballast"
    free = shutil.disk_usage(disk).free
    with ballast.open("wb") as file:
        for _ in range((free - left) // 4096):
            file.write(b"x" * 4096)
    return ballast


@pytest.mark.parametrize("left", [0, 40_000, 120_000])
def test_prune_on_a_full_disk(prufed: Call, disk: Path, base_directory: Path, left: int) -> None:
    """The base takes 170 kB, and is taken into the registry first."""
    command = ("prune", "--base", base_directory, *PRUNE)
    ballast = fill(disk, left)
    prufed(*command).refused(1, "disk", "full")
    registry = Registry(disk / "registry")
    assert [artifact.name for artifact in registry.list()] in ([], ["tiny"])
    assert registry.verify() == []
    assert registry.gc(dry_run=True).items == ()
    ballast.unlink()
    assert prufed(*command).out == "tiny-magnitude-50@v1\n"
    assert registry.verify() == []


@pytest.mark.parametrize(("sparsity", "left"), [("0.5", 300_000), ("0.5,0.25", 400_000)])
def test_a_prune_that_the_disk_has_no_room_for_is_refused_before_work_begins(
    prufed: Call, disk: Path, base_directory: Path, sparsity: str, left: int
) -> None:
    """Its blocks take 150 kB, and each sub-model 180 kB."""
    prufed("import", base_directory)
    command = ("prune", "--base", "tiny", "--method", "magnitude", "--sparsity", sparsity)
    needed = json.loads(prufed(*command, "--dry-run", "--json").out)
    assert needed["kept_bytes"] + needed["artifact_bytes"] > left
    ballast = fill(disk, left)
    before = used(disk)
    for extra in ("--dry-run", "--quiet"):
        prufed(*command, extra).refused(1, "the prune needs", "kB on disk", str(disk), "gc")
    assert not (disk / "prunes").exists()
    assert used(disk) == before
    ballast.unlink()
    made = prufed(*command)
    assert made.code == 0
    assert "disk about " in made.err
    fill(disk, 50_000)
    assert prufed(*command).out == made.out  # nothing is left to be written
    assert prufed(*command, "--dry-run").code == 0


def test_a_federation_whose_sub_models_the_disk_has_no_room_for(
    prufed: Call,
    disk: Path,
    base_directory: Path,
    configuration: dict[str, Any],
    clients_file: Callable[[dict[str, Any]], Path],
) -> None:
    prufed("import", base_directory)
    clients = [{"name": "a", "sparsity": 0.25}, {"name": "b", "sparsity": 0.5}]
    fill(disk, 300_000)
    federate = ("federate", "--clients", clients_file({**configuration, "clients": clients}))
    prufed(*federate, "--set", "base=tiny").refused(1, "the sub-models need", str(disk), "gc")


@pytest.mark.parametrize("left", [0, 16_384, 49_152, 81_920])
def test_federate_on_a_full_disk(
    prufed: Call,
    disk: Path,
    base_directory: Path,
    configuration: dict[str, Any],
    clients_file: Callable[[dict[str, Any]], Path],
    left: int,
) -> None:
    prufed("import", base_directory)
    document = {**configuration, "base": "tiny", "clients": [{"name": "a"}, {"name": "b"}]}
    command = ("federate", "--clients", clients_file(document))
    ballast = fill(disk, left)
    called = prufed(*command)
    called.refused(1, "disk", "full")
    registry = Registry(disk / "registry")
    assert registry.verify() == []
    assert registry.gc(dry_run=True).items == ()
    runs = (
        sorted(path.name for path in (disk / "runs").glob("*")) if (disk / "runs").exists() else []
    )
    assert bool(runs) == (left > 10_000), called.err
    ballast.unlink()
    if runs:
        assert runs == ["fed-1"]
        assert "`prufed federate --resume fed-1` goes on" in called.err
        assert prufed("federate", "--resume", "fed-1", "-q").out == "fed@v2\n"
    assert prufed(*command, "-q").code == 0
    assert registry.verify() == []
