"""Clients of one depth at a time (PruFed: users are grouped by the depth of their sub-model)."""

from __future__ import annotations

from collections.abc import Sequence

from prufed_plugins.api import ClientInfo
from prufed_plugins.params import ByDepthParams
from prufed_plugins.samplers.tiers import sample_tiers


class ByDepthSampler:
    """One depth per round, the deepest first; or a share of every depth."""

    def __init__(self, params: ByDepthParams) -> None:
        self.params = params

    def sample(self, round_index: int, clients: Sequence[ClientInfo], seed: int) -> list[str]:
        """Return the round's names, tier by tier."""
        depths = sorted({client.layers for client in clients}, reverse=True)
        tiers = [[client.name for client in clients if client.layers == depth] for depth in depths]
        return sample_tiers(
            tiers,
            round_index,
            seed,
            fraction=self.params.fraction,
            stratified=self.params.stratified,
        )
