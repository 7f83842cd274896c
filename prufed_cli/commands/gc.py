"""``prufed gc``: free what nothing refers to."""

from __future__ import annotations

from typing import Annotated

import typer

from prufed_cli.commands.options import Json


def command(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would go; remove nothing.")
    ] = False,
    unfinished: Annotated[
        bool, typer.Option("--unfinished", help="Also the work of prunes that were cut off.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Free the disk space nothing refers to: removed versions, and what crashes left behind."""
    from prufed_cli.home import open_registry, prunes_directory
    from prufed_cli.output import emit_json, print_line, reporter
    from prufed_cli.pruning.work import sweep

    registry = open_registry()
    garbage = registry.gc(dry_run=dry_run).items
    items = [(item.reason, item.path, item.size) for item in garbage]
    workplace = prunes_directory(registry)
    waiting = sweep(workplace, untouched=0, dry_run=dry_run or not unfinished)
    if unfinished:
        for work in waiting:
            path = work.path.relative_to(workplace.parent).as_posix()
            items.append(("unfinished prune", path, work.size))
    total = sum(size for _, _, size in items)
    if as_json:
        documents = [
            {"reason": reason, "path": path, "bytes": size} for reason, path, size in items
        ]
        emit_json({"dry_run": dry_run, "bytes": total, "items": documents})
        return
    for reason, path, size in items:
        print_line(f"{reason}  {path}  {size} bytes")
    print_line(f"{'would free' if dry_run else 'freed'} {total} bytes in {len(items)} items")
    if waiting and not unfinished:
        kept = sum(work.size for work in waiting)
        reporter().note(
            f"{kept} bytes are kept for prunes that were cut off, should they be asked for again; "
            "`prufed gc --unfinished` deletes them"
        )
