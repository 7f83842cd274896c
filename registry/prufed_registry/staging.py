"""Publishing: a private directory becomes a version in one rename, or leaves no trace.

Order is what makes a crash harmless. The staging lock is taken before the directory exists, so gc
can tell a dead writer from a living one. Files reach the disk before the manifest that names
them, the manifest before the rename, and the rename is both the commit and the claim on the
version number: a directory that is not empty cannot be renamed over.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from uuid import uuid4

from prufed_registry import names
from prufed_registry.artifact import Artifact
from prufed_registry.digests import (
    LAYOUT,
    MANIFEST,
    FileEntry,
    Parent,
    content_digest,
    fingerprint,
    plain_json,
    render,
)
from prufed_registry.durable import (
    TEMPORARY_PREFIX,
    delete_tree,
    fsync,
    full_disk_error,
    hash_file,
    is_full_disk,
    make_directory,
    storage_errors,
    write_atomically,
)
from prufed_registry.errors import InvalidRequest, RegistryError
from prufed_registry.index import facts_of
from prufed_registry.layout import Layout
from prufed_registry.versions import all_numbers
from prufed_registry.weights import check_no_pickle, check_safetensors

if TYPE_CHECKING:
    from filelock import FileLock

# Not every filesystem links: then an artifact keeps its own copy, and nothing else changes.
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV, errno.ENOSYS}


class Staging:
    """A directory to write an artifact into; use it in a ``with`` statement.

    Attributes:
        path: the empty directory. It is removed at the end unless it was published.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self.path = layout.staging / uuid4().hex
        self._lock: FileLock | None = None
        self._files: dict[str, FileEntry] | None = None
        self._published = False

    def __enter__(self) -> Self:
        from filelock import FileLock

        self._layout.create()
        with storage_errors("write into the registry"):
            self._lock = FileLock(lock_of(self.path), thread_local=False)
            try:
                self._lock.acquire()
                self.path.mkdir()
            except BaseException:  # Ctrl-C, too, leaves nothing behind
                delete_tree(self.path)
                self._release()
                raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        delete_tree(self.path)
        if self._files and not self._published:
            self._drop_blobs()
        self._release()
        expected = error is None or isinstance(error, RegistryError)
        if not expected and is_full_disk(error):
            raise full_disk_error("write the artifact", error) from error

    def publish(
        self,
        name: str,
        kind: str,
        *,
        parents: Sequence[Parent] = (),
        recipe: Mapping[str, Any],
        environment: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> Artifact:
        """Make the directory the next version of `name`; nothing may write into it any more.

        Args:
            name: what to publish it under.
            kind: one of `names.KINDS`.
            parents: what it was made from.
            recipe: how it was made: command, plugin, parameters, seed. Together with the kind
                and the parents it makes the fingerprint, so nothing of one machine belongs in it.
            environment: versions of the libraries that made it.
            metrics: what was measured while it was made.
            details: further facts of its kind.

        Raises:
            InvalidRequest: a bad name or kind, an empty directory, a link or a pickle in it.
            Damaged: a safetensors file in it is not whole.
            RegistryError: the disk is full or refuses. Nothing is published then.
        """
        names.check_name(name)
        names.check_kind(kind)
        for parent in parents:
            names.check_digest(parent.digest)
        if self._published:
            raise InvalidRequest(f"{name} is published already", "open another stage")
        facts = {
            "layout": LAYOUT,
            "name": name,
            "kind": kind,
            "parents": [{"ref": parent.ref, "digest": parent.digest} for parent in parents],
            "recipe": plain_json("recipe", recipe),
            "environment": plain_json("environment", environment),
            "metrics": plain_json("metrics", metrics),
            "details": plain_json("details", details),
            "fingerprint": fingerprint(kind, parents, recipe),
        }
        with storage_errors(f"publish {name}"):
            return self._publish(name, facts)

    def seal(self) -> dict[str, FileEntry]:
        """Hash every file, make it durable and read-only; return what the manifest will say.

        Raises:
            InvalidRequest: the directory is empty, or holds a link or a pickle.
            Damaged: a safetensors file is not whole.
        """
        if self._files is None:
            (self.path / MANIFEST).unlink(missing_ok=True)
            found = sorted(regular_files(self.path))
            if not found:
                raise InvalidRequest("an empty directory cannot be published", "write files first")
            for path in found:
                check_no_pickle(path)
                check_safetensors(self.path / path, path)
            self._files = {path: _seal(self.path / path) for path in found}
        return self._files

    def _publish(self, name: str, facts: dict[str, Any]) -> Artifact:
        files = self.seal()
        payload = {
            **facts,
            "files": {path: {"sha256": e.sha256, "size": e.size} for path, e in files.items()},
            "digest": content_digest(files),
            "created": datetime.now(UTC).isoformat(timespec="microseconds"),
        }
        # A damaged blob would damage the new artifact too, so its bytes are read, out of the lock.
        unsound = {e.sha256 for e in files.values() if not _is_sound(self._layout, e.sha256)}
        write_atomically(self.path / MANIFEST, render(payload), mode=0o444)
        with self._layout.changing():
            for path, entry in files.items():
                self._share(self.path / path, entry, replace=entry.sha256 in unsound)
            self._close_directories(files)
            target = self._commit(name)
        fsync(target.parent)
        target.chmod(0o555)
        version = names.parse_version(target.name) or 0
        return Artifact(name, version, str(target), facts_of(payload))

    def _share(self, file: Path, entry: FileEntry, *, replace: bool) -> None:
        """Make a staged file and its blob one inode, where the filesystem can."""
        blob = self._layout.blob(entry.sha256)
        temporary = self.path / f"{TEMPORARY_PREFIX}{uuid4().hex}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        try:
            if not blob.exists():
                os.link(file, blob)
            elif blob.samefile(file):
                return
            elif replace:
                os.link(file, temporary)
                temporary.replace(blob)
            else:
                os.link(blob, temporary)
                temporary.replace(file)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise

    def _close_directories(self, files: Mapping[str, FileEntry]) -> None:
        """Drop empty directories, make the others read-only and durable, deepest first."""
        needed = {parent.as_posix() for path in files for parent in Path(path).parents}
        for directory, _, _ in os.walk(self.path, topdown=False):
            relative = Path(directory).relative_to(self.path).as_posix()
            if relative not in needed:
                Path(directory).rmdir()
                continue
            # A directory must be writable to be moved, so the top one is closed after the rename.
            if relative != ".":
                Path(directory).chmod(0o555)
            fsync(Path(directory))

    def _commit(self, name: str) -> Path:
        make_directory(self._layout.versions(name))
        number = max(all_numbers(self._layout, name), default=0) + 1
        while True:
            target = self._layout.versions(name) / f"v{number}"
            try:
                self.path.rename(target)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
                number += 1
            else:
                self._published = True
                return target

    def _drop_blobs(self) -> None:
        """Delete the blobs that a publication which failed was the first to link."""
        with self._layout.changing():
            for entry in (self._files or {}).values():
                blob = self._layout.blob(entry.sha256)
                if blob.exists() and blob.stat().st_nlink == 1:
                    blob.unlink()

    def _release(self) -> None:
        if self._lock is not None:
            # Unlinked while it is held: whoever waits for it sees that its file is gone.
            lock_of(self.path).unlink(missing_ok=True)
            self._lock.release()
            self._lock = None


def lock_of(directory: Path) -> Path:
    """Return the lock file of a staging directory."""
    return directory.with_name(f"{directory.name}.lock")


def _is_sound(layout: Layout, sha256: str) -> bool:
    try:
        return hash_file(layout.blob(sha256)) == sha256
    except FileNotFoundError:
        return True


def _seal(file: Path) -> FileEntry:
    if file.stat().st_nlink > 1:
        # Its other name stands outside the registry, where anybody may write to it.
        copy = file.with_name(f"{TEMPORARY_PREFIX}{uuid4().hex}")
        shutil.copyfile(file, copy)
        copy.replace(file)
    file.chmod(0o444)
    fsync(file)
    return FileEntry(hash_file(file), file.stat().st_size)


def regular_files(root: Path) -> Iterator[str]:
    """Return the paths of the files under `root`, relative to it.

    Raises:
        InvalidRequest: there is a link or a device, or a name that cannot be stored.
    """
    for directory, directories, files in os.walk(root):
        for name in (*directories, *files):
            path = Path(directory, name)
            relative = path.relative_to(root).as_posix()
            if path.is_symlink() or not (path.is_dir() or path.is_file()):
                raise InvalidRequest(
                    f"{relative!r} is a link or a device, not a file",
                    "copy the directory with 'cp -rL' first",
                )
            if not names.is_safe_path(relative):
                raise InvalidRequest(
                    f"{relative!r} is not a name for a stored file",
                    "rename it: no control characters and no backslashes",
                )
        yield from (Path(directory, name).relative_to(root).as_posix() for name in files)
