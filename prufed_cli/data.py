"""Rows of training data: read from a file, checked line by line, and hashed.

Four shapes of row are understood: Dolly (instruction, context, response, category), Alpaca
(instruction, input, output), chat (messages) and plain text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from prufed_cli.errors import FAILED, NOT_FOUND, PrufedError

MAX_SHOWN: Final = 5
_SHAPES: Final = (
    "a row has `instruction` and `response` (and `context`, `category`), or `instruction` and "
    "`output` (and `input`), or `messages`, or `text`"
)


@dataclass(frozen=True)
class Row:
    """One training example.

    Attributes:
        instruction: what is asked; empty for plain text.
        context: material for the answer; often empty.
        response: the answer; empty for plain text.
        category: what kind of task it is, where the data says so.
        text: plain text; None for an instruction.
    """

    instruction: str = ""
    context: str = ""
    response: str = ""
    category: str | None = None
    text: str | None = None


@dataclass(frozen=True)
class Record:
    """One row as it stands in its file, usable or not.

    Attributes:
        place: where it stands, ``rows.jsonl:7`` or ``rows.json: row 7``.
        number: of its line, or of the row where rows are no lines; 1 for the first.
        row: what is trained on; None where it cannot be used.
        problem: why it cannot be used.
        fields: everything the row says, also what :class:`Row` has no place for.
        line: its line without the line feed; None where rows are no lines.
    """

    place: str
    number: int
    row: Row | None
    problem: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    line: str | None = None


class _BadRowError(Exception):
    """Why one row cannot be used."""


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file, in its order; see :func:`read_records`.

    Raises:
        PrufedError: there is no such file, it is empty, or rows are unusable; the message counts
            them and names the lines of the first few.
    """
    return [record.row for record in read_records(path) if record.row is not None]


def read_records(path: Path) -> list[Record]:
    """Return the rows of a file as they stand there, all of them usable.

    Raises:
        PrufedError: as :func:`read_rows`.
    """
    records = scan(path)
    bad = [record for record in records if record.problem is not None]
    if bad:
        raise _bad_rows(path, bad, total=len(records))
    return records


def scan(path: Path) -> list[Record]:
    """Return the rows of a file as they stand there, usable or not.

    Args:
        path: ``.jsonl``/``.ndjson`` (one object per line), ``.json`` (a list of objects, or lines),
            ``.txt``/``.md`` (one row of text per paragraph), or a directory saved by ``datasets``.

    Raises:
        PrufedError: there is no such file, it is empty, or it is not text at all.
    """
    if not _exists(path):
        raise PrufedError(
            f"no data file {str(path)!r}", "check the path; it is a JSONL or text file", NOT_FOUND
        )
    if path.is_dir():
        return _records(path, _numbered(_directory(path)))
    text = _text(path)
    if path.suffix.lower() in {".txt", ".md"}:
        return _records(path, _numbered({"text": part} for part in _paragraphs(text)))
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        return _records(path, _numbered(_json_list(path, text)))
    return _records(path, _json_lines(text))


def rows_digest(rows: Sequence[Row]) -> str:
    """Return ``sha256:...`` over the rows' content and order, whatever file they came from."""
    digest = hashlib.sha256()
    for row in rows:
        fields = [row.instruction, row.context, row.response, row.category, row.text]
        line = json.dumps(fields, ensure_ascii=True, separators=(",", ":"))
        digest.update(line.encode("ascii") + b"\n")
    return f"sha256:{digest.hexdigest()}"


# --- files ---------------------------------------------------------------------------------------


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long, a NUL byte
        return False


def _text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise PrufedError(
            f"{path}:{line}: not UTF-8 text", "save the file as UTF-8 (`iconv -t utf-8`)"
        ) from error
    except OSError as error:
        raise PrufedError(
            f"cannot read {path}: {error.strerror}", "check its permissions"
        ) from error
    if not text.strip():
        raise _empty(path)
    return text


def _empty(path: Path) -> PrufedError:
    return PrufedError(f"the data file {str(path)!r} is empty", _SHAPES)


def _paragraphs(text: str) -> Iterator[str]:
    """Yield the runs of non-blank lines."""
    lines: list[str] = []
    for line in [*text.splitlines(), ""]:
        if line.strip():
            lines.append(line.rstrip())
        elif lines:
            yield "\n".join(lines)
            lines = []


def _json_lines(text: str) -> Iterator[_Item]:
    """Yield every line that is not blank; the value of a broken one is an exception."""
    # Only \n ends a line: JSON text may hold U+2028 and its like unescaped.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, _decode(line), line


def _numbered(values: Iterable[object]) -> Iterator[_Item]:
    """Yield values that stand on no lines of their own."""
    for number, value in enumerate(values, 1):
        yield number, value, None


