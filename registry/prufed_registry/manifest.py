"""The manifest: everything the registry promises about one artifact, as a validated model."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from prufed_registry import names
from prufed_registry.digests import MANIFEST, FileEntry, Parent, content_digest, fingerprint
from prufed_registry.errors import Damaged


class Manifest(BaseModel):
    """What one artifact is and how it was made; ``prufed.json`` in its directory.

    Attributes:
        layout: the version of this format.
        name: the artifact's name; its version is its directory's.
        kind: one of `names.KINDS`.
        files: every file but the manifest itself.
        digest: over the sorted ``path sha256`` lines of `files`.
        parents: what it was made from.
        recipe: how to make it again: command, plugin, parameters, seed.
        environment: versions of the libraries that made it.
        metrics: what was measured while it was made.
        details: further facts of its kind (sparsity, kept layers, adapter specification).
        created: when, in UTC, ISO 8601.
        fingerprint: over kind, parents' digests and recipe.
        checksum: over this manifest's own bytes without this entry.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    layout: int = Field(ge=1)
    name: str
    kind: str
    files: dict[str, FileEntry]
    digest: str
    parents: tuple[Parent, ...]
    recipe: dict[str, Any]
    environment: dict[str, Any]
    metrics: dict[str, Any]
    details: dict[str, Any]
    created: str
    fingerprint: str
    checksum: str

    @model_validator(mode="after")
    def _holds_together(self) -> Self:
        if not names.is_name(self.name):
            raise ValueError(f"{self.name!r} is not a name")
        if self.kind not in names.KINDS:
            raise ValueError(f"{self.kind!r} is not a kind of artifact")
        for path in self.files:
            if path == MANIFEST:
                raise ValueError("it lists itself among the files")
            if not names.is_safe_path(path):
                raise ValueError(f"{path!r} does not stay inside the artifact")
        if self.digest != content_digest(self.files):
            raise ValueError("the digest is not that of the files")
        if self.fingerprint != fingerprint(self.kind, self.parents, self.recipe):
            raise ValueError("the fingerprint is not that of the recipe")
        return self


def parse_manifest(payload: dict[str, Any], ref: str) -> Manifest:
    """Validate a manifest read from a file.

    Raises:
        Damaged: it does not hold together.
    """
    import json

    try:
        # Strict JSON mode: arrays may become tuples, and nothing else is converted.
        return Manifest.model_validate_json(json.dumps(payload))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise Damaged(
            f"the manifest of {ref} is not valid: {where}: {first['msg'].lower()}",
            f"remove it with 'prufed rm {ref}' and publish or pull it again",
        ) from error
