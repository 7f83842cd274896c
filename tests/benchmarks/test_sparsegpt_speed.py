"""SparseGPT on one 4096x4096 matrix with two threads is no slower than the plain algorithm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("time_sparsegpt.py")


@pytest.mark.slow
def test_sparsegpt_is_no_slower_than_the_plain_algorithm() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "4096", "2", "0.5"],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "2"},
    )
    found = json.loads(done.stdout)
    print(found)
    assert found["agreement"] >= 0.9999
    assert found["wall"] <= found["plain_wall"]
