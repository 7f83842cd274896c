"""Pack one safetensors file and restore it bit for bit, a chunk of a tensor at a time.

A packed file is a safetensors file too: one uint8 tensor per tensor of the original, of the same
name, holding its chunks one after the other, and one metadata entry that says how to read them
(:class:`~prufed_cli.packing.layout.PackedManifest`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import numpy as np
from safetensors import SafetensorError, safe_open

from prufed_cli.errors import INTEGRITY, PrufedError
from prufed_cli.packing.chunks import DamagedChunk, Encoding, decode, encode
from prufed_cli.packing.layout import (
    CHUNK,
    LAYOUT,
    LONGEST_HEADER,
    METADATA_KEY,
    PackedManifest,
    Stored,
    damaged,
    parse_header,
    parse_manifest,
)
from prufed_plugins.safetensors_header import LENGTH_BYTES, header_bytes, with_length

if TYPE_CHECKING:
    from torch import Tensor

Masks = Mapping[str, "Tensor"]
Chunks = dict[str, list[tuple[Encoding, int]]]

_LONGEST_ENCODING: Final[Encoding] = "masked-zstd"


def pack_file(source: Path, target: Path, masks: Masks | None = None) -> PackedManifest:
    """Write the packed form of a safetensors file.

    Of a tensor with a mask only the entries that exist are stored. The mask itself is not: it is
    needed again to unpack, and belongs in a file of its own that travels once.

    Args:
        source: a safetensors file; read once, in memory is one mask and one chunk.
        target: a new file.
        masks: bool tensors by tensor name; a name that is absent has every entry.

    Returns:
        What the packed file says about the original, its SHA-256 included.

    Raises:
        PrufedError: ``source`` is not a whole safetensors file, or one of too many tensors. Nothing
            is left at ``target``.
    """
    with source.open("rb") as file, _new_file(target) as out:
        try:
            header = header_bytes(source)
            tensors = parse_header(header)
        except (SafetensorError, ValueError) as error:
            raise PrufedError(
                f"{source} is not a whole safetensors file: {error}", "fetch it again", INTEGRITY
            ) from error
        hashed = hashlib.sha256(with_length(header))
        file.seek(LENGTH_BYTES + len(header))
        # The header comes first and is known last: its longest form is reserved, and what remains
        # of it is filled with blanks, as the format allows.
        room = len(_packed_header(_longest(header, tensors), tensors))
        if room > LONGEST_HEADER:
            raise PrufedError(
                f"{source} holds {len(tensors):,} tensors, more than a packed file can describe",
                "leave --packed out",
            )
        out.seek(LENGTH_BYTES + room)
        chunks = {
            tensor.name: list(_pack_tensor(tensor, file, out, masks or {}, hashed))
            for tensor in tensors
        }
        size = LENGTH_BYTES + len(header) + sum(tensor.size for tensor in tensors)
        manifest = PackedManifest(
            layout=LAYOUT,
            sha256=hashed.hexdigest(),
            size=size,
            header=header.decode(),
            tensors=chunks,
        )
        out.seek(0)
        out.write(with_length(_packed_header(manifest, tensors).ljust(room)))
    return manifest


def read_packed(source: Path) -> PackedManifest:
    """Return what a packed file says about the original, without reading its tensors.

    Raises:
        PrufedError: the file is damaged, is no packed file, or comes from a newer prufed.
    """
    with _opened(source) as file:
        return parse_manifest(source, file.metadata())


def unpack_file(source: Path, target: Path, masks: Masks | None = None) -> PackedManifest:
    """Write the original of a packed file, and compare its SHA-256.

    Args:
        source: what :func:`pack_file` wrote.
        target: a new file.
        masks: the masks that it was packed with.

    Raises:
        PrufedError: the packed file is damaged, or the masks are not those it was packed with.
            Nothing is left at ``target``.
    """
    with _opened(source) as file:
        manifest = parse_manifest(source, file.metadata())
        try:
            header = manifest.header.encode()
            tensors = parse_header(header)
            _check_sizes(manifest, header, tensors, file)
        except ValueError as error:
            raise damaged(source, str(error)) from error
        with _new_file(target) as out:
            hashed = hashlib.sha256()
            for data in _restored(source, file, manifest, tensors, masks or {}):
                hashed.update(data)
                out.write(data)
            if hashed.hexdigest() != manifest.sha256:
                raise damaged(source, "what it holds is not what was packed")
    return manifest


def _restored(
    source: Path, file: Any, manifest: PackedManifest, tensors: list[Stored], masks: Masks
) -> Iterator[bytes | memoryview]:
    """Return the original's bytes piece by piece."""
    yield with_length(manifest.header.encode())
    for tensor in tensors:
        try:
            for entries in _unpack_tensor(tensor, file, manifest.tensors[tensor.name], masks):
                yield entries.data.cast("B") if entries.size else b""
        except DamagedChunk as error:
            raise damaged(source, f"{tensor.name}: {error}") from error


