"""``prufed diff``: what two artifacts have in common, and what not."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from prufed_cli.commands.options import Json
from prufed_cli.completion import complete_reference


def command(
    first: Annotated[str, typer.Argument(autocompletion=complete_reference)],
    second: Annotated[str, typer.Argument(autocompletion=complete_reference)],
    as_json: Json = False,
) -> None:
    """Compare two artifacts: recipe, details and files."""
    from prufed_cli.home import open_registry
    from prufed_cli.output import emit_json, print_line, table

    registry = open_registry()
    left, right = registry.resolve(first), registry.resolve(second)
    rows = [
        (key, before, after)
        for section in ("kind", "recipe", "details", "metrics", "environment")
        for key, before, after in _differences(
            section, getattr(left.manifest, section), getattr(right.manifest, section)
        )
    ]
    files = {**left.manifest.files, **right.manifest.files}
    for path in sorted(files):
        before, after = left.manifest.files.get(path), right.manifest.files.get(path)
        if before != after:
            rows.append(
                (f"file {path}", before and before.sha256[:12], after and after.sha256[:12])
            )
    if as_json:
        emit_json(
            {
                "first": left.ref,
                "second": right.ref,
                "identical": left.digest == right.digest,
                "differences": [{"key": k, "first": b, "second": a} for k, b, a in rows],
            }
        )
    elif left.digest == right.digest:
        print_line(f"{left.ref} and {right.ref} have the same content, {left.digest}")
    else:
        table(["", left.ref, right.ref], [[k, _shown(b), _shown(a)] for k, b, a in rows])


def _differences(key: str, before: Any, after: Any) -> list[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(after, dict):
        return [
            row
            for name in sorted(before.keys() | after.keys())
            for row in _differences(f"{key}.{name}", before.get(name), after.get(name))
        ]
    return [] if before == after else [(key, before, after)]


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
