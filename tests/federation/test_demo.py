"""The demo, on a few documents per task: every stage is measured, everything left in place."""

from __future__ import annotations

from pathlib import Path

import pytest

from prufed_cli.demo import STAGES, TIERS, demo_config, run_demo
from prufed_cli.federation.journal import load
from prufed_registry import Registry


@pytest.mark.slow
def test_the_demo_fills_its_table_and_leaves_its_artifacts(prufed_home: Path) -> None:
    config = demo_config("cpu", limit=4)
    few_steps = config.tuner.settings | {"max_steps": 3}
    tuner = config.tuner.model_copy(update={"settings": few_steps})
    result = run_demo(config.model_copy(update={"tuner": tuner}))
    assert result.cells.keys() == {(stage, tier) for stage in STAGES for tier in TIERS}
    assert all(0 <= cell.mean <= 1 and cell.stderr > 0 for cell in result.cells.values())
    assert 0 <= result.overhead < 1
    registry = Registry(prufed_home / "registry")
    assert registry.resolve(result.global_adapter).kind == "global-adapter"
    assert registry.resolve(result.sparse_base).manifest.details["sparsity"] == pytest.approx(
        0.75, abs=0.01
    )
    run = load(prufed_home / "runs", result.run)
    assert run.finished
    assert len(run.select("client")) == 8
    assert len(run.select("written_back")) == 8
