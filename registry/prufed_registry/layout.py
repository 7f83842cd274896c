"""Where things stand in a registry's directory, and whether a directory is a registry at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from prufed_registry.digests import LAYOUT
from prufed_registry.durable import (
    TEMPORARY_PREFIX,
    make_directory,
    storage_errors,
    write_atomically,
)
from prufed_registry.errors import Damaged, InvalidRequest

LAYOUT_FILE = "prufed-registry.json"


def default_home() -> Path:
    """Return ``$PRUFED_HOME``, or the user's data directory for prufed."""
    if configured := os.environ.get("PRUFED_HOME"):
        return Path(configured).expanduser().absolute()
    from platformdirs import user_data_path

    return user_data_path("prufed", appauthor=False)


@dataclass(frozen=True)
class Layout:
    """The directories of the registry at `root`."""

    root: Path

    @cached_property
    def artifacts(self) -> Path:
        """``artifacts/<name>/v3``: what was published."""
        return self.root / "artifacts"

    @property
    def blobs(self) -> Path:
        """``blobs/sha256/ab/abcd...``: the same files once more, by content."""
        return self.root / "blobs" / "sha256"

    @property
    def staging(self) -> Path:
        """``tmp/<uuid>``: what is being written, or deleted."""
        return self.root / "tmp"

    @property
    def evaluations(self) -> Path:
        """``evals/<artifact digest>/<task digest>.json``."""
        return self.root / "evals"

    @property
    def records(self) -> Path:
        """The cache of manifests; deleting it costs time and nothing else."""
        return self.root / "cache" / "records.jsonl"

    def versions(self, name: str) -> Path:
        """Return the directory of one name's versions."""
        return self.artifacts / name

    def aliases(self, name: str) -> Path:
        """Return the directory of one name's aliases."""
        return self.artifacts / name / "aliases"

    def tombstones(self, name: str) -> Path:
        """Return the directory that remembers one name's removed versions."""
        return self.artifacts / name / ".gone"

    def blob(self, sha256: str) -> Path:
        """Return where the bytes of this hash are."""
        return self.blobs / sha256[:2] / sha256

    def evaluation(self, artifact_digest: str, task_digest: str) -> Path:
        """Return where one artifact's result on one task is."""
        artifact = artifact_digest.removeprefix("sha256:")
        return self.evaluations / artifact / f"{task_digest.removeprefix('sha256:')}.json"

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Hold the registry's one lock: commits, removals, aliases and gc's sweep take turns.

        Hashing and copying happen outside it, so it is held for a few renames and links.
        """
        from filelock import FileLock

        with FileLock(self.root / "prufed-registry.lock").acquire(poll_interval=0.005):
            yield

    def exists(self) -> bool:
        """Say whether the registry has been created.

        Raises:
            InvalidRequest: the directory is something else, or a newer prufed's registry.
            Damaged: the layout file cannot be read.
        """
        marker = self.root / LAYOUT_FILE
        if marker.exists():
            _check_marker(marker)
            return True
        if self.root.exists() and not self.root.is_dir():
            raise InvalidRequest(f"{self.root} is not a directory", _foreign_hint())
        # The second look: another process may have created the registry between the two.
        if self.root.exists() and _foreign_entries(self.root) and not marker.exists():
            raise InvalidRequest(
                f"{self.root} holds files but is not a prufed registry", _foreign_hint()
            )
        return marker.exists()

    def create(self) -> None:
        """Create the registry where it is missing; the layout file comes first."""
        with storage_errors(f"create the registry {self.root}"):
            if not self.exists():
                self.root.mkdir(parents=True, exist_ok=True)
                content = json.dumps({"layout": LAYOUT}).encode()
                try:
                    write_atomically(self.root / LAYOUT_FILE, content)
                except FileNotFoundError:
                    # Another process created it first, and its gc took our temporary file.
                    if not self.exists():
                        raise
            for directory in (self.artifacts, self.blobs.parent, self.blobs, self.staging):
                make_directory(directory)
            for directory in (self.evaluations, self.records.parent):
                make_directory(directory)


def _check_marker(marker: Path) -> None:
    try:
        layout = json.loads(marker.read_bytes())["layout"]
        if not isinstance(layout, int):
            raise TypeError(f"layout {layout!r} is not a number")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(
            f"{marker} cannot be read: {error}",
            f"""restore it from a backup, or write {{"layout": {LAYOUT}}} into it""",
        ) from error
    if layout > LAYOUT:
        raise InvalidRequest(
            f"{marker.parent} is a registry of layout {layout}, newer than this prufed's {LAYOUT}",
            "upgrade prufed, or set PRUFED_HOME to another directory",
        )


def _foreign_entries(root: Path) -> list[str]:
    return [name for name in os.listdir(root) if not name.startswith(TEMPORARY_PREFIX)]  # noqa: PTH208


def _foreign_hint() -> str:
    return "set PRUFED_HOME to an empty directory or to one that prufed made"
