"""The same mixture of categories for everyone (LEGO, arXiv 2410.18287, section 4.1)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prufed_plugins.params import NoParams
from prufed_plugins.partitioners.rows import assign, check_sizes, rows_by_category


class StratifiedIidPartitioner:
    """Clients differ by at most one row in every category, and by at most one row in all."""

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
        # Dealing like cards, category after category, keeps each category and the sum even.
        order = np.concatenate(list(grouped.values()))
        return assign(clients, [order[first :: len(clients)] for first in range(len(clients))])
