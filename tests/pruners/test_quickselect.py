"""The k-th smallest of many numbers is that of sorting them, whatever they are."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prufed_plugins.quickselect import FEW, STRIDE, kth_smallest

Numbers = npt.NDArray[np.float32]


def misleading(numbers: Numbers) -> Numbers:
    """Return numbers of which exactly those that are sampled are far too large."""
    numbers[::STRIDE] += 1e6
    return numbers


KINDS: dict[str, Callable[[Numbers], Numbers]] = {
    "as they come": lambda numbers: numbers,
    "ordered": np.sort,
    "mostly zero": lambda numbers: np.maximum(numbers - 1, 0),
    "few values": lambda numbers: np.round(numbers),
    "all equal": np.zeros_like,
    "sampled at the wrong places": misleading,
    "infinite in places": lambda numbers: np.where(np.abs(numbers) > 1, np.inf * numbers, numbers),
}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(
    size=st.integers(1, 5 * FEW),
    share=st.sampled_from([0.0, 0.001, 0.25, 0.5, 0.75, 0.999, 1.0]),
    seed=st.integers(0, 9),
)
def test_it_is_what_sorting_puts_at_that_place(
    kind: str, size: int, share: float, seed: int
) -> None:
    numbers = KINDS[kind](np.random.default_rng(seed).standard_normal(size, np.float32))
    given = numbers.copy()
    k = max(int(share * size), 1)
    assert kth_smallest(numbers, k) == np.sort(numbers)[k - 1]
    assert np.array_equal(numbers, given)
