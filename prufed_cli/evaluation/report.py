"""How an evaluation is shown: one table, a line per comparison, or one JSON document."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import Any, Final

from rich.filesize import decimal

from prufed_cli.evaluation.compare import Comparison, EvaluationReport, Row
from prufed_cli.evaluation.scores import Metric, TaskScore

NOTHING: Final = "-"


@dataclass(frozen=True)
class Table:
    """Title, headings and cells as text."""

    title: str | None
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def table_of(report: EvaluationReport) -> Table:
    """Return the table: references down, tasks across.

    Accuracies are percentages with one standard error; the columns of what was not measured are
    left out, and so is the beginning that all task names share.
    """
    rows = report.rows
    tasks = rows[0].scores.tasks
    prefix = _shared_prefix(list(tasks))
    columns: list[tuple[str, list[str]]] = [("reference", [row.reference for row in rows])]
    for name, task in tasks.items():
        heading = name.removeprefix(prefix)
        if task.primary != "acc":
            heading += f" ({task.primary})"
        columns.append((heading, [_task_cell(row.scores.tasks[name]) for row in rows]))
    for metric, heading in (("acc", "mean"), ("acc_norm", "mean acc_norm")):
        means = [row.scores.mean(metric) for row in rows]
        if len(tasks) > 1 and any(means):
            columns.append((heading, [_percent(mean) for mean in means]))
    if any(row.scores.perplexity for row in rows):
        columns += _perplexity_columns(rows)
    columns.append(("sparsity", [f"{row.scores.footprint.sparsity:.1%}" for row in rows]))
    columns.append(("size", [decimal(row.bytes) for row in rows]))
    speeds = [row.scores.tokens_per_second for row in rows]
    if any(speeds):
        columns.append(("tokens/s", [f"{speed:,.0f}" if speed else NOTHING for speed in speeds]))
    title = f"{prefix}: " if prefix else ""
    return Table(
        f"{title}accuracy in % ± one standard error" if tasks else None,
        tuple(heading for heading, _ in columns),
        tuple(tuple(cells[index] for _, cells in columns) for index in range(len(rows))),
    )


def comparison_line(comparison: Comparison) -> str:
    """Return one sentence about a paired difference, in percentage points."""
    paired = comparison.paired
    return (
        f"{comparison.second} against {comparison.first}: {100 * paired.difference:+.1f} points "
        f"of {comparison.metric}, {paired.level:.0%} interval {100 * paired.low:+.1f} to "
        f"{100 * paired.high:+.1f} (paired bootstrap, {paired.documents} documents)"
    )


def document_of(report: EvaluationReport) -> dict[str, Any]:
    """Return the report as JSON; every document's answer stays in the registry."""
    return {
        "references": [_row_document(row) for row in report.rows],
        "comparisons": [
            {
                "first": each.first,
                "second": each.second,
                "metric": each.metric,
                **asdict(each.paired),
            }
            for each in report.comparisons
        ],
    }


def _shared_prefix(names: Sequence[str]) -> str:
    """Return what several names begin with, up to an underscore."""
    if len(names) < 2:
        return ""
    pairs = zip(min(names), max(names), strict=False)
    shared = "".join(left for left, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    head, underscore, _ = shared.rpartition("_")
    return head + underscore


def _row_document(row: Row) -> dict[str, Any]:
    scores = row.scores
    means = {metric: scores.mean(metric) for metric in ("acc", "acc_norm")}
    perplexity = None
    if scores.perplexity is not None:
        perplexity = asdict(scores.perplexity)
        perplexity["value"] = _finite(scores.perplexity.value)
    return {
        "reference": row.reference,
        "digest": row.digest,
        "kind": row.kind,
        "base": row.base,
        "bytes": row.bytes,
        "cached": row.cached,
        "tasks": {name: _task_document(task) for name, task in scores.tasks.items()},
        "subtasks": {
            name: _task_document(task)
            for name, task in scores.leaves.items()
            if name not in scores.tasks
        },
        "mean": {name: asdict(mean) for name, mean in means.items() if mean is not None},
        "perplexity": perplexity,
        "footprint": {**asdict(scores.footprint), "sparsity": scores.footprint.sparsity},
        "tokens_per_second": scores.tokens_per_second,
    }


def _task_document(task: TaskScore) -> dict[str, Any]:
    return {
        "documents": task.documents,
        "metrics": {
            name: {"value": _finite(metric.value), "stderr": metric.stderr}
            for name, metric in task.metrics.items()
        },
    }


def _task_cell(task: TaskScore) -> str:
    metric = task.metrics[task.primary]
    return _percent(metric) if 0 <= metric.value <= 1 else f"{metric.value:.3f}"


def _percent(metric: Metric | None) -> str:
    if metric is None:
        return NOTHING
    error = "" if metric.stderr is None else f" ±{100 * metric.stderr:.1f}"
    return f"{100 * metric.value:.1f}{error}"


def _perplexity_columns(rows: Sequence[Row]) -> list[tuple[str, list[str]]]:
    found = [row.scores.perplexity for row in rows]
    values = [NOTHING if each is None else f"{each.value:.2f}" for each in found]
    bits = [NOTHING if each is None else f"{each.bits_per_byte:.3f}" for each in found]
    return [("perplexity", values), ("bits/byte", bits)]


def _finite(value: float) -> float | None:
    """Return a number that JSON has; infinity and NaN become null."""
    return value if math.isfinite(value) else None
