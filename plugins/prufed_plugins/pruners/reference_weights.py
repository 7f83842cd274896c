"""The weights of another checkpoint of the same model, read one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from prufed_plugins.errors import MethodError

if TYPE_CHECKING:
    from torch import Tensor

SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
HINT: Final = "name a model directory with safetensors, as `prufed path REF` prints it"


class ReferenceWeights:
    """The tensors of a model directory by parameter name.

    A checkpoint may leave out the model's outer prefix (``h.0.attn…`` for
    ``transformer.h.0.attn…``); such a name is found as well.
    """

    def __init__(self, directory: Path) -> None:
        """Find the files.

        Raises:
            MethodError: there is no such directory, or no whole safetensors in it.
        """
        self._directory = directory
        self._files = {name: path for path in shards(directory) for name in _names(path)}

    def depth(self, prefix: str) -> int:
        """Return how many blocks the stack at a module path has."""
        outer = {f"{prefix}.", f"{prefix.partition('.')[2]}."}
        inside = (
            name.removeprefix(start).partition(".")[0]
            for name in self._files
            for start in outer
            if name.startswith(start)
        )
        return len({number for number in inside if number.isdecimal()})

    def __call__(self, name: str) -> Tensor:
        """Read one tensor.

        Raises:
            MethodError: the directory has none of that name.
        """
        from safetensors import safe_open

        stored = name if name in self._files else name.partition(".")[2]
        if stored not in self._files:
            raise MethodError(
                f"the reference {self._directory} has no {name}",
                "name the directory of the model that this one was tuned from",
            )
        with safe_open(self._files[stored], framework="pt") as file:
            tensor: Tensor = file.get_tensor(stored)
            return tensor


def shards(directory: Path) -> Iterator[Path]:
    """Yield the weight files of a model directory.

    Raises:
        MethodError: there is no such directory, or its index is none.
    """
    if not directory.is_dir():
        raise MethodError(f"the reference {directory} is no directory", HINT)
    index = directory / INDEX
    if not index.is_file():
        yield directory / SINGLE
        return
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        inside = all(Path(name).name == name for name in names)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise MethodError(f"{index} is no index of shards", HINT) from error
    if not inside:
        raise MethodError(f"{index} names files outside its directory", HINT)
    yield from (directory / name for name in sorted(names))


def _names(path: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise MethodError(f"cannot read the reference's {path.name}: {error}", HINT) from error
