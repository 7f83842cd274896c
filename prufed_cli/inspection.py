"""The use case behind ``prufed data inspect``: what a file holds, and what is wrong with it."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from prufed_cli.data import Record, Row, scan
from prufed_cli.errors import NOT_FOUND, PrufedError

if TYPE_CHECKING:
    from prufed_cli.models.prompts import Template
    from prufed_registry import Registry

_NO_CUTOFF: Final = 10**9


@dataclass(frozen=True)
class Finding:
    """Something about one row.

    Attributes:
        number: of its line, or of the row where rows are no lines.
        message: what is wrong with it.
    """

    number: int
    message: str


@dataclass(frozen=True)
class TokenLengths:
    """How long the rows are for a model, worded by a template and with the end token.

    Attributes:
        base: whose tokenizer.
        template: how a row becomes text.
        cutoff: what a longer row is cut to.
        total: tokens in all, before the cut.
        smallest, median, p90, largest: of the rows.
        mean: of the rows.
        over: rows longer than the cutoff.
    """

    base: str
    template: str
    cutoff: int
    total: int
    smallest: int
    median: int
    p90: int
    largest: int
    mean: float
    over: int


@dataclass(frozen=True)
class Inspection:
    """What a data file holds.

    Attributes:
        rows: how many there are, unusable ones included.
        fields: in how many rows each field stands.
        categories: how many usable rows of each category; those without are under ``none``.
        tokens: lengths of the usable rows; None where there are none.
        duplicates: for each repeated row, its number and that of its first occurrence.
        empty: numbers of the usable rows without a response, which teach only their question.
        problems: why rows cannot be used, in the order of the file.
    """

    rows: int
    fields: Mapping[str, int]
    categories: Mapping[str, int]
    tokens: TokenLengths | None
    duplicates: tuple[tuple[int, int], ...]
    empty: tuple[int, ...]
    problems: tuple[Finding, ...]


def inspect(
    path: Path,
    *,
    base: str | None = None,
    template: Template | None = None,
    cutoff: int = 512,
    registry: Registry | None = None,
) -> Inspection:
    """Return what a data file holds; nothing is written.

    Args:
        path: as for training: JSONL, JSON, text or a ``datasets`` directory.
        base: the model whose tokenizer counts; ``PRUFED_BASE`` or the embedded model by default.
        template: how rows are worded; ``plain`` by default where there is plain text, else
            ``alpaca``.
        cutoff: rows longer than this are counted.
        registry: where ``base`` is looked up; this machine's by default.

    Raises:
        PrufedError: the file cannot be read, or the base has no tokenizer that fits.
    """
    records = scan(path)
    usable = [(record.number, record.row) for record in records if record.row is not None]
    rows = [row for _, row in usable]
    return Inspection(
        rows=len(records),
        fields=dict(Counter(str(key) for record in records for key in record.fields)),
        categories=dict(Counter(row.category or "none" for row in rows)),
        tokens=_token_lengths(rows, base, template, cutoff, registry) if rows else None,
        duplicates=_duplicates(usable),
        empty=tuple(n for n, row in usable if row.text is None and not row.response.strip()),
        problems=_problems(records),
    )


def _problems(records: Sequence[Record]) -> tuple[Finding, ...]:
    return tuple(
        Finding(record.number, record.problem) for record in records if record.problem is not None
    )


def _duplicates(rows: Sequence[tuple[int, Row]]) -> tuple[tuple[int, int], ...]:
    """Return (number, number of the first like it) of rows that teach the same once more."""
    first: dict[Any, int] = {}
    found = []
    for number, row in rows:
        content = (row.instruction, row.context, row.response, row.text)
        if content in first:
            found.append((number, first[content]))
        else:
            first[content] = number
    return tuple(found)


def _token_lengths(
    rows: Sequence[Row],
    base: str | None,
    template: Template | None,
    cutoff: int,
    registry: Registry | None,
) -> TokenLengths:
    from prufed_cli.models.base import default_base, open_tokenizer
    from prufed_cli.models.prompts import tokenize_rows

    name = base or default_base()
    chosen: Template = template or (
        "plain" if any(row.text is not None for row in rows) else "alpaca"
    )
    tokenizer = open_tokenizer(_directory(name, registry), name)
    data = tokenize_rows(rows, tokenizer, template=chosen, cutoff=_NO_CUTOFF)
    lengths = sorted(map(len, data.input_ids))
    return TokenLengths(
        base=name,
        template=chosen,
        cutoff=cutoff,
        total=sum(lengths),
        smallest=lengths[0],
        median=statistics.median_low(lengths),
        p90=lengths[(len(lengths) * 9 - 1) // 10],
        largest=lengths[-1],
        mean=statistics.fmean(lengths),
        over=sum(length > cutoff for length in lengths),
    )


def _directory(base: str, registry: Registry | None) -> Path:
    """Return where a base's tokenizer is; one on the Hub is fetched with its model."""
    from prufed_cli.federation.plan import base_directory
    from prufed_cli.home import open_registry
    from prufed_cli.models.base import find_base

    registry = registry or open_registry()
    directory = base_directory(base, registry)
    if directory is not None and not directory.is_dir():
        raise PrufedError(f"no directory {base}", "give a model directory", NOT_FOUND)
    return directory or find_base(base, registry).path
