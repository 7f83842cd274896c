"""Calibration text: from a file, a directory or a data set to batches of token ids.

The documents are tokenized without special tokens and laid end to end, the tokenizer's own document
mark between them. As the SparseGPT and Wanda scripts do with C4, sequences of equal length are cut
at seeded random offsets; a text too short for that is cut from its beginning, piece after piece, so
that no token is used twice.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from prufed_cli.errors import FAILED, NOT_FOUND, USAGE, PrufedError
from prufed_registry.names import readable

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

END_OF_DOCUMENT: Final = "<|endoftext|>"
"""Separates the documents of a plain text file."""

LONGEST: Final = 2048
"""Tokens per sequence unless the tokenizer's model takes fewer, as in the published scripts."""

SURPLUS: Final = 4
"""Tokens are read until there are this many times what the sequences need."""

FIELDS: Final = ("instruction", "context", "input", "response", "output")
HINT: Final = "pass a text or JSONL file, a directory, a Hub data set, or nothing for the built-in"

_ROWS: Final = frozenset({".jsonl", ".ndjson", ".json"})
_SEPARATORS: Final = {".csv": ",", ".tsv": "\t"}
_OVERLAP: Final = len(END_OF_DOCUMENT) - 1
_PIECE: Final = 1 << 20
_HUB_ID: Final = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?")


@dataclass(frozen=True)
class Calibration:
    """Token ids to calibrate with.

    Attributes:
        batches: int64, each (B, T), without padding.
        digest: ``sha256:…`` over the shape and the ids of all sequences.
        description: what the text was and how much of it is used, without a path.
    """

    batches: list[Tensor]
    digest: str
    description: str


def calibration_batches(
    source: str | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int = 128,
    length: int | None = None,
    longest: int = LONGEST,
    seed: int = 0,
    batch_size: int = 8,
) -> Calibration:
    """Return batches of calibration sequences.

    Args:
        source: a text file; a ``.jsonl``, ``.json``, ``.csv``, ``.tsv`` or ``.parquet`` file; a
            local ``datasets`` directory; the id of a data set on the Hub, ``id`` or
            ``id:configuration``; None for the embedded text. Rows have a ``text``, or ``messages``,
            or an ``instruction``, ``context`` and ``response`` (Alpaca's ``input`` and ``output``).
        tokenizer: of the model to be pruned.
        samples: how many sequences; a short text gives fewer.
        length: tokens per sequence; None for what the tokenizer's model takes, at most ``longest``
            and at most what there is.
        longest: tokens that the model itself takes.
        seed: decides the offsets.
        batch_size: sequences per batch.

    Raises:
        PrufedError: the source is missing, empty, damaged, or shorter than one sequence.
    """
    name = "the embedded text" if source is None else readable(Path(source).name)
    wanted = length or min(int(tokenizer.model_max_length), longest)
    stream = _token_stream(documents(source), tokenizer, SURPLUS * samples * wanted)
    if not stream:
        raise PrufedError(f"calibration text {name} is empty", HINT, FAILED)
    size = wanted if length else min(wanted, len(stream))
    if len(stream) < size or size < 2:
        raise PrufedError(
            f"{name} has {len(stream)} tokens, fewer than one calibration sequence of {size}",
            f"give more text, or shorter sequences: --length {max(len(stream), 2)}",
            FAILED,
        )
    sequences = cut(stream, samples, size, seed)
    return Calibration(
        _batches(sequences, batch_size),
        _digest(sequences),
        f"{name}, {len(sequences)} sequences of {size} tokens",
    )


def cut(stream: Sequence[int], samples: int, length: int, seed: int) -> list[list[int]]:
    """Cut sequences out of a token stream that has at least ``length`` tokens.

    Returns:
        ``samples`` sequences at random offsets, or, where the stream is too short to give as many
        side by side, as many as it gives from its beginning.
    """
    room = len(stream) // length
    if room < samples:
        offsets: Iterable[int] = range(0, room * length, length)
    else:
        generator = random.Random(seed)
        offsets = [generator.randint(0, len(stream) - length) for _ in range(samples)]
    return [list(stream[offset : offset + length]) for offset in offsets]


