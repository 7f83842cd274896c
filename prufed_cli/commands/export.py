"""``prufed export``: out of the registry."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prufed_cli.commands.options import Json, Quiet
from prufed_cli.completion import complete_reference


def command(
    reference: Annotated[str, typer.Argument(autocompletion=complete_reference)],
    directory: Annotated[Path, typer.Argument(help="A new or empty directory.")],
    merge: Annotated[
        bool, typer.Option("--merge", help="Merge an adapter into its base: a stand-alone model.")
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(help="What an adapter names as its base. Default: its base's directory."),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Copy an artifact out of the registry, or merge an adapter into a stand-alone model."""
    from prufed_cli.exporting import export, export_merged
    from prufed_cli.output import emit_json, print_line, reporter

    if merge:
        written = export_merged(reference, directory, reporter=reporter(quiet=quiet or as_json))
    else:
        written = export(reference, directory, base=base)
    if as_json:
        emit_json({"path": str(written)})
    else:
        print_line(str(written))
