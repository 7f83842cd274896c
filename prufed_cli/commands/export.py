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
    packed: Annotated[
        bool,
        typer.Option("--packed", help="Masks and kept values only; `prufed import` restores it."),
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(help="What an adapter names as its base. Default: its base's directory."),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Copy an artifact out of the registry, or merge an adapter into a stand-alone model.

    --packed writes a smaller form that no library opens: for storing, and for sending.
    """
    from prufed_cli.errors import USAGE, PrufedError
    from prufed_cli.exporting import export, export_merged, export_packed
    from prufed_cli.output import emit_json, print_line, reporter

    telling = reporter(quiet=quiet or as_json)
    if merge and base is not None:
        raise PrufedError("--merge leaves no base to name", "leave --base out", USAGE)
    if merge and packed:
        raise PrufedError(
            "--merge and --packed exclude each other",
            "merge, `prufed import` the result, and export that --packed",
            USAGE,
        )
    if packed:
        made = export_packed(reference, directory, base=base, reporter=telling)
        plain, small = made.sizes.plain, made.sizes.packed
        telling.note(f"{plain:,} bytes of weights and masks packed into {small:,}")
        document = {"path": str(made.path), "bytes": plain, "packed_bytes": small}
    elif merge:
        document = {"path": str(export_merged(reference, directory, reporter=telling))}
    else:
        document = {"path": str(export(reference, directory, base=base))}
    if as_json:
        emit_json(document)
    else:
        print_line(str(document["path"]))
