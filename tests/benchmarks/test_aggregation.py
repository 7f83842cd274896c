"""Merging 16 and 128 adapters of 64 MB: peak memory, and time against reading the files once.

Times are CPU seconds of one thread, the best of three; "reading" reads the same files, masks
included, once into one reused buffer; "again" is a merge whose masks are those of the round before.
Beside it two plain ways to the same mean. Memory is
asserted; times are printed with their budgets. Needs 1.4 GB of disk: beyond 16 clients the files
are hard links.
"""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

MERGE = Path(__file__).with_name("merge_files.py")
ADAPTER = 64 * 2**20
FEW, MANY = 16, 128
BUDGETS = {1.0: {"merging": 2.5}, 0.5: {"merging": 5.0, "again": 2.5}}


def run(*arguments: object) -> list[dict[str, Any]]:
    command = [sys.executable, str(MERGE), *map(str, arguments)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [json.loads(line) for line in output.splitlines()]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("density", [1.0, 0.5], ids=["dense", "masked"])
def test_merging_16_and_128_adapters_of_64_mb(
    tmp_path: Path, density: float, capsys: pytest.CaptureFixture[str]
) -> None:
    with tempfile.TemporaryDirectory(dir=tmp_path) as directory:  # pytest would keep the files
        runpy.run_path(str(MERGE))["write"](Path(directory), MANY, 32, 4096, density, FEW)
        few, many = run("merge", directory, FEW, MANY)
        [plain] = run("compare", directory, FEW)
    with capsys.disabled():
        for figures in (few, many):
            print(
                f"\n{figures['clients']} clients, density {density}:"
                f" peak +{(figures['peak'] - few['before']) / 2**20:.0f} MiB,"
                f" reading {figures['reading']:.2f} s",
                end="",
            )
            for what, budget in BUDGETS[density].items():
                print(
                    f", {what} {figures[what]:.2f} s,"
                    f" ratio {figures[what] / figures['reading']:.2f}"
                    f" ({figures[f'{what}_wall'] / figures['reading_wall']:.2f} on the clock),"
                    f" budget {budget}",
                    end="",
                )
        print(
            f"\n{FEW} clients, density {density}: stacked"
            f" {plain['stacked'] / plain['merging']:.2f} x as long, a loop over state dicts"
            f" {plain['state_dicts'] / plain['merging']:.2f} x;"
            f" diagnostics {plain['diagnostics'] / plain['merging']:.2f} x"
        )
    assert few["peak"] - few["before"] <= 2 * ADAPTER
    assert many["peak"] - few["peak"] <= ADAPTER / 4
