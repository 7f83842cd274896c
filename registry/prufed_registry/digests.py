"""Digests that are equal on every machine: of an artifact's content, of a recipe, of a manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prufed_registry.errors import Damaged, InvalidRequest

MANIFEST = "prufed.json"
LAYOUT = 1


@dataclass(frozen=True, slots=True)
class Parent:
    """An artifact that another one was made from.

    Attributes:
        ref: where it was found: a registry reference such as ``tiny@v3``.
        digest: its content's digest, ``sha256:...``; the truth where the two disagree.
    """

    ref: str
    digest: str


@dataclass(frozen=True, slots=True)
class FileEntry:
    """What one file must be: its SHA-256 in hexadecimal digits and its size in bytes."""

    sha256: str
    size: int


def content_digest(files: Mapping[str, FileEntry]) -> str:
    """Return the digest of an artifact: SHA-256 over the sorted lines ``path sha256``."""
    lines = "".join(f"{path} {files[path].sha256}\n" for path in sorted(files))
    return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"


def fingerprint(kind: str, parents: Sequence[Parent], recipe: Mapping[str, Any]) -> str:
    """Return the digest of how an artifact is made: its kind, its parents' digests, its recipe.

    Two artifacts with one fingerprint come from the same inputs by the same steps.

    Raises:
        InvalidRequest: the recipe holds something that JSON cannot.
    """
    facts = {"kind": kind, "parents": [parent.digest for parent in parents], "recipe": recipe}
    text = _dumps("recipe", facts, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def plain_json(what: str, value: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return `value` as it will read back from JSON: tuples as lists, keys as strings.

    Raises:
        InvalidRequest: it holds something that JSON cannot, NaN and infinity included.
    """
    loaded: dict[str, Any] = json.loads(_dumps(what, dict(value or {})))
    return loaded


def render(payload: Mapping[str, Any]) -> bytes:
    """Return a manifest's bytes, its checksum computed and added.

    There is one rendering for one content, so that any changed byte shows.
    """
    whole = {**payload, "checksum": _checksum(payload)}
    return f"{json.dumps(whole, indent=1, sort_keys=True)}\n".encode()


def read_payload(directory: Path, ref: str) -> dict[str, Any]:
    """Return the manifest in `directory` as plain JSON, its checksum verified.

    Raises:
        Damaged: it is missing, unreadable, or not the bytes that were written.
        InvalidRequest: a newer prufed wrote it.
    """
    path = directory / MANIFEST
    hint = f"run 'prufed verify {ref}'; remove it with 'prufed rm {ref}' or publish it again"
    try:
        payload = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(f"the manifest of {ref} cannot be read: {error}", hint) from error
    if not isinstance(payload, dict):
        raise Damaged(f"the manifest of {ref} is not a JSON object", hint)
    layout = payload.get("layout")
    if payload.get("checksum") != _checksum(payload):
        raise Damaged(f"the manifest of {ref} has changed since it was published", hint)
    if isinstance(layout, int) and layout > LAYOUT:
        raise InvalidRequest(
            f"{ref} was written by a newer prufed (layout {layout})", "upgrade prufed"
        )
    return payload


def _checksum(payload: Mapping[str, Any]) -> str:
    body = {key: value for key, value in payload.items() if key != "checksum"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _dumps(what: str, value: object, separators: tuple[str, str] | None = None) -> str:
    try:
        json.dumps(value, ensure_ascii=False).encode()  # no half of a surrogate pair reads back
        return json.dumps(value, sort_keys=True, allow_nan=False, separators=separators)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(
            f"the {what} cannot be stored: {error}",
            "use only text, finite numbers, booleans, lists and dictionaries",
        ) from error
