"""Taking clients tier by tier: what ``by-sparsity`` and ``by-depth`` have in common."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from prufed_plugins.samplers.share import share


def sample_tiers(
    tiers: Sequence[Sequence[str]],
    round_index: int,
    seed: int,
    *,
    fraction: float,
    stratified: bool,
) -> list[str]:
    """Return a share of one tier, the tiers in turn; or a share of every tier.

    Args:
        tiers: names by tier; no tier is empty.
        round_index: 0 for the first round, which is the first tier's.
        seed: decides who is taken where ``fraction`` leaves a choice.
        fraction: share of a tier to take, at least one client.
        stratified: whether every tier has its turn in every round.
    """
    if not tiers:
        return []
    turns = tiers if stratified else [tiers[round_index % len(tiers)]]
    random = Random(seed)
    return [name for tier in turns for name in _take(tier, fraction, random)]


def _take(tier: Sequence[str], fraction: float, random: Random) -> list[str]:
    chosen = sorted(random.sample(range(len(tier)), share(fraction, len(tier))))
    return [tier[index] for index in chosen]
