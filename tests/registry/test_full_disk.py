"""A disk that fills up at any byte: one sentence, nothing published, nothing left behind."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
from pathlib import Path

import pytest

from prufed_registry import Registry, RegistryError
from prufed_registry.outside import new_directory


def files_under(root: Path) -> set[str]:
    """Return every file of the registry but the cache, whose loss costs nothing."""
    found = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    return {path for path in found if not path.startswith("cache/")}


def test_every_byte_count_at_which_a_file_stops_growing(
    memory_path, publish_into, run_child, assert_sound
):
    """A limit on file sizes fails a write halfway, as a full disk does; it needs no privileges."""
    registry = Registry(memory_path / "registry")
    first = publish_into(registry)
    registry.set_alias("tiny", "best", 1)
    before = files_under(registry.root)
    outcomes = set()
    for limit in [0, 1, 2, *range(10, 1400, 45)]:

        def fill(limit: int = limit) -> None:
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            with pytest.raises(RegistryError, match="a file would be larger than is allowed"):
                publish_into(registry, seed=1, parents=(first,))

        outcomes.add(run_child(fill))
        if files_under(registry.root) != before:
            break
        assert registry.list() == [first]
        assert_sound(registry)
    assert limit > 700, "the manifest is larger than this"
    assert outcomes == {0, 1}, "only the last, large enough limit lets the writer through"
    assert [each.ref for each in registry.list()] == ["tiny@v1", "tiny@v2"]


@pytest.fixture
def small_disk(tmp_path: Path):
    """A disk of 128 KiB; only root may make one."""
    directory = tmp_path / "disk"
    directory.mkdir()
    options = ["-t", "tmpfs", "-o", "size=128k", "prufed-test"]
    made = subprocess.run(["mount", *options, directory], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {made.stderr.strip()}")
    yield directory
    subprocess.run(["umount", directory], check=True)


def test_a_disk_with_any_number_of_free_pages(small_disk, publish_into, assert_sound):
    registry = Registry(small_disk / "registry")
    first = publish_into(registry)
    page = os.statvfs(small_disk).f_bsize
    succeeded = []
    for pages in range(10):
        free = os.statvfs(small_disk).f_bavail
        ballast = small_disk / "ballast"
        ballast.write_bytes(b"x" * page * max(0, free - pages))
        before = files_under(registry.root)
        error = None
        try:
            publish_into(registry, seed=pages + 1, parents=(first,))
            succeeded.append(pages)
        except RegistryError as raised:
            error = raised
        if error:
            assert "the disk is full" in error.message
            assert "gc" in (error.hint or "")
            assert files_under(registry.root) == before
        ballast.unlink()
        assert_sound(registry)
    assert 0 not in succeeded
    assert 9 in succeeded
    assert succeeded == list(range(succeeded[0], 10))


def test_a_full_disk_outside_the_registry_is_not_mended_by_another_home(
    registry, publish_into, tmp_path, run_child
):
    publish_into(registry)
    target = tmp_path / "out"

    def fill() -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        with pytest.raises(RegistryError, match="larger than is allowed") as caught:
            registry.export("tiny", target)
        assert "ulimit" in (caught.value.hint or "")
        with (
            pytest.raises(RegistryError, match=f"cannot write {target}: a file would be larger"),
            new_directory(target) as partial,
        ):
            (partial / "large").write_bytes(b"x" * 1000)
        full = OSError(errno.ENOSPC, "No space left on device")
        with (
            pytest.raises(
                RegistryError, match=f"cannot write {target}: the disk is full"
            ) as caught,
            new_directory(target),
        ):
            raise full
        assert "PRUFED_HOME" not in (caught.value.hint or "")

    assert run_child(fill) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["registry"]


def test_a_caller_that_fills_the_disk_itself_gets_the_same_sentence(registry):
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(RegistryError, match="the disk is full"), registry.stage():
        raise full
    assert list((registry.root / "tmp").iterdir()) == []


def test_another_error_of_the_caller_passes_and_leaves_nothing(registry):
    staging = registry.stage()

    def break_off() -> None:
        with staging:
            (staging.path / "half.txt").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        break_off()
    assert list((registry.root / "tmp").iterdir()) == []
    assert registry.list() == []
