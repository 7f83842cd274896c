"""Masks in files: a bit for every entry of a matrix, in a safetensors file beside the weights.

A mask is a bool tensor, True where the entry exists.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prufed_plugins.errors import MethodError
from prufed_plugins.tensor_files import Buffer, Entries, TensorFile

METADATA_KEY: Final = "prufed-masks"
"""The one metadata entry of a mask file: JSON with the layout version and the shapes."""

_LAYOUT: Final = 1


def pack(mask: Tensor) -> Tensor:
    """Return the mask as uint8, eight entries a byte, the first in the lowest bit."""
    bits = mask.detach().to("cpu", torch.bool).contiguous().flatten().numpy()
    return torch.from_numpy(np.packbits(bits, bitorder="little"))


def unpack(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the bool mask of ``shape`` that :func:`pack` turned into ``packed``.

    Raises:
        MethodError: ``packed`` is not uint8, has another length than ``shape`` asks for, or has
            bits set beyond the last entry.
    """
    _check_packed(packed.dtype, tuple(packed.shape), shape)
    bits = np.unpackbits(packed.cpu().contiguous().numpy(), bitorder="little").view(np.bool_)
    size = math.prod(shape)
    _check_rest(bits[size:], shape)
    return torch.from_numpy(bits[:size]).reshape(tuple(shape))


def _check_packed(dtype: torch.dtype, stored: tuple[int, ...], shape: Sequence[int]) -> None:
    size = (math.prod(shape) + 7) // 8
    if dtype != torch.uint8 or stored != (size,):
        raise MethodError(
            f"a packed mask of shape {list(shape)} takes {size} bytes, "
            f"not {list(stored)} of {dtype}",
            "the mask file is damaged; prune the base again",
        )


def _check_rest(bits: np.ndarray[Any, Any], shape: Sequence[int]) -> None:
    if bits.any():
        raise MethodError(
            f"a packed mask of shape {list(shape)} has bits beyond its last entry",
            "the mask file is damaged; prune the base again",
        )


def save_masks(path: Path, masks: Mapping[str, Tensor]) -> None:
    """Write masks to a safetensors file: one packed tensor each, shapes in the metadata.

    The bytes depend on the masks alone.
    """
    names = sorted(masks)
    shapes = {name: list(masks[name].shape) for name in names}
    save_file({name: pack(masks[name]) for name in names}, path, metadata=mask_metadata(shapes))


def mask_metadata(
    shapes: Mapping[str, Sequence[int]], stored: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return the metadata of a mask file.

    Args:
        shapes: of the masks, by parameter name.
        stored: by parameter name, what the weights' file calls those that it calls otherwise.
    """
    stated: dict[str, Any] = {"layout": _LAYOUT, "shapes": {n: list(s) for n, s in shapes.items()}}
    if stored:
        stated["stored"] = dict(stored)
    # safetensors does not order metadata entries: with one entry there is one order
    return {METADATA_KEY: json.dumps(stated, sort_keys=True)}


class MaskFile(Mapping[str, Tensor]):
    """The masks of a file, each unpacked when it is asked for.

    Unpacked, the masks of a model take a byte per weight; whoever adapts one matrix per block need
    not pay for the rest.

    Raises:
        MethodError: when opened, the file is missing or damaged, is no mask file, comes from a
            newer layout, or its tensors and its stated shapes differ; on access, a mask is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
        except (OSError, SafetensorError) as error:
            raise MethodError(
                f"cannot read masks from {path}: {error}", "prune the base again"
            ) from error
        self._packed = TensorFile(path)
        self._shapes, self._stored = _stated(path, metadata)
        self._renamed: Mapping[str, str] = {}
        if odd := sorted(self._shapes.keys() ^ set(self._packed)):
            raise MethodError(
                f"{path} and its stated shapes differ in {', '.join(odd[:3])}",
                "prune the base again",
            )

    @property
    def shapes(self) -> Mapping[str, Sequence[int]]:
        """The shape of every mask."""
        return self._shapes

    def stored_name(self, name: str) -> str:
        """Return what the weights' file calls the parameter that has a mask."""
        return self._stored.get(name, name)

    def as_stored(self) -> MaskFile:
        """Return the same masks under the names that the weights' file has for their tensors."""
        if not self._stored:
            return self
        renamed = copy.copy(self)
        renamed._renamed = {self.stored_name(name): name for name in self._shapes}
        renamed._shapes = {new: self._shapes[old] for new, old in renamed._renamed.items()}
        return renamed

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        return unpack(self._packed[self._renamed.get(name, name)], shape)

    def entries(self, name: str) -> Entries:
        """Return one mask to be read piece by piece.

        Raises:
            KeyError: there is no such mask.
            MethodError: it is damaged.
        """
        shape = self._shapes[name]
        packed = self._packed.entries(self._renamed.get(name, name))
        _check_packed(packed.dtype, packed.shape, shape)

        def read(start: int, stop: int, buffer: Buffer | None) -> Tensor:
            first = start // 8
            piece = packed.read(first, (stop + 7) // 8, buffer)
            bits = np.unpackbits(piece.numpy(), bitorder="little").view(np.bool_)
            if stop == math.prod(shape):
                _check_rest(bits[stop - 8 * first :], shape)
            return torch.from_numpy(bits[start - 8 * first : stop - 8 * first])

        return Entries(torch.bool, tuple(shape), read)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._shapes))

    def __len__(self) -> int:
        return len(self._shapes)


def load_masks(path: Path) -> dict[str, Tensor]:
    """Return all masks that :func:`save_masks` wrote, unpacked.

    Raises:
        MethodError: as :class:`MaskFile`.
    """
    return dict(MaskFile(path))


def _stated(
    path: Path, metadata: Mapping[str, str] | None
) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Return the shapes in a mask file's metadata, and the other names that tensors are stored by.

    Raises:
        MethodError: it is no mask file, damaged, or of a newer layout.
    """
    if not metadata or METADATA_KEY not in metadata:
        raise MethodError(f"{path} is not a mask file", "give a file that prufed prune wrote")
    try:
        stated: Any = json.loads(metadata[METADATA_KEY])
        layout, shapes, stored = stated["layout"], stated["shapes"], stated.get("stored", {})
        valid = all(type(n) is int and n >= 0 for shape in shapes.values() for n in shape)
        valid &= stored.keys() <= shapes.keys() and set(map(type, stored.values())) <= {str}
        valid &= len({stored.get(name, name) for name in shapes}) == len(shapes)
    except (ValueError, TypeError, KeyError, AttributeError):
        valid = False
    if not valid:
        raise MethodError(f"{path} has unreadable metadata", "prune the base again")
    if layout != _LAYOUT:
        raise MethodError(
            f"{path} has mask layout {layout}, this version reads {_LAYOUT}", "upgrade prufed"
        )
    return dict(shapes), dict(stored)


def digest(masks: Mapping[str, Tensor]) -> str:
    """Return ``sha256:…`` over names, shapes and entries, independent of the order of names."""
    state = hashlib.sha256()
    for name in sorted(masks):
        state.update(json.dumps([name, list(masks[name].shape)]).encode() + b"\n")
        state.update(pack(masks[name]).numpy().tobytes())
    return f"sha256:{state.hexdigest()}"
