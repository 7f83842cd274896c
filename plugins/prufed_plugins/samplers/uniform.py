"""A random share of the clients (McMahan et al. 2017, https://arxiv.org/abs/1602.05629)."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from prufed_plugins.api import ClientInfo
from prufed_plugins.params import UniformParams
from prufed_plugins.samplers.share import share


class UniformSampler:
    """``max(floor(fraction * N), 1)`` different clients, each set of that size equally likely."""

    def __init__(self, params: UniformParams) -> None:
        self.params = params

    def sample(self, round_index: int, clients: Sequence[ClientInfo], seed: int) -> list[str]:
        """Return the chosen names, in the order of the configuration."""
        count = share(self.params.fraction, len(clients))
        chosen = sorted(Random(seed).sample(range(len(clients)), count))
        return [clients[index].name for index in chosen]
