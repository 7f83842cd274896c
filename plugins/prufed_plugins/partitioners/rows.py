"""What every partitioner asks of the rows and the clients before it splits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prufed_plugins.errors import MethodError

Rows = NDArray[np.intp]
"""Row indices, (n,)."""


def check_sizes(rows: int, clients: Sequence[str], needed: int = 1) -> None:
    """Refuse what no split can satisfy.

    Args:
        rows: how many rows there are.
        clients: the clients' names.
        needed: rows that every client must get.

    Raises:
        MethodError: no clients, a name twice, or too few rows.
    """
    if not clients:
        raise MethodError("there are no clients to split the rows over", "add one under clients:")
    twice = sorted(name for name, times in Counter(clients).items() if times > 1)
    if twice:
        raise MethodError(f"two clients are called {twice[0]!r}", "give every client its own name")
    if rows < needed * len(clients):
        each = "one row" if needed == 1 else f"{needed} rows"
        raise MethodError(
            f"{rows} rows cannot give each of {len(clients)} clients {each}",
            "use fewer clients or more rows",
        )


def rows_by_category(
    categories: Sequence[str | None], random: np.random.Generator
) -> dict[str, Rows]:
    """Return the rows of each category in random order, the categories by name.

    Raises:
        MethodError: a row has no category.
    """
    members: dict[str, list[int]] = {}
    for row, category in enumerate(categories):
        if category is None:
            raise MethodError(
                f"row {row + 1} has no category",
                'give every row a "category" field, or use the partitioner iid',
            )
        members.setdefault(category, []).append(row)
    return {
        category: random.permutation(np.asarray(members[category], dtype=np.intp))
        for category in sorted(members)
    }


def assign(clients: Sequence[str], parts: Sequence[Any]) -> dict[str, list[int]]:
    """Return the rows by client, ascending, from one array of rows per client."""
    return {name: np.sort(part).tolist() for name, part in zip(clients, parts, strict=True)}
