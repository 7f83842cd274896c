"""``prufed lineage``: what an artifact was made from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from prufed_cli.commands.options import Json
from prufed_cli.completion import complete_reference

if TYPE_CHECKING:
    from prufed_registry import Lineage


def command(
    reference: Annotated[str, typer.Argument(autocompletion=complete_reference)],
    as_json: Json = False,
) -> None:
    """Show what an artifact was made from, down to the base, and what was made from it."""
    from prufed_cli.home import open_registry
    from prufed_cli.output import emit_json, print_line

    registry = open_registry()
    lineage = registry.lineage(reference)
    children = [child.ref for child in registry.children(reference)]
    if as_json:
        emit_json({**_document(lineage), "children": children})
        return
    for line in _tree(lineage, ""):
        print_line(line)
    if children:
        print_line(f"children: {', '.join(children)}")


def _document(lineage: Lineage) -> dict[str, Any]:
    return {
        "reference": lineage.ref,
        "digest": lineage.digest,
        "kind": lineage.artifact.kind if lineage.artifact else None,
        "missing": lineage.artifact is None,
        "recipe": lineage.artifact.manifest.recipe if lineage.artifact else None,
        "parents": [_document(parent) for parent in lineage.parents],
    }


def _tree(lineage: Lineage, indent: str) -> list[str]:
    kind = lineage.artifact.kind if lineage.artifact else "missing"
    lines = [f"{indent}{lineage.ref}  {kind}  {lineage.digest.removeprefix('sha256:')[:12]}"]
    for parent in lineage.parents:
        lines += _tree(parent, indent + "  ")
    return lines
