"""The packed form of an artifact: masks and the values they keep, for storing and for sending.

:func:`pack_file` and :func:`unpack_file` do one safetensors file, :func:`pack_artifact` and
:func:`unpack_artifact` a directory. What was packed comes back bit for bit.
"""

from __future__ import annotations

from prufed_cli.packing.directories import (
    PACKED,
    Sizes,
    is_packed,
    pack_artifact,
    refuse_packed,
    restore_packed,
    unpack_artifact,
)
from prufed_cli.packing.files import pack_file, unpack_file

__all__ = [
    "PACKED",
    "Sizes",
    "is_packed",
    "pack_artifact",
    "pack_file",
    "refuse_packed",
    "restore_packed",
    "unpack_artifact",
    "unpack_file",
]
