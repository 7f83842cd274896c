"""Keep, or drop, the layers that the user lists."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prufed_plugins.errors import MethodError
from prufed_plugins.pruners.layers import Dropped, LayerPruner, Subject

if TYPE_CHECKING:
    from prufed_plugins.api import PruneTarget
    from prufed_plugins.params import ExplicitParams


class Explicit(LayerPruner):
    """Keeps the layers of one list, or drops those of the other."""

    def __init__(self, params: ExplicitParams) -> None:
        self._lists = params  # instead of the parameters that count layers

    def count(self, layers: int, target: PruneTarget) -> int:
        """Return how many layers the list drops.

        Raises:
            MethodError: the target says how many too, or the list is none of this model's layers.
        """
        if target.sparsity is not None or target.pattern is not None or target.layers is not None:
            raise MethodError(
                "explicit drops the layers of its list, so a sparsity, pattern or count is one "
                "answer too many",
                "leave it out, and pass --set layers=[0,1,2,5]",
            )
        return len(_dropped(layers, self._lists))

    def choose(self, subject: Subject, count: int) -> Dropped:
        """Return the layers that the list drops."""
        subject.all_seen()
        return _dropped(subject.layers, self._lists), None


def _dropped(layers: int, params: ExplicitParams) -> set[int]:
    listed = (params.layers if params.drop_layers is None else params.drop_layers) or ()
    for index in listed:
        if not 0 <= index < layers:
            raise MethodError(
                f"layer {index} does not exist: the model has {layers}, counted from 0",
                f"list layers between 0 and {layers - 1}",
            )
        if listed.count(index) > 1:
            raise MethodError(f"layer {index} is listed twice", "list every layer once")
    return set(range(layers)) - set(listed) if params.drop_layers is None else set(listed)
