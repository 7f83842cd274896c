"""The clients in turn (LEGO, https://arxiv.org/abs/2410.18287, appendix A.4)."""

from __future__ import annotations

from collections.abc import Sequence

from prufed_plugins.api import ClientInfo
from prufed_plugins.params import SequentialParams
from prufed_plugins.samplers.share import share


class SequentialSampler:
    """Round t takes clients t k, ..., (t + 1) k - 1 modulo N, with k = max(floor(fraction N), 1).

    So every client has trained once before any trains for the second time.
    """

    def __init__(self, params: SequentialParams) -> None:
        self.params = params

    def sample(self, round_index: int, clients: Sequence[ClientInfo], seed: int) -> list[str]:
        """Return the round's names, first in turn first."""
        total = len(clients)
        count = share(self.params.fraction, total)
        first = round_index * count
        return [clients[index % total].name for index in range(first, first + count)]