def _decode(text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        return _BadRowError(f"not valid JSON: {error.msg.lower()} (column {error.colno})")
    except (RecursionError, ValueError):
        return _BadRowError("not usable JSON: nested too deeply or a number too long")


def _json_list(path: Path, text: str) -> list[object]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise PrufedError(
            f"{path}:{error.lineno}: not valid JSON: {error.msg.lower()} (column {error.colno})",
            "the file may be truncated; fetch or write it again",
        ) from error
    except (RecursionError, ValueError) as error:
        raise PrufedError(f"{path}: not usable JSON: {error}", _SHAPES) from error
    return list(rows)


def _directory(path: Path) -> Iterator[object]:
    """Yield the rows of a data set that ``datasets`` saved; of several splits, ``train``."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except (FileNotFoundError, ValueError, OSError) as error:
        raise PrufedError(
            f"the directory {str(path)!r} is not a data set saved by `datasets`",
            "write one with `Dataset.save_to_disk`, or name a JSONL file",
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if "train" not in loaded:
            raise PrufedError(
                f"the data set {str(path)!r} has the splits {', '.join(loaded)} but no `train`",
                "name the directory of one split",
            )
        loaded = loaded["train"]
    yield from loaded


# --- rows ----------------------------------------------------------------------------------------


_Item = tuple[int, object, str | None]
"""Number, value and line of what may be a row."""


def _records(path: Path, items: Iterable[_Item]) -> list[Record]:
    records = [_record(path, *item) for item in items]
    if not records:
        raise _empty(path)
    return records


def _record(path: Path, number: int, value: object, line: str | None) -> Record:
    place = f"{path}: row {number}" if line is None else f"{path}:{number}"
    fields = value if isinstance(value, Mapping) else {}
    try:
        return Record(place, number, _row(value), None, fields, line)
    except _BadRowError as error:
        return Record(place, number, None, str(error), fields, line)


def _bad_rows(path: Path, bad: Sequence[Record], *, total: int) -> PrufedError:
    first = [f"{record.place}: {record.problem}" for record in bad[:MAX_SHOWN]]
    if len(bad) == 1:
        return PrufedError(first[0], _SHAPES, FAILED)
    if len(bad) > MAX_SHOWN:
        first.append(f"and {len(bad) - MAX_SHOWN} more")
    head = f"{len(bad)} of {total} rows of {path} cannot be used"
    return PrufedError("\n".join([head, *first]), _SHAPES, FAILED)


def _row(item: object) -> Row:
    if isinstance(item, _BadRowError):
        raise item
    if not isinstance(item, Mapping):
        raise _BadRowError(f"expected an object, got {_kind(item)}")
    for needed, build in _BUILDERS:
        if all(item.get(key) is not None for key in needed):
            return build(item)
    keys = ", ".join(repr(str(key)[:30]) for key in list(item)[:8]) or "no fields at all"
    raise _BadRowError(f"a row without the needed fields; it has {keys}")


def _dolly(item: Mapping[str, Any]) -> Row:
    return Row(
        instruction=_string(item, "instruction", required=True),
        context=_string(item, "context"),
        response=_string(item, "response"),
        category=_category(item),
    )


def _alpaca(item: Mapping[str, Any]) -> Row:
    return Row(
        instruction=_string(item, "instruction", required=True),
        context=_string(item, "input"),
        response=_string(item, "output"),
        category=_category(item),
    )


def _chat(item: Mapping[str, Any]) -> Row:
    """Take the last assistant turn as the response, the user turn before it as the instruction."""
    turns = item["messages"]
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise _BadRowError(f"`messages` must be a list, not {_kind(turns)}")
    for turn in turns:
        if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
            raise _BadRowError("each of `messages` must have a `role` and a `content`")
    roles = [turn["role"] for turn in turns]
    if "assistant" not in roles:
        raise _BadRowError("`messages` has no turn of the assistant")
    last = len(roles) - 1 - roles[::-1].index("assistant")
    if "user" not in roles[:last]:
        raise _BadRowError("`messages` has no turn of the user before the assistant's last")
    asked = last - 1 - roles[:last][::-1].index("user")
    return Row(
        instruction=_string(turns[asked], "content", required=True),
        response=_string(turns[last], "content"),
        category=_category(item),
    )


def _plain(item: Mapping[str, Any]) -> Row:
    return Row(text=_string(item, "text", required=True), category=_category(item))


_BUILDERS: Final[Sequence[tuple[tuple[str, ...], Callable[[Mapping[str, Any]], Row]]]] = (
    (("instruction", "response"), _dolly),
    (("instruction", "output"), _alpaca),
    (("messages",), _chat),
    (("text",), _plain),
)


def _category(item: Mapping[str, Any]) -> str | None:
    return _string(item, "category") or None


def _string(item: Mapping[str, Any], key: str, *, required: bool = False) -> str:
    value = item.get(key)
    if value is None:
        value = ""
    if not isinstance(value, str):
        raise _BadRowError(f"`{key}` must be text, not {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _BadRowError(f"`{key}` holds half of a surrogate pair") from error
    if required and not value.strip():
        raise _BadRowError(f"`{key}` is empty")
    return value


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    if value is None:
        return "null"
    return names.get(
        type(value), "a number" if isinstance(value, int | float) else "something else"
    )
