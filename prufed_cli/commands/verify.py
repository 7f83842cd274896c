"""``prufed verify``: are the stored bytes what was published?"""

from __future__ import annotations

from typing import Annotated

import typer

from prufed_cli.commands.options import Json
from prufed_cli.completion import complete_reference


def command(
    references: Annotated[
        list[str] | None,
        typer.Argument(help="Default: everything.", autocompletion=complete_reference),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check every stored byte against its manifest; exit 5 on damage."""
    from prufed_cli.errors import INTEGRITY
    from prufed_cli.home import open_registry
    from prufed_cli.output import emit_json, print_line

    registry = open_registry()
    checked = len(references) if references else len(registry.list())
    problems = registry.verify(references or None)
    if as_json:
        emit_json(
            {
                "checked": checked,
                "problems": [
                    {"reference": p.ref, "path": p.path, "message": p.message} for p in problems
                ],
            }
        )
    else:
        for problem in problems:
            print_line(" ".join(filter(None, [problem.ref, problem.path])) + f": {problem.message}")
        print_line(f"{checked} artifacts checked, {len(problems)} problems")
    if problems:
        raise typer.Exit(INTEGRITY)
