"""What a plan foretells grows with the work, and is counted in what this machine does."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prufed_cli.errors import PrufedError
from prufed_cli.models.activations import Activations
from prufed_cli.models.skeleton import open_skeleton
from prufed_cli.models.streaming import StreamedDecoder
from prufed_cli.progress import Reporter
from prufed_cli.pruning import PruneRequest, at_sparsities, plan_prune, prune, prune_several
from prufed_cli.pruning.estimate import BlockWork, Rates, block_seconds, measure_rates
from prufed_cli.pruning.plan import layouts_of, look_at_layouts
from prufed_plugins.pruners.collecting import embed, observe
from prufed_plugins.pruners.hessian import InputHessian
from tests.pruners.test_mixtures_of_experts import make_mixture

RATES = Rates(product=1e-11, entry=2e-9, step=1e-6)
WORK = BlockWork([(64, 32), (32, 64)], 2, [32, 64], 1000, 0.5, 2, hessians=True, targets=1)
SIZES = st.integers(1, 10**4)


@given(st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=8), SIZES, st.integers(0, 3))
def test_more_work_takes_longer(shapes: list[tuple[int, int]], tokens: int, passes: int) -> None:
    columns = sorted({columns for _, columns in shapes})
    work = BlockWork(shapes, 2, columns, tokens, 0.1, passes, hessians=True, targets=1)
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


# --- mixtures whose first block is dense ---------------------------------------------------------

DENSE_FIRST = ["deepseek_v2", "deepseek_v3", "dots1", "glm4_moe", "qwen3_moe"]


def streamed(directory: Path) -> StreamedDecoder:
    skeleton = open_skeleton(directory, "mixture", torch.float32)
    return StreamedDecoder(skeleton, torch.device("cpu"), Activations())


@pytest.mark.parametrize("name", DENSE_FIRST)
def test_statistics_are_planned_for_the_block_that_gathers_most(
    name: str, saved: Callable[..., Path], text: Path, ids: torch.Tensor
) -> None:
    base = saved(make_mixture(name))
    decoder = streamed(base)
    states, held = embed(decoder, [ids]), []
    for index in range(3):
        names = decoder.shapes(index).keys()
        found = observe(decoder, index, names, InputHessian, states, advancing=True)
        statistics = {id(one.statistic): one.statistic for one in found.values()}
        held.append(sum(4 * one.columns**2 for one in statistics.values()))
    assert held[0] < held[1]
    wanted = PruneRequest(
        base=str(base),
        method="sparsegpt",
        sparsity=0.5,
        calibration=str(text),
        samples=3,
        length=24,
    )
    assert plan_prune([wanted], device="cpu").statistics >= max(held)


def test_a_batch_is_planned_for_the_widest_block(saved: Callable[..., Path], text: Path) -> None:
    changes = {"mlp_only_layers": [0], "shared_expert_intermediate_size": 512}
    base = saved(make_mixture("qwen2_moe", **changes))
    wanted = PruneRequest(
        base=str(base), method="wanda", sparsity=0.5, calibration=str(text), samples=5, length=24
    )
    assert plan_prune([wanted], device="cpu").batch == 5 * 24 * (6 * 512 + 8 * 32) * 4


def test_each_layout_is_looked_at_in_one_block_and_once(
    saved: Callable[..., Path], ids: torch.Tensor
) -> None:
    decoder = streamed(saved(make_mixture("deepseek_v3", num_hidden_layers=4)))
    layouts = layouts_of(decoder)
    assert [layout.blocks for layout in layouts] == [(0,), (1, 2, 3)]
    runs: Counter[tuple[int, int]] = Counter()  # by block and sequences

    def slow(index: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            runs[index, len(output[0])] += 1
            time.sleep(0.1 * (1 + index))  # longer than a small block is timed for

        return hook

    decoder.embed([ids])  # runs block 0, to see what blocks return
    decoder.release()
    released: list[int] = []
    decoder.released = released.append
    for index, block in enumerate(decoder.blocks):
        block.get_submodule("self_attn").register_forward_hook(slow(index))
    dense, mixed = look_at_layouts(decoder, ids, layouts)
    decoder.release()
    assert released == [0, 1]
    assert runs == {(0, 1): 1, (1, 1): 1, (1, 3): 1}
    assert 0.1 <= dense.token * 24 < 0.5
    assert 0.2 <= mixed.token * 24 * 3 < 0.6
    assert len(dense.groups) < len(mixed.groups)
    assert sum(map(len, mixed.groups)) == len(mixed.shapes)


# --- methods that read no weight -----------------------------------------------------------------

# --- what is written -----------------------------------------------------------------------------

HEADS = 0.2
"""Of these small files, at most, that are the names of their tensors."""


class Watcher(Reporter):
    """Counts the bytes of kept blocks when the first sub-model is about to be written."""

    def __init__(self, workplace: Path) -> None:
        self.workplace = workplace
        self.kept = 0

    def task(self, description: str, total: int | None = None) -> Any:
        if description == "write the sub-model" and not self.kept:
            self.kept = bytes_of(self.workplace, "*/*.safetensors")
        return super().task(description, total)


def bytes_of(directory: Path, pattern: str) -> int:
    return sum(file.stat().st_size for file in directory.glob(pattern))


@pytest.mark.parametrize("sparsities", [[0.5], [0.25, 0.5]])
def test_the_plan_says_what_is_written(
    llama: Any, saved: Callable[..., Path], prufed_home: Path, sparsities: list[float]
) -> None:
    base = PruneRequest(base=str(saved(llama)), method="magnitude")
    wanted, nested = at_sparsities(base, sparsities), len(sparsities) > 1
    plan = plan_prune(wanted, nested=nested)
    watcher = Watcher(prufed_home / "prunes")
    made = prune_several(wanted, nested=nested, reporter=watcher)
    files = sum(bytes_of(one.artifact.path, "*.safetensors") for one in made)
    assert plan.kept < watcher.kept < plan.kept * (1 + HEADS)
    assert plan.models < files < plan.models * (1 + HEADS)


@pytest.mark.parametrize("method", ["top", "explicit"])
def test_the_plan_of_a_method_that_drops_layers_leaves_them_out(
    llama: Any, saved: Callable[..., Path], method: str
) -> None:
    how = {"settings": {"layers": [0, 3]}} if method == "explicit" else {"layers": 4}
    wanted = PruneRequest(base=str(saved(llama)), method=method, **how)
    plan = plan_prune([wanted])
    assert plan.kept == 0
    assert "until the end" not in "".join(plan.lines())
    file = bytes_of(prune(wanted).artifact.path, "*.safetensors")
    assert plan.models < file < plan.models * (1 + HEADS)


POSITIONAL: list[tuple[str, dict[str, Any]]] = [
    *((method, {"layers": 2}) for method in ("top", "bottom", "symmetric", "even-alternate")),
    ("explicit", {"settings": {"layers": [0, 3]}}),
]


@pytest.mark.parametrize(("method", "target"), POSITIONAL)
def test_what_reads_no_weight_needs_no_room_for_a_block(
    llama: Any, saved: Callable[..., Path], method: str, target: dict[str, Any]
) -> None:
    wanted = PruneRequest(base=str(saved(llama)), method=method, **target)
    plan = plan_prune([wanted], device="cpu", max_memory=10_000)
    assert (plan.block, plan.batch, plan.statistics, plan.peak) == (0, 0, 0, 0)
    assert "none of them is read" in plan.lines()[0]
    assert prune(wanted, device="cpu", max_memory=10_000).report["kept_layers"]


@pytest.mark.parametrize(
    ("method", "scored"), [("top", True), ("magnitude-layers", False), ("contribution", False)]
)
def test_what_reads_weights_is_refused_without_room_for_a_block(
    llama: Any, saved: Callable[..., Path], text: Path, method: str, scored: bool
) -> None:
    calibration = {"calibration": str(text), "samples": 2, "length": 24}
    wanted = PruneRequest(
        base=str(saved(llama)),
        method=method,
        layers=2,
        perplexity=str(text) if scored else None,
        **(calibration if method == "contribution" else {}),
    )
    with pytest.raises(PrufedError, match=r"more than the 10\.0 kB there may be"):
        plan_prune([wanted], device="cpu", max_memory=10_000)
