"""SparseGPT against the published algorithm written plainly: CPU time, wall time and masks.

Ratios of one run on one machine, on a matrix of 4096x4096. ``make bench FULL=1`` takes the other
matrices of a 7B model too, which the plain algorithm needs minutes for.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("time_sparsegpt.py")
SHAPES = [(4096, 4096)]
if os.environ.get("BENCH_FULL"):
    SHAPES += [(11008, 4096), (4096, 11008)]


def compare(rows: int, columns: int, threads: int, target: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(rows), str(columns), str(threads), target],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
    )
    found: dict[str, float] = json.loads(done.stdout)
    print(
        f"\nsparsegpt {rows}x{columns} {target}, {threads} threads: "
        f"CPU 1/{found['plain_cpu'] / found['cpu']:.1f}, "
        f"wall 1/{found['plain_wall'] / found['wall']:.1f} "
        f"(budget {'CPU 1/2.5' if threads == 1 else 'wall 1/5'}), "
        f"agreement {found['agreement']:.6f}"
    )
    return found


@pytest.mark.slow
@pytest.mark.parametrize("target", ["0.5", "2:4"])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_one_thread_needs_a_fraction_of_the_cpu_time(rows: int, columns: int, target: str) -> None:
    assert compare(rows, columns, 1, target)["agreement"] >= 0.9999


@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
@pytest.mark.parametrize("target", ["0.5", "2:4"])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_two_threads_need_a_fraction_of_the_time(rows: int, columns: int, target: str) -> None:
    assert compare(rows, columns, 2, target)["agreement"] >= 0.9999
