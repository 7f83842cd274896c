"""What is asked of every entry of a tensor again and again, in the fewest passes.

On a CPU the plain ways, ``isfinite().all()``, ``mask.sum()`` and ``masked_fill_``, take several
times as long as reading the tensor; together they would cost a tenth of a prune.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from torch import Tensor

_INTEGERS: Final = {2: torch.int16, 4: torch.int32, 8: torch.int64}

_ROWS: Final = 256
"""Rows that are cleared at once, so that what lies between stays small."""


def is_finite(tensor: Tensor) -> bool:
    """Return whether all entries are finite.

    NaN and infinity survive a sum, so one fast pass decides unless the sum itself overflows.
    """
    return math.isfinite(tensor.sum()) or bool(tensor.isfinite().all())


def count(mask: Tensor) -> int:
    """Return how many entries of a bool tensor are True."""
    return int(torch.count_nonzero(mask))


def clear(tensor: Tensor, kept: Tensor) -> None:
    """Set the entries of a floating-point tensor that are not kept to +0, in place.

    Multiplying their bits by 0 or 1 leaves no negative zeros, as multiplying their values would.
    """
    bits = tensor.view(_INTEGERS[tensor.dtype.itemsize])
    for some, flags in zip(
        torch.split(bits, _ROWS), torch.split(kept.view(torch.uint8), _ROWS), strict=True
    ):
        some.mul_(flags.to(bits.dtype))
