"""Data files of every shape are read, and bad ones are refused with their lines."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prufed_cli.data import Row, read_rows, rows_digest
from prufed_cli.errors import FAILED, NOT_FOUND, PrufedError


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def jsonl(*rows: object) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def refusal(path: Path) -> PrufedError:
    with pytest.raises(PrufedError) as caught:
        read_rows(path)
    assert caught.value.hint
    return caught.value


# --- what is read --------------------------------------------------------------------------------

DOLLY = {"instruction": "Add.", "context": "1 1", "response": "2", "category": "sums"}
ALPACA = {"instruction": "Add.", "input": "1 1", "output": "2"}
CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "Thanks."},
    ]
}


@pytest.mark.parametrize(
    ("item", "row"),
    [
        (DOLLY, Row("Add.", "1 1", "2", "sums")),
        ({**DOLLY, "context": None, "category": ""}, Row("Add.", "", "2", None)),
        ({"instruction": "Add.", "response": "2", "id": 7}, Row("Add.", "", "2", None)),
        (ALPACA, Row("Add.", "1 1", "2", None)),
        ({"instruction": "Add.", "output": ""}, Row("Add.", "", "", None)),
        (CHAT, Row("Add.", "", "2", None)),
        ({"text": "Once.", "category": "tales"}, Row(category="tales", text="Once.")),
        ({"instruction": None, "text": "Once."}, Row(text="Once.")),
    ],
)
def test_each_shape_of_row(item: object, row: Row, tmp_path: Path) -> None:
    assert read_rows(write(tmp_path / "a.jsonl", jsonl(item))) == [row]
    assert read_rows(write(tmp_path / "a.json", json.dumps([item], indent=1))) == [row]


def test_text_is_one_row_per_paragraph(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "\n\nOne\r\nmore line.\r\n \r\n\n  Two.  \n\n")
    assert read_rows(path) == [Row(text="One\nmore line."), Row(text="  Two.")]


def test_blank_lines_bom_and_windows_line_ends_are_no_rows(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + b'{"text": "a"}\r\n\r\n  \r\n{"text": "b"}'
    assert [row.text for row in read_rows(write(tmp_path / "a.jsonl", content))] == ["a", "b"]


def test_a_line_separator_inside_a_string_ends_no_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", jsonl({"text": "a\u2028b\x85c"}))
    assert read_rows(path) == [Row(text="a\u2028b\x85c")]


def test_a_datasets_directory(tmp_path: Path) -> None:
    import datasets

    loaded = datasets.Dataset.from_list([DOLLY, {**DOLLY, "response": "3"}])
    loaded.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": loaded, "test": loaded}).save_to_disk(str(tmp_path / "two"))
    datasets.DatasetDict({"test": loaded}).save_to_disk(str(tmp_path / "three"))
    expected = [Row("Add.", "1 1", "2", "sums"), Row("Add.", "1 1", "3", "sums")]
    assert read_rows(tmp_path / "one") == expected
    assert read_rows(tmp_path / "two") == expected
    assert "the splits test but no `train`" in refusal(tmp_path / "three").message
    (tmp_path / "four").mkdir()
    assert "is not a data set saved by `datasets`" in refusal(tmp_path / "four").message


texts = st.text(st.characters(exclude_categories=["Cs"]))
filled = texts.filter(str.strip)
rows = st.builds(Row, filled, texts, texts, st.none() | texts.filter(bool)) | st.builds(
    lambda text, category: Row(text=text, category=category), filled, st.none()
)


@given(st.lists(rows, min_size=1, max_size=5))
def test_any_text_survives_a_file(
    tmp_path_factory: pytest.TempPathFactory, some: list[Row]
) -> None:
    path = tmp_path_factory.mktemp("rows") / "a.jsonl"
    write(path, jsonl(*(vars(row) if row.text is None else {"text": row.text} for row in some)))
    assert read_rows(path) == some


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": "b', "2: not valid JSON: unterminated string starting at "),
        ('{"text": "a"}\n{"text": ', "2: not valid JSON: expecting value (column "),
        ('{"text": "a"}\n\n[1]\n', "3: expected an object, got a list"),
        ('{"text": "a"}\n7\n', "2: expected an object, got a number"),
        ('{"text": 7}\n', "1: `text` must be text, not a number"),
        ('{"text": "  "}\n', "1: `text` is empty"),
        ('{"text": "\\ud800"}\n', "1: `text` holds half of a surrogate pair"),
        ('{"instruction": ["a"], "response": "b"}\n', "1: `instruction` must be text, not a list"),
        ('{"instruction": "a", "response": {}}\n', "1: `response` must be text, not an object"),
        ('{"instruction": "a", "output": "b", "input": true}\n', "1: `input` must be text, not tr"),
        ('{"text": "a", "category": 3}\n', "1: `category` must be text, not a number"),
        ('{"q": "a", "a": "b"}\n', "1: a row without the needed fields; it has 'q', 'a'"),
        ('{"instruction": "a", "response": null}\n', "1: a row without the needed fields; it has "),
        ("{}\n", "1: a row without the needed fields; it has no fields at all"),
        ('{"messages": "hi"}\n', "1: `messages` must be a list, not text"),
        ('{"messages": [{"content": "a"}]}\n', "1: each of `messages` must have a `role` and a"),
        (
            '{"messages": [{"role": "user", "content": "a"}]}\n',
            "1: `messages` has no turn of the a",
        ),
        ('{"messages": [{"role": "assistant"}]}\n', "1: `messages` has no turn of the user before"),
        ("[" * 100_000 + "\n", "1: not usable JSON: nested too deeply"),
    ],
)
def test_a_bad_row_is_named_by_its_line(content: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", content)
    error = refusal(path)
    assert error.message.startswith(f"{path}:{message}")
    assert error.exit_code == FAILED


def test_all_bad_rows_are_counted_and_the_first_listed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n{"x": 1}\n' * 7)
    lines = refusal(path).message.splitlines()
    assert lines[0] == f"7 of 14 rows of {path} cannot be used"
    assert [line.split(": ")[0] for line in lines[1:6]] == [f"{path}:{n}" for n in (2, 4, 6, 8, 10)]
    assert lines[6:] == ["and 2 more"]


def test_a_bad_item_of_a_json_list_is_named_by_its_number(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", json.dumps([DOLLY, {"x": 1}], indent=2))
    assert refusal(path).message.startswith(f"{path}: row 2: a row without the needed fields")


def test_a_truncated_json_list(tmp_path: Path) -> None:
    whole = json.dumps([DOLLY, DOLLY], indent=1)
    path = write(tmp_path / "a.json", whole[: whole.rindex("response") + 4])
    error = refusal(path)
    assert error.message.startswith(f"{path}:11: not valid JSON: unterminated string")
    assert "truncated" in str(error.hint)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", ""), ("a.jsonl", " \n\n"), ("a.json", "[]"), ("a.txt", "\n \n")],
)
def test_an_empty_file(name: str, content: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, content)
    assert refusal(path).message == f"the data file {str(path)!r} is empty"


@pytest.mark.parametrize("name", ["none.jsonl", "none/none.jsonl", "n" * 300, "a\0b"])
def test_a_missing_file(name: str, tmp_path: Path) -> None:
    error = refusal(tmp_path / name)
    assert error.message == f"no data file {str(tmp_path / name)!r}"
    assert error.exit_code == NOT_FOUND


def test_bytes_that_are_no_text_are_named_by_their_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n')
    assert refusal(path).message == f"{path}:2: not UTF-8 text"


@given(st.binary(max_size=200))
def test_no_bytes_do_anything_but_read_or_refuse(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    directory = tmp_path_factory.mktemp("bytes")
    for name in ("a.jsonl", "a.json", "a.txt"):
        path = write(directory / name, content)
        with contextlib.suppress(PrufedError):
            assert read_rows(path)


# --- the digest ----------------------------------------------------------------------------------


def test_the_digest_depends_on_content_and_order_not_on_the_file(tmp_path: Path) -> None:
    one = read_rows(write(tmp_path / "a.jsonl", jsonl(DOLLY, ALPACA)))
    same = read_rows(write(tmp_path / "b.json", json.dumps([DOLLY, ALPACA])))
    other = read_rows(write(tmp_path / "c.jsonl", jsonl(ALPACA, DOLLY)))
    assert rows_digest(one) == rows_digest(same) != rows_digest(other)


def test_the_digest_is_pinned() -> None:
    # Manifests and journals hold this value: it must not change between versions.
    rows = [Row("Add.", "1 1", "2", "sums"), Row(text="é")]
    content = b'["Add.","1 1","2","sums",null]\n["","","",null,"\\u00e9"]\n'
    assert rows_digest(rows) == f"sha256:{hashlib.sha256(content).hexdigest()}"


def test_fields_do_not_run_into_one_another() -> None:
    assert rows_digest([Row("ab", "c", "d")]) != rows_digest([Row("a", "bc", "d")])
    assert rows_digest([Row(text="")]) != rows_digest([Row()])
