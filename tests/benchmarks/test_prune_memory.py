"""A model of 110 M parameters is pruned in the memory of two blocks, activations and Hessians."""

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
    allowed = 2 * figures["block"] + sum(figures[part] for part in parts)
    used = figures["peak"] - figures["before"]
    print(f"\n{method}: {used / 1e6:.0f} MB of {allowed / 1e6:.0f} MB allowed")
    assert used <= allowed
