"""Where hidden states wait between two blocks: in memory, or in files that are mapped into it."""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class Activations:
    """Keeps hidden states on the host.

    In a file, each tensor has one of its own that is deleted while it is mapped: the system takes
    the space back when the last view of the tensor goes, so a set that is replaced batch by batch
    never exists twice. Pages are handed back after each use and do not add up in memory.

    Attributes:
        directory: where the files are; None keeps everything in memory.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory
        self._maps: weakref.WeakValueDictionary[int, mmap.mmap] = weakref.WeakValueDictionary()

    def hold(self, hidden: Tensor, instead_of: Tensor | None = None) -> Tensor:
        """Return the same values, kept where there is room.

        Args:
            hidden: values to keep.
            instead_of: what was held before and is not needed any more; overwritten where it fits.
                New tensors that stay would lie between those of a forward pass that go, and keep
                the memory of all of them.
        """
        if instead_of is not None and _fits(hidden, instead_of):
            instead_of.copy_(hidden)
            self.rest(instead_of)
            return instead_of
        if self.directory is None or not hidden.numel():
            return hidden.cpu()
        import torch

        with tempfile.TemporaryFile(dir=self.directory) as file:
            _reserve(file, hidden.nbytes)
            mapped = mmap.mmap(file.fileno(), hidden.nbytes)
        held = torch.frombuffer(mapped, dtype=hidden.dtype).reshape(hidden.shape)
        held.copy_(hidden)
        self._maps[held.data_ptr()] = mapped
        self.rest(held)
        return held

    def rest(self, held: Tensor) -> None:
        """Hand back the pages of a held tensor; its values stay in the file."""
        mapped = self._maps.get(held.data_ptr())
        if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)


def _reserve(file: IO[bytes], size: int) -> None:
    """Give a file its size, and the disk's room for it where the system can promise that.

    Without the room, the first value written through the map would kill the process.

    Raises:
        OSError: the disk has not so much room.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
    else:
        file.truncate(size)


def _fits(hidden: Tensor, held: Tensor) -> bool:
    return hidden.shape == held.shape and hidden.dtype == held.dtype and held.is_contiguous()
