"""The header of a safetensors file: JSON, after its length, that says which tensors lie where.

Nothing here imports torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from safetensors import safe_open

LENGTH_BYTES: Final = 8
"""Of the length of the header, little endian, which the file begins with."""


def header_bytes(path: Path) -> bytes:
    """Return a file's header as it stands there, without its length.

    Raises:
        OSError: the file cannot be read.
        SafetensorError: it is cut off, or no safetensors file.
    """
    with safe_open(path, framework="np"):  # checks lengths, offsets and dtypes
        pass
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(LENGTH_BYTES), "little"))


def read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Return where the tensors' bytes begin in a file, and what it says of each tensor.

    Raises:
        OSError: the file cannot be read.
        SafetensorError: it is cut off, or no safetensors file.
        ValueError: it changes while it is read.
    """
    text = header_bytes(path)
    header: dict[str, Any] = json.loads(text)
    header.pop("__metadata__", None)
    return LENGTH_BYTES + len(text), header


def with_length(header: bytes) -> bytes:
    """Return a header as a file begins with it: after its length."""
    return len(header).to_bytes(LENGTH_BYTES, "little") + header
