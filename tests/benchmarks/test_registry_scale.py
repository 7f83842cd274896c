"""Listing and resolving among 10,000 versions, against a plain walk over the same directories."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from prufed_registry import Artifact, Registry
from prufed_registry.digests import FileEntry, Parent, content_digest, fingerprint, render

VERSIONS = 10_000


def make_registry(root: Path, names: int) -> Registry:
    """Write 10,000 versions as publishing leaves them, without waiting for the disk each time."""
    registry = Registry(root)
    with registry.stage() as staging:
        (staging.path / "config.json").write_text("{}")
        first = staging.publish("first", "base", recipe={})
    for number in range(VERSIONS - 1):
        name, version = f"model-{number % names:05d}", number // names + 1
        directory = root / "artifacts" / name / f"v{version}"
        directory.mkdir(parents=True)
        (directory / "prufed.json").write_bytes(manifest(name, number, first))
    return registry


def manifest(name: str, number: int, parent: Artifact) -> bytes:
    recipe = {"command": "tune", "params": {"lr": 3e-4, "r": 16}, "seed": number}
    files = {
        path: FileEntry(f"{number:064x}", 10_000)
        for path in ("adapter_config.json", "adapter_model.safetensors", "README.md")
    }
    parents = [Parent(parent.ref, parent.digest)]
    return render(
        {
            "layout": 1,
            "name": name,
            "kind": "client-adapter",
            "files": {path: {"sha256": e.sha256, "size": e.size} for path, e in files.items()},
            "digest": content_digest(files),
            "parents": [{"ref": parent.ref, "digest": parent.digest}],
            "recipe": recipe,
            "environment": {"torch": "2.13.0", "transformers": "5.23.0"},
            "metrics": {"loss": 1.0},
            "details": {"round": number, "samples": 500},
            "created": f"2026-01-01T00:00:00.{number:06d}+00:00",
            "fingerprint": fingerprint("client-adapter", parents, recipe),
        }
    )


def plain_walk(root: Path) -> int:
    """Scan every name's directory and count the versions: what no listing can do without."""
    count = 0
    for name in os.scandir(root / "artifacts"):
        for entry in os.scandir(name.path):
            count += entry.name.startswith("v")
    return count


def median(action: Callable[[], object], times: int = 7) -> float:
    spent = []
    for _ in range(times):
        started = time.perf_counter()
        action()
        spent.append(time.perf_counter() - started)
    return statistics.median(spent)


def in_new_process(root: Path, reference: str) -> dict[str, float]:
    """Time the first call of a process, when nothing is in memory yet."""
    code = (
        "import sys, time, json; from pathlib import Path; from prufed_registry import Registry\n"
        "def timed(act):\n"
        "    t = time.perf_counter(); act(); return time.perf_counter() - t\n"
        "print(json.dumps({'list': timed(lambda: Registry(Path(sys.argv[1])).list()),"
        " 'resolve': timed(lambda: Registry(Path(sys.argv[1])).resolve(sys.argv[2]))}))"
    )
    command = [sys.executable, "-c", code, str(root), reference]
    times = [
        json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        for _ in range(5)
    ]
    return {key: statistics.median(each[key] for each in times) for key in times[0]}


@pytest.mark.slow
@pytest.mark.parametrize("names", [1, 100, VERSIONS - 1])
def test_ten_thousand_versions(tmp_path: Path, names: int, capsys: pytest.CaptureFixture[str]):
    registry = make_registry(tmp_path / "registry", names)
    started = time.perf_counter()
    assert len(registry.list()) == VERSIONS
    first = time.perf_counter() - started
    walk = median(lambda: plain_walk(registry.root))
    reference = "model-00000"
    fresh = in_new_process(registry.root, reference)
    wanted = registry.resolve(reference)
    figures = {
        "list, first ever (no cache)": first,
        "list, new process": fresh["list"],
        "list, same process": median(registry.list),
        "list by kind": median(lambda: registry.list(kind="base")),
        "resolve latest, new process": fresh["resolve"],
        "resolve latest": median(lambda: registry.resolve(reference)),
        "resolve version": median(lambda: registry.resolve(wanted.ref)),
        "resolve digest": median(lambda: registry.resolve(f"{reference}@{wanted.digest[:20]}")),
        "find": median(lambda: registry.find(wanted.fingerprint)),
        "children": median(lambda: registry.children("first")),
    }
    assert registry.find(wanted.fingerprint) == wanted
    assert len(registry.list(kind="base")) == 1
    assert len(registry.children("first")) == VERSIONS - 1
    with capsys.disabled():
        print(f"\n{VERSIONS} versions of {names} names; a plain walk takes {walk:.3f} s")
        for label, spent in figures.items():
            print(f"  {label:30} {spent:.4f} s = {spent / walk:6.2f} walks")
