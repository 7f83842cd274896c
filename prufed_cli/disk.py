"""Whether the disks have room for what is going to be written."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from prufed_cli.errors import FAILED, PrufedError


def free_at(path: Path) -> tuple[Path, int]:
    """Return the nearest directory that exists, a path itself or one above, and its free bytes."""
    while not path.exists():
        path = path.parent
    return path, shutil.disk_usage(path).free


def check_room(what: str, needed: Mapping[Path, int]) -> None:
    """Refuse what does not fit; what goes to several places on one disk is added up.

    Args:
        what: as in "the sub-models need", before the size.
        needed: bytes that are going to be written, by where; none of it has to exist yet.

    Raises:
        PrufedError: a disk has less room.
    """
    from rich.filesize import decimal

    sizes: dict[int, int] = {}
    for path, size in needed.items():
        place, free = free_at(path)
        disk = place.stat().st_dev
        sizes[disk] = sizes.get(disk, 0) + size
        if sizes[disk] > free:
            raise PrufedError(
                f"{what} {decimal(sizes[disk])} on disk, but {place} has {decimal(free)} free",
                "free some space (`prufed gc`), or point PRUFED_HOME at a larger disk",
                FAILED,
            )
