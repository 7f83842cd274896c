"""Directories outside the registry, written so that one is whole or not there at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prufed_registry.durable import (
    TEMPORARY_PREFIX,
    delete_tree,
    full_disk_error,
    is_full_disk,
    storage_errors,
)
from prufed_registry.errors import InvalidRequest, RegistryError


@contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """Return a directory beside `directory` to write into; it takes its place when all is written.

    What a killed process left there is deleted first: the two have the same name every time.

    Raises:
        InvalidRequest: there is something at `directory`, or another process is writing it.
        RegistryError: its disk is full, or a file in it is larger than is allowed.
    """
    from filelock import FileLock, Timeout

    # what a link leads to: nothing can be renamed onto a link; it may also lead to itself
    directory = Path(os.path.realpath(directory))
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InvalidRequest(f"{directory} exists and is not empty", "name a new directory")
    with storage_errors(f"write {directory}", outside=True):
        directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.with_name(f"{TEMPORARY_PREFIX}{directory.name}")
    lock_file = partial.with_name(f"{partial.name}.lock")
    lock = FileLock(lock_file, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        if not lock_file.exists():
            raise InvalidRequest(
                f"cannot write {directory}", "check the directory's permissions and its disk"
            ) from None
        raise InvalidRequest(
            f"another process writes {directory} right now", "wait until it has ended"
        ) from None
    try:
        delete_tree(partial)
        partial.mkdir()
        yield partial
        if directory.exists():
            directory.rmdir()
        lock_file.unlink()  # before, so that a kill after the rename leaves nothing beside it
        partial.rename(directory)
    except Exception as error:
        if is_full_disk(error) and not isinstance(error, RegistryError):
            raise full_disk_error(f"write {directory}", error, outside=True) from error
        raise
    finally:
        delete_tree(partial)
        lock_file.unlink(missing_ok=True)
        lock.release()
