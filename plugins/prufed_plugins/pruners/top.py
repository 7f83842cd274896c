"""Drop the top: the layers next to the output.

Sajjad et al., https://arxiv.org/abs/2004.03844, §3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prufed_plugins.pruners.layers import PositionalLayerPruner

if TYPE_CHECKING:
    from prufed_plugins.params import LayerDropParams


class Top(PositionalLayerPruner):
    """Drops the last K layers."""

    def __init__(self, params: LayerDropParams) -> None:
        super().__init__(params, dropped)


def dropped(layers: int, count: int) -> set[int]:
    """Return the dropped indices, counted from 0: {L−K, …, L−1}."""
    return set(range(layers - count, layers))