def documents(source: str | None) -> Iterator[str]:
    """Yield the documents of a source; see :func:`calibration_batches`.

    Raises:
        PrufedError: the source is missing or damaged, with the line at fault.
    """
    if source is None:
        from prufed_cli.assets import embedded_calibration

        return _text_file(embedded_calibration())
    if not source:
        raise PrufedError("the calibration text has no name", HINT, USAGE)
    path = Path(source)
    if path.is_dir():
        return _directory(path)
    suffix = path.suffix.lower()
    if path.exists() and suffix in _SEPARATORS:
        return _columns(path, _SEPARATORS[suffix])
    if path.is_file() and suffix == ".parquet":
        return _parquet(path)
    if path.exists():  # a pipe, too
        return _json_rows(path) if suffix in _ROWS else _text_file(path)
    if suffix in _ROWS | _SEPARATORS.keys() | {
        ".parquet",
        ".txt",
        ".text",
        ".md",
    } or not _HUB_ID.fullmatch(source):
        raise PrufedError(f"calibration text {source} does not exist", HINT, NOT_FOUND)
    return _hub(source)


def row_text(row: Any, where: str) -> str:
    """Return a row's ``text``, the turns of its chat, or its instruction, context and response.

    Raises:
        PrufedError: the row has none of them; names ``where``.
    """
    parts: list[str] = []
    if isinstance(row, Mapping):
        if isinstance(row.get("text"), str):
            parts = [row["text"]]
        else:
            parts = _turns(row.get("messages")) or [
                row[field] for field in FIELDS if isinstance(row.get(field), str)
            ]
    if not parts:
        raise PrufedError(
            f"{where} has no text, messages, instruction, context or response",
            "give every row a text, or an instruction and a response",
            USAGE,
        )
    text = "\n".join(part for part in parts if part)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PrufedError(
            f"{where} holds half of a surrogate pair", "write the character itself", USAGE
        ) from error
    return text


def _turns(messages: Any) -> list[str]:
    """Return what is said in a chat; nothing where there is none."""
    turns = messages if isinstance(messages, Sequence) and not isinstance(messages, str) else ()
    return [
        turn["content"]
        for turn in turns
        if isinstance(turn, Mapping) and isinstance(turn.get("content"), str)
    ]


def _text_file(path: Path) -> Iterator[str]:
    """Yield the documents of a text file without the line breaks around them.

    A document that does not end comes in pieces.
    """
    rest = ""
    try:
        with path.open(encoding="utf-8-sig") as file:
            while piece := file.read(_PIECE):
                *complete, rest = (rest + piece).split(END_OF_DOCUMENT)
                yield from (document.strip("\n") for document in complete)
                if len(rest) > _PIECE:  # its end may be the beginning of a separator
                    yield rest[:-_OVERLAP]
                    rest = rest[-_OVERLAP:]
    except (UnicodeDecodeError, OSError) as error:
        raise _unreadable(path, error) from error
    yield rest.strip("\n")


