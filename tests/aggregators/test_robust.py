"""Methods that withstand clients which send anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prufed_plugins.aggregators.distances import pairwise_distances
from prufed_plugins.aggregators.streaming import Aggregated, aggregate
from prufed_plugins.api import GlobalState, Update
from prufed_plugins.discover import build
from prufed_plugins.errors import MethodError

MODULE = "model.layers.0.self_attn.q_proj"
A, B = f"{MODULE}.lora_A.weight", f"{MODULE}.lora_B.weight"

few = settings(max_examples=40, deadline=None)


def state_of(value: float = 0.0, k: int = 3) -> GlobalState:
    return GlobalState({A: torch.full((1, k), value), B: torch.zeros(2, 1)}, 1, 1.0, 1)


def update_of(client: str, row: Sequence[float], mask: Sequence[bool] | None = None) -> Update:
    tensors = {A: torch.tensor([row], dtype=torch.float32), B: torch.zeros(2, 1)}
    return Update(
        client, tensors, None if mask is None else {A: torch.tensor([mask])}, 1, 1, 1.0, (0,)
    )


def outcome(
    method: str, updates: Sequence[Update], state: GlobalState, **values: Any
) -> Aggregated:
    return aggregate(build("aggregator", method, values), updates, state)


def row(method: str, updates: Sequence[Update], **values: Any) -> Tensor:
    return outcome(method, updates, state_of(), **values).state.tensors[A][0]


def attacked() -> list[Update]:
    """Five honest clients that agree, and two that do not."""
    honest = [update_of(f"honest{index}", [1.0, -2.0, 3.0]) for index in range(5)]
    return [*honest, update_of("bad0", [1e6, 1e6, 1e6]), update_of("bad1", [-1e6, 50.0, -9.0])]


@pytest.mark.parametrize(("method", "values"), [("median", {}), ("trimmed-mean", {"trim": 0.3})])
def test_outliers_do_not_count(method: str, values: dict[str, Any]) -> None:
    assert torch.equal(row(method, attacked(), **values), torch.tensor([1.0, -2.0, 3.0]))


def test_median_counts_the_clients_that_have_an_entry() -> None:
    updates = [
        update_of("a", [1.0, 9.0, 9.0], [True, False, False]),
        update_of("b", [3.0, 4.0, 9.0], [True, True, False]),
        update_of("c", [8.0, 6.0, 9.0], [True, True, False]),
    ]
    result = outcome("median", updates, state_of(7.0))
    assert result.state.tensors[A].tolist() == [[3.0, 5.0, 7.0]]


def test_trimmed_mean_trims_by_the_clients_that_have_an_entry() -> None:
    """Of five, one at either end; of four, none."""
    present = [[True, True, False]] * 4 + [[True, False, False]]
    values = ([1.0, 1.0], [2.0, 2.0], [4.0, 4.0], [90.0, 9.0], [-50.0, 0.0])
    updates = [
        update_of(f"c{index}", [*pair, 0.0], mask)
        for index, (pair, mask) in enumerate(zip(values, present, strict=True))
    ]
    result = outcome("trimmed-mean", updates, state_of(7.0))
    torch.testing.assert_close(result.state.tensors[A], torch.tensor([[7 / 3, 4.0, 7.0]]))
    # entries of A with fewer than five clients, and none of B, which all five have
    assert result.diagnostics[MODULE]["untrimmed"] == pytest.approx(1 / 4)


numbers = st.lists(st.floats(-100, 100, width=32), min_size=3, max_size=3)


@few
@given(
    st.lists(
        st.tuples(numbers, st.lists(st.booleans(), min_size=3, max_size=3)), min_size=1, max_size=6
    )
)
def test_robust_means_lie_between_the_extremes_of_those_who_have_the_entry(
    clients: list[tuple[list[float], list[bool]]],
) -> None:
    updates = [update_of(f"c{i}", values, mask) for i, (values, mask) in enumerate(clients)]
    for method in ("median", "trimmed-mean"):
        result = outcome(method, updates, state_of(7.0)).state.tensors[A][0]
        for place in range(3):
            there = [v[place] for v, mask in clients if mask[place]] or [7.0]
            slack = 1e-4
            assert min(there) - slack <= result[place] <= max(there) + slack


# --- krum ----------------------------------------------------------------------------------------


def chosen(method: str, updates: Sequence[Update], **values: Any) -> set[str]:
    numbers = outcome(method, updates, state_of(), **values).diagnostics[MODULE]
    return {
        key.removeprefix("chosen.") for key, flag in numbers.items() if "chosen" in key and flag
    }


def test_krum_returns_an_honest_update() -> None:
    assert torch.equal(row("krum", attacked(), byzantine=2), torch.tensor([1.0, -2.0, 3.0]))
    assert torch.equal(row("multi-krum", attacked(), byzantine=2), torch.tensor([1.0, -2.0, 3.0]))
    assert chosen("multi-krum", attacked(), byzantine=2) == {f"honest{i}" for i in range(5)}


def test_krum_scores_by_the_nearest_n_minus_f_minus_2() -> None:
    """On a line at 0, 1, 2.5, 9, 10 with f = 1, two neighbours: 7.25, 3.25, 8.5, 43.25, 57.25."""
    updates = [
        update_of(name, [value, 0.0, 0.0])
        for name, value in zip("abcde", (0.0, 1.0, 2.5, 9.0, 10.0), strict=True)
    ]
    assert chosen("krum", updates) == {"b"}
    assert chosen("multi-krum", updates, select=3) == {"a", "b", "c"}
    assert chosen("multi-krum", updates) == {"a", "b", "c", "d"}
    mean = row("multi-krum", updates, select=3)
    torch.testing.assert_close(mean, torch.tensor([3.5 / 3, 0.0, 0.0]))


@few
@given(
    st.lists(st.lists(st.integers(-20, 20), min_size=3, max_size=3), min_size=5, max_size=8),
    st.integers(0, 1),
)
def test_krum_chooses_by_the_definition(rows: list[list[int]], byzantine: int) -> None:
    """Against the definition, in whole numbers."""
    updates = [update_of(f"c{i}", [float(v) for v in values]) for i, values in enumerate(rows)]
    scores = []
    for one in range(len(rows)):
        apart = sorted(
            sum((a - b) ** 2 for a, b in zip(rows[one], rows[other], strict=True))
            for other in range(len(rows))
            if other != one
        )
        scores.append(sum(apart[: len(rows) - byzantine - 2]))
    best = scores.index(min(scores))
    assert chosen("krum", updates, byzantine=byzantine) == {f"c{best}"}


def test_distances_count_what_both_have_and_scale_it_up() -> None:
    updates = [
        update_of("a", [1.0, 5.0, 0.0], [True, True, False]),
        update_of("b", [4.0, 0.0, 7.0], [True, False, True]),
        update_of("c", [0.0, 0.0, 0.0]),
    ]
    result = pairwise_distances(updates, state_of())
    # five entries in all, of which B's two are shared and equal
    assert result[0, 1].item() == pytest.approx(9 * 5 / 3)
    assert result[0, 2].item() == pytest.approx(26 * 5 / 4)
    assert result[1, 2].item() == pytest.approx(65 * 5 / 4)
    assert torch.equal(result, result.T)


def test_krum_refuses_clients_that_share_nothing() -> None:
    state = GlobalState({A: torch.zeros(1, 60), B: torch.zeros(2, 1)}, 1, 1.0, 1)
    updates = []
    for index in range(3):
        mask = torch.zeros(1, 60, dtype=torch.bool)
        mask[0, index * 20 : index * 20 + 20] = True
        hidden = torch.zeros(2, 1, dtype=torch.bool)
        tensors = {A: torch.ones(1, 60), B: torch.zeros(2, 1)}
        updates.append(Update(f"c{index}", tensors, {A: mask, B: hidden}, 1, 1, 1.0, (0,)))
    with pytest.raises(MethodError, match="share 5 % of the entries"):
        outcome("krum", updates, state, byzantine=0)


@pytest.mark.parametrize("method", ["krum", "multi-krum"])
def test_krum_refuses_fewer_than_2_f_plus_3_clients(method: str) -> None:
    few_clients = [update_of(f"c{index}", [1.0, 2.0, 3.0]) for index in range(4)]
    with pytest.raises(MethodError, match=f"{method} against 1 bad clients needs 5 clients") as no:
        build("aggregator", method, {}).prepare(few_clients, state_of())
    assert "sample more clients" in (no.value.hint or "")


def test_a_client_left_out_for_nan_can_cost_krum_its_round() -> None:
    updates = [update_of(f"c{index}", [1.0, 2.0, 3.0]) for index in range(4)]
    updates.append(update_of("x", [float("nan"), 2.0, 3.0]))
    with pytest.raises(MethodError, match="needs 5 clients, and the round has 4"):
        aggregate(build("aggregator", "krum", {}), updates, state_of(), on_invalid="exclude")
