"""A few shards of the sorted rows each (McMahan et al. 2017, https://arxiv.org/abs/1602.05629)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prufed_plugins.errors import MethodError
from prufed_plugins.params import ShardsParams
from prufed_plugins.partitioners.rows import assign, check_sizes, rows_by_category


class ShardsPartitioner:
    """Rows sorted by category are cut into N * per_client shards; each client draws per_client."""

    def __init__(self, params: ShardsParams) -> None:
        self.params = params

    def split(
        self, categories: Sequence[str | None], clients: Sequence[str], seed: int
    ) -> dict[str, list[int]]:
        """Return row indices by client.

        Raises:
            MethodError: a row without a category, or fewer rows than shards.
        """
        check_sizes(len(categories), clients)
        each = self.params.per_client
        total = each * len(clients)
        if len(categories) < total:
            raise MethodError(
                f"{len(categories)} rows cannot be cut into {total} shards "
                f"({each} for each of {len(clients)} clients)",
                "lower per_client or use more rows",
            )
        random = np.random.default_rng(seed)
        order = np.concatenate(list(rows_by_category(categories, random).values()))
        shards = np.array_split(order, total)
        drawn = random.permutation(total).reshape(len(clients), each)
        return assign(clients, [np.concatenate([shards[i] for i in own]) for own in drawn])
