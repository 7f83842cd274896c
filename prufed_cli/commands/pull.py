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
                "path": str(result.artifact.path),
                "repository": result.repository,
                "commit": result.commit,
                "already": result.already,
                "missing_base": result.missing_base.repository if result.missing_base else None,
            }
        )
        return
    if result.already:
        telling.note(f"{result.artifact.ref} is the same content; nothing to do")
    if result.missing_base is not None:
        telling.warn(f"its base is not here; `prufed pull {repository} --with-base` fetches it")
    print_line(result.artifact.ref)
