"""Clients of one sparsity at a time (LEGO, https://arxiv.org/abs/2410.18287, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence

from prufed_plugins.api import ClientInfo
from prufed_plugins.params import BySparsityParams
from prufed_plugins.samplers.tiers import sample_tiers


class BySparsitySampler:
    """One tier of sparsity per round, the densest first; or a share of every tier."""

    def __init__(self, params: BySparsityParams) -> None:
        self.params = params

    def sample(self, round_index: int, clients: Sequence[ClientInfo], seed: int) -> list[str]:
        """Return the round's names, tier by tier."""
        return sample_tiers(
            self._tiers(clients),
            round_index,
            seed,
            fraction=self.params.fraction,
            stratified=self.params.stratified,
        )

    def _tiers(self, clients: Sequence[ClientInfo]) -> list[list[str]]:
        # Sparsities are counted, so two models pruned to 50 % rarely have the same one.
        tiers: list[list[str]] = []
        start = 0.0
        for client in sorted(clients, key=lambda client: client.sparsity):
            if not tiers or client.sparsity - start > self.params.tolerance:
                tiers.append([])
                start = client.sparsity
            tiers[-1].append(client.name)
        return tiers
