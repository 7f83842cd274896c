"""The model card a repository shows: what it is, from what, how, and how good."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from prufed_cli.model_card import read_card, render_card

if TYPE_CHECKING:
    from prufed_cli.hub.places import Place
    from prufed_registry import Artifact, Lineage

_RELATIONS: Final = {
    "pruned": "finetune",
    "client-adapter": "adapter",
    "global-adapter": "adapter",
    "merged": "merge",
}
"""The relations the Hub knows; it has no word for pruning."""

_PACKED: Final = (
    "This repository holds the packed form of the model: masks and the values they keep. "
    "`prufed pull` restores it bit for bit; transformers cannot open it as it is.",
    "",
)


def model_card(
    lineage: Lineage, artifact: Artifact, base: Place | None, *, packed: bool = False
) -> str:
    """Return the card with the metadata block that the Hub reads.

    Args:
        lineage: of the artifact.
        artifact: what it describes; its own card, with the upstream licence, is the beginning.
        base: where the model it was made from is on the Hub, if it is there.
        packed: whether the repository holds the packed form.
    """
    metadata, body = read_card(artifact.path)
    adapter = artifact.kind.endswith("-adapter")
    metadata.setdefault("library_name", "peft" if adapter else "transformers")
    if packed:
        metadata["library_name"] = "prufed"
    tags = metadata.get("tags")
    metadata["tags"] = sorted({*(tags if isinstance(tags, list) else []), "prufed"}, key=str)
    if base is not None and artifact.kind in _RELATIONS:
        metadata["base_model"] = base.repository
        metadata["base_model_relation"] = _RELATIONS[artifact.kind]
    facts = "\n".join([*(_PACKED if packed else ()), *_facts(lineage, artifact)])
    return render_card(metadata, f"{body.strip() or f'# {artifact.name}'}\n\n{facts}\n")


def _facts(lineage: Lineage, artifact: Artifact) -> list[str]:
    manifest = artifact.manifest
    recipe, details = manifest.recipe, manifest.details
    method = recipe.get("plugin")
    versions = ", ".join(f"{key} {value}" for key, value in sorted(manifest.environment.items()))
    return [
        "## Provenance",
        "",
        f"- published as `{artifact.ref}`, kind {artifact.kind}, {artifact.digest}",
        *([f"- method: {method}"] if isinstance(method, str) else []),
        *([f"- sparsity, as counted: {details['sparsity']:.4f}"] if _is_number(details) else []),
        *(f"- {key}: {_text(value)}" for key, value in sorted(manifest.metrics.items())),
        *(f"- made from `{parent.ref}` ({parent.digest})" for parent in manifest.parents),
        *_line_of_descent(lineage),
        f"- recipe: `{_text(recipe)}`",
        *([f"- made with {versions}"] if versions else []),
    ]


def _line_of_descent(lineage: Lineage) -> list[str]:
    """Return the way from the artifact to its root over the first parents, the models."""
    refs, node, seen = [lineage.ref], lineage, {lineage.digest}
    while node.parents and node.parents[0].digest not in seen:
        node = node.parents[0]
        refs.append(node.ref)
        seen.add(node.digest)
    return [f"- lineage: {' ← '.join(f'`{ref}`' for ref in refs)}"] if len(refs) > 1 else []


def _is_number(details: dict[str, Any]) -> bool:
    return isinstance(details.get("sparsity"), int | float)


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
