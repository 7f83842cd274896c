"""``prufed push``: an artifact onto the Hub."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from prufed_cli.commands.options import Json, Quiet
from prufed_cli.completion import complete_reference

if TYPE_CHECKING:
    from prufed_cli.hub import PushResult


def command(
    reference: Annotated[str, typer.Argument(autocompletion=complete_reference)],
    repository: Annotated[str, typer.Argument(help="owner/name; created if it does not exist.")],
    public: Annotated[
        bool, typer.Option("--public", help="A repository that is created is public.")
    ] = False,
    with_base: Annotated[
        bool, typer.Option("--with-base", help="Push an adapter's base too, if it is not there.")
    ] = False,
    packed: Annotated[
        bool,
        typer.Option("--packed", help="Send a smaller form, which only `prufed pull` opens."),
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Publish an artifact on the Hugging Face Hub, tagged with its version.

    The token is the one of `hf auth login` or HF_TOKEN; prufed never stores it.
    """
    from prufed_cli.hub import push
    from prufed_cli.output import emit_json, print_line, reporter

    telling = reporter(quiet=quiet or as_json)
    result = push(
        reference,
        repository,
        private=not public,
        with_base=with_base,
        packed=packed,
        reporter=telling,
    )
    if as_json:
        emit_json(_document(result) | {"base": _document(result.base) if result.base else None})
        return
    if result.already:
        telling.note(f"{result.repository} has this {result.tag} already; nothing to do")
    print_line(result.url)


def _document(result: PushResult) -> dict[str, object]:
    return {
        "reference": result.artifact.ref,
        "digest": result.artifact.digest,
        "repository": result.repository,
        "tag": result.tag,
        "commit": result.commit,
        "url": result.url,
        "already": result.already,
    }
