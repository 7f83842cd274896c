"""Drop the layers that change their input least.

A layer's score is its Block Influence, BI = 1 − E[cos(x, y)] over all calibration tokens, x the
hidden state that enters the block and y the one that leaves it (Men et al.,
https://arxiv.org/abs/2403.03853, eq. 1). Sajjad et al. (https://arxiv.org/abs/2004.03844, §3) rank
by the same cosine, of the sentence token alone, and drop what lies above a threshold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch.nn.functional import cosine_similarity

from prufed_plugins.errors import MethodError
from prufed_plugins.pruners.block_states import passages
from prufed_plugins.pruners.layers import (
    FEWEST_LAYERS,
    Dropped,
    ScoringLayerPruner,
    Subject,
    said_counts,
)

if TYPE_CHECKING:
    from torch import Tensor

    from prufed_plugins.api import PruneTarget
    from prufed_plugins.params import ContributionParams


class Contribution(ScoringLayerPruner):
    """Drops the K layers of the lowest Block Influence, or all whose cosine is above a threshold.

    The scores are the Block Influence, in [0, 2].
    """

    needs_calibration = True

    def __init__(self, params: ContributionParams) -> None:
        super().__init__(params)
        self._threshold = params.threshold

    def count(self, layers: int, target: PruneTarget) -> int:
        """Return how many layers to drop at least: with a threshold, the scores say how many.

        Raises:
            MethodError: the threshold and something else both say how many.
        """
        if self._threshold is None:
            return super().count(layers, target)
        if given := said_counts(layers, self._params, target):
            raise MethodError(
                f"threshold and {' and '.join(given)} both say how many layers to drop",
                "leave one of them out",
            )
        return 0

    def choose(self, subject: Subject, count: int) -> Dropped:
        """Return the layers of the lowest scores or above the threshold, and all scores.

        Raises:
            MethodError: as :func:`above`, and :meth:`scores`.
        """
        if self._threshold is None:
            return super().choose(subject, count)
        scores = self.scores(subject)
        return above(scores, self._threshold), scores

    def scores(self, subject: Subject) -> list[float]:
        """Return the Block Influence of every layer.

        Raises:
            MethodError: no calibration, or a hidden state that is not finite.
        """
        layers = subject.layers
        sums, tokens = [0.0] * layers, [0] * layers
        for block, batch, before, after in passages(subject.decoder, subject.calibration):
            cosines = _cosines(before.float(), after.float())
            sums[block] += float(cosines.cpu().double().sum())  # mps has no float64
            tokens[block] += cosines.numel()
            if batch + 1 == len(subject.calibration or ()):
                subject.progress("block", block + 1, layers)
        return [1 - total / count for total, count in zip(sums, tokens, strict=True)]


def _cosines(before: Tensor, after: Tensor) -> Tensor:
    """Return the cosine of every token's states (B, T, H), exactly 1 where they are equal, (B, T).

    In float32 a cosine is off by 1e-7: too little to tell layers apart that do something, but it
    would decide between layers that do nothing.
    """
    cosines = cosine_similarity(before, after, dim=-1).clamp(-1, 1)
    return cosines.masked_fill_((before == after).all(dim=-1), 1.0)


def above(scores: Sequence[float], threshold: float) -> set[int]:
    """Return the layers whose mean cosine, 1 − score, is above the threshold.

    Raises:
        MethodError: it is none of them, or so many that fewer than two are left.
    """
    cosines = [1 - score for score in scores]
    dropped = {index for index, cosine in enumerate(cosines) if cosine > threshold}
    ascending = sorted(cosines)
    if not dropped:
        raise MethodError(
            f"no layer's mean cosine is above {threshold:g}; the highest is {ascending[-1]:.4f}",
            f"lower it below {ascending[-1]:.4f}, or say how many: --layers 1",
        )
    if len(scores) - len(dropped) < FEWEST_LAYERS:
        raise MethodError(
            f"{len(dropped)} of {len(scores)} layers have a mean cosine above {threshold:g}, "
            f"which leaves fewer than {FEWEST_LAYERS}",
            f"raise it to {_up(ascending[FEWEST_LAYERS - 1]):.4f} or more, "
            "or say how many: --layers 1",
        )
    return dropped


def _up(value: float) -> float:
    """Return ``value`` rounded up to four decimals."""
    return math.ceil(value * 10_000) / 10_000
