"""Clients of lower rank in the global adapter's shape.

Write-back gives a client of rank r_i the first r_i rows of A and columns of B (HetLoRA,
2401.06432), unless the method says which others, so that is where its update belongs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from prufed_plugins.api import Part
from prufed_plugins.errors import UpdateError

_A = "lora_A.weight"


def padded(
    parts: Iterable[Part],
    current: Mapping[str, Tensor],
    windows: Mapping[str, Sequence[int]] | None = None,
) -> Iterator[Part]:
    """Yield each part at the global rank r; the ranks it lacks are zero and masked out.

    Args:
        parts: A (r_i, k) and B (d, r_i) with r_i ≤ r.
        current: A (r, k) and B (d, r).
        windows: by client, the r_i global ranks that its own are, in their order; the first
            without it.

    Raises:
        UpdateError: a client's rank is above the global one.
    """
    for part in parts:
        whole = current[_A].shape[0]
        if part.rank > whole:
            raise UpdateError(
                part.client,
                f"rank {part.rank} is above the global rank {whole}",
                f"give the client a rank of at most {whole}",
            )
        ranks = range(part.rank) if windows is None else windows[part.client]
        if list(ranks) == list(range(whole)):
            yield part
            continue
        tensors, masks = {}, {}
        for key, tensor in part.tensors.items():
            axis = 0 if key == _A else 1
            index = torch.tensor(list(ranks))
            given = part.masks[key]
            present = torch.ones_like(tensor, dtype=torch.bool) if given is None else given
            empty = torch.zeros(current[key].shape, dtype=tensor.dtype)
            tensors[key] = empty.index_copy(axis, index, tensor)
            masks[key] = torch.zeros(current[key].shape, dtype=torch.bool)
            masks[key].index_copy_(axis, index, present)
        yield replace(part, tensors=tensors, masks=masks)
