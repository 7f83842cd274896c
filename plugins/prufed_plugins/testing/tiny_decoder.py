"""Small decoders of random weights that any pruner can be tried on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

LAYERS: Final = 6

FEWER_LAYERS: Final = 3
"""Of the decoders on which only some checks run, to keep those quick."""


class TinyBlock(nn.Module):
    """A residual block of three matrices, two of which share their input."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the block's output (B, T, width)."""
        normed = self.norm(hidden)
        update: Tensor = self.down(torch.tanh(self.gate(normed)) * self.up(normed))
        return hidden + update


class TinyDecoder:
    """A decoder of random weights that any pruner can be tried on.

    Attributes:
        prefix: module path of the stack.
        blocks: the blocks in order.
        start: the first block to be pruned.
        masks: of matrices that were pruned before; none.
        embedding: token embedding, which no pruner may touch.
    """

    prefix = "model.layers"
    _stored = torch.float32
    masks: Mapping[str, Tensor] = MappingProxyType({})

    def __init__(self, layers: int = LAYERS, width: int = 16, inner: int = 24) -> None:
        self.start = 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embedding = nn.Embedding(64, width)
            self.blocks: Sequence[nn.Module] = [TinyBlock(width, inner) for _ in range(layers)]

    def stored_dtype(self, name: str) -> torch.dtype:
        """Return what a parameter is stored in."""
        return self._stored

    def linears(self, index: int) -> Mapping[str, nn.Module]:
        """Return the matrices of a block by their full name."""
        return {
            f"{self.prefix}.{index}.{name}": module
            for name, module in self.blocks[index].named_children()
            if isinstance(module, nn.Linear)
        }

    def shapes(self, index: int) -> Mapping[str, tuple[int, int]]:
        """Return (outputs, inputs) of the matrices of a block."""
        weights = {name: one.get_parameter("weight") for name, one in self.linears(index).items()}
        return {
            name: (rows, columns)
            for name, weight in weights.items()
            for rows, columns in [self.by_rows(weight).shape]
        }

    def by_rows(self, tensor: Tensor) -> Tensor:
        """Return a tensor of a matrix's own layout as (outputs, inputs)."""
        return tensor

    @torch.no_grad()
    def embed(self, batches: Sequence[Tensor]) -> list[tuple[Tensor, dict[str, Any]]]:
        """Return what block ``start`` receives, (B, T, width) each, and no further arguments."""
        states: list[tuple[Tensor, dict[str, Any]]] = []
        for batch in batches:
            hidden = self.embedding(batch)
            for index in range(self.start):
                hidden = self.run_block(index, hidden, {})
            states.append((hidden, {}))
        return states

    def run_block(self, index: int, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Return the output of a block."""
        output: Tensor = self.blocks[index](hidden)
        return output

    def hold(self, hidden: Tensor, instead_of: Tensor | None = None) -> Tensor:
        """Return the values as they are."""
        return hidden

    def parameters(self) -> dict[str, Tensor]:
        """Return a copy of every parameter by its full name."""
        named = {"embedding": self.embedding.weight.detach().clone()}
        for index, block in enumerate(self.blocks):
            for name, parameter in block.named_parameters():
                named[f"{self.prefix}.{index}.{name}"] = parameter.detach().clone()
        return named


class StoredInBfloat16(TinyDecoder):
    """A decoder that computes in float32, and whose weights are stored in bfloat16."""

    _stored = torch.bfloat16

    @torch.no_grad()
    def __init__(self, layers: int = FEWER_LAYERS) -> None:
        super().__init__(layers)
        for block in (self.embedding, *self.blocks):
            for parameter in block.parameters():
                parameter.copy_(parameter.to(self._stored))


class PrunedBefore(TinyDecoder):
    """A decoder whose ``gate`` and ``down`` have lost some of every eight inputs of each row."""

    @torch.no_grad()
    def __init__(self, layers: int = FEWER_LAYERS, gone: int = 1) -> None:
        super().__init__(layers)
        generator = torch.Generator().manual_seed(2)
        masks = {}
        for index in range(layers):
            for name, module in self.linears(index).items():
                if name.endswith("up"):
                    continue
                weight = module.get_parameter("weight")
                draws = torch.rand(len(weight), weight.shape[1] // 8, 8, generator=generator)
                mask = (draws.argsort(dim=2) >= gone).flatten(1)  # a permutation of 0 to 7 each
                weight.masked_fill_(~mask, 0.0)
                masks[f"{name}.weight"] = mask
        self.masks = masks


class OfConv1D(TinyDecoder):
    """A decoder whose matrices are ``Conv1D`` of transformers, with weights (inputs, outputs).

    They are square unless ``inner`` says otherwise, so that what reads them the wrong way goes on.
    """

    @torch.no_grad()
    def __init__(self, layers: int = FEWER_LAYERS, inner: int = 16) -> None:
        super().__init__(layers, inner=inner)
        from transformers.pytorch_utils import (
            Conv1D,
        )  # the class itself, which a pruner may ask for

        for index in range(layers):
            for name, linear in super().linears(index).items():
                weight = linear.get_parameter("weight")
                with torch.random.fork_rng(devices=[]):  # which its own first values come from
                    module = Conv1D(*weight.shape)
                module.weight.copy_(weight.t())
                setattr(self.blocks[index], name.rpartition(".")[2], module)

    def linears(self, index: int) -> Mapping[str, nn.Module]:
        """Return the matrices of a block by their full name."""
        return {
            f"{self.prefix}.{index}.{name}": module
            for name, module in self.blocks[index].named_children()
            if not isinstance(module, nn.LayerNorm)
        }

    def by_rows(self, tensor: Tensor) -> Tensor:
        """Return a tensor of a matrix's own layout as (outputs, inputs)."""
        return tensor.t()


def tokens(batches: int = 2) -> list[Tensor]:
    """Return calibration batches (4, 16) for :class:`TinyDecoder`."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 64, (4, 16), generator=generator) for _ in range(batches)]
