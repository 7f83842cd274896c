"""``prufed list``: artifacts and their versions."""

from __future__ import annotations

from typing import Annotated

import typer

from prufed_cli.commands.options import Json


def command(
    name: Annotated[str | None, typer.Argument(help="Only this artifact.")] = None,
    kind: Annotated[
        str | None,
        typer.Option(help="base, pruned, client-adapter, global-adapter or merged."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List artifacts and their versions, newest last."""
    from prufed_cli.home import open_registry
    from prufed_cli.output import emit_json, table

    registry = open_registry()
    artifacts = registry.list(name=name, kind=kind)
    if name is not None and not artifacts and not registry.list(name=name):
        registry.resolve(name)  # raises, and names what is near
    if as_json:
        emit_json(
            {
                "artifacts": [
                    {
                        "reference": artifact.ref,
                        "name": artifact.name,
                        "version": artifact.version,
                        "kind": artifact.kind,
                        "digest": artifact.digest,
                    }
                    for artifact in artifacts
                ]
            }
        )
        return
    aliases: dict[str, list[str]] = {}
    for artifact_name in {artifact.name for artifact in artifacts}:
        for alias, version in registry.aliases(artifact_name).items():
            aliases.setdefault(f"{artifact_name}@v{version}", []).append(alias)
    table(
        ["reference", "kind", "digest", "aliases"],
        [
            [
                artifact.ref,
                artifact.kind,
                artifact.digest.removeprefix("sha256:")[:12],
                " ".join(sorted(aliases.get(artifact.ref, []))),
            ]
            for artifact in artifacts
        ],
    )
