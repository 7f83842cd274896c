"""Where on the Hub an artifact's content is: remembered after a push or a pull."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prufed_cli.home import home

if TYPE_CHECKING:
    from prufed_registry import Artifact, Registry


@dataclass(frozen=True)
class Place:
    """One revision of one repository.

    Attributes:
        endpoint: the Hub's address.
        repository: ``owner/name``.
        revision: a tag or a commit, what others should ask for.
        commit: the commit it was.
    """

    endpoint: str
    repository: str
    revision: str
    commit: str


def remember(artifact: Artifact, place: Place) -> None:
    """Note that the artifact's content is at ``place``."""
    path = _path(artifact.digest)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(place)), encoding="utf-8")
    partial.replace(path)


def recall(artifact: Artifact, endpoint: str) -> Place | None:
    """Return where the artifact's content was last seen on that Hub."""
    place = _read(_path(artifact.digest))
    return place if place is not None and place.endpoint == endpoint else None


def seen(registry: Registry, endpoint: str, repository: str, commit: str) -> Artifact | None:
    """Return the artifact that a commit of a repository was, if it is still here."""
    for path in sorted((home() / "hub").glob("*.json")):
        place = _read(path)
        if place and (place.endpoint, place.repository, place.commit) == (
            endpoint,
            repository,
            commit,
        ):
            digest = f"sha256:{path.stem}"
            return next((each for each in registry.list() if each.digest == digest), None)
    return None


def _read(path: Path) -> Place | None:
    try:
        return Place(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _path(digest: str) -> Path:
    return home() / "hub" / f"{digest.removeprefix('sha256:')}.json"
