"""Tensors of a safetensors file, read one at a time and never kept.

``safetensors.safe_open`` maps the file: what has been read stays resident for as long as the file
is open, and opening it anew for every tensor parses the header every time. A merge over many
clients wants neither, so the header is parsed once and each access reads its own bytes, into memory
that an earlier tensor no longer needs.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from prufed_plugins.errors import MethodError
from prufed_plugins.memory import scratch
from prufed_plugins.safetensors_header import read_header

DTYPES: Final[Mapping[str, torch.dtype]] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
"""The dtypes that are read, in the order in which safetensors ranks them."""


class _Entry(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    begin: int  # in bytes, after the header


class Buffer:
    """Memory for pieces that are read one after the other: each read overwrites the one before."""

    def __init__(self, size: int) -> None:
        """Take ``size`` bytes."""
        self._memory = scratch([size], np.uint8)
        self._taken: tuple[int, torch.dtype, memoryview, Tensor] | None = None

    def take(self, size: int, dtype: torch.dtype) -> tuple[memoryview, Tensor]:
        """Return the first ``size`` bytes, to be filled, and as entries, to be looked at."""
        if self._taken is None or self._taken[:2] != (size, dtype):
            part = self._memory[:size]
            self._taken = size, dtype, part.data, torch.from_numpy(part).view(dtype)
        return self._taken[2:]


class Entries(NamedTuple):
    """A tensor that is read piece by piece.

    Attributes:
        dtype: of its entries.
        shape: what it is as a whole.
        read: returns the entries from one index to before another, in row-major order; in the
            buffer, if it is given one that is large enough and they are not in memory anyway.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[int, int, Buffer | None], Tensor]


def entries_of(tensors: Mapping[str, Tensor], name: str) -> Entries | None:
    """Return one of the tensors to be read piece by piece; None where it can only be had whole.

    A mapping that reads from disk says how with a method ``entries(name)`` like
    :meth:`TensorFile.entries`.

    Raises:
        KeyError: there is no such tensor.
        MethodError: it cannot be read.
    """
    method = getattr(tensors, "entries", None)
    if method is not None:
        found: Entries = method(name)
        return found
    if not isinstance(tensors, dict):
        return None
    tensor: Tensor = tensors[name]
    flat = tensor.detach().cpu().reshape(-1)
    return Entries(tensor.dtype, tuple(tensor.shape), lambda start, stop, buffer: flat[start:stop])


class TensorFile(Mapping[str, Tensor]):
    """A safetensors file as a mapping; every access reads the tensor anew.

    Memory in use is that of the tensors the caller still holds, whatever the size of the file.
    """

    def __init__(self, path: Path) -> None:
        """Parse the header.

        Args:
            path: the file; it must not change while it is read.

        Raises:
            MethodError: the file is missing, truncated or no safetensors file.
        """
        self._path = path
        self._name = str(path)  # of a path it would be made anew at every read
        try:
            self._start, header = read_header(path)
        except (OSError, SafetensorError, ValueError) as error:
            raise MethodError(
                f"cannot read tensors from {path}: {error}", "make the adapter again"
            ) from error
        self._entries = {sys.intern(name): _entry(stated) for name, stated in header.items()}

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor.

        Raises:
            KeyError: the file has no such tensor.
            MethodError: the file has become shorter or unreadable, or the dtype is not supported.
        """
        entries = self.entries(name)
        return entries.read(0, math.prod(entries.shape), None).reshape(entries.shape)

    def entries(self, name: str) -> Entries:
        """Return one tensor to be read piece by piece.

        Raises:
            KeyError: the file has no such tensor.
            MethodError: the dtype is not supported; on reading, the file has become shorter or
                unreadable.
        """
        stated, shape, begin = self._entries[name]
        if stated not in DTYPES:
            raise MethodError(
                f"{name} in {self._path} has dtype {stated}", "save it as F32, F16 or BF16"
            )
        dtype = DTYPES[stated]
        width, begin = dtype.itemsize, self._start + begin

        def read(start: int, stop: int, buffer: Buffer | None) -> Tensor:
            size = (stop - start) * width
            if not size:
                return torch.empty(0, dtype=dtype)
            view, entries = (buffer or Buffer(size)).take(size, dtype)
            try:
                _read_into(view, self._name, begin + start * width)
            except OSError as error:
                raise MethodError(
                    f"cannot read {name} from {self._path}: {error}", "make the adapter again"
                ) from error
            return entries

        return Entries(dtype, shape, read)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _entry(stated: dict[str, Any]) -> _Entry:
    """Keep what is equal once, in tuples, since a round keeps the header of every client."""
    shape = _once(tuple(stated["shape"]))
    return _Entry(sys.intern(stated["dtype"]), shape, stated["data_offsets"][0])


@lru_cache(maxsize=1024)
def _once(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the first of all equal shapes."""
    return shape


def _read_into(view: memoryview, path: str, offset: int) -> None:
    """Fill ``view`` from the file; one read returns at most 2 GiB."""
    file = os.open(path, os.O_RDONLY)  # io.FileIO takes as long again as reading a short piece
    try:
        while view:
            count = os.preadv(file, [view], offset)
            if not count:
                raise OSError(f"{len(view)} bytes are missing at the end of the file")
            view, offset = view[count:], offset + count
    finally:
        os.close(file)
