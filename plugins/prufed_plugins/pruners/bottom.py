"""Drop the bottom: the layers next to the embedding.

Sajjad et al., https://arxiv.org/abs/2004.03844, §3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prufed_plugins.pruners.layers import PositionalLayerPruner

if TYPE_CHECKING:
    from prufed_plugins.params import LayerDropParams


class Bottom(PositionalLayerPruner):
    """Drops the first K layers."""

    def __init__(self, params: LayerDropParams) -> None:
        super().__init__(params, dropped)


def dropped(layers: int, count: int) -> set[int]:
    """Return the dropped indices, counted from 0: {0, …, K−1}."""
    return set(range(count))
