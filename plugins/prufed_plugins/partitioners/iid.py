"""Random rows in equal numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prufed_plugins.params import NoParams
from prufed_plugins.partitioners.rows import assign, check_sizes


class IidPartitioner:
    """Every client gets a random part of the rows; the parts differ by at most one row."""

    def __init__(self, params: NoParams) -> None:
        self.params = params

    def split(
        self, categories: Sequence[str | None], clients: Sequence[str], seed: int
    ) -> dict[str, list[int]]:
        """Return row indices by client.

        Raises:
            MethodError: fewer rows than clients.
        """
        check_sizes(len(categories), clients)
        order = np.random.default_rng(seed).permutation(len(categories))
        return assign(clients, np.array_split(order, len(clients)))
