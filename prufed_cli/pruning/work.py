"""Unfinished work: the blocks that are pruned already, kept until the sub-model is published.

``<home>/prunes/<fingerprint>/`` belongs to one set of arguments on one base. Of every finished
block it holds, per sub-model, the weights, the packed masks and the report's rows. The rows are
written last, with checksums of the other two: a block without them is not finished, and one that
has changed since is pruned again. A lock beside the directory keeps a second process out; what
nobody has touched for two weeks is deleted once another prune is done, the rest by
``prufed gc --unfinished``.
"""

from __future__ import annotations

import json
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from prufed_cli.errors import PrufedError

if TYPE_CHECKING:
    from filelock import BaseFileLock

KEPT_SECONDS: Final = 14 * 86400
"""How long unfinished work waits to be taken up."""

_ATTEMPTS: Final = 100

_PAUSE: Final = 0.2
"""Seconds between two looks at work that another process has."""

_PIECE: Final = 2**18
"""Bytes of a file that are read at once, few enough for the cache."""

_ANEW: Final = "begun-anew.json"

_FINGERPRINTS: Final = "[0-9a-f]" * 32
"""What work directories are called: where a registry is not in prufed's home, what lies beside it
may be anybody's."""

_ROWS: Final = "[0-9][0-9]-[0-9]*.json"
"""The files that mark a block as finished."""


@dataclass(frozen=True)
class WorkBlock:
    """One block of one sub-model in a work directory.

    Attributes:
        weights: everything stored of the block, under the model's own names; missing where the
            pruner left the block as it was.
        masks: packed masks by parameter name.
        facts: the report's rows, and the shape and kept entries of every mask.
    """

    weights: Path
    masks: Path
    facts: Path

    def is_whole(self) -> bool:
        """Return whether the block is finished, and its files are there and have their length."""
        from prufed_cli.models.stored import stored_tensors

        if not self.facts.is_file():
            return False
        try:
            facts = self.read_facts()
            if facts["shapes"]:
                stored_tensors(self.weights)
                stored_tensors(self.masks)
        except (OSError, ValueError, KeyError, PrufedError):
            return False
        return True

    def is_sound(self) -> bool:
        """Return whether the block is finished, and no byte has changed since; reads them all."""
        return self.is_whole() and self.read_facts().get("checksums") == self.checksums()

    def checksums(self) -> dict[str, int]:
        """Return the CRC-32 of the files with tensors, as far as they exist.

        A longer digest would protect no better from damage, and would take several times as long.
        """
        named = {"weights": self.weights, "masks": self.masks}
        return {name: _crc32(file) for name, file in named.items() if file.is_file()}

    def read_facts(self) -> dict[str, Any]:
        """Return what :attr:`facts` holds.

        Raises:
            ValueError: it has changed since it was written.
        """
        return _read(self.facts)


