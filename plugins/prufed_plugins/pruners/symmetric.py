"""Drop the middle: as many layers stay at the bottom as at the top.

Sajjad et al., https://arxiv.org/abs/2004.03844, §3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prufed_plugins.pruners.layers import PositionalLayerPruner

if TYPE_CHECKING:
    from prufed_plugins.params import LayerDropParams


class Symmetric(PositionalLayerPruner):
    """Drops the K middle layers; of an odd number of kept layers the top has one more."""

    def __init__(self, params: LayerDropParams) -> None:
        super().__init__(params, dropped)


def dropped(layers: int, count: int) -> set[int]:
    """Return the dropped indices, counted from 0: {lo, …, lo+K−1}, lo = ⌊(L−K)/2⌋."""
    low = (layers - count) // 2
    return set(range(low, low + count))
