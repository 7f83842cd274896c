"""Clients of unequal size (Li et al. 2021, https://arxiv.org/abs/2102.02079, quantity skew)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prufed_plugins.params import QuantityParams
from prufed_plugins.partitioners.rows import assign, check_sizes


class QuantityPartitioner:
    """Random rows, and of the n rows client i gets the share q_i, with q ~ Dirichlet(alpha, ...).

    Every client is first dealt ``min_samples`` rows; the draw divides the others.
    """

    def __init__(self, params: QuantityParams) -> None:
        self.params = params

    def split(
        self, categories: Sequence[str | None], clients: Sequence[str], seed: int
    ) -> dict[str, list[int]]:
        """Return row indices by client.

        Raises:
            MethodError: fewer rows than ``min_samples`` for each client.
        """
        least = self.params.min_samples
        check_sizes(len(categories), clients, least)
        random = np.random.default_rng(seed)
        order = random.permutation(len(categories))
        free = len(categories) - least * len(clients)
        shares = random.dirichlet(np.full(len(clients), self.params.alpha))  # (N,)
        drawn = np.minimum(np.floor(np.cumsum(shares)[:-1] * free).astype(np.intp), free)
        cuts = drawn + least * np.arange(1, len(clients))
        return assign(clients, np.split(order, cuts))
