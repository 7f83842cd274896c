"""What a person reads about a faulty configuration: place, key, reason, source line and caret."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from prufed_cli.config.yaml_source import KeyPath, Position, Source
from prufed_cli.errors import USAGE, PrufedError

MAX_SHOWN: Final = 25
_WIDTH: Final = 100
_HINT: Final = "`prufed schema` lists every key; `prufed init` writes a file to start from"


class ConfigError(PrufedError):
    """A configuration cannot be used; the message lists everything that is wrong with it."""

    def __init__(self, message: str, hint: str | None = _HINT, exit_code: int = USAGE) -> None:
        super().__init__(message, hint, exit_code)


@dataclass(frozen=True)
class Problem:
    """One thing wrong with the configuration.

    Attributes:
        path: the key it is about.
        message: what is wrong, without the key.
        at_key: point at the key rather than at its value.
    """

    path: KeyPath
    message: str
    at_key: bool = False


def render(name: str, source: Source, problems: Iterable[Problem]) -> str:
    """Return all problems and the source's own faults in the order of the file."""
    placed = [(fault.position, fault.path, fault.message) for fault in source.faults]
    placed += [(source.locate(p.path, key=p.at_key), p.path, p.message) for p in problems]
    unique = sorted(set(placed), key=lambda item: (item[0], [str(k) for k in item[1]], item[2]))
    shown = [_render_one(name, source.lines, *item) for item in unique[:MAX_SHOWN]]
    if len(unique) > MAX_SHOWN:
        shown.append(f"and {len(unique) - MAX_SHOWN} more")
    count = "1 error" if len(unique) == 1 else f"{len(unique)} errors"
    return "\n".join([f"{count} in {name}", *shown])


def _render_one(
    name: str, lines: Sequence[str], position: Position, path: KeyPath, message: str
) -> str:
    where = f"{name}:{position.line}:{position.column}: "
    head = where + describe(Problem(path, message))
    line = lines[position.line - 1] if position.line <= len(lines) else ""
    if not line.strip():
        return head
    shown, indent = _window(line.expandtabs(1), position.column - 1)
    return f"{head}\n    {shown}\n    {indent}^"


def describe(problem: Problem) -> str:
    """Return a problem in one line: ``clients.1.epochs: unknown key``."""
    key = ".".join(str(part) for part in problem.path)
    return _escaped(f"{key}: {problem.message}" if key else problem.message)


def _escaped(text: str) -> str:
    """Return text that cannot steer a terminal, whatever the file puts into it."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _window(line: str, column: int) -> tuple[str, str]:
    """Return the part of a long line around ``column`` and the blanks that lead to it."""
    start = max(0, column - _WIDTH // 2) if len(line) > _WIDTH else 0
    part = line[start : start + _WIDTH].rstrip()
    printable = "".join(character if character.isprintable() else " " for character in part)
    before = printable[: column - start].ljust(column - start)
    width = sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in before)
    return printable, " " * width


def near(word: str, known: Iterable[str]) -> str:
    """Return ``; did you mean `x`?`` where a known word is close, else an empty string."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean `{found[0]}`?" if found else ""


def show(value: Any) -> str:
    """Return a short, printable rendering of a value."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


_SENTENCES: Final[Mapping[str, str]] = {
    "missing": "missing",
    "int_type": "must be a whole number, not {input}",
    "int_from_float": "must be a whole number, not {input}",
    "int_parsing": "must be a whole number, not {input}",
    "float_type": "must be a number, not {input}",
    "float_parsing": "must be a number, not {input}",
    "finite_number": "must be a finite number, not {input}",
    "bool_type": "must be true or false, not {input}",
    "bool_parsing": "must be true or false, not {input}",
    "string_type": "must be text, not {input}",
    "path_type": "must be a path, not {input}",
    "tuple_type": "must be a list, not {input}",
    "list_type": "must be a list, not {input}",
    "dict_type": "must be a mapping, not {input}",
    "model_type": "must be a mapping, not {input}",
    "model_attributes_type": "must be a mapping, not {input}",
    "greater_than": "must be more than {gt}, not {input}",
    "greater_than_equal": "must be at least {ge}, not {input}",
    "less_than": "must be less than {lt}, not {input}",
    "less_than_equal": "must be at most {le}, not {input}",
    "too_short": "needs at least {min_length}, has {actual_length}",
    "too_long": "takes at most {max_length}, has {actual_length}",
    "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} characters, not {length}",
}


def explain(error: Mapping[str, Any], known: Iterable[str] = ()) -> str:
    """Return the sentence for one entry of pydantic's ``ValidationError.errors()``.

    Args:
        error: the entry, with ``type``, ``loc``, ``input`` and ``ctx``.
        known: the keys allowed where an unknown one was found.
    """
    kind = error["type"]
    context = {
        key: f"{value:g}" if isinstance(value, float) else value
        for key, value in error.get("ctx", {}).items()
    }
    given = error.get("input")
    if kind == "extra_forbidden":
        return "unknown key" + near(str(error["loc"][-1]), known)
    if kind in {"literal_error", "enum"}:
        return f"must be {context['expected']}, not {show(given)}" + _near_literal(error)
    if kind in _SENTENCES:
        return _SENTENCES[kind].format(**{**context, "input": show(given)})
    if kind == "value_error":
        return str(context.get("error", error["msg"]))
    message = str(error["msg"])
    return message[:1].lower() + message[1:]


def _near_literal(error: Mapping[str, Any]) -> str:
    given = error.get("input")
    choices = str(error["ctx"]["expected"]).replace(" or ", ", ").split(", ")
    return near(given, [choice.strip("'") for choice in choices]) if isinstance(given, str) else ""
