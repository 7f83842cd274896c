"""``prufed show``: everything known about one artifact."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prufed_cli.commands.options import Json
from prufed_cli.completion import complete_reference

if TYPE_CHECKING:
    from prufed_registry import Artifact


def command(
    reference: Annotated[str, typer.Argument(autocompletion=complete_reference)],
    report: Annotated[
        bool, typer.Option("--report", help="What pruning did, per matrix or per layer.")
    ] = False,
    every: Annotated[
        bool, typer.Option("--all", help="With --report: a row for every matrix.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the report into an .svg or .png file."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show one artifact: recipe, parents, metrics, details, evaluations, files."""
    from prufed_cli.home import open_registry

    if plot is not None:
        from prufed_cli.prune_plot import check_plot_path

        check_plot_path(plot)
    registry = open_registry()
    artifact = registry.resolve(reference)
    if plot is not None:
        _draw(artifact, plot)
    if report or every:
        _print_report(artifact, every=every, as_json=as_json)
    elif plot is None or as_json:
        _print_artifact(artifact, registry.evaluations(artifact.digest), as_json=as_json)


def _print_artifact(
    artifact: Artifact, evaluations: Mapping[str, Mapping[str, Any]], *, as_json: bool
) -> None:
    from prufed_cli.output import emit_json, print_line
    from prufed_cli.prune_report import stored_report

    if as_json:
        emit_json(
            {
                "reference": artifact.ref,
                "path": str(artifact.path),
                "manifest": artifact.manifest.model_dump(mode="json"),
                "evaluations": evaluations,
                "report": stored_report(artifact),
            }
        )
        return
    for line in _lines(artifact):
        print_line(line)
    for payload in evaluations.values():
        shown = {key: value for key, value in payload.items() if key != "per_document"}
        print_line(f"evaluated   {_compact(shown)}")


def _print_report(artifact: Artifact, *, every: bool, as_json: bool) -> None:
    from prufed_cli import prune_report as reports
    from prufed_cli.output import emit_json, print_line, table

    stored = reports.stored_report(artifact)
    report = reports.parse_report(stored, artifact.ref)
    if as_json:
        seconds = reports.matrix_seconds(artifact)
        emit_json({"reference": artifact.ref, "report": stored, "matrix_seconds": seconds})
        return
    if report.result == "sliced":
        layers = reports.layer_rows(report)
        columns, cells = reports.layer_table(layers, reports.score_label(artifact), _bar())
        table(columns, cells, numeric=[0, 2])
        print_line(f"kept {len(report.kept_layers)} of {len(layers)} layers of the base")
    else:
        rows = reports.matrix_rows(
            report, reports.stored_shapes(artifact), reports.matrix_seconds(artifact)
        )
        folded = len(rows) > reports.FULL_TABLE and not every
        shown = reports.block_rows(rows) if folded else reports.with_subtotals(rows)
        columns, cells = reports.row_table(shown if len(rows) > reports.FULL_TABLE else rows)
        table(columns, cells, numeric=range(1, len(columns) - ("" in columns)))
        print_line(reports.MASKED_NOTE)
        if folded:
            print_line(f"--all lists the {len(rows)} matrices one by one.")
    if report.perplexity is not None:
        print_line(reports.perplexity_line(report.perplexity))


def _draw(artifact: Artifact, path: Path) -> None:
    from prufed_cli import prune_plot, prune_report
    from prufed_cli.output import reporter

    report = prune_report.parse_report(prune_report.stored_report(artifact), artifact.ref)
    if report.result == "sliced":
        rows = prune_report.layer_rows(report)
        figure = prune_plot.plot_layers(rows, prune_report.score_label(artifact), artifact.ref)
    else:
        figure = prune_plot.plot_matrices(prune_report.matrix_rows(report, {}, {}), artifact.ref)
    prune_plot.write_figure(figure, path)
    reporter().note(f"wrote {path}")


def _bar() -> str:
    """Return what bars are made of, in the encoding of stdout."""
    return "\u2588" if (sys.stdout.encoding or "").lower().startswith("utf") else "#"


def _lines(artifact: Artifact) -> list[str]:
    manifest = artifact.manifest
    lines = [
        f"reference   {artifact.ref}",
        f"kind        {artifact.kind}",
        f"digest      {artifact.digest}",
        f"path        {artifact.path}",
        f"created     {manifest.created}",
    ]
    lines += [f"parent      {parent.ref}  {parent.digest}" for parent in manifest.parents]
    lines += [f"recipe      {_compact(manifest.recipe)}"]
    lines += [f"{key:<11} {_compact(value)}" for key, value in sorted(manifest.details.items())]
    lines += [
        f"metric      {key} = {_compact(value)}"
        for key, value in sorted(manifest.metrics.items())
        if key != "matrix_seconds"  # a number per matrix: --report has them
    ]
    if manifest.environment:
        made = ", ".join(f"{name} {version}" for name, version in manifest.environment.items())
        lines.append(f"made with   {made}")
    lines += [f"file        {path}  {entry.size} bytes" for path, entry in manifest.files.items()]
    return lines


def _compact(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
