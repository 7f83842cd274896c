"""What a plan foretells grows with the work, and is counted in what this machine does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prufed_cli.pruning import PruneRequest, plan_prune
from prufed_cli.pruning.estimate import BlockWork, Rates, block_seconds, measure_rates

RATES = Rates(product=1e-11, entry=2e-9, step=1e-6)
WORK = BlockWork([(64, 32), (32, 64)], [32, 64], 1000, 0.5, 2, hessians=True, targets=1)
SIZES = st.integers(1, 10**4)


@given(st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=8), SIZES, st.integers(0, 3))
def test_more_work_takes_longer(shapes: list[tuple[int, int]], tokens: int, passes: int) -> None:
    columns = sorted({columns for _, columns in shapes})
    work = BlockWork(shapes, columns, tokens, 0.1, passes, hessians=True, targets=1)
    seconds = block_seconds(work, RATES)
    assert block_seconds(replace(work, passes=passes + 1), RATES) > seconds
    assert block_seconds(replace(work, tokens=2 * tokens), RATES) > seconds
    assert block_seconds(replace(work, targets=2), RATES) > seconds
    assert block_seconds(replace(work, shapes=[*shapes, (1, 1)]), RATES) > seconds
    slower = Rates(2 * RATES.product, 2 * RATES.entry, 2 * RATES.step)
    assert seconds < block_seconds(work, slower) < 2 * seconds


def test_a_hessian_costs_the_square_of_its_columns_per_token() -> None:
    def hessians(tokens: int, columns: int) -> float:
        work = replace(WORK, tokens=tokens, inputs=[columns], shapes=[], passes=0)
        return block_seconds(work, RATES)

    once = hessians(10**9, 100) - hessians(0, 100)
    assert hessians(2 * 10**9, 100) - hessians(0, 100) == pytest.approx(2 * once)
    assert hessians(10**9, 200) - hessians(0, 200) == pytest.approx(4 * once)


def test_rates_are_those_of_a_machine() -> None:
    rates = measure_rates(torch.device("cpu"))
    assert 1e-14 < rates.product < 1e-8
    assert 1e-11 < rates.entry < 1e-6
    assert 1e-8 < rates.step < 1e-3


def test_plans_of_methods_are_in_the_order_of_their_work(
    llama: Any, saved: Callable[..., Path], text: Path
) -> None:
    base = saved(llama)

    def plan(method: str, **target: Any) -> Any:
        wanted = PruneRequest(
            base=str(base), method=method, calibration=str(text), samples=5, length=24, **target
        )
        return plan_prune([wanted], device="cpu")

    plans = [plan("top", layers=2), plan("magnitude", sparsity=0.5), plan("wanda", sparsity=0.5)]
    seconds = [one.seconds for one in plans]
    assert seconds == sorted(seconds)
    assert all("time about 1 s" in one.lines()[-1] for one in plans)
