"""``prufed federate``: run a federation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prufed_cli.commands.options import Json, Quiet
from prufed_cli.completion import complete_run

if TYPE_CHECKING:
    from prufed_cli.config.models import MethodSection
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
    from prufed_cli.config import load
    from prufed_cli.errors import USAGE, PrufedError
    from prufed_cli.federation.federate import federate, set_values
    from prufed_cli.federation.plan import describe, make_plan
    from prufed_cli.home import open_registry
    from prufed_cli.output import emit_json, print_line, reporter
    from prufed_cli.plugins_report import warn_failures
    from prufed_plugins.discover import parse_settings

    telling = reporter(quiet=quiet or as_json)
    warn_failures(telling)
    if resume is not None:
        if clients is not None or settings:
            raise PrufedError(
                "a resumed run keeps its configuration", "give --resume RUN alone", USAGE
            )
        result = federate(resume=resume, reporter=telling)
    else:
        if clients is None:
            raise PrufedError(
                "no configuration given",
                "use --clients clients.yaml; `prufed init` writes one to start from",
                USAGE,
            )
        config = load(clients)
        if settings:
            config = set_values(config, parse_settings(settings))
        plan = make_plan(config, open_registry())
        if dry_run:
            emit_json(describe(plan)) if as_json else _print_plan(plan)
            return
        _tell(plan, telling)
        result = federate(config=config, reporter=telling)
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


def _print_plan(plan: Plan) -> None:
    from prufed_cli.output import print_line, table

    for line in _heading(plan):
        print_line(line)
    table(
        ["client", "sub-model", "rows", "categories", "rank", "preset", "weight"],
        [
            [
                client.name,
                client.submodel.label,
                len(client.rows),
                _top(client.categories),
                client.adapter.r,
                client.adapter.preset,
                f"{client.weight:g}",
            ]
            for client in plan.clients
        ],
        numeric=(2, 4, 6),
    )


def _tell(plan: Plan, telling: Reporter) -> None:
    for line in _heading(plan):
        telling.note(line)
    for client in plan.clients:
        telling.note(
            f"  {client.name}: {client.submodel.label}, {len(client.rows)} rows, "
            f"{_top(client.categories)}"
        )


def _heading(plan: Plan) -> list[str]:
    config = plan.config
    layers = f" ({plan.layers} layers)" if plan.layers else ""
    optimizer = config.server_optimizer
    return [
        f"base        {plan.base}{layers}",
        f"rounds      {config.rounds}, sampler {config.sampler.name}, seed {config.seed}",
        f"aggregator  {config.aggregator.name}{_settings(config.aggregator)}, "
        f"write-back share {config.write_back.share:g}",
        f"server step {f'{optimizer.name}{_settings(optimizer)}' if optimizer else 'none'}",
        f"evaluate    {', '.join(config.evaluate.tasks) or 'no tasks'}",
    ]


def _settings(section: MethodSection) -> str:
    said = ", ".join(f"{key}={value}" for key, value in section.settings.items())
    return f" ({said})" if said else ""


def _top(categories: Mapping[str, int], shown: int = 3) -> str:
    largest = sorted(categories.items(), key=lambda item: -item[1])
    names = [f"{name} {count}" for name, count in largest[:shown]]
    rest = len(largest) - shown
    return ", ".join(names) + (f" and {rest} more" if rest > 0 else "")
