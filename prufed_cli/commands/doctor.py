"""``prufed doctor``: is everything here that prufed needs?"""

from __future__ import annotations

from typing import Annotated

import typer

from prufed_cli.commands.options import Json


def command(
    offline: Annotated[bool, typer.Option("--offline", help="Do not try the Hub.")] = False,
    as_json: Json = False,
) -> None:
    """Check versions, devices, registry, runs, plugins, disk and the Hub; exit 1 on errors."""
    from dataclasses import asdict

    from prufed_cli.doctor import examine
    from prufed_cli.errors import FAILED
    from prufed_cli.output import emit_json, print_line

    findings = examine(network=not offline)
    if as_json:
        emit_json({"findings": [asdict(finding) for finding in findings]})
    else:
        for finding in findings:
            print_line(f"{finding.status:<8}{finding.topic:<10}{finding.found}")
            if finding.advice:
                print_line(f"{'':<18}{finding.advice}")
    if any(finding.status == "error" for finding in findings):
        raise typer.Exit(FAILED)
