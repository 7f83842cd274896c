"""The local data files of a task: where they are, their digest, and their rows in memory.

``datasets`` would copy a JSONL file to its own cache, under locks, before handing it over; a task's
few hundred documents are read directly instead.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from prufed_cli.errors import NOT_FOUND, USAGE, PrufedError

LOCAL_BUILDERS: Final = frozenset({"json", "csv", "parquet", "text", "arrow"})

DataFiles = Mapping[str, tuple[Path, ...]]
"""Split to files."""


def data_files(config: Mapping[str, Any], directory: Path) -> DataFiles:
    """Return the local files a task's configuration names, as absolute paths.

    A relative path is looked for beside the YAML file, then in the working directory.

    Raises:
        PrufedError: a file does not exist.
    """
    named = (config.get("dataset_kwargs") or {}).get("data_files")
    if config.get("dataset_path") not in LOCAL_BUILDERS or not named:
        return {}
    splits = named if isinstance(named, Mapping) else {"train": named}
    found = {}
    for split, entry in splits.items():
        entries = [entry] if isinstance(entry, str) else list(entry)
        if any("://" in name for name in entries):
            return {}
        found[split] = tuple(
            path for name in entries for path in _locate(name, directory, config["task"])
        )
    return found


def _locate(name: str, directory: Path, task: str) -> list[Path]:
    for root in (directory, Path.cwd()):
        matches = sorted(root.glob(name)) if "*" in name else [root / name]
        files = [path.resolve() for path in matches if path.is_file()]
        if files:
            return files
    raise PrufedError(
        f"task {task}: no data file {name}",
        f"put it beside the YAML file, in {directory}",
        NOT_FOUND,
    )


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def overrides(files: DataFiles, config: Mapping[str, Any], cache: Path) -> dict[str, Any]:
    """Return the changes to a task's configuration that make it read these files.

    Plain JSON lines are read in memory; anything else goes through ``datasets`` with its cache
    under ``cache``.
    """
    if not files:
        return {}
    settings = dict(config["dataset_kwargs"])
    lines_only = all(path.suffix == ".jsonl" for paths in files.values() for path in paths)
    if config["dataset_path"] == "json" and settings.keys() == {"data_files"} and lines_only:
        return {"custom_dataset": _reader(files), "dataset_kwargs": {}}
    settings["data_files"] = {split: [str(path) for path in files[split]] for split in files}
    return {"dataset_kwargs": {**settings, "cache_dir": str(cache)}}


def _reader(files: DataFiles) -> Callable[..., Any]:
    def read(**_: object) -> Any:
        import datasets

        return datasets.DatasetDict({split: _rows(paths) for split, paths in files.items()})

    return read


def _rows(paths: tuple[Path, ...]) -> Any:
    """Return the rows of JSON lines files as one data set in memory; a missing key is null."""
    import datasets
    import pyarrow

    rows = [row for path in paths for row in read_json_lines(path)]
    keys = dict.fromkeys(key for row in rows for key in row)
    try:
        return datasets.Dataset.from_dict({key: [row.get(key) for row in rows] for key in keys})
    except pyarrow.ArrowException as error:
        raise PrufedError(
            f"the rows of {paths[0]} do not agree on a type: {error}",
            "give every row the same fields with the same types",
            USAGE,
        ) from error


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON lines file.

    Raises:
        PrufedError: a line is not a JSON object (with its number), or there is none.
    """
    seen = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise _bad_line(path, number, f"is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise _bad_line(path, number, f"is a {type(row).__name__}, not an object")
            seen += 1
            yield row
    if not seen:
        raise PrufedError(f"{path} has no documents", "give one JSON object per line", USAGE)


def _bad_line(path: Path, number: int, problem: str) -> PrufedError:
    return PrufedError(f"{path}:{number}: {problem}", "give one JSON object per line", USAGE)
