"""The model card a repository shows: what it is, from what, how, and how good."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prufed_cli.hub.places import Place
    from prufed_registry import Artifact

_RELATIONS = {
    "pruned": "finetune",
    "client-adapter": "adapter",
    "global-adapter": "adapter",
    "merged": "merge",
}


def model_card(artifact: Artifact, base: Place | None) -> str:
    """Return the card with the metadata block that the Hub reads.

    Args:
        artifact: what it describes.
        base: where its base is on the Hub, if it is there.
    """
    import yaml

    body = _body_of(artifact)
    metadata: dict[str, Any] = _metadata_of(artifact)
    metadata.setdefault("tags", [])
    metadata["tags"] = sorted({*metadata["tags"], "prufed"})
    if base is not None and artifact.kind in _RELATIONS:
        metadata |= {
            "base_model": base.repository,
            "base_model_relation": _RELATIONS[artifact.kind],
        }
    header = yaml.safe_dump(metadata, sort_keys=True, allow_unicode=True)
    return f"---\n{header}---\n\n{body.strip()}\n\n{_facts(artifact)}"


def _split(artifact: Artifact) -> tuple[str, str]:
    """Return (metadata, body) of the card stored with the artifact."""
    path = artifact.path / "README.md"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if text.startswith("---\n"):
        header, separator, body = text[4:].partition("\n---\n")
        if separator:
            return header, body
    return "", text


def _metadata_of(artifact: Artifact) -> dict[str, Any]:
    """Return the stored card's metadata, the licence of the original among it."""
    import yaml

    try:
        found = yaml.safe_load(_split(artifact)[0])
    except yaml.YAMLError:
        return {}
    return dict(found) if isinstance(found, dict) else {}


def _body_of(artifact: Artifact) -> str:
    return _split(artifact)[1] or f"# {artifact.name}"


def _facts(artifact: Artifact) -> str:
    manifest = artifact.manifest
    lines = [
        "## Provenance",
        "",
        f"- published as `{artifact.ref}`, kind {artifact.kind}, {artifact.digest}",
        *(f"- made from `{parent.ref}` ({parent.digest})" for parent in manifest.parents),
        f"- recipe: `{json.dumps(manifest.recipe, sort_keys=True)}`",
    ]
    if "sparsity" in manifest.details:
        lines.append(f"- sparsity, as counted: {manifest.details['sparsity']:.4f}")
    lines += [f"- {key}: {value}" for key, value in sorted(manifest.metrics.items())]
    versions = ", ".join(f"{k} {v}" for k, v in sorted(manifest.environment.items()))
    return "\n".join([*lines, f"- made with {versions}", ""])