def _json_rows(path: Path) -> Iterator[str]:
    """Yield the rows of a file with one object per line; a ``.json`` file may be a list of them."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            begun = list(_up_to_text(file))
            if path.suffix.lower() == ".json" and begun[-1:] and begun[-1].lstrip().startswith("["):
                rows = _list(path.name, "".join(begun) + file.read())
            else:
                rows = _lines(path.name, chain(begun, file))
            for where, row in rows:
                yield row_text(row, where)
    except (UnicodeDecodeError, OSError) as error:
        raise _unreadable(path, error) from error


def _up_to_text(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        yield line
        if line.strip():
            return


def _list(name: str, text: str) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(_parse(text, name, "is the list cut off?"), start=1):
        yield f"{name} row {number}", row


def _lines(name: str, lines: Iterable[str]) -> Iterator[tuple[str, Any]]:
    hint = "write one JSON object per line; is the file cut off?"
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{name} line {number}"
            yield where, _parse(line, where, hint)


def _parse(text: str, where: str, hint: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers and nesting that are too long
        reason = str(error)
        if isinstance(error, json.JSONDecodeError):
            line = f"line {error.lineno}, " if error.lineno > 1 else ""
            reason = f"{error.msg} at {line}column {error.colno}"
        raise PrufedError(f"{where} is not JSON: {reason}", hint, USAGE) from error


def _unreadable(path: Path, error: Exception) -> PrufedError:
    reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)
    return PrufedError(f"cannot read calibration text {path}: {reason}", HINT, FAILED)


def _directory(path: Path) -> Iterator[str]:
    """Yield the rows of a directory made by ``save_to_disk``, or of the data files in one."""
    import datasets

    saved = (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
    try:
        if saved:
            rows = datasets.load_from_disk(str(path))
            if isinstance(rows, Mapping):
                rows = rows.get("train", next(iter(rows.values())))
        else:
            rows = datasets.load_dataset(str(path), split="train", streaming=True)
        yield from _rows(rows, path.name)
    except _unreadable_data() as error:
        raise PrufedError(f"{path} is no data set: {_first_line(error)}", HINT, FAILED) from error


def _columns(path: Path, separator: str) -> Iterator[str]:
    """Yield the rows of a text table with a header; every cell is text."""
    import csv

    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            csv.field_size_limit(sys.maxsize)
            yield from _rows(csv.DictReader(file, delimiter=separator), path.name)
    except (UnicodeDecodeError, OSError) as error:
        raise _unreadable(path, error) from error
    except csv.Error as error:
        raise PrufedError(f"{path} is no table of text: {error}", HINT, FAILED) from error


def _parquet(path: Path) -> Iterator[str]:
    import datasets

    try:
        rows = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        yield from _rows(rows, path.name)
    except _unreadable_data() as error:
        raise PrufedError(
            f"{path} is no parquet table: {_first_line(error)}", HINT, FAILED
        ) from error


def _hub(source: str) -> Iterator[str]:
    """Yield the rows of a Hub data set's training split as they stream in."""
    import datasets

    repository, _, configuration = source.partition(":")
    try:
        rows = datasets.load_dataset(
            repository, configuration or None, split="train", streaming=True
        )
        yield from _rows(rows, source)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise PrufedError(
            f"calibration text {source} is neither a file here nor a data set on the Hub",
            HINT,
            NOT_FOUND,
        ) from error
    except _unreadable_data() as error:
        raise PrufedError(
            f"calibration text {source} is no file here, and it cannot be read as a data set on "
            f"the Hub: {_first_line(error)}",
            "check the path, or the network (prufed doctor)",
            FAILED,
        ) from error


def _unreadable_data() -> tuple[type[Exception], ...]:
    """Return what ``datasets`` raises for what it cannot read; StopIteration for an empty file."""
    import datasets

    return (OSError, ValueError, RuntimeError, StopIteration, datasets.exceptions.DatasetsError)


def _rows(rows: Iterable[Any], name: str) -> Iterator[str]:
    for number, row in enumerate(rows, start=1):
        yield row_text(row, f"{name} row {number}")


def _first_line(error: Exception) -> str:
    if isinstance(error, StopIteration):
        return "it has no rows"
    return (str(error).splitlines() or [type(error).__name__])[0]


def _token_stream(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, enough: int
) -> list[int]:
    """Return the tokens of the documents, a document mark before each, until there are enough."""
    mark = list(tokenizer("")["input_ids"])
    if not mark and tokenizer.eos_token_id is not None:
        mark = [tokenizer.eos_token_id]
    stream: list[int] = []
    for text in texts:
        if not text.strip():
            continue
        stream += mark
        stream += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(stream) >= enough:
            break
    return stream


def _batches(sequences: Sequence[Sequence[int]], batch_size: int) -> list[Tensor]:
    import torch

    ids = torch.tensor(sequences, dtype=torch.int64)
    return [ids[start : start + batch_size] for start in range(0, len(ids), batch_size)]


def _digest(sequences: Sequence[Sequence[int]]) -> str:
    import numpy as np

    ids = np.asarray(sequences, dtype="<i8")
    content = hashlib.sha256(f"{ids.shape[0]}x{ids.shape[1]}:".encode())
    content.update(ids.tobytes())
    return f"sha256:{content.hexdigest()}"
