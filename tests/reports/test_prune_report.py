"""``prufed show REF --report``: what the table, the JSON and the figure say of a stored report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from prufed_cli.home import open_registry
from prufed_cli.main import main
from prufed_cli.models.base import find_base
from prufed_cli.prune_report import block_rows, matrix_rows, parse_report
from prufed_registry import Artifact

Called = tuple[int, str, str]
Show = Callable[..., Called]

MATRICES = [
    {"name": "model.layers.0.up.weight", "sparsity": 0.5, "error": 0.25, "dead_channels": 1.0},
    {"name": "model.layers.0.down.weight", "sparsity": 0.25, "error": 0.75, "dead_channels": 2.0},
    {"name": "model.layers.1.up.weight", "sparsity": 0.0, "unrouted": 1.0},
]
SCORES = [0.8, 0.1, 0.05, 0.4]
SLICED = {"result": "sliced", "kept_layers": [0, 3], "layers_before": 4, "scores": SCORES}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUFED_HOME", str(tmp_path / "home"))


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str]) -> Show:
    def run(*arguments: str) -> Called:
        code = main(["show", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def publish(report: Any, **manifest: Any) -> Artifact:
    """Publish a sub-model with this report; a string is written as it is."""
    with open_registry().stage() as staging:
        text = report if isinstance(report, str) else json.dumps(report)
        (staging.path / "prufed-report.json").write_text(text)
        (staging.path / "config.json").write_text("{}")
        tensors = {
            "model.layers.0.up.weight": torch.zeros(8, 4),
            "model.layers.0.down.weight": torch.zeros(4, 24),
        }
        save_file(tensors, staging.path / "model.safetensors")
        empty: dict[str, Any] = {"recipe": {"command": "prune"}, "details": {}, "metrics": {}}
        return staging.publish(name="made", kind="pruned", parents=[], **(empty | manifest))


def cells(out: str) -> list[list[str]]:
    return [line.split() for line in out.splitlines() if line.strip()]


# --- masked --------------------------------------------------------------------------------------


def test_a_row_per_matrix(show: Show) -> None:
    seconds = {"matrix_seconds": {"model.layers.0.up.weight": 1.5}}
    made = publish({"result": "masked", "matrices": MATRICES}, metrics=seconds)
    code, out, _ = show(made.ref, "--report")
    assert code == 0
    rows = cells(out)
    assert rows[0] == ["matrix", "shape", "sparsity", "error", "dead", "channels", "seconds"]
    assert rows[2] == ["model.layers.0.up.weight", "8x4", "50.0000%", "0.25", "1", "1.50"]
    assert rows[3] == ["model.layers.0.down.weight", "4x24", "25.0000%", "0.75", "2"]
    assert rows[4][:2] == ["model.layers.1.up.weight", "0.0000%"]
    assert "kept: no calibration token was routed to it" in out
    assert "damping" not in out


def test_what_else_a_method_reports(show: Show) -> None:
    entries = [
        {"name": "h.0.a.weight", "sparsity": 0.5, "error": 0.125},
        {"name": "h.0.b.weight", "sparsity": 0.5, "damping": 0.1, "damping_retries": 1.0},
        {"name": "h.0.c.weight", "sparsity": 0.5, "partial_group": 4.0},
        {"name": "h.0.d.weight", "sparsity": 0.0, "excluded": 1.0},
    ]
    made = publish({"result": "masked", "matrices": entries})
    _, out, _ = show(made.ref, "--report")
    rows = cells(out)
    assert rows[0] == ["matrix", "sparsity", "error", "damping"]
    assert rows[2] == ["h.0.a.weight", "50.0000%", "0.125"]
    assert rows[3] == [
        "h.0.b.weight",
        "50.0000%",
        "0.1",
        "damping",
        "raised",
        "to",
        "0.1",
    ]
    assert rows[4] == ["h.0.c.weight", "50.0000%", "the", "last", "group", "has", "4", "columns"]
    assert rows[5] == ["h.0.d.weight", "0.0000%", "kept:", "excluded"]
    (block,) = block_rows(
        matrix_rows(parse_report({"result": "masked", "matrices": entries}, "x"), {}, {})
    )
    assert block.note == "1 kept as they are"


def test_it_does_not_promise_speed(show: Show) -> None:
    made = publish({"result": "masked", "matrices": MATRICES})
    _, out, _ = show(made.ref, "--report")
    assert "zeros are stored like any other value" in out
    assert "kernels are no faster" in out


def many(blocks: int, matrices: int) -> dict[str, Any]:
    return {
        "result": "masked",
        "matrices": [
            {
                "name": f"model.layers.{block}.m{index}.weight",
                "sparsity": 0.1 * block,
                "error": float(index),
                "dead_channels": 1.0,
                "damping": 0.01 * 10**block,
            }
            for block in range(blocks)
            for index in range(matrices)
        ],
    }


def test_many_matrices_are_shown_block_by_block(show: Show) -> None:
    seconds = {f"model.layers.1.m{index}.weight": 0.5 for index in range(21)}
    made = publish(many(2, 21), metrics={"matrix_seconds": seconds})
    _, out, _ = show(made.ref, "--report")
    rows = cells(out)
    assert rows[2] == ["block", "0", "(21", "matrices)", "0.0000%", "10", "21", "0.01"]
    assert rows[3] == ["block", "1", "(21", "matrices)", "10.0000%", "10", "21", "0.1", "10.50"]
    assert "model.layers" not in out
    assert "--all lists the 42 matrices" in out


def test_all_shows_every_matrix_and_the_subtotals(show: Show) -> None:
    made = publish(many(2, 21))
    _, out, _ = show(made.ref, "--all")
    names = [row[0] for row in cells(out)]
    assert sum(name.startswith("model.layers.") for name in names) == 42
    assert [index for index, name in enumerate(names) if name == "block"] == [23, 45]
    assert "--all" not in out


def test_forty_matrices_need_no_folding(show: Show) -> None:
    made = publish(many(2, 20))
    _, out, _ = show(made.ref, "--report")
    assert out.count("model.layers.") == 40
    assert "block" not in out


def test_a_block_counts_entries_where_shapes_are_known(show: Show) -> None:
    report = many(2, 20)
    report["matrices"] += MATRICES[:2]
    made = publish(report)
    _, out, _ = show(made.ref, "--report")
    block = next(row for row in cells(out) if row[:2] == ["block", "0"])
    assert block[2:4] == ["(22", "matrices)"]
    parsed = parse_report({"result": "masked", "matrices": MATRICES[:2]}, "x")
    shapes = {"model.layers.0.up.weight": (8, 4), "model.layers.0.down.weight": (4, 24)}
    (row,) = block_rows(matrix_rows(parsed, shapes, {}))
    assert row.sparsity == pytest.approx((0.5 * 32 + 0.25 * 96) / 128)


@pytest.mark.parametrize(
    ("pruned", "said"),
    [(25.5, "20.0000 before, 25.5000 after"), (None, "before, not finite after")],
)
def test_perplexity_before_and_after(show: Show, pruned: float | None, said: str) -> None:
    entry = {"file": "held-out.txt", "tokens": 100, "base": 20.0, "pruned": pruned}
    made = publish({"result": "masked", "matrices": MATRICES, "perplexity": entry})
    _, out, _ = show(made.ref, "--report")
    assert "perplexity on held-out.txt (100 tokens): " in out
    assert said in out


# --- sliced --------------------------------------------------------------------------------------


def test_a_row_and_a_bar_per_layer(show: Show) -> None:
    made = publish(SLICED, recipe={"plugin": "contribution"})
    code, out, _ = show(made.ref, "--report")
    assert code == 0
    assert "1 - cosine" in out
    rows = cells(out)[2:]
    assert [row[:3] for row in rows[:4]] == [
        ["0", "kept", "0.8"],
        ["1", "dropped", "0.1"],
        ["2", "dropped", "0.05"],
        ["3", "kept", "0.4"],
    ]
    assert [len(row[3]) if len(row) > 3 else 0 for row in rows[:4]] == [24, 3, 2, 12]
    assert "kept 2 of 4 layers of the base" in out


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_bars_are_drawn_in_the_encoding_of_the_terminal(encoding: str) -> None:
    made = publish(SLICED)
    done = subprocess.run(
        [sys.executable, "-m", "prufed_cli", "show", made.ref, "--report"],
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"},
    )
    bar = "#" if encoding == "ascii" else "█"
    assert bar * 24 in done.stdout.decode(encoding)


def test_layers_dropped_by_position_have_no_scores(show: Show) -> None:
    made = publish({"result": "sliced", "kept_layers": [0, 1], "layers_before": 4})
    _, out, _ = show(made.ref, "--report")
    assert [row[1] for row in cells(out)[2:6]] == ["kept", "kept", "dropped", "dropped"]
    assert "score" not in out


def test_a_run_of_layers_has_a_score_per_start(show: Show) -> None:
    report = {**SLICED, "scores": [0.3, 0.1, 0.2]}
    made = publish(report, recipe={"plugin": "angular"})
    _, out, _ = show(made.ref, "--report")
    assert [row[1:3] for row in cells(out)[2:6]] == [
        ["kept", "0.3"],
        ["dropped", "0.1"],
        ["dropped", "0.2"],
        ["kept"],
    ]


def test_scores_may_be_negative_or_all_zero(show: Show) -> None:
    made = publish({"result": "sliced", "kept_layers": [0], "scores": [-1.0, 1.0, 0.0]})
    _, out, _ = show(made.ref, "--report")
    assert [len(row[3]) if len(row) > 3 else 0 for row in cells(out)[2:5]] == [0, 24, 12]
    made = publish({"result": "sliced", "kept_layers": [0], "scores": [0.0, 0.0]})
    code, out, _ = show(made.ref, "--report")
    assert code == 0
    assert "█" not in out


# --- JSON ----------------------------------------------------------------------------------------


def test_json_is_the_stored_report(show: Show) -> None:
    seconds = {"model.layers.0.up.weight": 1.5}
    report = {"result": "masked", "matrices": MATRICES, "of_a_method": 1}
    made = publish(report, metrics={"matrix_seconds": seconds})
    _, out, _ = show(made.ref, "--report", "--json")
    assert json.loads(out) == {
        "schema": 1,
        "reference": made.ref,
        "report": report,
        "matrix_seconds": seconds,
    }


# --- figures -------------------------------------------------------------------------------------


def test_a_figure_of_layer_scores(show: Show, tmp_path: Path) -> None:
    made = publish(SLICED, recipe={"plugin": "contribution"})
    code, out, err = show(made.ref, "--plot", str(tmp_path / "one.svg"))
    assert (code, out) == (0, "")
    assert "one.svg" in err
    figure = (tmp_path / "one.svg").read_text()
    for text in ("kept", "dropped", "1 - cosine", "layer of the base", made.ref):
        assert text in figure, text
    show(made.ref, "--plot", str(tmp_path / "two.svg"))
    assert (tmp_path / "two.svg").read_text() == figure


def test_a_figure_of_matrices(show: Show, tmp_path: Path) -> None:
    experts = [
        {"name": f"model.layers.{block}.mlp.experts.{expert}.w1.weight", "sparsity": 0.5}
        for block in range(2)
        for expert in range(3)
    ]
    made = publish({"result": "masked", "matrices": MATRICES + experts})
    code, out, _ = show(made.ref, "--report", "--plot", str(tmp_path / "figure.svg"))
    assert code == 0
    assert "model.layers.0.up.weight" in out
    figure = (tmp_path / "figure.svg").read_text()
    for text in ("relative squared error", "sparsity", "up", "down", "mlp.experts.*.w1"):
        assert f">{text}<" in figure, text
    assert "experts.0" not in figure


def test_a_figure_as_png(show: Show, tmp_path: Path) -> None:
    made = publish({"result": "masked", "matrices": [{"name": "h.0.a.weight", "sparsity": 0.5}]})
    assert show(made.ref, "--plot", str(tmp_path / "figure.PNG"))[0] == 0
    assert (tmp_path / "figure.PNG").read_bytes().startswith(b"\x89PNG")


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("report", "code", "message"),
    [
        ({}, 3, "has no pruning report"),
        ({"result": "frozen"}, 5, "cannot be read: result"),
        ({"result": "masked", "matrices": [{"name": "x"}]}, 5, "matrices.0.sparsity"),
        ({"result": "sliced", "kept_layers": [3, 1]}, 5, "not ascending layers"),
        ({"result": "sliced", "kept_layers": ["a"]}, 5, "kept_layers.0"),
        ("[1, 2]", 5, "is no JSON object"),
        ("{", 5, "is no JSON object"),
    ],
)
def test_a_report_that_does_not_hold_together(
    show: Show, report: Any, code: int, message: str
) -> None:
    made = publish(report)
    found, out, err = show(made.ref, "--report")
    assert (found, out) == (code, "")
    assert message in err
    assert "hint: " in err


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("figure.pdf", "neither .svg nor .png"),
        ("figure", "neither .svg nor .png"),
        ("no/figure.svg", "no directory"),
    ],
)
def test_a_file_that_no_figure_goes_to(show: Show, tmp_path: Path, file: str, message: str) -> None:
    made = publish(SLICED)
    code, out, err = show(made.ref, "--report", "--plot", str(tmp_path / file))
    assert (code, out) == (2, "")
    assert message in err


def test_layers_without_scores_cannot_be_drawn(show: Show, tmp_path: Path) -> None:
    made = publish({"result": "sliced", "kept_layers": [0, 1], "layers_before": 4})
    code, _, err = show(made.ref, "--plot", str(tmp_path / "figure.svg"))
    assert code == 2
    assert "no scores to plot" in err
    assert not (tmp_path / "figure.svg").exists()


def test_a_base_has_no_report(show: Show) -> None:
    base = find_base(None, open_registry())
    code, out, err = show(base.ref, "--report")
    assert (code, out) == (3, "")
    assert "prufed-tiny@v1 has no pruning report" in err


# --- made by prune -------------------------------------------------------------------------------


def test_what_prune_stores_can_be_shown(show: Show, capsys: pytest.CaptureFixture[str]) -> None:
    for method, flags, row in (
        ("magnitude", ["--sparsity", "0.5"], "block 7 (7 matrices)"),
        ("contribution", ["--layers", "2", "--samples", "2", "--length", "32"], "dropped"),
        ("top", ["--layers", "2"], "dropped"),
    ):
        assert main(["prune", "--method", method, *flags, "--name", f"by-{method}"]) == 0
        capsys.readouterr()
        code, out, _ = show(f"by-{method}", "--report")
        assert code == 0
        assert row in out
