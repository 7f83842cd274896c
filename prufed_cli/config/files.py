"""Paths in clients.yaml: relative to the file they stand in, and there before anything starts."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any, Final

from prufed_cli.config.messages import Problem
from prufed_cli.config.yaml_source import KeyPath

EMBEDDED: Final = "embedded"
"""What stands for the data that comes with prufed; ``./embedded`` is a file of that name."""

_TEXT_SUFFIXES: Final = frozenset({".jsonl", ".ndjson", ".json", ".txt", ".md"})


def resolve_paths(document: MutableMapping[str, Any], directory: Path) -> Iterator[Problem]:
    """Make the paths in ``document`` absolute, in place, and yield those that do not exist.

    ``base`` and ``calibration`` may also be references or Hub ids: they are taken for paths only
    where they look like one or such a path exists.
    """
    yield from _path(document, ("data", "path"), directory)
    yield from _path(document, ("evaluate", "include_path"), directory, is_directory=True)
    yield from _path(document, ("evaluate", "perplexity"), directory)
    yield from _either(document, ("base",), directory)
    yield from _either(document, ("pruner", "calibration"), directory)
    clients = document.get("clients")
    for index in range(len(clients) if isinstance(clients, list) else 0):
        yield from _path(document, ("clients", index, "data"), directory)
        yield from _either(document, ("clients", index, "base"), directory)
        yield from _either(document, ("clients", index, "pruner", "calibration"), directory)


def _path(
    document: Any, path: KeyPath, directory: Path, *, is_directory: bool = False
) -> Iterator[Problem]:
    found = _text_at(document, path)
    if found is None:
        return
    holder, text = found
    if text == EMBEDDED and path[-1] in {"path", "data"}:
        from prufed_cli.assets import embedded_data

        holder[path[-1]] = str(embedded_data())
        return
    resolved = _absolute(text, directory)
    if resolved is None:
        yield Problem(path, f"{text!r} is not a path")
        return
    holder[path[-1]] = str(resolved)
    if is_directory and not resolved.is_dir():
        yield Problem(path, f"no directory {text!r} (looked for {resolved})")
    elif not resolved.exists():
        yield Problem(path, f"no file {text!r} (looked for {resolved})")


def _either(document: Any, path: KeyPath, directory: Path) -> Iterator[Problem]:
    found = _text_at(document, path)
    if found is None:
        return
    holder, text = found
    resolved = _absolute(text, directory)
    if resolved is not None and resolved.exists():
        holder[path[-1]] = str(resolved)
    elif text.startswith(("/", "./", "../", "~")) or Path(text).suffix.lower() in _TEXT_SUFFIXES:
        yield Problem(path, f"no file or directory {text!r} (looked for {resolved})")


def _text_at(document: Any, path: KeyPath) -> tuple[Any, str] | None:
    """Return the container of ``path`` and the text in it; None where there is no text."""
    for key in path[:-1]:
        if isinstance(key, int) and isinstance(document, list):
            document = document[key]
        elif isinstance(document, dict):
            document = document.get(key)
        else:
            return None
    value = document.get(path[-1]) if isinstance(document, dict) else None
    return (document, value) if isinstance(value, str) and value else None


def _absolute(text: str, directory: Path) -> Path | None:
    try:
        resolved = (directory / Path(text).expanduser()).resolve()
        resolved.exists()
    except (OSError, RuntimeError, ValueError):  # too long, no such user's home, a NUL byte
        return None
    return resolved
