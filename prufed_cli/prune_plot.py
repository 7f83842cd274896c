"""A figure of a sub-model's report: layer scores, or error and sparsity per matrix by block."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from prufed_cli.errors import USAGE, PrufedError
from prufed_cli.models.layer_names import layer_number
from prufed_cli.prune_report import LayerRow, ReportRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS: Final = (".svg", ".png")
KEPT: Final = "#4477aa"
DROPPED: Final = "#ee6677"

_EXPERT: Final = re.compile(r"\.\d+\.")


def check_plot_path(path: Path) -> None:
    """Refuse a file that no figure can be written to, before any work.

    Raises:
        PrufedError: its suffix is not .svg or .png, or its directory does not exist.
    """
    if path.suffix.lower() not in FORMATS:
        raise PrufedError(
            f"cannot write a figure to {path}: its name ends in neither .svg nor .png",
            "for example --plot report.svg",
            USAGE,
        )
    if not path.parent.is_dir():
        raise PrufedError(f"no directory {path.parent}", "make it first", USAGE)


def plot_layers(rows: Sequence[LayerRow], label: str, title: str) -> Figure:
    """Return a bar chart of the layers' scores, dropped layers marked.

    Raises:
        PrufedError: no layer has a score.
    """
    if all(row.score is None for row in rows):
        raise PrufedError(
            f"{title}: layers were dropped by position, so there are no scores to plot",
            "contribution, angular, parameter and magnitude-layers have scores",
            USAGE,
        )
    figure = _figure(max(4.0, 0.28 * len(rows) + 1.5), 3.2)
    axes = figure.subplots()
    for kept, color, hatch, name in ((True, KEPT, "", "kept"), (False, DROPPED, "//", "dropped")):
        scores = {
            row.layer: row.score for row in rows if row.kept is kept and row.score is not None
        }
        axes.bar(
            list(scores),
            list(scores.values()),
            color=color,
            hatch=hatch,
            edgecolor="white",
            label=name,
        )
    unscored = [row.layer for row in rows if not row.kept and row.score is None]
    if unscored:  # of a run, the layers behind the last possible start
        axes.axvspan(unscored[0] - 0.5, unscored[-1] + 0.5, color=DROPPED, alpha=0.25)
    axes.set(title=title, xlabel="layer of the base", ylabel=label, xlim=(-0.6, len(rows) - 0.4))
    _count_blocks(axes)
    axes.legend(frameon=False)
    return figure


def plot_matrices(rows: Sequence[ReportRow], title: str) -> Figure:
    """Return error, where a method reports one, and sparsity of every matrix over the blocks."""
    kinds: dict[str, list[ReportRow]] = {}
    for row in rows:
        kinds.setdefault(_kind(row.label), []).append(row)
    shown = any(row.error for row in rows)
    figure = _figure(7.0, 5.6 if shown else 3.2)
    axes = figure.subplots(2 if shown else 1, 1, sharex=True, squeeze=False)[:, 0]
    if shown:
        _plot_kinds(axes[0], kinds, "error")
        axes[0].set(ylabel="relative squared error")
    _plot_kinds(axes[-1], kinds, "sparsity")
    axes[-1].set(ylabel="sparsity", xlabel="block", ylim=(-0.02, 1.02))
    axes[0].set_title(title)
    _count_blocks(axes[-1])
    handles, labels = axes[-1].get_legend_handles_labels()  # every kind has a sparsity
    axes[0].legend(handles, labels, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def write_figure(figure: Figure, path: Path) -> None:
    """Write a figure, whole or not at all; equal figures give equal bytes."""
    import matplotlib

    from prufed_registry.durable import storage_errors, write_atomically

    kind = path.suffix.lower().removeprefix(".")
    content = io.BytesIO()
    # Text stays text, and neither a date nor random names make two files of one figure differ.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "prufed"}):
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(content, format=kind, dpi=150, bbox_inches="tight", metadata=metadata)
    with storage_errors(f"write {path}", outside=True):
        write_atomically(path, content.getvalue())


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # not pyplot, which keeps every figure and seeks a display

    return Figure(figsize=(width, height), layout="constrained")


def _plot_kinds(axes: Axes, kinds: Mapping[str, Sequence[ReportRow]], value: str) -> None:
    for number, (kind, rows) in enumerate(kinds.items()):
        points = [
            (layer_number(row.label), getattr(row, value))
            for row in rows
            if getattr(row, value) is not None
        ]
        if points:
            blocks, values = zip(*points, strict=True)
            one_each = len(set(blocks)) == len(blocks)  # a line through many experts says nothing
            axes.plot(
                blocks, values, "o-" if one_each else "o", ms=3, lw=1, c=f"C{number}", label=kind
            )


def _kind(name: str) -> str:
    """Return what a matrix is in its block; all experts' gates are of one kind."""
    parts = name.removesuffix(".weight").split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), -1)
    return _EXPERT.sub(".*.", ".".join(parts[number + 1 :]))


def _count_blocks(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