@dataclass(frozen=True)
class WorkDirectory:
    """A work directory that this process holds."""

    path: Path

    def block(self, submodel: int, index: int) -> WorkBlock:
        """Return where block ``index`` of one of the sub-models is."""
        stem = self.path / f"{submodel:02}-{index:05}"
        return WorkBlock(
            stem.with_name(f"{stem.name}.safetensors"),
            stem.with_name(f"{stem.name}.masks.safetensors"),
            stem.with_name(f"{stem.name}.json"),
        )

    def finished(self, submodels: int, blocks: int) -> int:
        """Return how many blocks, from the first on, are finished in all sub-models."""
        return self._leading(submodels, blocks, WorkBlock.is_whole)

    def sound(self, submodels: int, blocks: int) -> int:
        """Return how many blocks are as they were finished, as :meth:`finished` counts them."""
        return self._leading(submodels, blocks, WorkBlock.is_sound)

    def stated(self, submodels: int, blocks: int) -> int:
        """Return how many blocks are said to be finished; opens no file, so needs no memory."""
        return self._leading(submodels, blocks, lambda block: block.facts.is_file())

    def _leading(self, submodels: int, blocks: int, holds: Callable[[WorkBlock], bool]) -> int:
        for index in range(blocks):
            if not all(holds(self.block(each, index)) for each in range(submodels)):
                return index
        return blocks

    def forget_damaged(self, submodels: int, blocks: int) -> str | None:
        """Let the first block that has changed since it was finished be unfinished.

        Everything goes where one of the answers has changed: what is kept hangs on them.

        Returns:
            A sentence about it; None where all is well.
        """
        if not all(map(_is_readable, self._answers())):
            anew = self.begun_anew
            self.clear()
            if anew:
                self.begin_anew()
            return "what was kept of this prune has changed on disk since; it begins anew"
        index = self.sound(submodels, blocks)
        damaged = [self.block(each, index).facts for each in range(submodels)]
        if not all(facts.is_file() for facts in damaged):
            return None
        for facts in damaged:
            facts.unlink()
        return (
            f"block {index + 1} of {blocks} has changed on disk since it was finished; "
            "it is pruned again, and so are those after it"
        )

    def _answers(self) -> Iterator[Path]:
        return (file for file in self.path.glob("[a-z]*.json") if file.name != _ANEW)

    def answer(self, question: str, ask: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """Return what ``ask`` said the first time the question came up."""
        file = self.path / f"{question}.json"
        if not file.is_file():
            self.write(file, ask())
        return _read(file)

    def write(self, file: Path, content: Mapping[str, Any]) -> None:
        """Write a JSON document with its checksum, whole or not at all."""
        from prufed_registry.durable import write_atomically

        document = {"checksum": _crc32_of(content), "content": content}
        write_atomically(file, (json.dumps(document) + "\n").encode())

    @property
    def begun_anew(self) -> bool:
        """Whether :meth:`begin_anew` began it."""
        return (self.path / _ANEW).is_file()

    def begin_anew(self) -> None:
        """Delete all that is in it, unless it was begun anew before and not finished since."""
        if not self.begun_anew:
            self.clear()
            self.write(self.path / _ANEW, {})

    def clear(self) -> None:
        """Delete all that is in it."""
        for file in self.path.iterdir():
            file.unlink()


@contextmanager
def take_work(
    workplace: Path, fingerprint: str, told: Callable[[str], None]
) -> Iterator[WorkDirectory]:
    """Hold the work directory of a fingerprint; it is deleted at the end unless it holds a block.

    Args:
        workplace: where work is kept.
        fingerprint: of the pass.
        told: hears once that another process has it, which is waited for.

    Raises:
        RegistryError: the disk is full or refuses.
    """
    from filelock import FileLock

    from prufed_registry.durable import storage_errors

    path = workplace / fingerprint
    lock = FileLock(_lock_of(path), timeout=0, thread_local=False)
    with storage_errors("keep unfinished work"):
        _acquire(lock, workplace, told)
    try:
        with storage_errors("keep unfinished work"):
            path.mkdir(exist_ok=True)
            for stray in path.glob(".*"):
                stray.unlink()
        yield WorkDirectory(path)
    finally:
        if not any(path.glob(_ROWS)):
            shutil.rmtree(path, ignore_errors=True)
        _lock_of(path).unlink(missing_ok=True)
        lock.release()
        _remove_empty(workplace)


def _acquire(lock: BaseFileLock, workplace: Path, told: Callable[[str], None]) -> None:
    """Lock a file in the workplace, which a process that ends may remove at any moment."""
    from filelock import Timeout

    waiting, missed = False, 0
    while True:
        try:
            workplace.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            if not waiting:
                told("another process makes this sub-model right now; waiting for it")
                waiting = True
            time.sleep(_PAUSE)
        except (FileNotFoundError, FileExistsError):
            missed += 1
            if missed == _ATTEMPTS:
                raise
        else:
            return


@dataclass(frozen=True)
class Left:
    """Unfinished work that no process holds.

    Attributes:
        path: its directory.
        size: its bytes.
    """

    path: Path
    size: int


def sweep(workplace: Path, *, untouched: float = KEPT_SECONDS, dry_run: bool = False) -> list[Left]:
    """Delete unfinished work that no process holds, and return what that was.

    Args:
        workplace: where work is kept.
        untouched: seconds that it must have been left alone.
        dry_run: only return it.
    """
    from filelock import FileLock, Timeout

    newest = time.time() - untouched
    try:
        paths = sorted(workplace.glob(f"{_FINGERPRINTS}/"))
    except FileNotFoundError:  # another process has removed it as empty
        return []
    swept = []
    for path in paths:
        if _touched(path) > newest:
            continue
        size, lock = _bytes_of(path), FileLock(_lock_of(path), timeout=0)
        try:
            lock.acquire()
        except (Timeout, OSError):  # a process holds it, or nothing may be written here
            continue
        if not dry_run:
            shutil.rmtree(path, ignore_errors=True)
        _lock_of(path).unlink(missing_ok=True)
        lock.release()
        swept.append(Left(path, size))
    _remove_empty(workplace)
    return swept


def _bytes_of(path: Path) -> int:
    """Return the bytes of the files in a directory."""
    try:
        return sum(file.stat().st_size for file in path.iterdir())
    except FileNotFoundError:  # another process has taken the work up
        return 0


def _touched(path: Path) -> float:
    """Return when a directory or a file in it was last changed."""
    try:
        return max(file.stat().st_mtime for file in (path, *path.iterdir()))
    except FileNotFoundError:  # another process renames or deletes what is in it right now
        return time.time()


def _read(file: Path) -> dict[str, Any]:
    """Return what :meth:`WorkDirectory.write` wrote.

    Raises:
        ValueError: the file has changed since.
    """
    document = json.loads(file.read_bytes())
    if not isinstance(document, dict) or document.keys() != {"checksum", "content"}:
        raise ValueError(f"{file.name} has changed since it was written")
    content: dict[str, Any] = document["content"]
    if document["checksum"] != _crc32_of(content):
        raise ValueError(f"{file.name} has changed since it was written")
    return content


def _is_readable(file: Path) -> bool:
    try:
        _read(file)
    except ValueError:
        return False
    return True


def _crc32_of(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content).encode())


def _crc32(file: Path) -> int:
    checksum = 0
    with file.open("rb", buffering=0) as opened:
        while piece := opened.read(_PIECE):
            checksum = zlib.crc32(piece, checksum)
    return checksum


def _lock_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


def _remove_empty(workplace: Path) -> None:
    try:
        workplace.rmdir()
    except OSError:
        return
