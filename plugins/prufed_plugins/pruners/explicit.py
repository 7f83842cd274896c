"""Keep, or drop, the layers that the user lists."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from prufed_plugins.errors import MethodError
from prufed_plugins.pruners.layers import check_count, keep_others

if TYPE_CHECKING:
    from torch import Tensor

    from prufed_plugins.api import Decoder, KeptLayers, Progress, PruneTarget
    from prufed_plugins.params import ExplicitParams


class Explicit:
    """Keeps the layers of one list, or drops those of the other."""

    result: Literal["sliced"] = "sliced"
    needs_calibration = False

    def __init__(self, params: ExplicitParams) -> None:
        self._params = params

    def prune(
        self,
        decoder: Decoder,
        calibration: Sequence[Tensor] | None,
        target: PruneTarget,
        progress: Progress,
    ) -> Iterator[KeptLayers]:
        """Yield the kept layers; see :meth:`prufed_plugins.api.Pruner.prune`."""
        if target.sparsity is not None or target.pattern is not None or target.layers is not None:
            raise MethodError(
                "explicit drops the layers of its list, so a sparsity, pattern or count is one "
                "answer too many",
                "leave it out, and pass --set layers=[0,1,2,5]",
            )
        layers = len(decoder.blocks)
        dropped = _dropped(layers, self._params)
        check_count(layers, len(dropped))
        yield keep_others(layers, dropped)
        progress("layers", layers, layers)


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