def _pack_tensor(
    tensor: Stored, file: BinaryIO, out: BinaryIO, masks: Masks, hashed: Any
) -> Iterator[tuple[Encoding, int]]:
    """Copy one tensor from the file's place to the other's, packed; return its chunks."""
    kept = _mask_of(tensor, masks)
    for run in _runs(tensor):
        size = (run.stop - run.start) * tensor.dtype.itemsize
        data = file.read(size)
        if len(data) != size:
            raise OSError(f"{size - len(data)} bytes of {tensor.name} are gone")
        hashed.update(data)
        entries = np.frombuffer(data, tensor.dtype)
        encoding, stored = encode(entries, None if kept is None else kept[run])
        out.write(stored)
        yield encoding, len(stored)


def _unpack_tensor(
    tensor: Stored, file: Any, chunks: list[tuple[Encoding, int]], masks: Masks
) -> Iterator[np.ndarray[Any, Any]]:
    stored = file.get_slice(tensor.name)
    masked = any(encoding.startswith("masked") for encoding, _ in chunks)
    kept = _mask_of(tensor, masks) if masked else None
    at = 0
    for run, (encoding, size) in zip(_runs(tensor), chunks, strict=True):
        count = run.stop - run.start
        mask = None if kept is None else kept[run]
        # safetensors has no slice of nothing
        data = stored[at : at + size] if size else np.empty(0, np.uint8)
        yield decode(encoding, data, count, tensor.dtype, mask)
        at += size


def _check_sizes(manifest: PackedManifest, header: bytes, tensors: list[Stored], file: Any) -> None:
    """Compare every stated size with every other, before anything is made of them.

    Raises:
        ValueError: two differ.
    """
    if manifest.size != LENGTH_BYTES + len(header) + sum(tensor.size for tensor in tensors):
        raise ValueError("the sizes it states do not add up")
    names = {tensor.name for tensor in tensors}
    if odd := sorted((names ^ manifest.tensors.keys()) | (names ^ set(file.keys()))):
        raise ValueError(f"it does not hold what it says of {odd[0]!r}")
    for tensor in tensors:
        chunks = manifest.tensors[tensor.name]
        stored = file.get_slice(tensor.name)
        sizes = [size for _, size in chunks]
        exact = stored.get_dtype() == "U8" and stored.get_shape() == [sum(sizes)]
        if not exact or len(chunks) != tensor.chunks or min(sizes, default=0) < 0:
            raise ValueError(f"the sizes it states of {tensor.name!r} do not add up")


def _runs(tensor: Stored) -> Iterator[slice]:
    for start in range(0, tensor.entries, CHUNK):
        yield slice(start, min(start + CHUNK, tensor.entries))


def _mask_of(tensor: Stored, masks: Masks) -> np.ndarray[Any, Any] | None:
    """Return a tensor's mask, flat; None where it has none that fits."""
    shapes = getattr(masks, "shapes", None)  # known before a mask is unpacked, however large
    if shapes is not None and tuple(shapes.get(tensor.name, ())) != tensor.shape:
        return None
    mask = masks.get(tensor.name)
    if mask is None or tuple(mask.shape) != tensor.shape or mask.numel() != tensor.entries:
        return None
    flat: np.ndarray[Any, Any] = mask.cpu().contiguous().numpy().reshape(-1)
    return flat


def _longest(header: bytes, tensors: list[Stored]) -> PackedManifest:
    """Return a manifest that is at least as long as any of these tensors can have."""
    size = sum(tensor.size for tensor in tensors)
    return PackedManifest(
        layout=LAYOUT,
        sha256="0" * 64,
        size=LENGTH_BYTES + len(header) + size,
        header=header.decode(),
        # a chunk that compression would make longer is stored plain
        tensors={
            tensor.name: [(_LONGEST_ENCODING, CHUNK * tensor.dtype.itemsize)] * tensor.chunks
            for tensor in tensors
        },
    )


def _packed_header(manifest: PackedManifest, tensors: list[Stored]) -> bytes:
    header: dict[str, Any] = {
        "__metadata__": {METADATA_KEY: json.dumps(manifest.model_dump(), separators=(",", ":"))}
    }
    at = 0
    for tensor in tensors:
        size = sum(size for _, size in manifest.tensors[tensor.name])
        header[tensor.name] = {"dtype": "U8", "shape": [size], "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    return text.ljust(-(-len(text) // LENGTH_BYTES) * LENGTH_BYTES)


@contextmanager
def _opened(source: Path) -> Iterator[Any]:
    """Open a packed file; safetensors checks its header first."""
    try:
        with safe_open(source, framework="np") as file:
            yield file
    except SafetensorError as error:
        raise damaged(source, str(error).lower()) from error


@contextmanager
def _new_file(target: Path) -> Iterator[BinaryIO]:
    """Open a file to write that is deleted again if that fails."""
    with target.open("xb") as file:
        try:
            yield file
        except BaseException:
            target.unlink()
            raise
