"""``prufed rm``: remove a version."""

from __future__ import annotations

from typing import Annotated

import typer

from prufed_cli.commands.options import Json
from prufed_cli.completion import complete_reference


def command(
    references: Annotated[list[str], typer.Argument(autocompletion=complete_reference)],
    as_json: Json = False,
) -> None:
    """Remove versions; refused while another artifact was made from one.

    The disk space is freed by `prufed gc`.
    """
    from prufed_cli.home import open_registry
    from prufed_cli.output import emit_json, print_line

    registry = open_registry()
    resolved = map(registry.resolve, references)
    artifacts = list({artifact.ref: artifact for artifact in resolved}.values())
    for artifact in artifacts:
        registry.remove(artifact.ref)
        if not as_json:
            print_line(f"removed {artifact.ref}")
    if as_json:
        emit_json({"removed": [artifact.ref for artifact in artifacts]})
