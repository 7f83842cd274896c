"""Paths in clients.yaml: relative to the file they stand in, and there before anything starts."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any, Final, get_args

from prufed_cli.config.messages import Problem
from prufed_cli.config.yaml_source import KeyPath

EMBEDDED: Final = "embedded"
"""What stands for the data and the tasks that come with prufed; ``./embedded`` is a path."""

_TEXT_SUFFIXES: Final = frozenset({".jsonl", ".ndjson", ".json", ".txt", ".md"})


def resolve_paths(document: MutableMapping[str, Any], directory: Path) -> Iterator[Problem]:
    """Make the paths in ``document`` absolute, in place, and yield those that do not exist.

    ``base`` and ``calibration`` may be something else than a path; see below.
    """
    yield from _path(document, ("data", "path"), directory)
    yield from _path(document, ("server_data",), directory)
    yield from _path(document, ("evaluate", "include_path"), directory, is_directory=True)
    yield from _path(document, ("evaluate", "perplexity"), directory)
    yield from _base(document, ("base",), directory)
    yield from _calibration(document, ("pruner", "calibration"), directory)
    yield from _parameters(document, ("pruner",), directory)
    clients = document.get("clients")
    for index in range(len(clients) if isinstance(clients, list) else 0):
        yield from _path(document, ("clients", index, "data"), directory)
        yield from _base(document, ("clients", index, "base"), directory)
        yield from _calibration(document, ("clients", index, "pruner", "calibration"), directory)
        yield from _parameters(document, ("clients", index, "pruner"), directory)


def _path(
    document: Any, path: KeyPath, directory: Path, *, is_directory: bool = False
) -> Iterator[Problem]:
    found = _text_at(document, path)
    if found is None:
        return
    holder, text = found
    if text == EMBEDDED and (embedded := _embedded(path)) is not None:
        holder[path[-1]] = str(embedded)
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


def _embedded(path: KeyPath) -> Path | None:
    from prufed_cli.assets import embedded_data, embedded_tasks

    if path == ("evaluate", "include_path"):
        return embedded_tasks()
    return None if path == ("evaluate", "perplexity") else embedded_data()


def _base(document: Any, path: KeyPath, directory: Path) -> Iterator[Problem]:
    """A model directory that exists is a path; any other bare name is a reference or a Hub id."""
    found = _text_at(document, path)
    resolved = _absolute(found[1], directory) if found else None
    if found and resolved and (_is_path(found[1]) or (resolved / "config.json").is_file()):
        found[0][path[-1]] = str(resolved)
        if not resolved.is_dir():
            yield Problem(path, f"no directory {found[1]!r} (looked for {resolved})")


def _calibration(document: Any, path: KeyPath, directory: Path) -> Iterator[Problem]:
    """What exists, or has a file's suffix, is a path; anything else is a Hub data set."""
    found = _text_at(document, path)
    resolved = _absolute(found[1], directory) if found else None
    if found is None or resolved is None:
        return
    if resolved.exists():
        found[0][path[-1]] = str(resolved)
    elif _is_path(found[1]) or resolved.suffix.lower() in _TEXT_SUFFIXES:
        yield Problem(path, f"no file or directory {found[1]!r} (looked for {resolved})")


def _parameters(document: Any, path: KeyPath, directory: Path) -> Iterator[Problem]:
    """Resolve those parameters of a section's pruner that are paths.

    A client's section that names no pruner is about the one that all have.
    """
    from prufed_plugins.discover import catalog
    from prufed_plugins.errors import MethodError
    from prufed_plugins.settings import holds_sub_models

    named = _text_at(document, (*path, "name")) or _text_at(document, ("pruner", "name"))
    if named is None:
        return
    try:
        fields = catalog().get("pruner", named[1]).method.params.model_fields
    except MethodError:
        return  # what is wrong with the name is said where names are checked
    for name, field in fields.items():
        paths = Path in {field.annotation, *get_args(field.annotation)}
        if paths and not holds_sub_models(field):
            yield from _path(document, (*path, field.alias or name), directory)


def _is_path(text: str) -> bool:
    return text.startswith((".", "/", "~"))


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
