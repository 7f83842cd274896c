"""A run of a tensor's entries in few bytes: those a mask keeps, byte planes apart, compressed.

The most significant bytes of weights, sign and exponent, are alike and compress well; the least
significant ones are noise. Stored plane by plane ("byte shuffle") the one does not get in the way
of the other.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import numpy as np
import zstandard

Encoding = Literal["plain", "zstd", "masked", "masked-zstd"]
"""``plain``: the entries' bytes. ``zstd``: their byte planes, compressed. ``masked``: only those of
entries that the mask keeps; all bits of the others are zero."""

Entries = np.ndarray[Any, Any]
"""A vector of unsigned integers, one per entry, whatever the entries mean."""

LEVEL: Final = 3


class DamagedChunk(ValueError):  # noqa: N818
    """Stored bytes that are not what :func:`encode` makes."""


def encode(entries: Entries, kept: np.ndarray[Any, Any] | None) -> tuple[Encoding, bytes]:
    """Return how a run is stored, and its bytes.

    Args:
        entries: (n,) unsigned integers.
        kept: (n,) bool, the mask. It is used where it loses nothing: where an entry that it does
            not keep has a bit set, -0.0 included, the run is stored whole.
    """
    values, masked = entries, False
    if kept is not None:
        chosen = entries[kept]
        if np.count_nonzero(chosen) == np.count_nonzero(entries):
            values, masked = chosen, True
    planes = np.ascontiguousarray(_bytes(values).T)
    packed = zstandard.ZstdCompressor(level=LEVEL).compress(planes.data)
    if len(packed) < values.nbytes:
        return ("masked-zstd" if masked else "zstd"), packed
    return ("masked" if masked else "plain"), values.tobytes()


def decode(
    encoding: Encoding,
    stored: Entries,
    count: int,
    dtype: np.dtype[Any],
    kept: np.ndarray[Any, Any] | None,
) -> Entries:
    """Return the run that :func:`encode` stored.

    Args:
        encoding: how.
        stored: the bytes, a uint8 vector.
        count: n, the number of entries.
        dtype: unsigned integers as wide as the entries.
        kept: the mask, (n,) bool; needed where the run is ``masked``.

    Raises:
        DamagedChunk: there is no mask, or the bytes are not those of so many entries. Nothing is
            allocated that ``count`` does not ask for.
    """
    masked = encoding.startswith("masked")
    if masked and kept is None:
        raise DamagedChunk("its mask is missing")
    present = int(np.count_nonzero(kept)) if masked and kept is not None else count
    values = _values(encoding, stored, present, dtype)
    if not masked:
        return values
    entries = np.zeros(count, dtype=dtype)
    entries[kept] = values
    return entries


def _values(encoding: Encoding, stored: Entries, present: int, dtype: np.dtype[Any]) -> Entries:
    size = present * dtype.itemsize
    if not encoding.endswith("zstd"):
        if stored.nbytes != size:
            raise DamagedChunk(f"{present} entries take {size} bytes, not {stored.nbytes}")
        return stored.view(dtype)
    try:
        stated = zstandard.frame_content_size(stored.data)
        if stated != size:
            raise DamagedChunk(f"{present} entries take {size} bytes, not {stated}")
        data = zstandard.ZstdDecompressor().decompress(stored.data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise DamagedChunk(f"its compressed bytes are damaged: {error}") from error
    values = np.empty(present, dtype=dtype)
    _bytes(values)[:] = np.frombuffer(data, np.uint8).reshape(dtype.itemsize, present).T
    return values


def _bytes(values: Entries) -> Entries:
    """Return the entries' bytes as (n, width), without a copy."""
    return values.view(np.uint8).reshape(values.size, values.itemsize)
