"""Memory for passing results: used again once nothing refers to it, or given back to the system.

Fresh memory costs more than most of what is done with it here: the system hands it out page by page
and clears every page first. A merge reads and sums tensors of a few shapes thousands of times, and
a block's forward pass asks for the same ones batch after batch.
"""

from __future__ import annotations

import ctypes
import math
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
from numpy.typing import DTypeLike

Array = np.ndarray[Any, Any]

_M_TRIM_THRESHOLD: Final = -1  # malloc.h
_M_MMAP_THRESHOLD: Final = -3

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


_bounds: Final = [2**25]  # where glibc's own ends up: it grows as it sees large pieces freed


@contextmanager
def mapped_above(size: int) -> Iterator[None]:
    """Let the C library map pieces of memory from ``size`` bytes on by themselves, meanwhile.

    Such a piece goes back to the system as soon as it is freed, and the next one comes page by
    page. Smaller ones come from a heap, which keeps what is freed for others: until the end of
    this, when all of it is given back.

    Only glibc can be told so; elsewhere nothing changes.
    """
    _bounds.append(size)
    _bound_mapped(size)
    try:
        yield
    finally:
        _bounds.pop()
        _bound_mapped(_bounds[-1])


def give_back() -> None:
    """Let the C library give the system what its heap keeps of freed memory, where it can."""
    trim = _c_function("malloc_trim")
    if trim is not None:
        trim(0)


def _bound_mapped(size: int) -> None:
    set_option = _c_function("mallopt")
    if set_option is not None:
        set_option(_M_TRIM_THRESHOLD, 2 * size)
        set_option(_M_MMAP_THRESHOLD, size)
    give_back()


def _c_function(name: str) -> Callable[..., int] | None:
    """Return a function of the C library; None where it has none of that name."""
    return getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None
