"""A rebuildable cache of what the manifests say, so that 10,000 versions list at once.

Published versions never change, so a line stays true as long as its directory is the same one;
the directory's inode, which the scan returns for free, tells. Lines are only ever appended; a
line torn by a crash is skipped, and gc rewrites the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from prufed_registry.digests import Parent, read_payload
from prufed_registry.durable import make_directory, write_atomically
from prufed_registry.errors import RegistryError

DAMAGED = "damaged"
"""The kind that a version with an unreadable manifest is listed under."""

_END = "\t."
"""What a line that was torn by a crash lacks."""

_DAMAGED_FACTS = json.dumps([DAMAGED, "", "", "", 0, []])


class Location(NamedTuple):
    """Where one version's directory is, before anything in it has been read.

    Attributes:
        name: the artifact's name.
        version: its number.
        key: what the cache knows it by: ``name/v3/inode``.
        directory: the version's directory.
    """

    name: str
    version: int
    key: str
    directory: str

    @property
    def ref(self) -> str:
        """The reference that always means this version: ``name@v3``."""
        return f"{self.name}@v{self.version}"


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


@lru_cache(maxsize=1 << 16)
def parse_record(facts: str) -> Record:
    """Return the record that a cached line's facts are; parsed when first asked for."""
    return Record(*json.loads(facts))


def facts_of(payload: Mapping[str, Any]) -> str:
    """Return the record of a manifest as one line of JSON, the form it is cached in."""
    record = Record(
        kind=payload["kind"],
        digest=payload["digest"],
        fingerprint=payload["fingerprint"],
        created=payload["created"],
        size=sum(entry["size"] for entry in payload["files"].values()),
        raw_parents=[[parent["ref"], parent["digest"]] for parent in payload["parents"]],
    )
    return json.dumps(record, separators=(",", ":"))


def read_facts(directory: str, ref: str) -> str:
    """Return the record of the manifest in a directory, `DAMAGED` where it cannot be read."""
    try:
        return facts_of(read_payload(Path(directory), ref))
    except (RegistryError, KeyError, TypeError, AttributeError):
        return _DAMAGED_FACTS


class Index:
    """The cached records of one registry, read once per process and then only its new lines.

    A line is ``name/v3/inode``, a tab, and the record as JSON, which is parsed only when it is
    asked for.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._facts: dict[str, str] = {}
        self._inode = 0
        self._offset = 0

    def lookup(self, locations: Sequence[Location]) -> list[str]:
        """Return the facts of some versions, reading the manifests of those not cached yet.

        Returns:
            One line per location; of the kind `DAMAGED` where the manifest cannot be read.
        """
        self._read_new_lines()
        fresh = {
            each.key: read_facts(each.directory, each.ref)
            for each in locations
            if each.key not in self._facts
        }
        sound = {key: facts for key, facts in fresh.items() if facts != _DAMAGED_FACTS}
        self._facts.update(sound)
        # A registry that cannot be written can still be read; then nothing is cached.
        with suppress(OSError):
            self._append(sound)
        get = self._facts.get
        return [get(each.key) or fresh[each.key] for each in locations]

    def rewrite(self, living: Iterable[Location]) -> None:
        """Write the file anew with the living versions only."""
        self._read_new_lines()
        kept = {each.key: self._facts[each.key] for each in living if each.key in self._facts}
        write_atomically(self._path, _lines(kept))

    def _append(self, fresh: Mapping[str, str]) -> None:
        if not fresh:
            return
        make_directory(self._path.parent)
        # The newline in front closes a line that a crash may have torn.
        with self._path.open("ab", buffering=0) as file:
            file.write(b"\n" + _lines(fresh))

    def _read_new_lines(self) -> None:
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._inode or status.st_size < self._offset:
                    self._facts, self._offset = {}, 0
                file.seek(self._offset)
                content = file.read()
        except OSError:
            self._facts, self._inode, self._offset = {}, 0, 0
            return
        whole = content[: content.rfind(b"\n") + 1]
        self._inode = status.st_ino
        self._offset += len(whole)
        for line in whole.decode("ascii", errors="replace").split("\n"):
            key, _, facts = line.partition("\t")
            if facts.endswith(_END):
                self._facts[key] = facts[: -len(_END)]


def _lines(facts: Mapping[str, str]) -> bytes:
    return "".join(f"{key}\t{line}{_END}\n" for key, line in facts.items()).encode()
