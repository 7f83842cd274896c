"""Models that are in memory as a whole, pruned and sliced there: what streaming is held against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prufed_cli.models.decoder import (
    ARGUMENTS,
    BlockCall,
    find_stack,
    first_inputs,
    linears_of,
    run_stack,
    shape_of,
    stack_of,
)
from prufed_cli.models.experts import unfuse_experts
from prufed_cli.models.slicing import check_layers, slice_config


class WholeDecoder:
    """A transformers model in memory as :class:`prufed_plugins.api.Decoder`."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self._model = model
        self.prefix = find_stack(model)
        self.start = 0
        self._stored = dtype
        self.blocks: Sequence[nn.Module] = list(stack_of(model, self.prefix))
        self.masks: Mapping[str, Tensor] = {}
        self._items = items_returned(model, self.blocks[0])

    def linears(self, index: int) -> Mapping[str, nn.Module]:
        """Return the prunable matrices of a block by their full module name."""
        return linears_of(self.blocks[index], f"{self.prefix}.{index}")

    def shapes(self, index: int) -> Mapping[str, tuple[int, int]]:
        """Return (outputs, inputs) of the matrices of a block."""
        return {name: shape_of(module) for name, module in self.linears(index).items()}

    def stored_dtype(self, name: str) -> torch.dtype:
        """Return what a parameter will be stored in."""
        return self._stored

    def embed(self, batches: Sequence[Tensor]) -> list[tuple[Tensor, dict[str, Any]]]:
        """Return what the first block receives for each batch (B, T), and the blocks' arguments."""
        found = (first_inputs(self._model, self.blocks, b, items=self._items) for b in batches)
        return [(hidden, {ARGUMENTS: calls}) for hidden, calls in found]

    def run_block(self, index: int, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Return the output (B, T, H) of a block."""
        call: BlockCall = arguments[ARGUMENTS][index]
        output: Any = self.blocks[index](hidden, *call.args, **call.kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def hold(self, hidden: Tensor, instead_of: Tensor | None = None) -> Tensor:
        """Return ``hidden``: all of it fits into memory."""
        return hidden


def open_decoder(model: PreTrainedModel, dtype: torch.dtype | None = None) -> WholeDecoder:
    """Return the decoder of a model in evaluation mode, the experts of a mixture unfused.

    Args:
        model: the model.
        dtype: what its weights will be stored in; by default what they are in now.
    """
    model.eval()
    unfuse_experts(model)
    return WholeDecoder(model, dtype or model.dtype)


def items_returned(model: PreTrainedModel, block: nn.Module) -> int:
    """Return how many things blocks return in a tuple, by running the model on two tokens."""
    seen: list[int] = []
    handle = block.register_forward_hook(
        lambda m, args, out: seen.append(len(out) if isinstance(out, tuple) else 0)
    )
    device = model.get_input_embeddings().weight.device
    run_stack(model, torch.zeros(1, 2, dtype=torch.long, device=device))
    handle.remove()
    return seen[0]


def slice_layers(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """Keep only some decoder layers, in place, renumbered so that the cache counts from 0."""
    unfuse_experts(model)
    path = find_stack(model)
    stack = stack_of(model, path)
    check_layers(kept, len(stack))
    slice_config(model.config.get_text_config(), kept)
    for local, layer in enumerate(kept):
        for module in stack[layer].modules():
            for name in {"layer_idx", "layer_id"} & vars(module).keys():
                setattr(module, name, local)
    model.set_submodule(path, nn.ModuleList(stack[layer] for layer in kept))
    return model
