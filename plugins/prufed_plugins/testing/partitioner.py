"""What every partitioner must do."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import numpy as np

from prufed_plugins.api import Partitioner
from prufed_plugins.errors import MethodError
from prufed_plugins.testing.checks import Outcome, run_checks

CATEGORIES: tuple[str | None, ...] = tuple(
    category
    for category, rows in (("writing", 40), ("qa", 200), ("summary", 90), ("labels", 70))
    for _ in range(rows)
)
"""400 rows of four categories of different sizes, sorted as data files often are."""


def check_partitioner(make: Callable[[], Partitioner]) -> Outcome:
    """Run every check on a partitioner.

    Args:
        make: constructs it; called once per check.
    """
    return run_checks(
        make,
        (
            assigns_every_row_once,
            gives_every_client_rows,
            names_every_client,
            is_decided_by_its_arguments,
            refuses_more_clients_than_rows,
            splits_or_refuses_rows_without_category,
            leaves_its_arguments_alone,
            leaves_global_generators_alone,
        ),
    )


def clients_of(count: int) -> tuple[str, ...]:
    """Return that many names."""
    return tuple(f"client-{index}" for index in range(count))


def _splits(partitioner: Partitioner) -> Iterator[tuple[int, dict[str, list[int]]]]:
    """Yield splits over few clients and many; only more clients than categories may be refused."""
    for count in (1, 3, 4, 10):
        try:
            yield count, partitioner.split(CATEGORIES, clients_of(count), 5)
        except MethodError:
            if count <= len(set(CATEGORIES)):
                raise


def assigns_every_row_once(partitioner: Partitioner) -> None:
    """Every row belongs to exactly one client."""
    for count, parts in _splits(partitioner):
        rows = sorted(row for part in parts.values() for row in part)
        assert rows == list(range(len(CATEGORIES))), f"not so with {count} clients"


def gives_every_client_rows(partitioner: Partitioner) -> None:
    """Every client has at least one row."""
    for count, parts in _splits(partitioner):
        empty = [name for name, part in parts.items() if not part]
        assert not empty, f"{empty[0]} of {count} has none"


def names_every_client(partitioner: Partitioner) -> None:
    """The clients are those given, in their order, each with a list of plain integers."""
    parts = partitioner.split(CATEGORIES, clients_of(4), 5)
    assert tuple(parts) == clients_of(4), f"it returned the clients {list(parts)}"
    kinds = {type(row).__name__ for part in parts.values() for row in part}
    assert kinds == {"int"}, f"rows are {', '.join(sorted(kinds))}"


def is_decided_by_its_arguments(partitioner: Partitioner) -> None:
    """The same rows, clients and seed give the same split."""
    first = partitioner.split(CATEGORIES, clients_of(4), 11)
    random.random()
    np.random.random()
    partitioner.split(CATEGORIES, clients_of(3), 12)
    assert partitioner.split(CATEGORIES, clients_of(4), 11) == first, "two calls differ"


def refuses_more_clients_than_rows(partitioner: Partitioner) -> None:
    """Too few rows are refused with a MethodError."""
    try:
        partitioner.split(CATEGORIES[:3], clients_of(4), 5)
    except MethodError:
        return
    raise AssertionError("three rows were split over four clients")


def splits_or_refuses_rows_without_category(partitioner: Partitioner) -> None:
    """Rows without a category are split like any others, or refused with a MethodError."""
    bare: list[str | None] = [None] * 20
    try:
        parts = partitioner.split(bare, clients_of(4), 5)
    except MethodError:
        return
    rows = sorted(row for part in parts.values() for row in part)
    assert rows == list(range(20)), "some rows are lost or doubled"


def leaves_its_arguments_alone(partitioner: Partitioner) -> None:
    """The sequences it is given are not changed."""
    categories, clients = list(CATEGORIES), list(clients_of(4))
    partitioner.split(categories, clients, 5)
    assert tuple(categories) == CATEGORIES, "it changed the categories"
    assert tuple(clients) == clients_of(4), "it changed the clients"


def leaves_global_generators_alone(partitioner: Partitioner) -> None:
    """The process's random generators are not touched: others depend on them."""
    before = random.getstate(), str(np.random.get_state())
    partitioner.split(CATEGORIES, clients_of(4), 5)
    assert (random.getstate(), str(np.random.get_state())) == before, "it drew from them"
