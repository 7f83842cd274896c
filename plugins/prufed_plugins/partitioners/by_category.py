"""One category per client (LEGO, arXiv 2410.18287, section 4.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from prufed_plugins.params import NoParams
from prufed_plugins.partitioners.rows import Rows, assign, check_sizes, rows_by_category


class ByCategoryPartitioner:
    """Client i gets category i, the categories sorted by name.

    With fewer clients than categories, category j goes to client j mod N. With more clients, each
    further client joins the category that has the most rows per client, and shares it evenly.
    """

    def __init__(self, params: NoParams) -> None:
        self.params = params

    def split(
        self, categories: Sequence[str | None], clients: Sequence[str], seed: int
    ) -> dict[str, list[int]]:
        """Return row indices by client.

        Raises:
            MethodError: a row without a category, or fewer rows than clients.
        """
        check_sizes(len(categories), clients)
        grouped = rows_by_category(categories, np.random.default_rng(seed))
        if len(clients) <= len(grouped):
            return assign(clients, _join(list(grouped.values()), len(clients)))
        return assign(clients, _share(grouped, len(clients)))


def _join(groups: Sequence[Rows], clients: int) -> list[Rows]:
    return [np.concatenate(groups[first::clients]) for first in range(clients)]


def _share(grouped: Mapping[str, Rows], clients: int) -> list[Rows]:
    names = list(grouped)
    owner = list(names)  # the category of each client
    while len(owner) < clients:
        owner.append(max(names, key=lambda name: len(grouped[name]) / owner.count(name)))
    pieces = {name: iter(np.array_split(grouped[name], owner.count(name))) for name in names}
    return [next(pieces[name]) for name in owner]
