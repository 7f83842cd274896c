"""A model of 270 M parameters is pruned in little more memory than one of its blocks takes.

Beside the block there are the activations, the Hessians, and copies of the matrix at hand or a
batch on its way through the block; in these shapes a matrix is a fifth of a block.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("prune_memory.py")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bases") / "llama"
    run("make", directory)
    return directory


def run(*arguments: object) -> str:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak as Linux counts it")
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_peak_memory(llama: Path, method: str) -> None:
    figures: dict[str, Any] = json.loads(run("prune", llama, method))
    parts = {
        "magnitude": (),
        "wanda": ("activations",),
        "sparsegpt": ("activations", "hessians"),
    }[method]
    rest = sum(figures[part] for part in parts)
    used = figures["peak"] - figures["before"]
    blocks = (used - rest) / figures["block"]
    print(f"\n{method}: {used / 1e6:.0f} MB, {blocks:.2f} blocks beside {' and '.join(parts)}")
    assert blocks <= 2.0
