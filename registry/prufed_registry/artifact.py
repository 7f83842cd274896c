"""One published version, as callers see it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from prufed_registry.digests import Parent, read_payload
from prufed_registry.index import Record, parse_record

if TYPE_CHECKING:
    from prufed_registry.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Artifact:
    """A published version: immutable files in one directory.

    Attributes:
        name: the name it was published under.
        version: its number, 1 for the first.
        directory: where its files are.
        facts: the manifest's main facts, unparsed: a list of 10,000 looks at few of them.
    """

    name: str
    version: int
    directory: str
    facts: str = field(repr=False)

    @property
    def record(self) -> Record:
        """The manifest's main facts."""
        return parse_record(self.facts)

    @property
    def ref(self) -> str:
        """The reference that always means this version: ``name@v3``."""
        return f"{self.name}@v{self.version}"

    @property
    def path(self) -> Path:
        """The directory, in Hugging Face layout; ``from_pretrained`` opens it as it is."""
        return Path(self.directory)

    @property
    def kind(self) -> str:
        """One of `names.KINDS`; ``damaged`` in a listing where the manifest cannot be read."""
        return self.record.kind

    @property
    def digest(self) -> str:
        """The digest of its content, ``sha256:...``."""
        return self.record.digest

    @property
    def fingerprint(self) -> str:
        """The digest of how it was made."""
        return self.record.fingerprint

    @property
    def parents(self) -> tuple[Parent, ...]:
        """What it was made from."""
        return self.record.parents

    @property
    def created(self) -> str:
        """When it was published, in UTC, ISO 8601."""
        return self.record.created

    @property
    def size(self) -> int:
        """The bytes of its files."""
        return self.record.size

    @property
    def manifest(self) -> Manifest:
        """The whole manifest, read from its file.

        Raises:
            Damaged: it is not what was published.
        """
        from prufed_registry.manifest import parse_manifest

        return parse_manifest(read_payload(self.path, self.ref), self.ref)
