"""How many entries go, and which of equals."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prufed_plugins.errors import MethodError
from prufed_plugins.pruners.magnitude import smallest_overall
from prufed_plugins.pruners.selection import (
    at_most_threshold,
    check_pattern,
    pruned_count,
    smallest,
    smallest_members,
    smallest_of_groups,
    smallest_transposed,
)

TIED = st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0])
ANY = st.floats(0, 1e6, width=32)


@st.composite
def matrices(draw: Callable, columns: int | None = None) -> torch.Tensor:
    rows = draw(st.integers(1, 6))
    width = columns or draw(st.integers(1, 24))
    values = draw(
        st.lists(draw(st.sampled_from([TIED, ANY])), min_size=rows * width, max_size=rows * width)
    )
    return torch.tensor(values, dtype=torch.float32).reshape(rows, width)


def first_by_stable_sort(scores: torch.Tensor, count: int) -> torch.Tensor:
    order = np.argsort(scores.numpy(), axis=-1, kind="stable")[..., :count]
    chosen = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(chosen, order, True, axis=-1)
    return torch.from_numpy(chosen)


@settings(max_examples=80, deadline=None)
@given(matrices(), st.data())
def test_the_smallest_of_each_row_are_those_of_a_stable_sort(
    scores: torch.Tensor, data: st.DataObject
) -> None:
    count = data.draw(st.integers(0, scores.shape[1]))
    chosen = smallest(scores, count)
    assert chosen.sum(dim=1).tolist() == [count] * scores.shape[0]
    assert torch.equal(chosen, first_by_stable_sort(scores, count))


@settings(max_examples=80, deadline=None)
@given(matrices(), st.data())
def test_ties_of_a_transposed_block_go_by_row_then_column(
    scores: torch.Tensor, data: st.DataObject
) -> None:
    count = data.draw(st.integers(0, scores.numel()))
    chosen = smallest_transposed(scores, count)
    expected = first_by_stable_sort(scores.t().reshape(1, -1), count)
    assert torch.equal(chosen.t().reshape(1, -1), expected)
    marked = torch.full_like(scores, 7.0)
    assert smallest_transposed(scores, count, out=marked) is marked
    assert torch.equal(marked, chosen.float())


@settings(max_examples=80, deadline=None)
@given(st.integers(2, 9), st.data())
def test_every_group_loses_exactly_n_the_lower_index_first(m: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, m - 1))
    scores = data.draw(matrices())
    chosen = smallest_of_groups(scores, (n, m))
    for group, gone in zip(scores.split(m, dim=1), chosen.split(m, dim=1), strict=True):
        expected = first_by_stable_sort(group, min(n, group.shape[1]))
        assert torch.equal(gone, expected)
        marked = torch.full_like(group.t(), 7.0)
        smallest_members(group.t(), min(n, group.shape[1]), out=marked)
        assert torch.equal(marked, expected.t().float())


@settings(max_examples=80, deadline=None)
@given(matrices(), st.floats(0, 0.999))
def test_the_published_threshold_takes_what_is_at_most_the_score_of_its_rank(
    scores: torch.Tensor, sparsity: float
) -> None:
    chosen = at_most_threshold(scores, sparsity)
    threshold = np.sort(scores.numpy(), axis=None)[int(scores.numel() * sparsity)]
    assert chosen.tolist() == (scores.numpy() <= threshold).tolist()
    assert int(chosen.sum()) > int(scores.numel() * sparsity)
    marked = at_most_threshold(scores, sparsity, out=torch.full_like(scores, 7.0))
    assert torch.equal(marked, chosen.float())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(matrices(), min_size=1, max_size=4),
    st.lists(st.floats(0, 0.999), min_size=1, max_size=3),
)
def test_the_shares_of_the_smallest_are_those_of_one_long_stable_sort(
    scores: list[torch.Tensor], sparsities: list[float]
) -> None:
    flat = torch.cat([one.flatten() for one in scores])
    counts = [pruned_count(sparsity, flat.numel()) for sparsity in sparsities]
    for count, shares in zip(counts, smallest_overall(lambda: iter(scores), counts), strict=True):
        chosen = first_by_stable_sort(flat, count).split([one.numel() for one in scores])
        assert shares == [int(one.sum()) for one in chosen]


def test_counts_are_those_of_the_decimal_that_was_typed() -> None:
    assert int(0.29 * 100) == 28  # in floating point, which the published code counts with
    assert pruned_count(0.29, 100) == 29
    assert pruned_count(1.0, 7) == 7


def test_large_groups_are_ranked_too() -> None:
    scores = torch.rand(2, 400, generator=torch.Generator().manual_seed(0))
    expected = first_by_stable_sort(scores.reshape(-1, 200), 150).reshape(scores.shape)
    assert torch.equal(smallest_of_groups(scores, (150, 200)), expected)


def test_equal_scores_go_from_the_left() -> None:
    assert smallest(torch.ones(2, 4), 2).tolist() == [[True, True, False, False]] * 2
    assert smallest_of_groups(torch.ones(1, 4), (1, 2)).tolist() == [[True, False, True, False]]


def test_sparsity_zero_selects_nothing() -> None:
    assert not smallest(torch.tensor([[0.0, 0.0, 1.0]]), pruned_count(0.0, 3)).any()


def test_a_pattern_that_leaves_nothing_names_the_matrix_and_its_columns() -> None:
    check_pattern("layer.down", 172, (4, 8))
    with pytest.raises(MethodError, match=r"8:16 would remove all 8 columns of layer\.down"):
        check_pattern("layer.down", 8, (8, 16))
