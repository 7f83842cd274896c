"""A registry in a temporary directory, and writers that publish small artifacts into it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from prufed_registry import Artifact, Parent, Registry

# Loaded before any child is forked, so that no child spends its events on imports.
for module in ("gc", "lineage", "manifest", "removal", "transfer", "verify"):
    import_module(f"prufed_registry.{module}")
import_module("filelock")

Publish = Callable[..., Artifact]


def write_model(directory: Path, seed: int = 0) -> None:
    """Write a model in Hugging Face layout: the tokenizer is the same for every seed."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(f'{{"model_type": "llama", "seed": {seed}}}')
    (directory / "tokenizer").mkdir(exist_ok=True)
    (directory / "tokenizer" / "vocabulary.txt").write_text("shared by every model\n" * 3)
    values = np.random.default_rng(seed).integers(0, 100, (4, 4)).astype(np.float32)
    save_file({"weight": values}, directory / "model.safetensors")


def publish_model(
    registry: Registry,
    name: str = "tiny",
    seed: int = 0,
    kind: str = "base",
    parents: tuple[Artifact, ...] = (),
    **facts: Any,
) -> Artifact:
    """Publish what `write_model` writes."""
    with registry.stage() as staging:
        write_model(staging.path, seed)
        return staging.publish(
            name,
            kind,
            parents=[Parent(parent.ref, parent.digest) for parent in parents],
            recipe=facts.pop("recipe", {"command": "test", "seed": seed}),
            **facts,
        )


def run_child(action: Callable[[], None]) -> int:
    """Run `action` in a forked child; return 0, minus the signal that ended it, or 1."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def assert_sound(registry: Registry) -> None:
    """Assert that nothing is damaged, no garbage is left, and every file shares its blob."""
    assert registry.verify() == []
    assert registry.gc(dry_run=True).items == ()
    assert list((registry.root / "tmp").glob("*")) == []
    for artifact in registry.list():
        for path, entry in artifact.manifest.files.items():
            blob = registry.root / "blobs" / "sha256" / entry.sha256[:2] / entry.sha256
            assert blob.samefile(artifact.path / path), f"{artifact.ref} {path} lost its blob"


def force_delete(root: Path) -> None:
    """Delete a directory whatever the permissions in it."""
    for directory, _, _ in os.walk(root):
        Path(directory).chmod(0o700)
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="session", name="write_model")
def _write_model() -> Callable[..., None]:
    return write_model


@pytest.fixture(scope="session", name="publish_into")
def _publish_into() -> Publish:
    """`publish_model` into any registry."""
    return publish_model


@pytest.fixture(scope="session", name="run_child")
def _run_child() -> Callable[[Callable[[], None]], int]:
    return run_child


@pytest.fixture(scope="session", name="assert_sound")
def _assert_sound() -> Callable[[Registry], None]:
    return assert_sound


@pytest.fixture
def memory_path(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where there is one: a killed process loses nothing it wrote to it."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    directory = Path(tempfile.mkdtemp(prefix="prufed-test-", dir="/dev/shm"))
    yield directory
    force_delete(directory)


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A place for a registry, deleted at the end whatever its permissions."""
    root = tmp_path / "registry"
    yield root
    force_delete(root)


@pytest.fixture
def registry(root: Path) -> Registry:
    return Registry(root)


@pytest.fixture
def publish(registry: Registry) -> Publish:
    """`publish_model` into the test's registry."""
    return lambda *args, **facts: publish_model(registry, *args, **facts)
