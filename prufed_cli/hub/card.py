"""The model card a repository shows: what it is, from what, how, and how good."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from prufed_cli.model_card import read_card, render_card

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
        artifact: what it describes; its own card, with the upstream licence, is the beginning.
        base: where its base is on the Hub, if it is there.
    """
    metadata, body = read_card(artifact.path)
    metadata["tags"] = sorted({*metadata.get("tags", []), "prufed"})
    if base is not None and artifact.kind in _RELATIONS:
        metadata |= {
            "base_model": base.repository,
            "base_model_relation": _RELATIONS[artifact.kind],
        }
    return render_card(metadata, f"{body.strip() or f'# {artifact.name}'}\n\n{_facts(artifact)}")


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
