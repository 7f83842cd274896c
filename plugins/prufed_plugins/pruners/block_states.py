"""The hidden states that enter and leave each decoder block, one batch of one block at a time.

They are the block's own input and output. A model's list of hidden states will not do: its last
entry has been through the final norm, which makes the last block look as if it did more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from prufed_plugins.entries import is_finite
from prufed_plugins.errors import MethodError

if TYPE_CHECKING:
    from torch import Tensor

    from prufed_plugins.api import Decoder


class Passage(NamedTuple):
    """One batch on its way through one block.

    Attributes:
        block: the block's index.
        batch: the batch's index.
        before: what the block received, (B, T, H).
        after: what it returned, (B, T, H).
    """

    block: int
    batch: int
    before: Tensor
    after: Tensor


def passages(decoder: Decoder, calibration: Sequence[Tensor] | None) -> Iterator[Passage]:
    """Yield every batch's passage through every block, block by block.

    Raises:
        MethodError: there is no calibration, or a hidden state is not finite.
    """
    if not calibration:
        raise MethodError(
            "this method needs calibration text",
            "pass --calibration FILE, or leave it out to use the embedded text",
        )
    with torch.no_grad():
        states = decoder.embed(calibration)
    for block in range(len(decoder.blocks)):
        decoder.linears(block)  # loads it
        for batch, (before, arguments) in enumerate(states):
            with torch.no_grad():
                after = decoder.run_block(block, before, arguments)
            if not is_finite(after):
                raise MethodError(
                    f"the outputs of block {block} are not finite",
                    "load the model with --dtype float32, or check its weights",
                )
            yield Passage(block, batch, before.to(after.device), after)
            states[batch] = (decoder.hold(after), arguments)
