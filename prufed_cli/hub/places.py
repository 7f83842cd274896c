"""Where on the Hub an artifact's content is: remembered after a push, a pull or an import."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prufed_cli.home import home

if TYPE_CHECKING:
    from prufed_registry import Artifact


@dataclass(frozen=True)
class Place:
    """One revision of one repository.

    Attributes:
        endpoint: the Hub's address.
        repository: ``owner/name``.
        revision: a tag or a commit.
    """

    endpoint: str
    repository: str
    revision: str


def remember(artifact: Artifact, place: Place) -> None:
    """Note that the artifact's content is at ``place``."""
    path = _path(artifact)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(place)), encoding="utf-8")
    partial.replace(path)


def recall(artifact: Artifact, endpoint: str) -> Place | None:
    """Return where the artifact's content was last seen on that Hub."""
    try:
        place = Place(**json.loads(_path(artifact).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return place if place.endpoint == endpoint else None


def _path(artifact: Artifact) -> Path:
    return home() / "hub" / f"{artifact.digest.removeprefix('sha256:')}.json"
