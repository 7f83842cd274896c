"""Writers, removers and gc at one time: every number is given once, no blob is lost."""

from __future__ import annotations

import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from filelock import FileLock

from prufed_registry import Registry

WRITERS = 6
PUBLISHES = 8


def fork(action) -> int:
    """Run `action` in a child that goes on by itself; return its process id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    return child


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def gc_running(memory_path):
    """A child that collects garbage for as long as the test lasts."""
    registry = Registry(memory_path / "registry")

    def collect() -> None:
        while True:
            registry.gc()
            time.sleep(0.01)

    child = fork(collect)
    yield
    os.kill(child, signal.SIGKILL)
    assert wait(child) == -signal.SIGKILL, "gc failed while writers were at work"


@pytest.mark.usefixtures("gc_running")
def test_each_publisher_gets_its_own_number(memory_path, publish_into, assert_sound):
    registry = Registry(memory_path / "registry")

    def write(writer: int) -> None:
        for number in range(PUBLISHES):
            # Few different contents, so that the writers link to each other's blobs.
            made = publish_into(registry, seed=number % 3, recipe={"by": [writer, number]})
            assert registry.resolve(made.ref).manifest.recipe == {"by": [writer, number]}

    children = [fork(lambda writer=writer: write(writer)) for writer in range(WRITERS)]
    assert [wait(child) for child in children] == [0] * WRITERS
    found = registry.list("tiny")
    assert [artifact.version for artifact in found] == list(range(1, WRITERS * PUBLISHES + 1))
    made = sorted(artifact.manifest.recipe["by"] for artifact in found)
    assert made == [[writer, n] for writer in range(WRITERS) for n in range(PUBLISHES)]
    registry.gc()
    assert_sound(registry)


@pytest.mark.usefixtures("gc_running")
def test_removing_and_publishing_the_same_bytes(memory_path, publish_into, assert_sound):
    """Blobs lose their last artifact and gain a new one all the time; no number comes twice."""
    registry = Registry(memory_path / "registry")
    log = memory_path / "log"

    def churn(seed: int) -> None:
        for number in range(PUBLISHES):
            made = publish_into(registry, seed=seed % 2)
            with log.open("a") as file:
                file.write(f"{made.version}\n")
            if number % 3:
                registry.remove(made.ref)

    children = [fork(lambda seed=seed: churn(seed)) for seed in range(4)]
    assert [wait(child) for child in children] == [0] * 4
    numbers = [int(line) for line in log.read_text().split()]
    assert sorted(numbers) == list(range(1, 4 * PUBLISHES + 1))
    registry.gc()
    assert_sound(registry)


@pytest.mark.usefixtures("gc_running")
def test_writers_killed_among_living_ones(memory_path, publish_into, assert_sound):
    registry = Registry(memory_path / "registry")
    dice = random.Random(0)

    def write() -> None:
        for number in range(PUBLISHES):
            publish_into(registry, seed=number % 3)

    living = [fork(write) for _ in range(2)]
    for _ in range(8):
        victim = fork(write)
        time.sleep(dice.uniform(0.005, 0.08))
        os.kill(victim, signal.SIGKILL)
        assert wait(victim) in (0, -signal.SIGKILL)
    assert [wait(child) for child in living] == [0, 0]
    registry.gc()
    numbers = [artifact.version for artifact in registry.list()]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) >= 2 * PUBLISHES
    assert_sound(registry)


def test_gc_leaves_a_living_writer_alone(registry, write_model):
    with registry.stage() as staging:
        write_model(staging.path)
        assert registry.gc().items == ()
        made = staging.publish("tiny", "base", recipe={})
    assert registry.verify() == []
    assert registry.resolve("tiny") == made


def test_a_dry_run_waits_for_who_is_writing_a_file(registry, publish):
    publish()
    file = registry.root / "cache" / ".prufed-being-written"
    with ThreadPoolExecutor(1) as pool:
        with FileLock(registry.root / "prufed-registry.lock"):
            file.write_text("half of it")
            report = pool.submit(registry.gc, dry_run=True)
            time.sleep(0.2)
            file.unlink()
        assert report.result().items == ()


def test_readers_see_a_version_whole_or_not_at_all(memory_path, publish_into):
    registry = Registry(memory_path / "registry")
    publish_into(registry)

    def churn() -> None:
        for seed in range(25):
            registry.remove(publish_into(registry, seed=seed).ref)

    writer = fork(churn)
    seen = set()
    while os.waitpid(writer, os.WNOHANG) == (0, 0):
        assert registry.verify() == []
        newest = registry.resolve("tiny")
        listed = registry.list()
        assert {artifact.kind for artifact in listed} == {"base"}
        assert newest.digest.startswith("sha256:")
        seen.add(newest.version)
    assert len(seen) > 1
