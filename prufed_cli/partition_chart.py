"""The chart of a partition: which client got how many rows of which category."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from prufed_cli.errors import NOT_FOUND, USAGE, PrufedError
from prufed_cli.partitioning import Part
from prufed_cli.prune_plot import write_figure

SUFFIXES: Final = (".svg", ".png")
MOST_COLOURS: Final = 12
"""Categories drawn in a colour of their own; the smallest others share one."""

_REST: Final = "others"
_HIGHEST: Final = 60.0  # inches


def check_chart_path(path: Path) -> None:
    """Refuse a file that no chart can be drawn to.

    Raises:
        PrufedError: another suffix than .svg or .png, or no such directory.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise PrufedError(
            f"cannot draw a chart to {str(path)!r}", "name a file that ends in .svg or .png", USAGE
        )
    if not path.absolute().parent.is_dir():
        raise PrufedError(
            f"no directory {str(path.parent)!r}", f"mkdir -p {path.parent}", NOT_FOUND
        )


def categories_of(parts: Sequence[Part]) -> list[str]:
    """Return the categories of all clients together, the largest first."""
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part.categories)
    return sorted(total, key=lambda category: (-total[category], category))


def table(parts: Sequence[Part]) -> tuple[list[str], list[list[str]]]:
    """Return heading and rows of the chart as a table: clients down, categories across."""
    categories = categories_of(parts)
    rows = [
        [part.client, str(part.rows), *(str(part.categories.get(c, 0) or "") for c in categories)]
        for part in parts
    ]
    return ["client", "rows", *categories], rows


def draw(parts: Sequence[Part], path: Path) -> None:
    """Draw one bar per client, divided by category, to an SVG or PNG file.

    The same parts give the same bytes.

    Raises:
        PrufedError: as :func:`check_chart_path`.
    """
    check_chart_path(path)
    import matplotlib
    from matplotlib.figure import Figure

    categories = categories_of(parts)
    own = categories if len(categories) <= MOST_COLOURS else categories[: MOST_COLOURS - 1]
    height = min(_HIGHEST, max(2.5, 1.2 + 0.28 * len(parts)))
    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.add_subplot()
    clients = [part.client for part in parts]
    palette = matplotlib.colormaps["tab20"]
    left = [0] * len(parts)
    for index, category in enumerate([*own, _REST] if len(own) < len(categories) else own):
        counts = [_rows_of(part, category, own) for part in parts]
        # tab20 is ten strong colours, each followed by its pale one
        colour = palette(2 * index if index < 10 else 2 * (index - 10) + 1)
        axes.barh(clients, counts, left=left, label=_label(category), color=colour)
        left = [before + count for before, count in zip(left, counts, strict=True)]
    axes.invert_yaxis()  # the first client on top
    axes.set_xlabel("rows")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    write_figure(figure, path)


def _label(category: str) -> str:
    """Return a category as matplotlib shows it: no formulas, nothing hidden for its first sign."""
    return " " * category.startswith("_") + category.replace("$", r"\$")


def _rows_of(part: Part, category: str, own: Sequence[str]) -> int:
    if category in own:
        return part.categories.get(category, 0)
    return sum(count for name, count in part.categories.items() if name not in own)
