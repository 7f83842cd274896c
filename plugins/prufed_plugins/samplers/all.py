"""Full participation."""

from __future__ import annotations

from collections.abc import Sequence

from prufed_plugins.api import ClientInfo
from prufed_plugins.params import NoParams


class AllSampler:
    """Every client trains in every round."""

    def __init__(self, params: NoParams) -> None:
        self.params = params

    def sample(self, round_index: int, clients: Sequence[ClientInfo], seed: int) -> list[str]:
        """Return every client's name, in the order of the configuration."""
        return [client.name for client in clients]
