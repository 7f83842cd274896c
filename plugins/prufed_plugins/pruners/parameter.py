"""Drop the layers whose weights say least: by their norm, variance or movement.

Sajjad et al., https://arxiv.org/abs/2004.03844, rank layers by the aggregate or the variance of
their weights; movement is how far tuning took them from where they were.
:mod:`prufed_plugins.pruners.weight_scores` defines the scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from prufed_plugins.errors import MethodError
from prufed_plugins.pruners.layers import ScoringLayerPruner, Subject
from prufed_plugins.pruners.reference_weights import ReferenceWeights
from prufed_plugins.pruners.weight_scores import Score, l1, l2, mean_abs, variance, weight_scores

if TYPE_CHECKING:
    from prufed_plugins.params import ParameterParams

SCORES: Final[Mapping[str, Score]] = {
    "l1": l1,
    "l2": l2,
    "mean-abs": mean_abs,
    "variance": variance,
    "movement": l2,  # of the difference
}


class Parameter(ScoringLayerPruner):
    """Drops the K layers of the lowest weight score."""

    needs_matrices = True

    def __init__(self, params: ParameterParams) -> None:
        super().__init__(params)
        self._score = SCORES[params.score]
        self._reference = params.reference

    def scores(self, subject: Subject) -> list[float]:
        """Return the weight score of every layer.

        Raises:
            MethodError: the reference cannot be read, or is another model's.
        """
        origin = None if self._reference is None else ReferenceWeights(self._reference)
        if origin is not None and (depth := origin.depth(subject.decoder.prefix)) != subject.layers:
            raise MethodError(
                f"the reference {self._reference} has {depth} layers, the model {subject.layers}",
                "name what this model was tuned from: a sub-model's is the sub-model it was before",
            )
        return weight_scores(subject.decoder, self._score, subject.progress, origin)
