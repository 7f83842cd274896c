"""``prufed data``: look into a data file, or split one into a file per client."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prufed_cli.commands.options import Json, Quiet, Settings

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from prufed_cli.inspection import Inspection

app = typer.Typer(help="Look into a data file, or split one into a file per client.")

SHOWN = 20
"""Lines of one kind that a person is shown; ``--json`` has them all."""


def _file(path: Path) -> Path:
    """Return a data file, that which comes with prufed by its name in clients.yaml."""
    from prufed_cli.assets import embedded_data
    from prufed_cli.config.files import EMBEDDED

    return embedded_data() if str(path) == EMBEDDED else path


@app.command("inspect")
def inspect_command(
    file: Annotated[
        Path,
        typer.Argument(help="JSONL, JSON, text or a datasets directory; `embedded` is prufed's."),
    ],
    base: Annotated[
        str | None,
        typer.Option(
            help="Whose tokenizer counts. Default: $PRUFED_BASE or the embedded model.",
        ),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(help="alpaca, chat or plain. Default: alpaca, or plain for plain text."),
    ] = None,
    cutoff: Annotated[int, typer.Option(min=2, help="Count rows longer than this.")] = 512,
    as_json: Json = False,
) -> None:
    """Say what a data file holds: rows, fields, categories, token lengths, duplicates, problems.

    Exit 1 if a row cannot be used; `prufed federate` would refuse the file.
    """
    from dataclasses import asdict
    from typing import cast

    from prufed_cli.errors import FAILED
    from prufed_cli.inspection import inspect
    from prufed_cli.models.prompts import Template
    from prufed_cli.output import emit_json, print_line

    found = inspect(
        _file(file), base=base, template=cast("Template | None", template), cutoff=cutoff
    )
    if as_json:
        emit_json({"file": str(file), **asdict(found)})
    else:
        for line in _described(file, found):
            print_line(line)
    if found.problems:
        raise typer.Exit(FAILED)


@app.command("partition")
def partition_command(
    path: Annotated[Path, typer.Option(help="The data file; `embedded` is prufed's own.")],
    out: Annotated[Path, typer.Option(help="A new directory for the clients' files.")],
    by: Annotated[
        str, typer.Option(help="A partitioner; `prufed plugins` lists them.")
    ] = "stratified-iid",
    clients: Annotated[
        int | None,
        typer.Option(min=1, help="How many. Default with natural, by-category: one per value."),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(help="Of dirichlet and quantity: the smaller, the more unequal."),
    ] = None,
    key: Annotated[
        str | None, typer.Option(help="Of natural: the field that says whose a row is.")
    ] = None,
    settings: Settings = None,
    seed: Annotated[int, typer.Option(min=0, help="As seed in clients.yaml.")] = 0,
    plot: Annotated[
        Path | None, typer.Option(help="Draw rows by client and category to an SVG or PNG file.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Split a data file into one JSONL file per client and print their directory.

    The split is the one that `prufed federate` makes with the same method, number of clients and
    seed. Lines of a JSONL file are kept as they are, byte for byte.
    """
    from prufed_cli.output import emit_json, print_line, reporter
    from prufed_cli.partition_chart import check_chart_path, draw
    from prufed_cli.partitioning import PartitionRequest, partition
    from prufed_cli.plugins_report import warn_failures
    from prufed_plugins.discover import parse_settings

    telling = reporter(quiet=quiet or as_json)
    warn_failures(telling)
    if plot is not None:
        check_chart_path(plot)
    shortcuts: dict[str, Any] = {"alpha": alpha, "key": key}
    given = {name: value for name, value in shortcuts.items() if value is not None}
    request = PartitionRequest(
        path=_file(path),
        by=by,
        clients=clients,
        out=out,
        settings={**given, **parse_settings(settings or [])},
        seed=seed,
    )
    parts = partition(request)
    if plot is not None:
        draw(parts, plot)
    if as_json:
        emit_json(
            {
                "path": str(out),
                "by": by,
                "settings": dict(request.settings),
                "seed": seed,
                "clients": [
                    {
                        "name": part.client,
                        "path": str(part.path),
                        "rows": part.rows,
                        "categories": dict(part.categories),
                    }
                    for part in parts
                ],
                "plot": str(plot) if plot is not None else None,
            }
        )
        return
    from prufed_cli.partition_chart import table

    for line in _aligned(*table(parts)):
        telling.note(line)
    print_line(str(out))


def _aligned(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table as lines, numbers to the right."""
    widths = [max(len(row[i]) for row in [heading, *rows]) for i in range(len(heading))]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [heading, *rows]
    ]


def _described(file: Path, found: Inspection) -> Iterator[str]:
    usable = found.rows - len(found.problems)
    yield f"file        {file}"
    yield f"rows        {found.rows}, {usable} usable"
    fields = (name if count == found.rows else f"{name} ({count})" for name, count in _by(found))
    yield f"fields      {', '.join(fields) or 'none'}"
    yield f"categories  {len(found.categories.keys() - {'none'})}"
    for name, count in sorted(found.categories.items(), key=lambda item: (-item[1], item[0])):
        yield f"            {name} {count}"
    if found.tokens is not None:
        lengths = found.tokens
        yield (
            f"tokens      {lengths.total} in all; a row has {lengths.smallest} to "
            f"{lengths.largest}, median {lengths.median}, mean {lengths.mean:.0f}, "
            f"90 % at most {lengths.p90}"
        )
        yield (
            f"            by the tokenizer of {lengths.base}, template {lengths.template}; "
            f"{lengths.over} rows are longer than {lengths.cutoff}"
        )
    yield f"duplicates  {len(found.duplicates)}"
    yield from _some([f"{again} repeats {first}" for again, first in found.duplicates])
    if found.empty:
        yield f"no response {len(found.empty)}"
        yield from _some(list(map(str, found.empty)))
    yield f"problems    {len(found.problems)}"
    yield from _some([f"{problem.number}: {problem.message}" for problem in found.problems])


def _by(found: Inspection) -> list[tuple[str, int]]:
    return sorted(found.fields.items(), key=lambda item: -item[1])


def _some(lines: Sequence[str]) -> Iterator[str]:
    yield from (f"            {line}" for line in lines[:SHOWN])
    if len(lines) > SHOWN:
        yield f"            and {len(lines) - SHOWN} more; --json lists them all"
