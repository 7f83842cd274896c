"""How much memory there is, and sizes as people write them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from prufed_cli.errors import USAGE, PrufedError

_UNITS: Final = {"": 1} | {
    f"{letter}{unit}": base**power
    for power, letter in enumerate("kmgt", start=1)
    for unit, base in (("", 1000), ("b", 1000), ("ib", 1024))
}
_RESERVE: Final = 0.1
"""Share of the available memory that is left to others."""


def parse_size(text: str) -> int:
    """Return the bytes of ``8GB``, ``512MiB`` or ``1.5g``.

    Raises:
        PrufedError: it is no such size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if found is None or (found[2] not in _UNITS and found[2] != "b"):
        raise PrufedError(f"{text!r} is no size", "for example --max-memory 8GB", USAGE)
    size = int(float(found[1]) * _UNITS.get(found[2], 1))
    if not size:
        raise PrufedError("0 bytes is no memory", "for example --max-memory 8GB", USAGE)
    return size


def available_memory() -> int:
    """Return the bytes that may be used: what is free, here or in this container, less a tenth."""
    import psutil

    free = int(psutil.virtual_memory().available)
    limit, used = (_group_bytes(name) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:
        free = min(free, limit - used + (_group_bytes("memory.stat", "inactive_file ") or 0))
    return int(max(free, 0) * (1 - _RESERVE))


def _group_bytes(name: str, key: str = "") -> int | None:
    """Return a figure of the container's control group, from the line that begins with a key.

    None where there is none, or no limit. Files that were read and are cached count as used there
    (``inactive_file``), although the system gives them up as soon as memory is wanted.
    """
    try:
        lines = Path("/sys/fs/cgroup", name).read_text().splitlines()
    except OSError:
        return None
    found = next((line.removeprefix(key) for line in lines if line.startswith(key)), "")
    return int(found) if found.isdecimal() else None
