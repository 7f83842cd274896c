"""A writer that is killed anywhere leaves whole versions or none, and nothing that gc cannot clear.

Each test forks a writer that kills itself with SIGKILL just before its k-th filesystem call, for
every k until it gets through; then again after an exact number of bytes of a file.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from prufed_registry import Registry

FILESYSTEM_EVENTS = ("open", "os.", "shutil.", "fcntl.")


def die_at_call(number: int) -> None:
    """Kill this process just before its `number`-th filesystem call."""
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)

    # The interpreter announces every call but the sync, which is where a crash matters most.
    plain_fsync = os.fsync

    def counted_fsync(descriptor: int) -> None:
        count()
        plain_fsync(descriptor)

    os.fsync = counted_fsync
    sys.addaudithook(lambda event, _: count() if event.startswith(FILESYSTEM_EVENTS) else None)


def die_at_byte(number: int) -> None:
    """Let the kernel kill this process when it writes a file beyond `number` bytes."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (number, hard))


def check_after_crash(registry: Registry, publish_into, assert_sound) -> None:
    """Assert that readers, gc and the next writer find nothing wrong: garbage is no damage."""
    assert registry.verify() == []
    registry.gc()
    assert_sound(registry)
    taken = {artifact.version for artifact in registry.list("tiny")}
    again = publish_into(registry, seed=99)
    assert again.version not in taken
    assert registry.resolve("tiny") == again


def setup_for(action: str, root: Path, publish_into, write_model) -> Callable[[], None]:
    """Prepare a registry and return the action that will be killed in it."""
    if action == "first-publish":
        return lambda: publish_into(Registry(root))
    registry = Registry(root)
    first = publish_into(registry)
    second = publish_into(registry, seed=1)
    registry.set_alias("tiny", "best", second.version)
    if action == "garbage":
        shared = root / "blobs" / "sha256" / "00"
        shared.mkdir()
        (shared / ("00" * 32)).write_text("unused")
        (root / "tmp" / "dead").mkdir()
        (root / "tmp" / "dead" / "config.json").write_text("{}")
        (root / "artifacts" / "empty").mkdir()
    source = root.parent / "source"
    write_model(source, seed=5)
    digests = (first.digest, "sha256:" + "ab" * 32)
    actions: dict[str, Callable[[Registry], object]] = {
        "publish": lambda registry: publish_into(registry, seed=2, parents=(first,)),
        "remove": lambda registry: registry.remove("tiny@v2"),
        "alias": lambda registry: registry.set_alias("tiny", "best", 1),
        "garbage": lambda registry: registry.gc(),
        "import": lambda registry: registry.import_directory(source, "brought"),
        "evaluation": lambda registry: registry.save_evaluation(*digests, {"acc": 0.5}),
    }
    return lambda: actions[action](Registry(root)) and None


@pytest.mark.slow
@pytest.mark.parametrize(
    "action", ["first-publish", "publish", "remove", "alias", "garbage", "import", "evaluation"]
)
def test_killed_at_every_filesystem_call(
    action, memory_path, run_child, publish_into, write_model, assert_sound
):
    for number in range(1, 1000):
        root = memory_path / str(number) / "registry"
        root.parent.mkdir()
        act = setup_for(action, root, publish_into, write_model)
        before = {artifact.ref for artifact in Registry(root).list()}

        def die_trying(number: int = number, act: Callable[[], None] = act) -> None:
            die_at_call(number)
            act()

        status = run_child(die_trying)
        assert status in (0, -signal.SIGKILL)
        registry = Registry(root)
        after = {artifact.ref for artifact in registry.list()}
        gained, lost = len(after - before), len(before - after)
        assert gained <= (action in ("first-publish", "publish", "import"))
        assert lost <= (action == "remove")
        assert registry.aliases("tiny") in ({}, {"best": 1}, {"best": 2})
        check_after_crash(registry, publish_into, assert_sound)
        if status == 0:
            break
    assert status == 0, "the writer never got through"
    assert number > 10, "too few calls were counted to have tested anything"
    assert (gained, lost) == {
        "first-publish": (1, 0),
        "publish": (1, 0),
        "import": (1, 0),
        "remove": (0, 1),
    }.get(action, (0, 0))


@pytest.mark.slow
def test_what_a_killed_export_leaves_goes_with_the_next(
    memory_path, run_child, publish_into, registry
):
    artifact = publish_into(registry)
    target = memory_path / "out"
    dirty = 0
    for number in range(1, 1000):

        def die_trying(number: int = number) -> None:
            die_at_call(number)
            registry.export(artifact.ref, target)

        status = run_child(die_trying)
        assert status in (0, -signal.SIGKILL)
        if target.exists():
            assert [path.name for path in memory_path.iterdir()] == ["out"]
            break
        dirty += any(memory_path.iterdir())
        registry.export(artifact.ref, target)
        assert [path.name for path in memory_path.iterdir()] == ["out"]
        shutil.rmtree(target)
    assert target.exists(), "the export never got through"
    assert dirty > 10
    assert {path.name for path in target.iterdir()} == {
        path.name for path in artifact.path.iterdir()
    }


def test_killed_at_exact_byte_counts(
    memory_path, run_child, publish_into, write_model, assert_sound
):
    killed = 0
    for number in [*range(0, 1500, 37), 1, 2, 63, 64, 65, 99, 100, 101]:
        root = memory_path / str(number) / "registry"
        root.parent.mkdir()
        act = setup_for("publish", root, publish_into, write_model)

        def die_trying(number: int = number, act: Callable[[], None] = act) -> None:
            die_at_byte(number)
            act()

        status = run_child(die_trying)
        assert status in (0, -signal.SIGXFSZ)
        killed += status != 0
        registry = Registry(root)
        assert len(registry.list()) == (3 if status == 0 else 2)
        check_after_crash(registry, publish_into, assert_sound)
    assert killed > 15
    assert status != 0 or killed < number, "some byte counts must let the writer through"


def test_half_a_cache_line_is_ignored(registry, publish):
    base = publish("base-model")
    first = publish(parents=(base,))
    registry.list()
    cache = registry.root / "cache" / "records.jsonl"
    whole = cache.read_bytes()
    for length in [*range(0, len(whole), 5), *range(len(whole) - 12, len(whole))]:
        cache.write_bytes(whole[:length])
        assert Registry(registry.root).list() == [base, first]
        second_look = Registry(registry.root)
        assert second_look.list() == [base, first]
        assert second_look.find(first.fingerprint) == first
