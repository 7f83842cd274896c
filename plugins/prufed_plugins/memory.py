"""Memory for passing results, used again once nothing refers to it any more.

Fresh memory costs more than most of what is done with it here: the system hands it out page by page
and clears every page first. A merge reads and sums tensors of a few shapes thousands of times.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import DTypeLike

Array = np.ndarray[Any, Any]

_KEPT: Final = 32 * 2**20
"""Bytes that wait to be used again, at most."""


class _Pool:
    def __init__(self) -> None:
        self._free: dict[int, list[Array]] = {}
        self._bytes = 0

    def take(self, size: int) -> Array:
        try:
            memory = self._free[size].pop()
            self._bytes -= size
        except (KeyError, IndexError):
            memory = np.empty(size, dtype=np.uint8)
        # Every view of the lease, a tensor's storage included, keeps it alive.
        lease = memory.view()
        weakref.finalize(lease, self._give_back, memory).atexit = False
        return lease

    def _give_back(self, memory: Array) -> None:
        if self._bytes + memory.size <= _KEPT:
            self._bytes += memory.size
            self._free.setdefault(memory.size, []).append(memory)


_pool: Final = _Pool()


def scratch(shape: Sequence[int], dtype: DTypeLike) -> Array:
    """Return an array of any content; what it and its views occupied is used again after them."""
    kind = np.dtype(dtype)
    size = math.prod(shape) * kind.itemsize
    if not size:
        return np.empty(shape, kind)
    lease = _pool.take(size)
    # A view of the lease would refer to the memory itself, as numpy keeps chains of views short;
    # as the owner of a buffer the lease is referred to.
    return np.frombuffer(lease.data, kind).reshape(shape)
