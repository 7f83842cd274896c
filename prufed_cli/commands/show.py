"""``prufed show``: everything known about one artifact."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from prufed_cli.commands.options import Json
from prufed_cli.completion import complete_reference

if TYPE_CHECKING:
    from prufed_registry import Artifact


def command(
    reference: Annotated[str, typer.Argument(autocompletion=complete_reference)],
    as_json: Json = False,
) -> None:
    """Show one artifact: recipe, parents, metrics, details, evaluations, files."""
    from prufed_cli.home import open_registry
    from prufed_cli.output import emit_json, print_line
    from prufed_cli.pruning import read_report

    registry = open_registry()
    artifact = registry.resolve(reference)
    evaluations = registry.evaluations(artifact.digest)
    if as_json:
        emit_json(
            {
                "reference": artifact.ref,
                "path": str(artifact.path),
                "manifest": artifact.manifest.model_dump(mode="json"),
                "evaluations": evaluations,
                "report": read_report(artifact),
            }
        )
        return
    for line in _lines(artifact):
        print_line(line)
    for payload in evaluations.values():
        shown = {key: value for key, value in payload.items() if key != "per_document"}
        print_line(f"evaluated   {_compact(shown)}")


def _lines(artifact: Artifact) -> list[str]:
    manifest = artifact.manifest
    lines = [
        f"reference   {artifact.ref}",
        f"kind        {artifact.kind}",
        f"digest      {artifact.digest}",
        f"path        {artifact.path}",
        f"created     {manifest.created}",
    ]
    lines += [f"parent      {parent.ref}  {parent.digest}" for parent in manifest.parents]
    lines += [f"recipe      {_compact(manifest.recipe)}"]
    lines += [f"{key:<11} {_compact(value)}" for key, value in sorted(manifest.details.items())]
    lines += [f"metric      {key} = {value}" for key, value in sorted(manifest.metrics.items())]
    if manifest.environment:
        made = ", ".join(f"{name} {version}" for name, version in manifest.environment.items())
        lines.append(f"made with   {made}")
    lines += [f"file        {path}  {entry.size} bytes" for path, entry in manifest.files.items()]
    return lines


def _compact(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
