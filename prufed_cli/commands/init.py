"""``prufed init``: write a clients.yaml to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    file: Annotated[Path, typer.Argument(help="Where to write.")] = Path("clients.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a commented clients.yaml that runs on the embedded model and data as it stands."""
    from prufed_cli.config.starter import write_starter
    from prufed_cli.output import print_line, reporter

    write_starter(file, force=force)
    reporter().note(f"next: `prufed federate --clients {file} --dry-run` shows what would run")
    print_line(str(file))
