"""A rebuildable cache of what the manifests say, so that 10,000 versions list at once.

Published versions never change, so a line stays true as long as its directory is the same one;
the directory's inode, which the scan returns for free, tells. Lines are only ever appended; a
line torn by a crash is skipped, and gc rewrites the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from prufed_registry.digests import Parent, read_payload
from prufed_registry.durable import make_directory, write_atomically
from prufed_registry.errors import RegistryError

DAMAGED = "damaged"
"""The kind that a version with an unreadable manifest is listed under."""

Key = tuple[str, int, int]
"""Name, version, inode of the version's directory."""


class Record(NamedTuple):
    """The facts of a manifest that listings and look-ups need."""

    kind: str
    digest: str
    fingerprint: str
    created: str
    size: int
    raw_parents: list[list[str]]

    @property
    def parents(self) -> tuple[Parent, ...]:
        """What the artifact was made from."""
        return tuple(Parent(ref, digest) for ref, digest in self.raw_parents)


_WIDTH = 3 + len(Record._fields)


def record_of(payload: Mapping[str, Any]) -> Record:
    """Return the record of a manifest."""
    return Record(
        kind=payload["kind"],
        digest=payload["digest"],
        fingerprint=payload["fingerprint"],
        created=payload["created"],
        size=sum(entry["size"] for entry in payload["files"].values()),
        raw_parents=[[parent["ref"], parent["digest"]] for parent in payload["parents"]],
    )


class Index:
    """The cached records of one registry, read once per process and then only its new lines."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._records: dict[Key, Record] = {}
        self._inode = 0
        self._offset = 0

    def lookup(self, keys: Mapping[Key, str]) -> dict[Key, Record]:
        """Return the records of some versions, reading the manifests of those not cached yet.

        Args:
            keys: the versions, each with its directory.

        Returns:
            One record per key; kind `DAMAGED` where the manifest cannot be read, never cached.
        """
        self._read_new_lines()
        missing = {key: path for key, path in keys.items() if key not in self._records}
        fresh, damaged = _read_manifests(missing)
        self._records.update(fresh)
        # A registry that cannot be written can still be read; then nothing is cached.
        with suppress(OSError):
            self._append(fresh)
        return {key: self._records.get(key) or damaged[key] for key in keys}

    def rewrite(self, living: Iterable[Key]) -> None:
        """Write the file anew with the living versions only."""
        self._read_new_lines()
        kept = {key: self._records[key] for key in living if key in self._records}
        write_atomically(
            self._path, b"".join(_line(key, record) + b"\n" for key, record in kept.items())
        )

    def _append(self, fresh: Mapping[Key, Record]) -> None:
        if not fresh:
            return
        make_directory(self._path.parent)
        # The newline in front closes a line that a crash may have torn.
        lines = b"".join(b"\n" + _line(key, record) for key, record in fresh.items())
        with self._path.open("ab", buffering=0) as file:
            file.write(lines + b"\n")

    def _read_new_lines(self) -> None:
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._inode or status.st_size < self._offset:
                    self._records, self._offset = {}, 0
                file.seek(self._offset)
                content = file.read()
        except OSError:
            self._records, self._inode, self._offset = {}, 0, 0
            return
        whole = content[: content.rfind(b"\n") + 1]
        self._inode = status.st_ino
        self._offset += len(whole)
        for name, version, inode, *facts in _parse_lines(whole):
            self._records[name, version, inode] = Record(*facts)


def _line(key: Key, record: Record) -> bytes:
    return json.dumps([*key, *record], separators=(",", ":")).encode()


def _parse_lines(content: bytes) -> list[list[Any]]:
    lines = [line for line in content.split(b"\n") if line]
    try:
        rows = json.loads(b"[" + b",".join(lines) + b"]")
    except ValueError:
        rows = [_parse_line(line) for line in lines]
    return [row for row in rows if isinstance(row, list) and len(row) == _WIDTH]


def _parse_line(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _read_manifests(missing: Mapping[Key, str]) -> tuple[dict[Key, Record], dict[Key, Record]]:
    fresh: dict[Key, Record] = {}
    damaged: dict[Key, Record] = {}
    for key, path in missing.items():
        try:
            fresh[key] = record_of(read_payload(Path(path), f"{key[0]}@v{key[1]}"))
        except (RegistryError, KeyError, TypeError, AttributeError):
            damaged[key] = Record(DAMAGED, "", "", "", 0, [])
    return fresh, damaged
