"""Tensors in safetensors files, read and written piece by piece.

A model larger than memory is read one tensor, or a few rows of one, at a time, and written the same
way. ``safe_open`` maps a file and what has been read stays resident; here every access reads its
own bytes. Files are laid out as ``safetensors`` itself lays them out, so that the same tensors make
the same bytes whoever writes them.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Self
from uuid import uuid4

import torch
from safetensors import SafetensorError

from prufed_cli.errors import INTEGRITY, PrufedError
from prufed_plugins.safetensors_header import LENGTH_BYTES, read_header, with_length
from prufed_plugins.tensor_files import DTYPES

if TYPE_CHECKING:
    from types import TracebackType

    from torch import Tensor

PIECE: Final = 2**17
"""Entries that are read or written at once: what is cast stays in the cache, and takes no memory
that would have to be fetched from the system."""

_RANKS: Final = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}
_CODES: Final = {dtype: code for code, dtype in DTYPES.items()}

_CANNOT: Final = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM})
"""What a system answers that cannot copy between these two files by itself, or is not let."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a safetensors file.

    Attributes:
        path: the file.
        name: its name in the file.
        code: its dtype as safetensors spells it.
        shape: its shape.
        offset: where its bytes begin in the file.
        size: how many bytes.
    """

    path: Path
    name: str
    code: str
    shape: tuple[int, ...]
    offset: int
    size: int

    @property
    def dtype(self) -> torch.dtype:
        """The tensor's dtype.

        Raises:
            PrufedError: it is one that cannot be computed with.
        """
        if self.code not in DTYPES:
            raise PrufedError(
                f"{self.name} is stored as {self.code}", "store the model in a 16 or 32 bit dtype"
            )
        return DTYPES[self.code]

    @property
    def is_floating_point(self) -> bool:
        """Whether it holds floating-point numbers that can be computed with."""
        return self.code in DTYPES and DTYPES[self.code].is_floating_point

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the whole tensor, in a dtype of its own or in another one."""
        entries = math.prod(self.shape)
        if dtype in (None, self.dtype):
            return self._piece(0, entries).reshape(self.shape)
        cast = torch.empty(entries, dtype=dtype)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset)
            for piece in torch.split(cast, PIECE):
                stored = torch.empty(piece.shape, dtype=self.dtype)
                self._fill(file, stored)
                piece.copy_(stored)
        return cast.reshape(self.shape)

    def rows(self, first: int, last: int) -> Tensor:
        """Return rows ``first`` to ``last`` − 1 of the leading dimension."""
        width = math.prod(self.shape[1:])
        return self._piece(first * width, last * width).reshape(-1, *self.shape[1:])

    def gather(self, rows: Sequence[int]) -> Tensor:
        """Return some rows of the leading dimension, in the order given."""
        found = torch.empty(len(rows), *self.shape[1:], dtype=self.dtype)
        width = math.prod(self.shape[1:]) * found.element_size()
        with self.path.open("rb", buffering=0) as file:
            for position, row in enumerate(rows):
                file.seek(self.offset + row * width)
                self._fill(file, found[position])
        return found

    def pieces(self, dtype: torch.dtype) -> Iterator[memoryview]:
        """Yield the tensor's bytes in another dtype, or its own, piece by piece."""
        entries = math.prod(self.shape)
        for first in range(0, entries, PIECE):
            yield _bytes(self._piece(first, min(first + PIECE, entries)).to(dtype))

    def copy_into(self, file: BinaryIO, offset: int) -> bool:
        """Let the system copy the tensor's bytes to ``offset`` of a file; False where it cannot.

        They do not pass through this process, and need no space of their own where the filesystem
        can share them.
        """
        if not hasattr(os, "copy_file_range"):
            return False
        done = 0
        with self.path.open("rb", buffering=0) as source:
            while done < self.size:
                places = (self.offset + done, offset + done)
                try:
                    count = os.copy_file_range(
                        source.fileno(), file.fileno(), self.size - done, *places
                    )
                except OSError as error:
                    if error.errno in _CANNOT:
                        return False
                    raise
                if not count:  # the file's end, or what some filesystems say for "cannot"
                    return False
                done += count
        return True

    def _piece(self, first: int, last: int) -> Tensor:
        """Read the entries from ``first`` to ``last`` − 1 of the flattened tensor."""
        piece = torch.empty(last - first, dtype=self.dtype)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset + first * piece.element_size())
            self._fill(file, piece)
        return piece

    def _fill(self, file: FileIO, tensor: Tensor) -> None:
        left = _bytes(tensor)
        while left:
            count = file.readinto(left)  # at most 2 GiB at once
            if not count:
                raise PrufedError(
                    f"{self.path} has become shorter", "`prufed verify` checks it", INTEGRITY
                )
            left = left[count:]


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file by name, without reading them.

    Raises:
        PrufedError: the file is missing, cut off, or no safetensors file.
    """
    try:
        start, header = read_header(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise PrufedError(
            f"{path} is not a whole safetensors file: {error}", "fetch it again", INTEGRITY
        ) from error
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        shape = tuple(entry["shape"])
        tensors[name] = StoredTensor(path, name, entry["dtype"], shape, start + begin, end - begin)
    return tensors


@dataclass(frozen=True)
class Spec:
    """What a tensor will be: its dtype and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorWriter:
    """Writes a safetensors file whose tensors come one by one, in any order.

    The file appears under its name, whole and durable, when the writer is closed without an error;
    until then it has another name, and after an error it is gone.
    """

    def __init__(
        self, path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str] | None = None
    ) -> None:
        self._path = path
        self._temporary = path.with_name(f".{path.name}-{uuid4().hex}")
        self._specs = specs
        self._header, self._offsets = _layout(specs, metadata or {"format": "pt"})
        self._missing = set(specs)
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        self._file = self._temporary.open("xb")
        self._file.write(self._header)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.commit()
        else:
            self.discard()

    def put(self, name: str, tensor: Tensor) -> None:
        """Write a tensor; it is cast to the dtype it was announced with."""
        spec = self._specs[name]
        assert tuple(tensor.shape) == spec.shape, name
        values = tensor.detach().to("cpu").reshape(-1)
        self._write(name, (_bytes(piece.to(spec.dtype)) for piece in torch.split(values, PIECE)))

    def copy(self, name: str, stored: StoredTensor) -> None:
        """Write a tensor of another file, without holding it."""
        spec = self._specs[name]
        assert stored.shape == spec.shape, name
        assert self._file is not None
        if stored.dtype == spec.dtype and stored.copy_into(self._file, self._place(name)):
            self._missing.discard(name)
        else:
            self._write(name, stored.pieces(spec.dtype))

    def missing(self) -> set[str]:
        """Return the names that were not written yet."""
        return set(self._missing)

    def commit(self) -> None:
        """Close the file, make it durable and give it its name."""
        assert self._file is not None
        assert not self._missing, self._missing
        size = len(self._header) + sum(spec.nbytes for spec in self._specs.values())
        assert self._file.seek(0, os.SEEK_END) == size
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._temporary.replace(self._path)

    def discard(self) -> None:
        """Close the file and delete it."""
        if self._file is not None:
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _write(self, name: str, pieces: Iterator[memoryview]) -> None:
        assert self._file is not None
        self._file.seek(self._place(name))
        for piece in pieces:
            self._file.write(piece)
        self._missing.discard(name)

    def _place(self, name: str) -> int:
        return len(self._header) + self._offsets[name]


