"""The sub-models that clients made of the same base, read one matrix at a time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from prufed_plugins.api import MASKS_FILE
from prufed_plugins.errors import MethodError
from prufed_plugins.mask_files import MaskFile
from prufed_plugins.pruners.reference_weights import shards
from prufed_plugins.tensor_files import TensorFile

if TYPE_CHECKING:
    from prufed_plugins.api import Decoder
    from prufed_plugins.tensor_files import Entries


class SubModel:
    """Masks and weights in a directory that ``prufed prune`` wrote.

    Attributes:
        directory: where it is.
    """

    def __init__(self, directory: Path) -> None:
        """Read the headers.

        Raises:
            MethodError: there are no masks, or no whole safetensors.
        """
        self.directory = directory
        self._masks = MaskFile(directory / MASKS_FILE)
        self._files = {name: file for file in map(TensorFile, shards(directory)) for name in file}

    def check(self, decoder: Decoder) -> None:
        """Refuse masks and weights of another shape than the model's matrices.

        Raises:
            MethodError: as said, with the first such matrix.
        """
        for index in range(len(decoder.blocks)):
            for name, (rows, columns) in decoder.shapes(index).items():
                parameter = f"{name}.weight"
                if parameter not in self._masks:
                    continue
                shapes = self._masks.shapes[parameter], self.weight(parameter).shape
                for shape in map(list, shapes):
                    if shape not in ([rows, columns], [columns, rows]) or shape != list(shapes[0]):
                        raise MethodError(
                            f"{self.directory}: {parameter} is {shape}, not {[rows, columns]}",
                            "only sub-models of the same base can be merged",
                        )

    def mask(self, parameter: str) -> Entries | None:
        """Return the mask of a matrix to be read piece by piece; None where it has none."""
        return self._masks.entries(parameter) if parameter in self._masks else None

    def weight(self, parameter: str) -> Entries:
        """Return a matrix to be read piece by piece, in the parameter's own layout.

        Raises:
            MethodError: the files have none of that name.
        """
        name = self._masks.stored_name(parameter)
        stored = name if name in self._files else name.partition(".")[2]
        if stored not in self._files:
            raise MethodError(
                f"{self.directory} has a mask of {parameter}, but no weight",
                "ask that client for its sub-model again",
            )
        return self._files[stored].entries(stored)
