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
        emit_json({"reference": lineage.ref, "artifacts": _graph(lineage), "children": children})
        return
    for line in _tree(lineage, "", set()):
        print_line(line)
    if children:
        print_line(f"children: {', '.join(children)}")


def _graph(lineage: Lineage) -> list[dict[str, Any]]:
    """Return every artifact of the graph once, nearest first."""
    found: dict[str, dict[str, Any]] = {}
    waiting = [lineage]
    while waiting:
        node = waiting.pop(0)
        if node.ref in found:
            continue
        found[node.ref] = {
            "reference": node.ref,
            "digest": node.digest,
            "kind": node.artifact.kind if node.artifact else None,
            "missing": node.artifact is None,
            "recipe": node.artifact.manifest.recipe if node.artifact else None,
            "parents": [parent.ref for parent in node.parents],
        }
        waiting += node.parents
    return list(found.values())


def _tree(lineage: Lineage, indent: str, seen: set[str]) -> list[str]:
    """Return the graph as lines; an artifact's own parents are shown the first time only."""
    kind = lineage.artifact.kind if lineage.artifact else "missing"
    line = f"{indent}{lineage.ref}  {kind}  {lineage.digest.removeprefix('sha256:')[:12]}"
    if lineage.ref in seen:
        return [f"{line}  (above)"] if lineage.parents else [line]
    seen.add(lineage.ref)
    return [line, *(each for p in lineage.parents for each in _tree(p, indent + "  ", seen))]
