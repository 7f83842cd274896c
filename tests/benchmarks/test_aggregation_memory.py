"""Merging 4 and 64 adapters of 64 MB: peak memory, and time against reading the files once.

Times are CPU seconds of one thread; "reading" reads the same files, masks included, once into one
reused buffer. Needs 6 GB of disk.
"""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

MERGE = Path(__file__).with_name("merge_files.py")
ADAPTER = 64 * 2**20


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("density", [1.0, 0.5], ids=["dense", "masked"])
def test_merging_4_and_64_adapters_of_64_mb(tmp_path: Path, density: float) -> None:
    with tempfile.TemporaryDirectory(dir=tmp_path) as directory:  # pytest would keep the files
        runpy.run_path(str(MERGE))["write"](Path(directory), 64, 32, 4096, density)
        command = [sys.executable, str(MERGE), "merge", directory, "4", "64"]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    few, many = (json.loads(line) for line in output.splitlines())
    for figures in (few, many):
        print(
            f"\n{figures['clients']} clients, density {density}:"
            f" peak +{(figures['peak'] - few['before']) / 2**20:.0f} MiB,"
            f" merging {figures['merging']:.2f} s, reading {figures['reading']:.2f} s,"
            f" ratio {figures['merging'] / figures['reading']:.2f}",
            end="",
        )
    print()
    assert few["peak"] - few["before"] <= 2 * ADAPTER
    assert many["peak"] - few["peak"] <= ADAPTER / 4
