"""What a data file holds is counted right, and what is wrong with it is named by line."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from prufed_cli.assets import embedded_data, embedded_model
from prufed_cli.data import read_rows
from prufed_cli.errors import PrufedError
from prufed_cli.inspection import Finding, inspect
from prufed_cli.models.base import open_tokenizer
from prufed_cli.models.prompts import tokenize_rows

Prufed = Callable[..., tuple[int, str, str]]

ROWS = [
    '{"instruction": "Add.", "response": "2", "category": "sums"}',
    "",
    '{"instruction": "Add.", "response": "2", "category": "arithmetic", "id": 1}',
    '{"instruction": "Add."}',
    '{"instruction": "Sing.", "response": "", "id": 2}',
    '{"instruction": "Add.", "response',
    '{"instruction": "Add.", "context": "1 1", "response": "2", "category": "sums"}',
]


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(ROWS))
    return path


def test_everything_is_counted(data_file: Path) -> None:
    found = inspect(data_file)
    assert found.rows == 6
    assert found.fields == {"instruction": 5, "response": 4, "category": 3, "id": 2, "context": 1}
    assert found.categories == {"sums": 2, "arithmetic": 1, "none": 1}
    assert found.duplicates == ((3, 1),)
    assert found.empty == (5,)
    assert [problem.number for problem in found.problems] == [4, 6]
    assert found.problems[0] == Finding(4, "a row without the needed fields; it has 'instruction'")


def test_token_lengths_are_those_that_training_sees() -> None:
    path = embedded_data()
    found = inspect(path, cutoff=60).tokens
    assert found is not None
    tokenizer = open_tokenizer(embedded_model(), "embedded")
    lengths = sorted(map(len, tokenize_rows(read_rows(path), tokenizer, cutoff=10**6).input_ids))
    assert (found.smallest, found.largest) == (lengths[0], lengths[-1])
    assert found.total == sum(lengths)
    assert found.mean == pytest.approx(statistics.fmean(lengths))
    assert found.median in lengths
    assert sum(length <= found.p90 for length in lengths) >= 0.9 * len(lengths)
    assert found.over == sum(length > 60 for length in lengths)
    assert found.template == "alpaca"


def test_plain_text_is_worded_plainly(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("The first.\n\nThe second one.\n")
    found = inspect(path)
    assert found.tokens is not None
    assert found.tokens.template == "plain"
    assert found.fields == {"text": 2}
    with pytest.raises(PrufedError, match="row 1 is plain text"):
        inspect(path, template="alpaca")


def test_a_file_without_a_usable_row_is_described_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("7\n[1]\n")
    found = inspect(path)
    assert (found.rows, found.tokens, len(found.problems)) == (2, None, 2)


def test_the_command_says_it_and_fails_where_rows_are_unusable(
    prufed: Prufed, data_file: Path, prufed_home: Path
) -> None:
    code, stdout, _ = prufed("data", "inspect", data_file)
    assert code == 1
    assert "rows        6, 4 usable" in stdout
    assert "            3 repeats 1" in stdout
    assert "            6: not valid JSON: unterminated string" in stdout
    assert not (prufed_home / "registry" / "artifacts").exists(), "looking writes nothing"
    code, stdout, _ = prufed("data", "inspect", data_file, "--json")
    document = json.loads(stdout)
    assert (code, document["schema"], document["rows"]) == (1, 1, 6)
    assert document["problems"][0]["number"] == 4
    code, _, _ = prufed("data", "inspect", embedded_data())
    assert code == 0


def test_the_command_refuses_what_it_cannot_look_into(prufed: Prufed, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    good = tmp_path / "good.jsonl"
    good.write_text(ROWS[0])
    for arguments, code, words in (
        ((tmp_path / "none.jsonl",), 3, "no data file"),
        ((empty,), 1, "is empty"),
        ((good, "--base", "nothing-here"), 3, "nothing-here"),
        ((good, "--base", tmp_path / "no"), 3, "no"),
        ((good, "--base", tmp_path), 1, "no tokenizer that opens"),
        ((good, "--template", "poem"), 2, "unknown template"),
    ):
        got, stdout, stderr = prufed("data", "inspect", *arguments)
        assert (got, stdout) == (code, ""), stderr
        assert words in stderr
        assert "Traceback" not in stderr
