"""Text and rows that cannot be used: which file, which line, and what a row should have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Call = Callable[..., Any]

GOOD = '{"instruction": "the cat", "response": "sees a dog"}\n'


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        pytest.param(b"", 1, "c.jsonl is empty", id="empty"),
        pytest.param(b'{"text": "the cat"}\n{"text": "th', 2, "c.jsonl line 2", id="truncated"),
        pytest.param(b'{"text": "a"}\n\n{"txet": "b"}\n', 2, "line 3 has no text", id="no-fields"),
        pytest.param(b"\xff\xfe\x00", 1, "not UTF-8", id="not-text"),
        pytest.param(b'{"text": "the cat"}\n', 1, "fewer than one calibration", id="too-short"),
    ],
)
def test_calibration_text(
    prufed: Call,
    prune: Call,
    nothing_made: Call,
    base_directory: Path,
    tmp_path: Path,
    content: bytes,
    code: int,
    words: str,
) -> None:
    file = tmp_path / "c.jsonl"
    file.write_bytes(content)
    prufed("import", base_directory)
    arguments = ("--method", "wanda", "--sparsity", "0.5", "--length", "16")
    prune("--base", "tiny", *arguments, "--calibration", file).refused(code, words)
    nothing_made("tiny@v1")


def test_calibration_text_that_is_not_there(
    prufed: Call, prune: Call, nothing_made: Call, base_directory: Path
) -> None:
    prufed("import", base_directory)
    wanted = ("--base", "tiny", "--method", "wanda", "--sparsity", "0.5")
    prune(*wanted, "--calibration", "/no/such.txt").refused(3, "/no/such.txt does not exist")
    nothing_made("tiny@v1")


def test_calibration_longer_than_the_model_takes(
    prufed: Call, prune: Call, nothing_made: Call, base_directory: Path, calibration_file: Path
) -> None:
    prufed("import", base_directory)
    wanted = ("--base", "tiny", "--method", "wanda", "--sparsity", "0.5")
    text = ("--calibration", calibration_file, "--samples", "2")
    prune(*wanted, *text, "--length", "65").refused(2, "65 is more than the 64 positions")
    nothing_made("tiny@v1")
    assert prune(*wanted, *text, "--length", "64").code == 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(b"", "is empty", id="empty"),
        pytest.param(b"\n \n", "is empty", id="blank"),
        pytest.param(GOOD.encode() + b'{"instruction": "a', "rows.jsonl:2: not", id="truncated"),
        pytest.param(
            GOOD.encode() + b'{"instruction": "a"}\n',
            "rows.jsonl:2: a row without the needed fields; it has 'instruction'",
            id="no-response",
        ),
        pytest.param(b"[1, 2]\n", "rows.jsonl:1: expected an object", id="a-list"),
        pytest.param(b"\xff\xfe", "rows.jsonl:1: not UTF-8", id="not-text"),
    ],
)
@pytest.mark.parametrize("whose", ["shared", "own"])
def test_rows(
    prufed: Call,
    nothing_made: Call,
    configuration: dict[str, Any],
    clients_file: Callable[[dict[str, Any]], Path],
    tmp_path: Path,
    content: bytes,
    words: str,
    whose: str,
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    if whose == "shared":
        configuration["data"]["path"] = str(file)
    else:
        configuration["clients"][1]["data"] = str(file)
    prufed("federate", "--clients", clients_file(configuration)).refused(1, words)
    nothing_made()


def test_fewer_rows_than_clients(
    prufed: Call,
    nothing_made: Call,
    configuration: dict[str, Any],
    clients_file: Callable[[dict[str, Any]], Path],
    tmp_path: Path,
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(GOOD)
    configuration["data"]["path"] = str(file)
    prufed("federate", "--clients", clients_file(configuration)).refused(2, "2 clients")
    nothing_made()


@pytest.mark.parametrize("key", ["data", "evaluate", "pruner"])
def test_files_that_are_not_there(
    prufed: Call,
    nothing_made: Call,
    configuration: dict[str, Any],
    clients_file: Callable[[dict[str, Any]], Path],
    key: str,
) -> None:
    missing = {
        "data": {"path": "none.jsonl"},
        "evaluate": {"perplexity": "none.txt"},
        "pruner": {"name": "wanda", "calibration": "none.txt"},
    }
    path = clients_file({**configuration, key: missing[key]})
    prufed("federate", "--clients", path).refused(2, f"clients.yaml:{line_of(path)}:", "no file")
    nothing_made()


def line_of(path: Path) -> int:
    lines = path.read_text().splitlines()
    return next(number for number, line in enumerate(lines, start=1) if "none." in line)


def test_a_configuration_that_is_not_there(prufed: Call, nothing_made: Call) -> None:
    prufed("federate", "--clients", "/no/clients.yaml").refused(3, "'/no/clients.yaml'")
    nothing_made()


def test_text_to_score_that_cannot_be_used(
    prufed: Call, base_directory: Path, tmp_path: Path
) -> None:
    prufed("import", base_directory)
    prufed("eval", "tiny", "--perplexity", tmp_path / "none.txt").refused(3, "none.txt")
    (tmp_path / "empty.txt").write_text("")
    prufed("eval", "tiny", "--perplexity", tmp_path / "empty.txt").refused(2, "empty.txt is empty")
    prufed("eval", "tiny").refused(2, "nothing to score tiny@v1 on")
