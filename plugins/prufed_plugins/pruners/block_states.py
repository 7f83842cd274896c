"""The hidden states that enter and leave each decoder block, one batch of one block at a time.

They are the block's own input and output. A model's list of hidden states will not do: its last
entry has been through the final norm, which makes the last block look as if it did more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from prufed_plugins.pruners.collecting import embed, put

if TYPE_CHECKING:
    from torch import Tensor

    from prufed_plugins.api import Decoder


class Passage(NamedTuple):
    """One batch on its way through one block; the next one may overwrite its states.

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


@torch.no_grad()  # while this runs, not while the caller does
def passages(decoder: Decoder, calibration: Sequence[Tensor] | None) -> Iterator[Passage]:
    """Yield every batch's passage through every block, block by block.

    Raises:
        MethodError: there is no calibration, or a hidden state is not finite.
    """
    states = embed(decoder, calibration)
    for block in range(len(decoder.blocks)):
        decoder.linears(block)  # loads it
        for batch, (before, arguments) in enumerate(states):
            after = decoder.run_block(block, before, arguments)
            yield Passage(block, batch, before.to(after.device), after)
            put(decoder, block, states, batch, after)