def write_checkpoint(
    directory: Path,
    specs: Mapping[str, Spec],
    source: Callable[[str], StoredTensor],
    largest: int,
) -> None:
    """Write ``model.safetensors``, or shards and their index where the total is larger.

    Args:
        directory: where to.
        specs: what to write, by name, in the order in which shards are filled.
        source: returns where a tensor is now.
        largest: bytes of the largest file.
    """
    shards = _shards(specs, largest)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(names, shards, strict=True):
        with TensorWriter(directory / file, shard) as writer:
            for name in shard:
                writer.copy(name, source(name))
    if len(shards) > 1:
        index = {
            "metadata": {
                "total_parameters": sum(math.prod(spec.shape) for spec in specs.values()),
                "total_size": sum(spec.nbytes for spec in specs.values()),
            },
            "weight_map": {n: f for f, shard in zip(names, shards, strict=True) for n in shard},
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _shards(specs: Mapping[str, Spec], largest: int) -> list[dict[str, Spec]]:
    """Return the tensors of each file; a tensor that is larger has a file of its own."""
    shards: list[dict[str, Spec]] = [{}]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + spec.nbytes > largest:
            shards.append({})
            size = 0
        shards[-1][name] = spec
        size += spec.nbytes
    return shards


def _layout(specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """Return a file's head, and where each tensor begins after it."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offsets: dict[str, int] = {}
    position = 0
    for name in sorted(specs, key=lambda name: (-_RANKS[specs[name].dtype], name)):
        spec = specs[name]
        offsets[name] = position
        position += spec.nbytes
        header[name] = {
            "dtype": _CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offsets[name], position],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    return with_length(text), offsets


def _bytes(tensor: Tensor) -> memoryview:
    """Return a contiguous tensor's bytes, without a copy."""
    if sys.byteorder != "little":
        raise PrufedError("safetensors are little endian, this machine is not", "use another one")
    raw: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(raw)
