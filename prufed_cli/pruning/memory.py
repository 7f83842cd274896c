"""How much memory there is, and sizes as people write them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from prufed_cli.errors import USAGE, PrufedError

_UNITS: Final = {"": 1} | {
    f"{letter}{unit}": base**power
    for power, letter in enumerate("kmgt", start=1)
    for unit, base in (("", 1000), ("b", 1000), ("ib", 1024))
}
_RESERVE: Final = 0.1
"""Share of the available memory that is left to others."""
_PROCESS: Final = Path("/proc/self/cgroup")
_MOUNT: Final = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class _Figures:
    """What a version of Linux control groups calls its figures.

    Attributes:
        limit: file of the limit. Without one, version 2 says ``max``, and version 1 a number that
            no machine has.
        used: file of what is used.
        cached: begins the line of ``memory.stat`` with the cached files that are not in use. In
            version 1 the plain figure leaves out the groups below, which ``used`` has.
    """

    limit: str
    used: str
    cached: str


_VERSION_1: Final = _Figures(
    "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "
)
_VERSION_2: Final = _Figures("memory.max", "memory.current", "inactive_file ")


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


def available_memory(process: Path = _PROCESS, mount: Path = _MOUNT) -> int:
    """Return the bytes that may be used, less a tenth.

    That is what is free on this machine and left of every limit: of this container, of a job's
    control group, of ``ulimit -v``.

    Args:
        process: says which control groups this process is in.
        mount: where control groups are mounted.
    """
    import psutil

    free = int(psutil.virtual_memory().available)
    left = min([free, *_left_in_groups(process, mount), *_left_of_addresses()])
    return int(max(left, 0) * (1 - _RESERVE))


def _left_of_addresses() -> Iterator[int]:
    """Yield what ``ulimit -v`` leaves to this process, where it is set."""
    import psutil

    try:
        import resource
    except ImportError:  # Windows has none
        return
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        yield limit - int(psutil.Process().memory_info().vms)


def _left_in_groups(process: Path, mount: Path) -> Iterator[int]:
    """Yield what is left in each control group that limits this process: its own and all above.

    A container may be told the path that its group has on the host, and see that group at the
    mount. So groups that cannot be found are passed over, and the mount itself always counts.
    """
    try:
        lines = process.read_text().splitlines()
    except OSError:
        lines = ["0::/"]
    for line in lines:  # hierarchy:controllers:path
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, figures = mount, _VERSION_2
        elif "memory" in controllers.split(","):
            top, figures = mount / "memory", _VERSION_1
        else:
            continue
        group = PurePosixPath(path.lstrip("/"))
        for each in (group, *group.parents):
            left = _left_in_group(top / each, figures)
            if left is not None:
                yield left


def _left_in_group(group: Path, figures: _Figures) -> int | None:
    """Return what is left in one group; None where it is not there, or has no limit.

    Files that were read and are cached count as used there, although the system gives them up as
    soon as memory is wanted.
    """
    limit, used = _figure(group / figures.limit), _figure(group / figures.used)
    if limit is None or used is None:
        return None
    return limit - used + (_figure(group / "memory.stat", figures.cached) or 0)


def _figure(file: Path, key: str = "") -> int | None:
    """Return the figure in the line that begins with a key; None where there is none, or a word."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    found = next((line.removeprefix(key) for line in lines if line.startswith(key)), "")
    return int(found) if found.isdecimal() else None
