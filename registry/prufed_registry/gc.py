"""Collecting garbage: what crashed writers left and what no artifact uses any more.

The plan is made without any lock and may be out of date at once, so every deletion looks again
while it holds the lock that makes its look final.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from prufed_registry import names, versions
from prufed_registry.durable import TEMPORARY_PREFIX, delete_tree, storage_errors
from prufed_registry.index import Index, Location
from prufed_registry.layout import Layout
from prufed_registry.removal import move_away
from prufed_registry.staging import Staging, lock_of


@dataclass(frozen=True, slots=True)
class Garbage:
    """One thing to delete.

    Attributes:
        path: where it is, from the registry's root.
        reason: what it is: ``dead staging``, ``unfinished removal``, ``unused blob``,
            ``stray file`` or ``empty name``.
        size: the bytes that deleting it frees.
    """

    path: str
    reason: str
    size: int


@dataclass(frozen=True, slots=True)
class GcReport:
    """What gc deleted, or would delete.

    Attributes:
        items: the garbage.
        dry_run: whether it still stands.
    """

    items: tuple[Garbage, ...]
    dry_run: bool

    @property
    def size(self) -> int:
        """The bytes freed, or to be freed."""
        return sum(item.size for item in self.items)


def collect(layout: Layout, index: Index, *, dry_run: bool) -> GcReport:
    """Delete the garbage of a registry, or only list it.

    Raises:
        RegistryError: the system refuses a deletion.
    """
    if not layout.exists():
        return GcReport((), dry_run)
    with storage_errors("collect garbage"):
        plan = _plan(layout)
        if dry_run:
            return GcReport(tuple(plan), dry_run)
        layout.create()  # its writer may have died before it had made every directory
        # Trees come before blobs in the plan: a blob is unused only once they are gone.
        done = tuple(item for item in plan if _delete(layout, item))
        with layout.changing():
            index.rewrite(_all_living(layout))
    return GcReport(done, dry_run)


def _plan(layout: Layout) -> list[Garbage]:
    dying: Counter[int] = Counter()
    trees = [
        Garbage(_relative(layout, path), reason, _tree_size(path, dying))
        for path, reason in (*_dead_staging(layout), *_unfinished_removals(layout))
    ]
    return [
        *trees,
        *_unused_blobs(layout, dying),
        *_stray_files(layout),
        *_empty_names(layout),
    ]


def _relative(layout: Layout, path: Path) -> str:
    return path.relative_to(layout.root).as_posix()


def _tree_size(tree: Path, dying: Counter[int]) -> int:
    """Return the bytes that only this tree holds; count its files' names by inode in `dying`."""
    size = 0
    paths = (Path(directory, file) for directory, _, files in os.walk(tree) for file in files)
    for path in [tree] if tree.is_file() else paths:
        try:
            status = path.lstat()
        except FileNotFoundError:
            continue  # deleted by its owner since
        dying[status.st_ino] += 1
        size += status.st_size if status.st_nlink == 1 else 0
    return size


def _dead_staging(layout: Layout) -> Iterator[tuple[Path, str]]:
    for path in sorted(layout.staging.glob("*")):
        directory = path.with_suffix("")
        if path.suffix == ".lock" and directory.exists():
            continue  # listed with its directory
        if _is_dead(directory):
            yield path, "dead staging"


def _is_dead(directory: Path) -> bool:
    from filelock import FileLock, Timeout

    lock = lock_of(directory)
    if not lock.exists():
        # A writer holds its lock as long as the directory exists; it may have ended just now.
        return directory.exists()
    try:
        with FileLock(lock, blocking=False, thread_local=False):
            return True
    except Timeout:
        return False


def _unfinished_removals(layout: Layout) -> Iterator[tuple[Path, str]]:
    for name in versions.all_names(layout):
        for number in sorted(versions.tombstones(layout, name)):
            directory = layout.versions(name) / f"v{number}"
            if directory.exists():
                yield directory, "unfinished removal"


def _unused_blobs(layout: Layout, dying: Counter[int]) -> Iterator[Garbage]:
    for blob in sorted(layout.blobs.glob("*/*")):
        with suppress(FileNotFoundError):  # another gc took it meanwhile
            status = blob.lstat()
            if status.st_nlink - dying[status.st_ino] == 1:
                yield Garbage(_relative(layout, blob), "unused blob", status.st_size)


def _stray_files(layout: Layout) -> Iterator[Garbage]:
    places = [layout.root, layout.records.parent, *layout.evaluations.glob("*")]
    places += [layout.aliases(name) for name in versions.all_names(layout)]
    found = [path for place in places for path in sorted(place.glob(f"{TEMPORARY_PREFIX}*"))]
    if not found:
        return
    # Whoever writes such a file holds the lock until it has its name: what stays is a dead one's.
    with layout.changing():
        stray = [(path, path.lstat().st_size) for path in found if path.exists()]
    for path, size in stray:
        yield Garbage(_relative(layout, path), "stray file", size)


def _empty_names(layout: Layout) -> Iterator[Garbage]:
    for name in versions.all_names(layout):
        if not any(layout.versions(name).iterdir()):
            yield Garbage(_relative(layout, layout.versions(name)), "empty name", 0)


def _delete(layout: Layout, item: Garbage) -> bool:
    """Delete one thing if it is still garbage; return whether it was."""
    path = layout.root / item.path
    if item.reason == "dead staging":
        return _reap(path)
    if item.reason == "unfinished removal":
        return _finish_removal(layout, path)
    with layout.changing():
        try:
            if item.reason == "empty name":
                path.rmdir()
            elif item.reason == "stray file" or path.lstat().st_nlink == 1:
                path.unlink()
            else:
                return False
        except FileNotFoundError:
            return False
        except OSError:
            if item.reason == "empty name":
                return False  # somebody published meanwhile
            raise
    return True


def _reap(path: Path) -> bool:
    from filelock import FileLock, Timeout

    directory = path.with_suffix("")
    try:
        with FileLock(lock_of(directory), blocking=False, thread_local=False):
            delete_tree(directory)
            lock_of(directory).unlink(missing_ok=True)
    except Timeout:
        return False
    return True


def _finish_removal(layout: Layout, path: Path) -> bool:
    number = names.parse_version(path.name) or 0
    with Staging(layout) as trash, layout.changing():
        if not path.exists():
            return False
        move_away(Location(path.parent.name, number, "", str(path)), trash)
    return True


def _all_living(layout: Layout) -> Iterator[Location]:
    for name in versions.all_names(layout):
        yield from versions.living(layout, name)
