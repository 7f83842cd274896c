"""Calibration sequences from files, directories and data sets, and what bad ones get."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from prufed_cli.errors import PrufedError
from prufed_cli.models.calibration import (
    _PIECE,
    END_OF_DOCUMENT,
    calibration_batches,
    cut,
    documents,
)

WORDS = [f"w{index}" for index in range(50)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate([*WORDS, "<eos>", "<unk>"])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<eos>", unk_token="<unk>", model_max_length=64
    )


def text(count: int, start: int = 0) -> str:
    return " ".join(WORDS[(start + index) % 50] for index in range(count))


def rows_of(calibration: Any) -> list[list[int]]:
    return torch.cat(calibration.batches).tolist()


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_long_text_is_cut_at_seeded_random_offsets(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text(text(2000))
    options: dict[str, Any] = {"samples": 10, "length": 20, "batch_size": 4}
    first = calibration_batches(str(path), tokenizer, seed=0, **options)
    again = calibration_batches(str(path), tokenizer, seed=0, **options)
    other = calibration_batches(str(path), tokenizer, seed=1, **options)
    assert [tuple(batch.shape) for batch in first.batches] == [(4, 20), (4, 20), (2, 20)]
    assert first.batches[0].dtype == torch.int64
    assert first.digest == again.digest != other.digest
    assert rows_of(first) == rows_of(again)
    assert first.description == "long.txt, 10 sequences of 20 tokens"
    for row in rows_of(first):
        assert {(b - a) % 50 for a, b in pairwise(row) if 50 not in (a, b)} == {1}


def test_a_short_text_is_cut_piece_after_piece(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text(text(34))
    calibration = calibration_batches(str(path), tokenizer, samples=10, length=10)
    assert rows_of(calibration) == [[50, *range(9)], [*range(9, 19)], [*range(19, 29)]]


def test_sequences_have_the_models_length_unless_told(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    path.write_text(text(1000))
    assert calibration_batches(str(path), tokenizer, samples=2).batches[0].shape == (2, 64)
    path.write_text(text(40))
    assert calibration_batches(str(path), tokenizer, samples=2).batches[0].shape == (1, 41)


def test_documents_of_a_text_file_are_marked(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "stories.txt"
    path.write_text("w1 w2\n<|endoftext|>\nw3 w4<|endoftext|>\n\n<|endoftext|>w5")
    calibration = calibration_batches(str(path), tokenizer, samples=1, length=8)
    assert rows_of(calibration) == [[50, 1, 2, 50, 3, 4, 50, 5]]


def test_a_separator_is_seen_wherever_a_long_document_is_cut(tmp_path: Path) -> None:
    for before in range(2, len(END_OF_DOCUMENT)):
        path = tmp_path / "long.txt"
        path.write_text("a" * (2 * _PIECE - before) + END_OF_DOCUMENT + "b")
        *first, last = documents(str(path))
        assert "".join(first) == "a" * (2 * _PIECE - before)
        assert last == "b"


def test_rows_give_their_text_or_their_instruction(tokenizer: Any, tmp_path: Path) -> None:
    source = write(
        tmp_path / "rows.jsonl",
        {"text": "w1 w2"},
        {"instruction": "w3", "context": "", "response": "w4", "category": "w9"},
        {"instruction": "w5", "context": "w6", "response": "w7"},
        {"instruction": "w8", "input": "", "output": "w9"},
        {"messages": [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]},
    )
    calibration = calibration_batches(source, tokenizer, samples=1, length=16)
    assert rows_of(calibration) == [[50, 1, 2, 50, 3, 4, 50, 5, 6, 7, 50, 8, 9, 50, 5, 6]]


def test_a_json_file_may_be_one_list_of_rows(tmp_path: Path) -> None:
    rows = [{"text": "w1"}, {"instruction": "w2", "input": "", "output": "w3"}]
    path = tmp_path / "rows.json"
    for text in (json.dumps(rows), "\n\n " + json.dumps(rows, indent=2)):
        path.write_text(text)
        assert list(documents(str(path))) == ["w1", "w2\nw3"]
    path.write_text("\n" + "\n".join(map(json.dumps, rows)))
    assert list(documents(str(path))) == ["w1", "w2\nw3"]


@pytest.mark.parametrize("form", ["csv", "tsv", "parquet"])
def test_tables_are_rows_too(tmp_path: Path, form: str) -> None:
    import datasets

    texts = ["w1, w2", "NA", "3"]
    rows = datasets.Dataset.from_dict({"text": texts, "label": [0, 1, 2]})
    path = tmp_path / f"rows.{form}"
    if form == "parquet":
        rows.to_parquet(str(path))
    else:
        rows.to_csv(str(path), sep="," if form == "csv" else "\t", index=False)
    assert list(documents(str(path))) == texts
    path.write_bytes(b"\xff\x00")
    with pytest.raises(PrufedError, match=r"is no parquet table|it is not UTF-8 text"):
        list(documents(str(path)))


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    for name, text in (("a.txt", "w1"), ("a.jsonl", '{"text": "w1"}')):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8-sig")
        assert list(documents(str(path))) == ["w1"]


def test_a_saved_data_set_and_a_directory_of_files(tokenizer: Any, tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"text": ["w1 w2", "w3 w4"]})
    rows.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "split"))
    (tmp_path / "files").mkdir()
    write(tmp_path / "files" / "part.jsonl", {"text": "w1 w2"}, {"text": "w3 w4"})
    for name in ("saved", "split", "files"):
        calibration = calibration_batches(str(tmp_path / name), tokenizer, samples=1, length=6)
        assert rows_of(calibration) == [[50, 1, 2, 50, 3, 4]], name


def test_the_embedded_text_is_the_default(tokenizer: Any) -> None:
    calibration = calibration_batches(None, tokenizer, samples=3, length=16)
    assert calibration.batches[0].shape == (3, 16)
    assert calibration.description == "the embedded text, 3 sequences of 16 tokens"


def test_cut_never_runs_over_the_end() -> None:
    sequences = cut(range(100), 10, 10, seed=3)
    assert all(row == list(range(row[0], row[0] + 10)) for row in sequences)
    assert len(cut(range(99), 10, 10, seed=3)) == 9


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "empty.txt is empty"),
        ("blank.txt", b" \n\n", "blank.txt is empty"),
        ("empty.jsonl", b"", "empty.jsonl is empty"),
        ("short.txt", b"w1 w2 w3", "short.txt has 4 tokens, fewer than one .* of 8"),
        ("latin.txt", b"caf\xe9 w1", "latin.txt: it is not UTF-8 text"),
        ("cut.jsonl", b'{"text": "w1"}\n\n{"text": "w2', "cut.jsonl line 3 is not JSON"),
        ("other.jsonl", b'{"text": "w1"}\n{"body": "w2"}\n', "other.jsonl line 2 has no text"),
        ("list.jsonl", b"[1, 2]\n", "list.jsonl line 1 has no text"),
        ("null.jsonl", b'{"text": null}\n', "null.jsonl line 1 has no text"),
        ("deep.jsonl", b"[" * 100_000, "deep.jsonl line 1 is not JSON"),
        ("long.jsonl", b'{"text": %s}' % (b"1" * 5000), "long.jsonl line 1 is not JSON"),
        ("half.jsonl", b'{"text": "\\ud800 w1"}\n', "half.jsonl line 1 holds half of a surrogate"),
        ("UPPER.JSONL", b'{"body": "w1"}\n', "UPPER.JSONL line 1 has no text"),
        (
            "list.json",
            b'[{"text": "w1"},\n {"text":',
            "list.json is not JSON: .* line 2",
        ),
        ("list.json", b'[{"text": "w1"}, {"body": "w1"}]', "list.json row 2 has no text"),
        ("rows.jsonl", b'[{"text": "w1"}]', "rows.jsonl line 1 has no text"),
        ("rows.ndjson", b'{"body": "w1"}\n', "rows.ndjson line 1 has no text"),
    ],
)
def test_damaged_files(
    tokenizer: Any, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(PrufedError, match=message) as refusal:
        calibration_batches(str(path), tokenizer, samples=2, length=8)
    assert refusal.value.hint


@pytest.mark.parametrize(
    "source",
    ["missing.txt", "/nowhere/at/all", "some/deep/path", "rows.jsonl", "./rows", "../rows"],
)
def test_a_missing_file_is_not_found(tokenizer: Any, source: str) -> None:
    with pytest.raises(PrufedError, match=f"{source} does not exist") as refusal:
        calibration_batches(source, tokenizer)
    assert refusal.value.exit_code == 3


@pytest.mark.parametrize("source", ["dolly", "rows.jsnl", "owner/rows:en"])
def test_what_may_be_a_data_set_is_said_to_be_no_file_too(tokenizer: Any, source: str) -> None:
    """The Hub is out of reach here."""
    words = f"{source} is no file here, and it cannot be read as a data set on the Hub"
    with pytest.raises(PrufedError, match=words) as refusal:
        calibration_batches(source, tokenizer, samples=2, length=8)
    assert "check the path" in str(refusal.value.hint)


def test_an_empty_directory_is_no_data_set(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(PrufedError, match="is no data set"):
        calibration_batches(str(tmp_path), tokenizer)
