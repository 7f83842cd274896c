"""Writing and deleting files so that a crash at any moment leaves the old state or the new one."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from prufed_registry.errors import RegistryError

TEMPORARY_PREFIX = ".prufed-"
"""Every temporary file beside stored files starts with this, so gc knows a stray one."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# safetensors reports a failed write as its own error, with the system's words inside.
_TOO_LARGE_WORDS = ("File too large", "os error 27")
_FULL_WORDS = ("No space left on device", "os error 28", "Disk quota exceeded", *_TOO_LARGE_WORDS)


def fsync(path: Path) -> None:
    """Force a file's bytes, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Create `path` where it is missing, its parent being there, and make the entry durable."""
    try:
        path.mkdir()
    except FileExistsError:
        return
    fsync(path.parent)


def write_atomically(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Put `content` at `path` in one step: a reader sees the old file or the whole new one."""
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(mode)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def delete_tree(path: Path) -> None:
    """Delete a directory, read-only ones inside it included.

    Only directories are made writable: the files share their inodes with other artifacts.
    """
    for directory, _, _ in os.walk(path):
        Path(directory).chmod(0o700)
    if path.exists():
        shutil.rmtree(path)


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_full_disk(error: BaseException | None) -> bool:
    """Say whether an exception means that no more bytes fit, on the disk or into one file."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    return any(words in str(error) for words in _FULL_WORDS)


def full_disk_error(
    action: str, error: BaseException | None, *, outside: bool = False
) -> RegistryError:
    """Return the one sentence for a full disk, or a file at its limit; see :func:`storage_errors`.

    Args:
        action: as there.
        error: what :func:`is_full_disk` is true of.
        outside: as there.
    """
    number = getattr(error, "errno", None)
    if number == errno.EFBIG or any(words in str(error) for words in _TOO_LARGE_WORDS):
        return RegistryError(
            f"cannot {action}: a file would be larger than is allowed here",
            "raise the limit (`ulimit -f unlimited`), or use a disk whose filesystem allows more",
        )
    return RegistryError(
        f"cannot {action}: the disk is full",
        "free some space there, or choose a directory on another disk"
        if outside
        else "free some space ('prufed gc --dry-run' tells what gc would free), "
        "or set PRUFED_HOME to a directory on another disk",
    )


@contextmanager
def storage_errors(action: str, *, outside: bool = False) -> Iterator[None]:
    """Turn an operating system's error into one sentence.

    Args:
        action: as in "publish tiny", after "cannot".
        outside: whether it is not in prufed's home that files are written.
    """
    try:
        yield
    except OSError as error:
        if is_full_disk(error):
            raise full_disk_error(action, error, outside=outside) from error
        where = f" ({error.filename})" if error.filename else ""
        reason = (error.strerror or str(error)).lower()
        raise RegistryError(
            f"cannot {action}: {reason}{where}", "check the directory's permissions and its disk"
        ) from error
