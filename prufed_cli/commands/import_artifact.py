"""``prufed import``: take a directory into the registry."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prufed_cli.commands.options import Json, Quiet


def command(
    directory: Annotated[Path, typer.Argument(help="A model or adapter directory.")],
    name: Annotated[str | None, typer.Option(help="Name of the artifact.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Take a model or adapter directory into the registry and print its reference.

    A directory exported by prufed keeps its kind, recipe and parents and is checked file by file;
    one exported --packed is restored first. Any other is imported as a base.
    """
    from prufed_cli.importing import import_directory
    from prufed_cli.output import emit_json, print_line, reporter

    artifact = import_directory(directory, name=name, reporter=reporter(quiet=quiet or as_json))
    if as_json:
        emit_json({"reference": artifact.ref, "digest": artifact.digest, "kind": artifact.kind})
    else:
        print_line(artifact.ref)
