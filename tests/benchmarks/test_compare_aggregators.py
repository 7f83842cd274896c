"""The comparison of aggregators, at its smallest: what is finished is not run again."""

from __future__ import annotations

import math
import runpy
from pathlib import Path
from typing import Any

import pytest

from prufed_cli.assets import embedded_calibration, embedded_data, embedded_model

COMPARE = Path(__file__).with_name("compare_aggregators.py")


@pytest.mark.slow
def test_finished_methods_are_not_run_again(tmp_path: Path) -> None:
    text = tmp_path / "held-out.txt"
    text.write_text(embedded_calibration().read_text(encoding="utf-8")[:3000], encoding="utf-8")
    script: dict[str, Any] = runpy.run_path(str(COMPARE))
    request = script["parse"](
        [
            *("--base", str(embedded_model()), "--data", str(embedded_data())),
            *("--text", str(text), "--out", str(tmp_path / "out")),
            *("--rounds", "1", "--max-steps", "1", "--methods", "fedavg,flora"),
        ]
    )
    first = script["compare"](request)
    for found in (first["before"], *first["methods"].values()):
        assert all(
            math.isfinite(value) for value in (found["perplexity"], *found["tiers"].values())
        )
    assert script["compare"](request) == first
    runs = script["prufed"](request, "runs", "list")["runs"]
    assert [run["run"] for run in runs] == ["fedavg-1", "flora-1"]
    lines = script["markdown"](first).splitlines()
    assert [line.split()[1] for line in lines[2:]] == ["before", "fedavg", "flora"]
