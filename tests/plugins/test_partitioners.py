"""How one data set is split over clients."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
from hypothesis import event, given
from hypothesis import settings as budget
from hypothesis import strategies as st

from prufed_plugins.api import Partitioner
from prufed_plugins.discover import build, catalog
from prufed_plugins.errors import MethodError
from prufed_plugins.testing import check_partitioner

some = budget(max_examples=60, deadline=None)
NAMES = [entry.name for entry in catalog().methods("partitioner")]
NEED_CATEGORIES = [name for name in NAMES if name not in {"iid", "quantity"}]
KINDS = ("qa", "zoo", "art", "code", "éa")
categories = st.lists(st.sampled_from(KINDS), max_size=120)
enough = st.integers(1, 12).flatmap(
    lambda count: st.tuples(
        st.lists(st.sampled_from(KINDS), min_size=count, max_size=120), st.just(count)
    )
)
"""Rows, and at most as many clients."""

seeds = st.integers(min_value=0, max_value=2**64 - 1)
counts = st.integers(1, 12)


def partitioner(name: str, **settings: Any) -> Partitioner:
    made: Partitioner = build("partitioner", name, settings)
    return made


def named(count: int) -> list[str]:
    return [f"c{index}" for index in range(count)]


@pytest.mark.parametrize("name", NAMES)
def test_conforms(name: str) -> None:
    check_partitioner(lambda: partitioner(name)).require()


@pytest.mark.parametrize("name", NAMES)
@some
@given(rows=categories, count=counts, seed=seeds)
def test_every_row_goes_to_one_client_and_every_client_has_one_or_it_is_refused(
    name: str, rows: list[str], count: int, seed: int
) -> None:
    try:
        parts = partitioner(name).split(rows, named(count), seed)
    except MethodError:
        # Only these may find no split of enough rows: too few shards or keys, no lucky draw.
        assert len(rows) < count or name in {"shards", "dirichlet", "natural"}
        return
    assert list(parts) == named(count)
    assert sorted(row for part in parts.values() for row in part) == list(range(len(rows)))
    assert all(parts.values())
    assert all(part == sorted(part) for part in parts.values())


@some
@given(drawn=enough, seed=seeds)
def test_iid_parts_differ_by_at_most_one_row(drawn: tuple[list[str], int], seed: int) -> None:
    rows, count = drawn
    sizes = [len(part) for part in partitioner("iid").split(rows, named(count), seed).values()]
    assert max(sizes) - min(sizes) <= 1


@some
@given(drawn=enough, seed=seeds)
def test_stratified_parts_differ_by_at_most_one_row_of_any_category(
    drawn: tuple[list[str], int], seed: int
) -> None:
    rows, count = drawn
    parts = partitioner("stratified-iid").split(rows, named(count), seed)
    sizes = [len(part) for part in parts.values()]
    assert max(sizes) - min(sizes) <= 1
    for category in set(rows):
        held = [sum(rows[row] == category for row in part) for part in parts.values()]
        assert max(held) - min(held) <= 1


def test_by_category_gives_client_i_category_i() -> None:
    rows = ["qa", "art", "zoo", "qa", "art"]
    parts = partitioner("by_category").split(rows, ["x", "y", "z"], 0)
    assert parts == {"x": [1, 4], "y": [0, 3], "z": [2]}


def test_by_category_with_fewer_clients_joins_categories() -> None:
    rows = ["qa", "art", "zoo", "code", "art"]
    parts = partitioner("by-category").split(rows, ["x", "y"], 0)
    assert parts == {"x": [0, 1, 4], "y": [2, 3]}  # art and qa; code and zoo


def test_by_category_with_more_clients_splits_the_largest_category() -> None:
    rows = ["art"] * 10 + ["qa"] * 40
    parts = partitioner("by-category").split(rows, named(5), 0)
    held = [Counter(rows[row] for row in part) for part in parts.values()]
    assert held == [{"art": 10}, {"qa": 10}, {"qa": 10}, {"qa": 10}, {"qa": 10}]


@some
@given(drawn=enough, seed=seeds)
def test_by_category_never_mixes_where_clients_suffice(
    drawn: tuple[list[str], int], seed: int
) -> None:
    rows, count = drawn
    count = max(count, len(set(rows)))
    parts = partitioner("by-category").split(rows, named(count), seed)
    assert all(len({rows[row] for row in part}) == 1 for part in parts.values())


@some
@given(seed=seeds, per_client=st.integers(1, 4))
def test_shards_hold_few_categories(seed: int, per_client: int) -> None:
    rows = [f"category-{row % 10}" for row in range(1000)]
    parts = partitioner("shards", per_client=per_client).split(rows, named(5), seed)
    shard = -(-200 // per_client)
    for part in parts.values():
        assert abs(len(part) - 200) <= per_client
        # n consecutive rows touch at most (n - 2) // 100 + 2 categories of 100 rows each.
        assert len({rows[row] for row in part}) <= per_client * ((shard - 2) // 100 + 2)


def test_small_alpha_skews_and_large_alpha_does_not() -> None:
    rows = [f"category-{row % 8}" for row in range(4000)]

    def skew(alpha: float, seed: int = 3) -> float:
        parts = partitioner("dirichlet", alpha=alpha).split(rows, named(8), seed)
        largest = [
            Counter(rows[row] for row in part).most_common(1)[0][1] for part in parts.values()
        ]
        return sum(largest) / len(rows)

    assert sum(skew(0.05, seed) for seed in range(10)) / 10 > 0.4
    assert skew(1e4) < 0.15


@some
@given(seed=seeds, alpha=st.floats(1e-3, 1e6), needed=st.integers(1, 20))
def test_dirichlet_keeps_its_minimum_or_says_that_it_cannot(
    seed: int, alpha: float, needed: int
) -> None:
    rows = [f"category-{row % 3}" for row in range(90)]
    method = partitioner("dirichlet", alpha=alpha, min_samples=needed, retries=5)
    try:
        parts = method.split(rows, named(4), seed)
    except MethodError:
        event("refused")
        return
    assert min(len(part) for part in parts.values()) >= needed


def test_dirichlet_gives_up_after_its_retries() -> None:
    method = partitioner("dirichlet", alpha=0.001, min_samples=10, retries=3)
    with pytest.raises(MethodError, match=r"3 draws with alpha 0\.001 left a client with fewer"):
        method.split(["qa"] * 100, named(4), 0)


@pytest.mark.parametrize("name", NAMES)
def test_bad_input_is_refused_in_one_sentence(name: str) -> None:
    method = partitioner(name)
    with pytest.raises(MethodError, match="3 rows cannot "):
        method.split(["qa"] * 3, named(4), 0)
    with pytest.raises(MethodError, match="two clients are called 'c0'"):
        method.split(["qa"] * 30, [*named(3), "c0"], 0)
    with pytest.raises(MethodError, match="no clients"):
        method.split(["qa"] * 30, [], 0)


@pytest.mark.parametrize("name", NEED_CATEGORIES)
def test_a_row_without_category_is_named(name: str) -> None:
    rows = ["qa"] * 20 + [None] + ["qa"] * 20
    with pytest.raises(MethodError, match="row 21 has no category") as caught:
        partitioner(name).split(rows, named(2), 0)
    assert "iid" in str(caught.value.hint)


def test_iid_needs_no_categories() -> None:
    parts = partitioner("iid").split([None] * 10, named(2), 0)
    assert [len(part) for part in parts.values()] == [5, 5]


@some
@given(seed=seeds, alpha=st.floats(1e-3, 1e6), count=counts, needed=st.integers(1, 20))
def test_quantity_keeps_its_minimum(seed: int, alpha: float, count: int, needed: int) -> None:
    method = partitioner("quantity", alpha=alpha, min_samples=needed)
    sizes = [len(part) for part in method.split([None] * 240, named(count), seed).values()]
    assert sum(sizes) == 240
    assert min(sizes) >= needed


def test_quantity_is_uneven_where_alpha_is_small() -> None:
    def largest(alpha: float, seed: int) -> int:
        parts = partitioner("quantity", alpha=alpha).split([None] * 1000, named(10), seed)
        return max(len(part) for part in parts.values())

    assert sum(largest(0.05, seed) for seed in range(10)) / 10 > 500
    assert largest(1e5, 0) < 110


@some
@given(drawn=enough, seed=seeds)
def test_natural_never_parts_the_rows_of_one_key(drawn: tuple[list[str], int], seed: int) -> None:
    rows, count = drawn
    count = min(count, len(set(rows)))
    parts = partitioner("natural", key="user").split(rows, named(count), seed)
    held = [{rows[row] for row in part} for part in parts.values()]
    assert sum(map(len, held)) == len(set(rows))


def test_natural_balances_keys_over_few_clients() -> None:
    rows = ["a"] * 5 + ["b"] * 4 + ["c"] * 3 + ["d"]
    parts = partitioner("natural", key="user").split(rows, ["x", "y"], 0)
    held = [sorted({rows[row] for row in part}) for part in parts.values()]
    assert held == [["a", "d"], ["b", "c"]]


def test_natural_refuses_more_clients_than_keys_and_names_a_row_without() -> None:
    method = partitioner("natural", key="user")
    assert method.field == "user"  # type: ignore[attr-defined]
    with pytest.raises(MethodError, match="2 values of user cannot give each of 3 clients one"):
        method.split(["a", "b"] * 10, named(3), 0)
    with pytest.raises(MethodError, match="row 2 has no user"):
        method.split(["a", None], named(2), 0)


def test_too_few_rows_for_a_minimum_or_for_shards() -> None:
    with pytest.raises(MethodError, match="30 rows cannot give each of 4 clients 10 rows"):
        partitioner("dirichlet", min_samples=10).split(["qa"] * 30, named(4), 0)
    with pytest.raises(MethodError, match="30 rows cannot be cut into 40 shards"):
        partitioner("shards", per_client=10).split(["qa"] * 30, named(4), 0)


def test_splits_do_not_depend_on_the_order_of_hashes() -> None:
    code = (
        "from prufed_plugins.discover import build, catalog\n"
        "rows = [('qa', 'art', 'code', 'zoo', 'law')[i**3 % 5] for i in range(100)]\n"
        "for entry in catalog().methods('partitioner'):\n"
        "    print(build('partitioner', entry.name).split(rows, ['x', 'y', 'z', 'w'], 9))\n"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(outputs) == 1
