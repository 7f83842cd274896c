"""Is one model better than another on the same documents? A paired bootstrap answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

DRAWS: Final = 10_000


@dataclass(frozen=True)
class PairedDifference:
    """The difference ``second - first`` of two means over the same documents.

    Attributes:
        difference: of the means; with several tasks the mean over tasks of the differences.
        low: lower end of the interval.
        high: upper end of the interval.
        level: coverage of the interval, .95 for 95 %.
        documents: how many documents were compared.
    """

    difference: float
    low: float
    high: float
    level: float
    documents: int


def paired_bootstrap(
    first: Mapping[str, Sequence[float]],
    second: Mapping[str, Sequence[float]],
    *,
    draws: int = DRAWS,
    level: float = 0.95,
    seed: int = 0,
) -> PairedDifference | None:
    """Resample the documents of every task and return the percentile interval of the difference.

    The documents are drawn within each task (the tasks themselves are fixed), and the statistic is
    the unweighted mean over tasks, as in the tables (Efron and Tibshirani, 1993, chapter 13).
    A bootstrap sample of differences only depends on how often each distinct value is drawn, so
    the counts come from one multinomial draw instead of an index per document.

    Args:
        first: task to per-document values; a document stands at the same place in both.
        second: the same for the other model.
        draws: bootstrap samples.
        level: coverage of the interval.
        seed: of the generator.

    Returns:
        The difference, or None where no task is in both.

    Raises:
        ValueError: a task has a different number of documents on the two sides.
    """
    import numpy as np

    shared = sorted(first.keys() & second.keys())
    if not shared:
        return None
    generator = np.random.default_rng(seed)
    point, documents = 0.0, 0
    sampled = np.zeros(draws)
    for task in shared:
        left, right = np.asarray(first[task], float), np.asarray(second[task], float)
        if left.shape != right.shape or not len(left):
            raise ValueError(f"task {task}: {len(left)} documents against {len(right)}")
        values, counts = np.unique(right - left, return_counts=True)
        point += float(values @ counts) / len(left) / len(shared)
        drawn = generator.multinomial(len(left), counts / len(left), size=draws)
        sampled += drawn @ values / len(left) / len(shared)
        documents += len(left)
    tail = (1 - level) / 2
    low, high = np.quantile(sampled, [tail, 1 - tail])
    return PairedDifference(point, float(low), float(high), level, documents)
