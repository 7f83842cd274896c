"""``prufed pull``: a repository from the Hub into the registry."""

from __future__ import annotations

from typing import Annotated

import typer

from prufed_cli.commands.options import Json, Quiet


def command(
    repository: Annotated[str, typer.Argument(help="owner/name.")],
    revision: Annotated[
        str | None, typer.Option(help="Tag, branch or commit. Default: the newest.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the artifact.")] = None,
    with_base: Annotated[
        bool, typer.Option("--with-base", help="Pull an adapter's base first, if it is not here.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fetch a repository from the Hub into the registry and print its reference.

    What prufed pushed is checked byte for byte; any other repository becomes a base.
    """
    from prufed_cli.hub import pull
    from prufed_cli.output import emit_json, print_line, reporter

    telling = reporter(quiet=quiet or as_json)
    result = pull(repository, revision=revision, name=name, with_base=with_base, reporter=telling)
    if as_json:
        emit_json(
            {
                "reference": result.artifact.ref,
                "digest": result.artifact.digest,
                "kind": result.artifact.kind,
                "commit": result.commit,
                "already": result.already,
            }
        )
        return
    if result.base is not None:
        telling.warn(f"its base is not here; `prufed pull {result.base[0]}` fetches it")
    print_line(result.artifact.ref)
