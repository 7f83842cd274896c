"""What the layer-dropping pruners share: how many layers go, and what is refused.

A strategy is a pure function (layers, count) → the dropped indices, counted from 0. The strategies
are those of Sajjad et al., https://arxiv.org/abs/2004.03844, under the names PruFed uses. A method
that looks at the model scores its layers instead, and the lowest scores go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final, Literal

from prufed_plugins.api import KeptLayers
from prufed_plugins.errors import MethodError

if TYPE_CHECKING:
    from torch import Tensor

    from prufed_plugins.api import Decoder, Progress, PruneTarget
    from prufed_plugins.params import LayerDropParams

FEWEST_LAYERS: Final = 2

Strategy = Callable[[int, int], "set[int]"]


class LayerPruner:
    """Keeps the layers that a strategy does not drop.

    Attributes:
        strategy: (layers, count) → dropped indices; set by each method.
    """

    result: Literal["sliced"] = "sliced"
    needs_calibration = False

    def __init__(self, params: LayerDropParams, strategy: Strategy) -> None:
        self._params = params
        self._strategy = strategy

    def prune(
        self,
        decoder: Decoder,
        calibration: Sequence[Tensor] | None,
        target: PruneTarget,
        progress: Progress,
    ) -> Iterator[KeptLayers]:
        """Yield the kept layers; see :meth:`prufed_plugins.api.Pruner.prune`."""
        layers = len(decoder.blocks)
        count = dropped_count(layers, self._params, target)
        check_count(layers, count)
        yield keep_others(layers, self._strategy(layers, count))
        progress("layers", layers, layers)


class ScoringLayerPruner:
    """Gives every layer a score and drops the K lowest; of equal scores the higher layer goes.

    A method says what the scores are.
    """

    result: Literal["sliced"] = "sliced"
    needs_calibration = False

    def __init__(self, params: LayerDropParams) -> None:
        self._params = params

    def prune(
        self,
        decoder: Decoder,
        calibration: Sequence[Tensor] | None,
        target: PruneTarget,
        progress: Progress,
    ) -> Iterator[KeptLayers]:
        """Yield the kept layers; see :meth:`prufed_plugins.api.Pruner.prune`."""
        layers = len(decoder.blocks)
        count = dropped_count(layers, self._params, target)
        check_count(layers, count)
        scores = self.scores(decoder, calibration, progress)
        yield keep_others(layers, lowest(scores, count), scores)

    def scores(
        self, decoder: Decoder, calibration: Sequence[Tensor] | None, progress: Progress
    ) -> list[float]:
        """Return one score per layer; each finished block is told to ``progress``."""
        raise NotImplementedError


def lowest(scores: Sequence[float], count: int) -> set[int]:
    """Return the indices of the ``count`` lowest scores; of equal ones the higher index."""
    return set(sorted(range(len(scores)), key=lambda index: (scores[index], -index))[:count])


def dropped_count(layers: int, params: LayerDropParams, target: PruneTarget) -> int:
    """Return how many of ``layers`` to drop: by parameter, by count, or K = round(L·s).

    Raises:
        MethodError: nothing says how many, or two things do.
    """
    given = said_counts(layers, params, target)
    if len(given) != 1:
        what = f"{' and '.join(given)} both say" if given else "nothing says"
        raise MethodError(
            f"{what} how many layers to drop",
            "pass one of --layers 8, --set keep=8, --set drop=8, --sparsity 0.25",
        )
    return next(iter(given.values()))


def said_counts(layers: int, params: LayerDropParams, target: PruneTarget) -> dict[str, int]:
    """Return how many layers to drop, by the name of what says so.

    Raises:
        MethodError: a pattern is asked for.
    """
    if target.pattern is not None:
        n, m = target.pattern
        raise MethodError(
            f"a layer pruner cannot prune to the pattern {n}:{m}",
            "pass --sparsity 0.25 or --set keep=8",
        )
    sparsity = target.sparsity
    said = {
        "drop": params.drop,
        "keep": None if params.keep is None else layers - params.keep,
        "layers": target.layers,
        "sparsity": None if sparsity is None else round(layers * sparsity),
    }
    return {name: count for name, count in said.items() if count is not None}


def check_count(layers: int, count: int) -> None:
    """Refuse a count that is negative or leaves fewer than two layers.

    Raises:
        MethodError: as said.
    """
    if layers < FEWEST_LAYERS:
        raise MethodError(
            f"the model has {layers} decoder layer, so none can be dropped",
            "prune its entries: --method magnitude --sparsity 0.5",
        )
    if count < 0:
        raise MethodError(
            f"cannot keep {layers - count} layers of a model that has {layers}",
            f"keep between {FEWEST_LAYERS} and {layers}",
        )
    if layers - count < FEWEST_LAYERS:
        raise MethodError(
            f"dropping {count} of {layers} layers leaves fewer than {FEWEST_LAYERS}",
            f"drop at most {max(layers - FEWEST_LAYERS, 0)}",
        )


def alternate(layers: int, count: int, parity: int) -> set[int]:
    """Return ``count`` layers from the top, every other one, by the parity of the 1-based index.

    Raises:
        MethodError: there are fewer layers of that parity.
    """
    available = [index for index in reversed(range(layers)) if (index + 1) % 2 == parity]
    if count > len(available):
        raise MethodError(
            f"cannot drop {count} of the {len(available)} {'odd' if parity else 'even'} layers "
            f"of a model that has {layers}",
            f"drop at most {len(available)}, or use --method symmetric",
        )
    return set(available[:count])


def keep_others(
    layers: int, dropped: set[int], scores: Sequence[float] | None = None
) -> KeptLayers:
    """Return the layers that are not dropped, ascending, with the scores that decided."""
    kept = tuple(index for index in range(layers) if index not in dropped)
    return KeptLayers(kept, None if scores is None else tuple(scores))
