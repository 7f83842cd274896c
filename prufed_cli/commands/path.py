"""``prufed path``: where an artifact lies."""

from __future__ import annotations

from typing import Annotated

import typer

from prufed_cli.commands.options import Json
from prufed_cli.completion import complete_reference


def command(
    reference: Annotated[str, typer.Argument(autocompletion=complete_reference)],
    as_json: Json = False,
) -> None:
    """Print the directory of an artifact; from_pretrained opens it as it is."""
    from prufed_cli.home import open_registry
    from prufed_cli.output import emit_json, print_line

    artifact = open_registry().resolve(reference)
    if as_json:
        emit_json({"reference": artifact.ref, "path": str(artifact.path)})
    else:
        print_line(str(artifact.path))
