"""``prufed alias``: names for versions."""

from __future__ import annotations

from typing import Annotated

import typer

from prufed_cli.commands.options import Json
from prufed_cli.completion import complete_reference


def command(
    reference: Annotated[
        str, typer.Argument(help="name@v3, or a name.", autocompletion=complete_reference)
    ],
    alias: Annotated[str | None, typer.Argument(help="The new name, such as best.")] = None,
    remove: Annotated[str | None, typer.Option(help="Remove this alias.")] = None,
    as_json: Json = False,
) -> None:
    """Name a version (`prufed alias llama@v3 best`), or list the aliases of an artifact."""
    from prufed_cli.errors import USAGE, PrufedError
    from prufed_cli.home import open_registry
    from prufed_cli.output import emit_json, print_line, table

    if alias is not None and remove is not None:
        raise PrufedError("give an alias to set or one to remove, not both", exit_code=USAGE)
    registry = open_registry()
    artifact = registry.resolve(reference)
    if remove is not None:
        registry.remove_alias(artifact.name, remove)
    elif alias is not None:
        registry.set_alias(artifact.name, alias, artifact.version)
    aliases = registry.aliases(artifact.name)
    if as_json:
        emit_json({"name": artifact.name, "aliases": aliases})
    elif alias is not None:
        print_line(f"{artifact.name}@{alias}")
    else:
        table(["alias", "version"], [[key, f"v{value}"] for key, value in sorted(aliases.items())])
