"""Which versions and aliases of a name exist: the directories are the truth."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from prufed_registry import names
from prufed_registry.index import Location
from prufed_registry.layout import Layout


def living(layout: Layout, name: str) -> list[Location]:
    """Return the versions of `name` that exist, oldest first; none where the name is unknown."""
    found = []
    has_tombstones = False
    try:
        with os.scandir(f"{layout.artifacts}/{name}") as entries:
            for entry in entries:
                text = entry.name
                if (number := names.parse_version(text)) is not None:
                    key = f"{name}/{text}/{entry.inode()}"
                    found.append(Location(name, number, key, entry.path))
                elif text == ".gone":
                    has_tombstones = True
    except (FileNotFoundError, NotADirectoryError):
        return []
    if has_tombstones:
        gone = tombstones(layout, name)
        found = [location for location in found if location.version not in gone]
    found.sort()
    return found


def newest(layout: Layout, name: str) -> Location | None:
    """Return the newest living version of `name`, or None where there is none."""
    while numbers := set(_numbers_in(layout.versions(name))) - tombstones(layout, name):
        if location := find_version(layout, name, max(numbers)):
            return location
        # Removed since the directory was listed: look again.
    return None


def find_version(layout: Layout, name: str, version: int) -> Location | None:
    """Return one version without reading the others, or None where it does not live."""
    directory = f"{layout.artifacts}/{name}/v{version}"
    try:
        inode = os.stat(directory).st_ino  # noqa: PTH116
    except (FileNotFoundError, NotADirectoryError):
        return None
    if (layout.tombstones(name) / f"v{version}").exists():
        return None
    return Location(name, version, f"{name}/v{version}/{inode}", directory)


def tombstones(layout: Layout, name: str) -> set[int]:
    """Return the numbers of `name` that were removed and stay taken."""
    return set(_numbers_in(layout.tombstones(name)))


def all_numbers(layout: Layout, name: str) -> set[int]:
    """Return every number of `name` that is taken, living or removed."""
    return {*_numbers_in(layout.versions(name)), *_numbers_in(layout.tombstones(name))}


def all_names(layout: Layout) -> list[str]:
    """Return every name that has a directory, sorted, living versions or not."""
    try:
        return sorted(entry for entry in os.listdir(layout.artifacts) if names.is_name(entry))  # noqa: PTH208
    except FileNotFoundError:
        return []


def read_aliases(layout: Layout, name: str) -> dict[str, str]:
    """Return the aliases of `name` with the text of each file, sorted; the text is unchecked."""
    directory = layout.aliases(name)
    try:
        found = sorted(entry for entry in os.listdir(directory) if names.is_name(entry))  # noqa: PTH208
    except FileNotFoundError:
        return {}
    return {alias: text for alias in found if (text := _read(directory / alias)) is not None}


def alias_version(text: str) -> int | None:
    """Return the version that an alias file names, or None where it is not a number."""
    return names.parse_version(f"v{text.strip()}")


def _numbers_in(directory: Path) -> Iterator[int]:
    try:
        entries = os.listdir(directory)  # noqa: PTH208
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        if (number := names.parse_version(entry)) is not None:
            yield number


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except FileNotFoundError:
        return None  # removed since the directory was listed
