"""What the layer-dropping pruners share: how many layers go, and what is refused.

A strategy is a pure function (layers, count) → the dropped indices, counted from 0. The strategies
are those of Sajjad et al., https://arxiv.org/abs/2004.03844, under the names PruFed uses. A method
that looks at the model scores its layers instead, and the lowest scores go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from prufed_plugins.api import KeptLayers
from prufed_plugins.errors import MethodError

if TYPE_CHECKING:
    from torch import Tensor

    from prufed_plugins.api import Decoder, Progress, PruneTarget
    from prufed_plugins.params import LayerDropParams

FEWEST_LAYERS: Final = 2

Strategy = Callable[[int, int], "set[int]"]


Dropped = tuple["set[int]", "Sequence[float] | None"]
"""The indices of the layers to drop, and the scores that decided where there are any."""


@dataclass(frozen=True)
class Subject:
    """What a layer pruner works on.

    Attributes:
        decoder: the model.
        calibration: batches of token ids, each (B, T); None where the method needs none.
        progress: told about finished blocks.
    """

    decoder: Decoder
    calibration: Sequence[Tensor] | None
    progress: Progress

    @property
    def layers(self) -> int:
        """How many decoder layers the model has."""
        return len(self.decoder.blocks)

    def all_seen(self) -> None:
        """Say that nothing of the model is left to look at."""
        self.progress("layers", self.layers, self.layers)


class LayerPruner:
    """Drops whole layers. A method says how many, where parameters and target do not, and which.

    Attributes:
        result: ``sliced``.
        needs_calibration: whether text is run through the model.
        needs_matrices: whether every matrix of a block must be a linear module.
    """

    result: Literal["sliced"] = "sliced"
    needs_calibration = False
    needs_matrices = False

    def __init__(self, params: LayerDropParams) -> None:
        self._params = params

    def check(self, decoder: Decoder, targets: Sequence[PruneTarget]) -> None:
        """Refuse what cannot be met, without looking at a weight.

        Raises:
            MethodError: so many layers cannot be dropped.
        """
        for target in targets:
            layers = len(decoder.blocks)
            check_count(layers, self.count(layers, target))

    def prune(
        self,
        decoder: Decoder,
        calibration: Sequence[Tensor] | None,
        target: PruneTarget,
        progress: Progress,
    ) -> Iterator[KeptLayers]:
        """Yield the kept layers; see :meth:`prufed_plugins.api.Pruner.prune`.

        Raises:
            MethodError: so many layers cannot be dropped; or what :meth:`choose` raises.
        """
        subject = Subject(decoder, calibration, progress)
        count = self.count(subject.layers, target)
        check_count(subject.layers, count)
        dropped, scores = self.choose(subject, count)
        kept = tuple(index for index in range(subject.layers) if index not in dropped)
        yield KeptLayers(kept, scores if scores is None else tuple(scores))

    def count(self, layers: int, target: PruneTarget) -> int:
        """Return how many of ``layers`` to drop.

        Raises:
            MethodError: nothing says how many, or two things do.
        """
        return dropped_count(layers, self._params, target)

    def choose(self, subject: Subject, count: int) -> Dropped:
        """Return the layers to drop, and the scores that decided where there are any.

        Raises:
            MethodError: the layers cannot be told.
        """
        raise NotImplementedError


class PositionalLayerPruner(LayerPruner):
    """Drops the layers that a strategy names by their position alone."""

    def __init__(self, params: LayerDropParams, strategy: Strategy) -> None:
        super().__init__(params)
        self._strategy = strategy

    def check(self, decoder: Decoder, targets: Sequence[PruneTarget]) -> None:
        """Refuse what cannot be met, without looking at a weight.

        Raises:
            MethodError: so many layers cannot be dropped, or not by this strategy.
        """
        super().check(decoder, targets)
        for target in targets:
            layers = len(decoder.blocks)
            self._strategy(layers, self.count(layers, target))

    def choose(self, subject: Subject, count: int) -> Dropped:
        """Return what the strategy drops."""
        dropped = self._strategy(subject.layers, count)
        subject.all_seen()
        return dropped, None


class ScoringLayerPruner(LayerPruner):
    """Gives every layer a score and drops the K lowest; of equal scores the higher layer goes.

    A method says what the scores are.
    """

    def choose(self, subject: Subject, count: int) -> Dropped:
        """Return the layers of the lowest scores, and all scores."""
        scores = self.scores(subject)
        return lowest(scores, count), scores

    def scores(self, subject: Subject) -> list[float]:
        """Return one score per layer; each finished block is told to its ``progress``."""
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
