"""What a model weighs: its parameters, its bytes, and the zeros in its matrices, as counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Footprint:
    """Counted over a loaded model.

    Attributes:
        parameters: entries of all parameters, a tied one once.
        bytes: of the parameters as loaded.
        matrix_entries: entries of the decoder's linear weights, those of experts included (no
            embedding, no output head).
        matrix_zeros: how many of those are exactly zero.
    """

    parameters: int
    bytes: int
    matrix_entries: int
    matrix_zeros: int

    @property
    def sparsity(self) -> float:
        """The share of zeros in the decoder's linear weights."""
        return self.matrix_zeros / self.matrix_entries if self.matrix_entries else 0.0


def measure_footprint(model: PreTrainedModel) -> Footprint:
    """Count parameters, bytes and zeros; an adapter counts only once it is merged."""
    import torch
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    parameters = list(model.parameters())
    matrices = [
        module.weight
        for module in model.modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    ]
    matrices += [each for each in parameters if each.dim() == 3]  # of experts, one above the other
    return Footprint(
        parameters=sum(parameter.numel() for parameter in parameters),
        bytes=sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        matrix_entries=sum(matrix.numel() for matrix in matrices),
        matrix_zeros=sum(matrix.numel() - int(matrix.count_nonzero()) for matrix in matrices),
    )
