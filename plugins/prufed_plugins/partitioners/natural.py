"""The clients that the data itself has: its users, sources or documents.

Federated data sets are split so in LEAF (Caldas et al. 2018, https://arxiv.org/abs/1812.01097).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prufed_plugins.errors import MethodError
from prufed_plugins.params import NaturalParams
from prufed_plugins.partitioners.rows import assign, check_sizes


class NaturalPartitioner:
    """Rows of one key stay together; with more keys than clients, a client gets several.

    The keys, the largest first, each go to the client that has the fewest rows.

    Attributes:
        field: the field of a row that holds its key.
    """

    def __init__(self, params: NaturalParams) -> None:
        self.field = params.key

    def split(
        self, categories: Sequence[str | None], clients: Sequence[str], seed: int
    ) -> dict[str, list[int]]:
        """Return row indices by client; ``categories`` are the keys. The seed decides nothing.

        Raises:
            MethodError: a row without the key, or fewer keys than clients.
        """
        check_sizes(len(categories), clients)
        rows: dict[str, list[int]] = {}
        for row, key in enumerate(categories):
            if key is None:
                raise MethodError(
                    f"row {row + 1} has no {self.field}",
                    f'give every row a "{self.field}" field, or use the partitioner iid',
                )
            rows.setdefault(key, []).append(row)
        if len(rows) < len(clients):
            raise MethodError(
                f"{len(rows)} values of {self.field} cannot give each of {len(clients)} clients "
                "one of its own",
                f"use at most {len(rows)} clients, or name another key",
            )
        parts: list[list[int]] = [[] for _ in clients]
        for key in sorted(rows, key=lambda key: (-len(rows[key]), key)):
            min(parts, key=len).extend(rows[key])
        return assign(clients, [np.asarray(part) for part in parts])
