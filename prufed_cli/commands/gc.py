"""``prufed gc``: free what nothing refers to."""

from __future__ import annotations

from typing import Annotated

import typer

from prufed_cli.commands.options import Json


def command(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would go; remove nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Free the disk space nothing refers to: removed versions, and what crashes left behind."""
    from prufed_cli.home import open_registry
    from prufed_cli.output import emit_json, print_line

    report = open_registry().gc(dry_run=dry_run)
    if as_json:
        emit_json(
            {
                "dry_run": dry_run,
                "bytes": report.size,
                "items": [
                    {"reason": item.reason, "path": item.path, "bytes": item.size}
                    for item in report.items
                ],
            }
        )
        return
    for item in report.items:
        print_line(f"{item.reason}  {item.path}  {item.size} bytes")
    verb = "would free" if dry_run else "freed"
    print_line(f"{verb} {report.size} bytes in {len(report.items)} items")
