"""Drop every other layer from the top: those whose 1-based number is even.

Sajjad et al., https://arxiv.org/abs/2004.03844, §3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prufed_plugins.pruners.layers import PositionalLayerPruner, alternate

if TYPE_CHECKING:
    from prufed_plugins.params import LayerDropParams


class EvenAlternate(PositionalLayerPruner):
    """Drops the K topmost even-numbered layers."""

    def __init__(self, params: LayerDropParams) -> None:
        super().__init__(params, dropped)


def dropped(layers: int, count: int) -> set[int]:
    """Return the dropped indices, counted from 0: 12 layers, 4 dropped: {5, 7, 9, 11}."""
    return alternate(layers, count, parity=0)
