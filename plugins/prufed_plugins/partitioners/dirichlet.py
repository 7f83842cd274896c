"""Label-skewed clients (Yurochkin et al. 2019, https://arxiv.org/abs/1905.12022)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prufed_plugins.errors import MethodError
from prufed_plugins.params import DirichletParams
from prufed_plugins.partitioners.rows import Rows, assign, check_sizes, rows_by_category


class DirichletPartitioner:
    """Of category c, client i gets the share p_ci, with p_c ~ Dirichlet(alpha, ..., alpha).

    A draw in which a client has fewer than ``min_samples`` rows is thrown away and drawn again.
    """

    def __init__(self, params: DirichletParams) -> None:
        self.params = params

    def split(
        self, categories: Sequence[str | None], clients: Sequence[str], seed: int
    ) -> dict[str, list[int]]:
        """Return row indices by client.

        Raises:
            MethodError: a row without a category, too few rows, or no acceptable draw.
        """
        needed = self.params.min_samples
        check_sizes(len(categories), clients, needed)
        random = np.random.default_rng(seed)
        grouped = list(rows_by_category(categories, random).values())
        for _ in range(self.params.retries):
            parts = self._draw(grouped, len(clients), random)
            if min(len(part) for part in parts) >= needed:
                return assign(clients, parts)
        raise MethodError(
            f"{self.params.retries} draws with alpha {self.params.alpha:g} left a client with "
            f"fewer than {needed} of {len(categories)} rows",
            "raise alpha, lower min_samples or raise retries",
        )

    def _draw(
        self, grouped: Sequence[Rows], clients: int, random: np.random.Generator
    ) -> list[Rows]:
        dealt = []
        for rows in grouped:
            shares = random.dirichlet(np.full(clients, self.params.alpha))  # (N,)
            cuts = np.floor(np.cumsum(shares)[:-1] * len(rows)).astype(np.intp)
            dealt.append(np.split(rows, np.minimum(cuts, len(rows))))
        return [np.concatenate(pieces) for pieces in zip(*dealt, strict=True)]
