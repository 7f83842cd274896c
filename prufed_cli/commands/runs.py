"""``prufed runs``: what runs there are, and what happened in each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from prufed_cli.commands.options import Json, Quiet
from prufed_cli.completion import complete_run

if TYPE_CHECKING:
    from collections.abc import Mapping

    from prufed_cli.federation.journal import Event

app = typer.Typer(help="List runs, show one, or go on with one.")

RunId = Annotated[str, typer.Argument(autocompletion=complete_run)]


@app.callback(invoke_without_command=True)
def runs(context: typer.Context, as_json: Json = False) -> None:
    """List runs, show one, or go on with one."""
    if context.invoked_subcommand is None:
        list_command(as_json)


@app.command("list")
def list_command(as_json: Json = False) -> None:
    """List runs, oldest first."""
    from prufed_cli.federation.journal import list_runs
    from prufed_cli.home import runs_directory
    from prufed_cli.output import emit_json, table

    runs = list_runs(runs_directory())
    if as_json:
        emit_json(
            {
                "runs": [
                    {
                        "run": run.id,
                        "created": run.document["created"],
                        "rounds": run.document["plan"]["rounds"],
                        "merged": len(run.select("merged")),
                        "finished": run.finished,
                    }
                    for run in runs
                ]
            }
        )
        return
    table(
        ["run", "created", "rounds", "state"],
        [
            [
                run.id,
                str(run.document["created"])[:19],
                f"{len(run.select('merged'))}/{run.document['plan']['rounds']}",
                "finished" if run.finished else "unfinished",
            ]
            for run in runs
        ],
    )


@app.command("show")
def show_command(run_id: RunId, as_json: Json = False) -> None:
    """Show what happened in every round of a run."""
    from prufed_cli.federation.journal import load
    from prufed_cli.federation.measured import essentials
    from prufed_cli.home import runs_directory
    from prufed_cli.output import emit_json, print_line, table

    run = load(runs_directory(), run_id)
    if as_json:
        emit_json({"run": run.id, **run.document, "events": run.events})
        return
    print_line(f"run       {run.id}, {'finished' if run.finished else 'unfinished'}")
    print_line(f"base      {run.document['base']}")
    merged = {event["round"]: event for event in run.select("merged")}
    table(
        [
            *("round", "client", "adapter", "rank", "loss", "tokens", "seconds", "sent"),
            *("change", "cosine"),
        ],
        [row for event in run.events for row in _rows(event, merged)],
        numeric=(0, 3, 5, 6, 7, 8, 9),
    )
    for event in merged.values():
        print_line(f"round {event['round'] + 1} merged: {essentials(event)}")
    for event in run.select("evaluated"):
        print_line(f"round {event['round'] + 1} {event['subject']}: {_scores(event)}")
    if not run.finished:
        print_line(f"`prufed federate --resume {run.id}` goes on")


@app.command("resume")
def resume_command(run_id: RunId, quiet: Quiet = False) -> None:
    """Go on with an interrupted run; the same as `prufed federate --resume`."""
    from prufed_cli.federation.federate import federate
    from prufed_cli.output import print_line, reporter

    print_line(federate(resume=run_id, reporter=reporter(quiet=quiet)).artifact.ref)


def _rows(event: Event, merged: Mapping[int, Event]) -> list[list[object]]:
    from rich.filesize import decimal

    from prufed_cli.federation.measured import of_client

    number = event.get("round", 0) + 1
    if event["event"] == "client":
        loss = f"{event['loss_first']:.3f} to {event['loss_last']:.3f}"
        rank, sent = event.get("rank", ""), event.get("payload_bytes")
        cells = [number, event["client"], event["ref"], rank, loss, event["tokens"]]
        cells += [event["seconds"], "" if sent is None else decimal(sent)]
        found = of_client(merged.get(event["round"], {}), event["client"])
        change = f"{found['norm']:.3g}" if found else ""
        if "clipped" in found:
            change += f" (scaled by {found['clipped']:.2g})"
        return [[*cells, change, f"{found['cosine']:.2f}" if "cosine" in found else ""]]
    if event["event"] == "client_failed":
        return [[number, event["client"], f"failed: {event['reason']}", *_EMPTY]]
    if event["event"] in {"merged", "refused"}:
        rows: list[list[object]] = [
            [number, name, f"excluded: {reason}", *_EMPTY]
            for name, reason in event["excluded"].items()
        ]
        if event["event"] == "refused":
            return rows
        whole = [number, "(global)", event["ref"], "", "", "", event["seconds"], "", "", ""]
        return [*rows, whole]
    if event["event"] == "own":
        return [[number, event["client"], f"{event['ref']} (its own)", *_EMPTY]]
    if event["event"] == "written_back":
        return [["", event["client"], f"{event['ref']} (written back)", *_EMPTY]]
    return []


_EMPTY = ("", "", "", "", "", "", "")
"""The cells of a row that is not about training."""


def _scores(event: Event) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in event["scores"].items())
