"""``prufed eval``: score models and adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prufed_cli.commands.options import Device, Dtype, Json, Quiet, TrustRemoteCode


def command(
    references: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[REF]...",
            help="Artifacts, directories or Hub ids. Default: $PRUFED_BASE or the embedded model.",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="lm-eval tasks, groups or tags, separated by commas."),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="A directory of task YAML files, searched first.")
    ] = None,
    perplexity: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A UTF-8 text to measure perplexity on.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most so many documents per task.")
    ] = None,
    num_fewshot: Annotated[
        int, typer.Option(min=0, help="Labelled examples before each document.")
    ] = 0,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Sequences per forward pass. Default: up to 64.")
    ] = None,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Measure again what was measured before.")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score references side by side and print one table.

    The models that stem from the embedded one are scored on its own tasks unless --tasks or
    --perplexity says otherwise. Results are recorded with their artifact and not measured twice.
    """
    from prufed_cli.evaluation import evaluate
    from prufed_cli.evaluation.report import comparison_line, document_of, table_of
    from prufed_cli.output import emit_json, print_line, reporter, table

    report = evaluate(
        references or [],
        tasks=[name.strip() for name in (tasks or "").split(",") if name.strip()],
        include_path=include_path,
        perplexity=perplexity,
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        reporter=reporter(quiet=quiet or as_json),
        refresh=refresh,
    )
    if as_json:
        emit_json(document_of(report))
        return
    shown = table_of(report)
    table(shown.columns, shown.rows, title=shown.title, numeric=range(1, len(shown.columns)))
    for comparison in report.comparisons:
        print_line(comparison_line(comparison))
