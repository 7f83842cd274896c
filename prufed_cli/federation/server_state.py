"""The server optimizer's state on disk, beside the journal: written before the round is journalled.

``runs/<id>/optimizer-<round>.safetensors`` holds the moments after a merged round. The journal's
``merged`` event names the file and its digest, so a resumed run steps from exactly what an
uninterrupted one would; the file of the round before is removed only after that event is on disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from prufed_cli.errors import INTEGRITY, PrufedError

if TYPE_CHECKING:
    from prufed_plugins.api import ServerOptimizer

_PREFIX: Final = "optimizer-"


def save_state(directory: Path, index: int, optimizer: ServerOptimizer) -> dict[str, str]:
    """Write the state after round ``index`` and return what the journal says about it."""
    from safetensors.torch import save

    from prufed_registry.durable import write_atomically

    content = save({name: tensor.contiguous() for name, tensor in optimizer.state().items()})
    name = f"{_PREFIX}{index}.safetensors"
    write_atomically(directory / name, content)
    return {"file": name, "digest": _digest(content)}


def load_state(directory: Path, noted: Mapping[str, str], optimizer: ServerOptimizer) -> None:
    """Give the optimizer back the state that a ``merged`` event names.

    Raises:
        PrufedError: the file is missing or not the one that was written.
    """
    from safetensors.torch import load

    path = directory / Path(noted["file"]).name
    content = path.read_bytes() if path.is_file() else b""
    if _digest(content) != noted["digest"]:
        state = "damaged" if content else "missing"
        raise PrufedError(
            f"{path} is {state}, so the server optimizer cannot go on",
            "start a new run",
            INTEGRITY,
        )
    optimizer.load_state(load(content))


def forget_older(directory: Path, noted: Mapping[str, str]) -> None:
    """Remove every state but the one the journal's last round names."""
    for path in directory.glob(f"{_PREFIX}*.safetensors"):
        if path.name != noted["file"]:
            path.unlink()


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
