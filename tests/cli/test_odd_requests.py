"""Requests that are odd rather than wrong: names, streams, numbers and targets at the edge."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prufed_cli.pruning.request import percent
from prufed_registry import Registry

Call = Callable[..., Any]
HALF = ("--method", "magnitude", "--sparsity", "0.5")


@pytest.fixture
def registry(prufed_home: Path, base_directory: Path) -> Registry:
    registry = Registry(prufed_home / "registry")
    registry.import_directory(base_directory, name="tiny")
    return registry


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux")
def test_file_names_that_are_not_utf8(
    prufed: Call, registry: Registry, calibration_file: Path, tmp_path: Path
) -> None:
    odd = tmp_path / os.fsdecode(b"c\xff.txt")
    odd.write_bytes(calibration_file.read_bytes())
    files = ("--calibration", odd, "--perplexity", odd, "--samples", "2", "--length", "8")
    made = prufed("prune", "--base", "tiny", "--method", "wanda", "--sparsity", "0.5", *files)
    assert made.code == 0, made.err
    assert registry.verify() == []
    shown = json.loads(prufed("show", made.out.strip(), "--json").out)
    assert shown["manifest"]["recipe"]["perplexity"]["file"] == "c\ufffd.txt"


@pytest.mark.parametrize(
    ("stderr", "unbuffered"),
    [("2>&-", ""), ("2>/dev/full", ""), ("2>/dev/full", "1"), ("2> >(head -1 >/dev/null)", "")],
)
def test_nobody_who_reads_of_it_does_not_stop_a_prune(
    registry: Registry, stderr: str, unbuffered: str
) -> None:
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    for arguments, code, out in (
        (f"prune --base tiny {' '.join(HALF)}", 0, "tiny-magnitude-50@v1\n"),
        ("show nothing", 3, ""),
    ):
        command = f"{sys.executable} -m prufed_cli {arguments} {stderr}"
        ended = subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, env=environment
        )
        assert (ended.returncode, ended.stdout) == (code, out)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "top"], "nothing says how many layers"),
        (["--method", "top", "--layers", "3"], "leaves fewer than 2"),
        (["--method", "odd-alternate", "--set", "drop=3"], "leaves fewer than 2"),
        (["--method", "explicit", "--set", "layers=[0,9]"], "layer 9 does not exist"),
        ([*HALF, "--set", "exclude=*"], "leave no matrix to prune"),
        ([*HALF, "--set", "include=nothing"], "matches no matrix"),
        (["--method", "wanda", "--pattern", "171:172"], "would remove all 32 columns"),
        (["--method", "magnitude", "--pattern", f"1:{10**20}"], "is not n:m"),
        (["--method", "magnitude", "--pattern", "2:4", "--set", "group=row"], "group row is for"),
        ([*HALF, "--perplexity", ""], "no text file"),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_the_plan_is_refused_as_the_prune_is(
    prufed: Call, registry: Registry, arguments: list[str], words: str, dry: bool
) -> None:
    called = prufed("prune", "--base", "tiny", *arguments, *(["--dry-run"] if dry else []))
    assert called.code in {2, 3}
    called.refused(called.code, words)
    assert "time about" not in called.err


@pytest.mark.parametrize("content", ["", "x = 1"])
def test_directories_that_are_no_data_set(
    prufed: Call, registry: Registry, tmp_path: Path, content: str
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / ("data.py" if content else "train.jsonl")).write_text(content)
    wanted = ("--base", "tiny", "--method", "wanda", "--sparsity", "0.5", "--calibration", data)
    prufed("prune", *wanted).refused(1, "is no data set")


@pytest.mark.parametrize(
    "change",
    [
        {"attn_implementation": "flash_attention_2"},
        {"num_attention_heads": 0},
        {"hidden_size": 33},
        {"rms_norm_eps": None},
        {"hidden_act": "nope"},
    ],
)
def test_a_configuration_at_fault_is_what_is_spoken_of(
    prufed: Call,
    prufed_home: Path,
    base_directory: Path,
    calibration_file: Path,
    tmp_path: Path,
    change: dict[str, Any],
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for file in base_directory.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | change))
    wanted = ("--method", "wanda", "--sparsity", "0.5", "--calibration", calibration_file)
    called = prufed("prune", "--base", base, *wanted, "--samples", "2", "--length", "8")
    called.refused(1, "cannot be opened as a causal language model")


def test_a_short_text_says_how_many_sequences_it_gives(
    prufed: Call, registry: Registry, calibration_file: Path
) -> None:
    wanted = ("--base", "tiny", "--method", "wanda", "--sparsity", "0.5", "--length", "64")
    called = prufed("prune", *wanted, "--calibration", calibration_file, "--samples", "10000")
    assert "of 10000 sequences" in called.err


@pytest.mark.parametrize(
    ("sparsity", "name"),
    [
        (0, "0"),
        (0.5, "50"),
        (1, "100"),
        (0.125, "12_5"),
        (0.29, "29"),
        (0.2500001, "25_00001"),
        (1e-8, "0_000001"),
        (0.99999999, "99_999999"),
    ],
)
def test_different_sparsities_have_different_names(sparsity: float, name: str) -> None:
    assert percent(sparsity) == name


def test_minus_nothing_is_nothing(prufed: Call, registry: Registry) -> None:
    first = prufed("prune", "--base", "tiny", "--method", "magnitude", "--sparsity=0")
    second = prufed("prune", "--base", "tiny", "--method", "magnitude", "--sparsity=-0")
    assert first.out == second.out == "tiny-magnitude-0@v1\n"


def test_what_an_export_cannot_do(prufed: Call, registry: Registry, tmp_path: Path) -> None:
    prufed("export", "tiny", tmp_path / "out", "--base", "other").refused(2, "is no adapter")
    inside = registry.root / "artifacts" / "out"
    for how in ([], ["--packed"]):
        prufed("export", "tiny", inside, *how).refused(2, "lies in the registry")
    assert registry.verify() == []


def test_a_version_that_is_named_twice_is_removed_once(prufed: Call, registry: Registry) -> None:
    assert prufed("rm", "tiny@v1", "tiny").out == "removed tiny@v1\n"


@pytest.mark.parametrize("nested", [(), ("--nested",)])
def test_several_sub_models_are_one_document(
    prufed: Call, registry: Registry, nested: tuple[str, ...]
) -> None:
    wanted = ("prune", "--base", "tiny", "--method", "magnitude", "--json", "--sparsity")
    several = json.loads(prufed(*wanted, "0.25,0.5", *nested).out)
    assert several.keys() == {"schema", "results"}
    assert [one["reference"][:17] for one in several["results"]] == [
        "tiny-magnitude-25",
        "tiny-magnitude-50",
    ]
    one = json.loads(prufed(*wanted, "0.5").out)
    assert one.keys() == {"schema", *several["results"][1]}
