"""Where the tensors of a safetensors file lie, and what a packed file says about the original."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prufed_cli.errors import INTEGRITY, PrufedError
from prufed_cli.packing.chunks import Encoding

LAYOUT: Final = 1
METADATA_KEY: Final = "prufed-packed"

CHUNK: Final = 2**20
"""Entries per chunk; part of layout 1, so that no file can ask for a chunk of any size."""

LONGEST_HEADER: Final = 100_000_000  # safetensors itself reads no longer one
_WIDTHS: Final = (1, 2, 4, 8)


@dataclass(frozen=True)
class Stored:
    """One tensor of a safetensors file.

    Attributes:
        name: what the file calls it.
        shape: as the file states it.
        begin: where its bytes begin, after the header.
        size: how many they are.
        entries: how many units it is packed in: its entries, or its bytes where an entry is not 1,
            2, 4 or 8 bytes wide.
    """

    name: str
    shape: tuple[int, ...]
    begin: int
    size: int
    entries: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """Unsigned integers as wide as an entry."""
        return np.dtype(f"u{self.size // self.entries if self.entries else 1}")

    @property
    def chunks(self) -> int:
        """How many chunks it is stored in."""
        return -(-self.entries // CHUNK)


class PackedManifest(BaseModel):
    """The one metadata entry of a packed file.

    Attributes:
        layout: the version of this format.
        sha256: of the original file.
        size: of the original file, in bytes.
        header: the original file's header as it stands there: dtype, shape and place by tensor.
        tensors: for each tensor the (encoding, stored bytes) of its chunks.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    layout: int = Field(ge=1)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size: int = Field(ge=0)
    header: str
    tensors: dict[str, list[tuple[Encoding, int]]]


def damaged(path: Path, problem: str) -> PrufedError:
    """Return the error for a packed file that cannot be restored."""
    return PrufedError(
        f"{path} cannot be unpacked: {problem}", "fetch it again, or pack it again", INTEGRITY
    )


def parse_header(header: bytes | str) -> list[Stored]:
    """Return the tensors in the order in which their bytes lie in the file.

    Raises:
        ValueError: it is no header of a safetensors file, or the tensors leave gaps.
    """
    try:
        stated: dict[str, Any] = json.loads(header)
        tensors = [_place(*entry) for entry in stated.items() if entry[0] != "__metadata__"]
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
        raise ValueError("the header is not that of a safetensors file") from error
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.size))
    at = 0
    for tensor in tensors:
        if tensor.begin != at:
            raise ValueError(f"the header leaves a gap before {tensor.name!r}")
        at += tensor.size
    return tensors


def parse_manifest(path: Path, metadata: dict[str, str] | None) -> PackedManifest:
    """Return what a packed file says about the original.

    Raises:
        PrufedError: it is no packed file, or one of a newer layout.
    """
    text = (metadata or {}).get(METADATA_KEY)
    if text is None:
        raise damaged(path, "it is not a packed file")
    try:
        stated = json.loads(text)
        layout = stated.get("layout") if isinstance(stated, dict) else None
        if isinstance(layout, int) and layout > LAYOUT:
            raise PrufedError(
                f"{path} has packed layout {layout}, this version reads {LAYOUT}",
                "upgrade prufed",
                INTEGRITY,
            )
        # strict JSON mode: arrays may become tuples, and nothing else is converted
        return PackedManifest.model_validate_json(text)
    except (ValueError, RecursionError, ValidationError) as error:
        raise damaged(path, "what it says about itself cannot be read") from error


def _place(name: str, entry: dict[str, Any]) -> Stored:
    shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end - begin)):
        raise ValueError("a length or an offset is not a natural number")
    entries, size = math.prod(shape), end - begin
    whole = any(entries * width == size for width in _WIDTHS)
    return Stored(name, shape, begin, size, entries if whole else size)
