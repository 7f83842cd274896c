"""``prufed federate``: run a federation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prufed_cli.commands.options import Json, Quiet
from prufed_cli.completion import complete_run

if TYPE_CHECKING:
    from prufed_cli.federation.plan import Plan
    from prufed_cli.progress import Reporter


def command(
    clients: Annotated[
        Path | None, typer.Option(help="The configuration; `prufed init` writes one.")
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(help="Go on with an interrupted run.", autocompletion=complete_run),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Replace a value of the configuration: rounds=2, tuner.lr=1e-4; repeatable.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, and stop.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune every client's sub-model, merge the adapters, and print the global one's reference.

    An interrupted run goes on with --resume RUN and ends with the same bytes.
    """
    from prufed_cli.errors import USAGE, PrufedError
    from prufed_cli.federation.federate import federate
    from prufed_cli.federation.plan_report import describe, warnings
    from prufed_cli.output import emit_json, print_line, reporter
    from prufed_cli.plugins_report import warn_failures

    telling = reporter(quiet=quiet or as_json)
    warn_failures(telling)
    if resume is not None:
        if clients is not None or settings:
            raise PrufedError(
                "a resumed run keeps its configuration", "give --resume RUN alone", USAGE
            )
        result = federate(resume=resume, reporter=telling)
    else:
        plan = _planned(clients, settings or [])
        if dry_run:
            for warning in warnings(plan):
                telling.warn(warning)
            _rehearse(plan, telling)
            emit_json(describe(plan)) if as_json else _print_plan(plan)
            return
        _tell(plan, telling)
        result = federate(config=plan.config, reporter=telling)
    if as_json:
        emit_json(
            {
                "run": result.run.id,
                "reference": result.artifact.ref,
                "digest": result.artifact.digest,
                "path": str(result.artifact.path),
            }
        )
        return
    telling.note(f"`prufed runs show {result.run.id}` tells what happened in each round")
    print_line(result.artifact.ref)


def _planned(clients: Path | None, settings: list[str]) -> Plan:
    """Return the plan of a configuration file, with values replaced."""
    from prufed_cli.config import load
    from prufed_cli.errors import USAGE, PrufedError
    from prufed_cli.federation.federate import set_values
    from prufed_cli.federation.plan import make_plan
    from prufed_cli.home import open_registry
    from prufed_plugins.discover import parse_settings

    if clients is None:
        raise PrufedError(
            "no configuration given",
            "use --clients clients.yaml; `prufed init` writes one to start from",
            USAGE,
        )
    config = load(clients)
    return make_plan(
        set_values(config, parse_settings(settings)) if settings else config, open_registry()
    )


def _rehearse(plan: Plan, telling: Reporter) -> None:
    """Refuse what the run would refuse before it begins, as far as the base is here."""
    from prufed_cli.federation.plan import base_directory
    from prufed_cli.home import open_registry

    directory = base_directory(plan.base, open_registry())
    if directory is None:
        telling.warn(f"{plan.base} is not here yet: whether its clients can be merged is not known")
        return
    from prufed_cli.federation.beginning import begin
    from prufed_cli.federation.rehearsal import rehearse_plan

    rehearse_plan(plan, begin(plan.config, directory).state)


def _print_plan(plan: Plan) -> None:
    from prufed_cli.federation.plan_report import client_columns, client_rows, heading
    from prufed_cli.output import print_line, table

    for line in heading(plan):
        print_line(line)
    columns = client_columns()
    numeric = [columns.index(name) for name in ("rows", "rank", "weight", "share")]
    table(columns, client_rows(plan), numeric=numeric)


def _tell(plan: Plan, telling: Reporter) -> None:
    from prufed_cli.federation.plan_report import client_columns, client_rows, heading

    for line in heading(plan):
        telling.note(line)
    columns = client_columns()
    for row in client_rows(plan):
        said = dict(zip(columns, row, strict=True))
        share = f", weight {said['share']}" if said["share"] else ""
        telling.note(
            f"  {said['client']}: {said['sub-model']}, {said['rows']} rows, {said['categories']}, "
            f"rank {said['rank']}, {said['tuner']}{share}"
        )
