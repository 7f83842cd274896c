"""What the system, Python and torch raise where there is no memory left."""

from __future__ import annotations

import errno
import sys
from typing import Final

from prufed_cli.errors import PrufedError

_SAID: Final = ("DefaultCPUAllocator", "bad_alloc", "could not create a memory")
"""How torch, C++ and oneDNN say it in errors that have no class of their own."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory, of the host or of a device, ran out."""
    if isinstance(error, MemoryError) or (
        isinstance(error, OSError) and error.errno == errno.ENOMEM
    ):
        return True
    torch = sys.modules.get("torch")  # without it, no error is torch's
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _SAID)


def out_of_memory_error() -> PrufedError:
    """Return the error to show for it."""
    return PrufedError(
        "out of memory",
        "free some, or ask for less: fewer tokens at a time, a smaller model, --dtype bfloat16",
    )
