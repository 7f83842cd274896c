"""The use case behind ``prufed data partition``: one data file becomes one file per client.

The same file, method, number of clients and seed give the same parts here and under ``data:`` in
clients.yaml.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prufed_cli.data import Record, read_records
from prufed_cli.errors import NOT_FOUND, USAGE, PrufedError
from prufed_cli.federation.seeds import derive


@dataclass(frozen=True)
class PartitionRequest:
    """What is split, and how.

    Attributes:
        path: the data file.
        by: a partitioner.
        clients: how many parts; None for one per value of the partitioner's own field, which only
            ``natural`` and ``by-category`` have a use for.
        out: directory of the parts; it must not exist, or be empty.
        settings: the partitioner's parameters.
        seed: of the random choices, as ``seed:`` in clients.yaml.
    """

    path: Path
    by: str
    clients: int | None
    out: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True)
class Part:
    """What one client got.

    Attributes:
        client: its name.
        path: its file.
        rows: how many rows.
        categories: how many rows of each category; those without are under ``none``.
    """

    client: str
    path: Path
    rows: int
    categories: Mapping[str, int]


def partition(request: PartitionRequest) -> list[Part]:
    """Split a data file and write one JSONL file per client, all of them or none.

    A line of a JSONL file is written as it stands, byte for byte; rows of other files become lines.

    Raises:
        PrufedError: the file cannot be read, or the directory holds something.
        MethodError: the rows cannot be split so.
    """
    _check_free(request.out)
    records = read_records(request.path)
    names = client_names(_count(request, records))
    split = split_records(records, request.by, request.settings, names, request.seed)
    lines = {name: "".join(map(_line, part)) for name, part in split.items()}
    _write(request.out, lines)
    return [
        Part(
            client=name,
            path=request.out / f"{name}.jsonl",
            rows=len(part),
            categories=Counter(_category(record) or "none" for record in part),
        )
        for name, part in split.items()
    ]


def split_records(
    records: Sequence[Record],
    by: str,
    settings: Mapping[str, Any],
    clients: Sequence[str],
    seed: int,
) -> dict[str, list[Record]]:
    """Return each client's rows, in the order of the file.

    Args:
        records: usable rows.
        by: a partitioner.
        settings: its parameters.
        clients: the clients' names.
        seed: the run's seed.

    Raises:
        MethodError: no such partitioner, or it cannot split these rows.
        PrufedError: a row's key is no plain value.
    """
    from prufed_plugins.discover import build

    partitioner = build("partitioner", by, settings)
    values = _values(records, getattr(partitioner, "field", "category"))
    parts = partitioner.split(values, clients, derive(seed, "partition"))
    return {name: [records[index] for index in indices] for name, indices in parts.items()}


def client_names(count: int) -> list[str]:
    """Return ``client-01``, ``client-02``, ... with as many digits as the last one needs."""
    if count < 1:
        raise PrufedError(f"{count} clients cannot share the rows", "use --clients 4", USAGE)
    digits = max(2, len(str(count)))
    return [f"client-{number:0{digits}}" for number in range(1, count + 1)]


def _count(request: PartitionRequest, records: Sequence[Record]) -> int:
    if request.clients is not None:
        return request.clients
    from prufed_plugins.discover import build, catalog

    name = catalog().get("partitioner", request.by).name
    if name not in {"natural", "by-category"}:
        raise PrufedError(
            f"{name} does not say into how many parts the rows go", "use --clients 4", USAGE
        )
    wanted = getattr(build("partitioner", name, request.settings), "field", "category")
    return max(1, len({value for value in _values(records, wanted) if value is not None}))


def _values(records: Sequence[Record], key: str) -> list[str | None]:
    """Return the value of one field by row, as text; None where a row does not have it."""
    return [_category(record) if key == "category" else _value(record, key) for record in records]


def _category(record: Record) -> str | None:
    return record.row.category if record.row is not None else None


def _value(record: Record, key: str) -> str | None:
    value = record.fields.get(key)
    if value is None or value == "":
        return None
    if not isinstance(value, str | int | float):
        raise PrufedError(
            f"{record.place}: {key!r} is not one value by which rows could be told apart",
            "name a field of text or numbers",
        )
    return str(value)


# --- files ---------------------------------------------------------------------------------------


def _line(record: Record) -> str:
    if record.line is not None:
        return record.line + "\n"
    try:
        return json.dumps(record.fields, ensure_ascii=False) + "\n"
    except TypeError as error:
        raise PrufedError(
            f"{record.place} holds something that JSON has no form for: {error}",
            "convert the data to JSONL first",
        ) from error


def _check_free(out: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise PrufedError(f"{str(out)!r} exists already", "name a new directory with --out", USAGE)
    parent = out.resolve().parent
    if not parent.is_dir():
        raise PrufedError(f"no directory {str(parent)!r}", f"mkdir -p {parent}", NOT_FOUND)


def _write(out: Path, contents: Mapping[str, str]) -> None:
    """Write the files beside ``out`` and put the whole directory in its place at once."""
    target = out.resolve()
    staging = target.parent / f".{target.name}-{uuid.uuid4().hex}"
    staging.mkdir()
    try:
        for name, content in contents.items():
            with (staging / f"{name}.jsonl").open("wb") as file:
                file.write(content.encode())
                file.flush()
                os.fsync(file.fileno())
        staging.replace(target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
