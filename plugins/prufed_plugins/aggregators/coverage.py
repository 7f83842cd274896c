"""The coverage-normalised mean: one formula, many papers.

For each entry e, over clients i with weight w_i, mask m_i and value θ_i::

    S[e] = Σ w_i m_i[e] θ_i[e]      C[e] = Σ w_i m_i[e]      N[e] = Σ m_i[e]
    g'[e] = S[e] / C[e]  where N[e] ≥ min_count, else the fallback

LEGO's HeteAgg (2410.18287, Algorithm 2), PruFed, FedSpaLLM's ℓ0 mean (2410.14852, Eq. 5), FedRolex
and HetLoRA are this formula under different masks, weights and fallbacks.

Sums are float64 whatever the clients send and are cast once at the end. They are additive, so
memory does not depend on the number of clients, and any split of a tensor gives the same result:
where the clients' files can be read piece by piece, sums are taken over pieces that stay in the
processor's cache from one client to the next.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from torch import Tensor

from prufed_plugins.aggregators.coverage_sum import (
    CoverageSum,
    Fallback,
    GlobalShare,
    Mean,
    as_float,
)
from prufed_plugins.aggregators.pieces import Counts, InPieces, mean_in_pieces
from prufed_plugins.api import Merged, Part


@np.errstate(all="ignore")  # NaN and infinity that are masked out, and those that are found later
def coverage_mean(
    parts: Iterable[Part],
    current: Mapping[str, Tensor],
    weights: Mapping[str, float],
    *,
    min_count: int = 1,
    fallback: Fallback = "keep",
    include_global: GlobalShare | None = None,
    absent_as_zero: bool = False,
    counts: Counts | None = None,
) -> Merged:
    """Return the coverage-normalised mean of one module.

    Args:
        parts: the clients' shares of the module; iterated once, or read piece by piece.
        current: the global tensors before the round, by key.
        weights: w_i > 0 by client name.
        min_count: clients an entry needs to move.
        fallback: what the others become. Where the global adapter takes part they keep its value.
        include_global: lets the global adapter take part.
        absent_as_zero: an entry that a client lacks counts, as 0.
        counts: saves reading masks that have not changed since the last round.
    """
    if include_global is not None:
        fallback = "keep"
    mean = Mean(weights, min_count, fallback, include_global, absent_as_zero)
    if isinstance(parts, InPieces):
        readers = {key: parts.readers(key) for key in current}
        if None not in readers.values():
            done = {
                key: mean_in_pieces(mean, key, readers[key] or (), old, counts)
                for key, old in current.items()
            }
            tensors = {key: tensor for key, (tensor, _) in done.items()}
            return _merged(tensors, {key: covered for key, (_, covered) in done.items()})
    sums = {key: CoverageSum(tuple(tensor.shape)) for key, tensor in current.items()}
    for part in parts:
        for key, total in sums.items():
            mean.add(total, part.client, part.tensors[key], part.masks[key])
    if include_global is not None:
        for key, total in sums.items():
            mask = include_global.masks.get(key)
            total.add(as_float(current[key]), mask, include_global.weight, client=False)
    return finish(sums, current, min_count=min_count, fallback=fallback)


def finish(
    sums: Mapping[str, CoverageSum],
    current: Mapping[str, Tensor],
    *,
    min_count: int = 1,
    fallback: Fallback = "keep",
) -> Merged:
    """Return the means of ``sums``, cast to the dtypes of ``current``, and their coverage."""
    tensors: dict[str, Tensor] = {}
    covered: dict[str, Tensor | None] = {}
    for key, total in sums.items():
        old = current[key]
        mean, covered[key] = total.mean(as_float(old) if fallback == "keep" else None, min_count)
        tensors[key] = mean.to(old.dtype)
    return _merged(tensors, covered)


def _merged(tensors: dict[str, Tensor], covered: dict[str, Tensor | None]) -> Merged:
    """Return the result, and as a diagnostic the share of entries that are covered."""
    entries = sum(tensor.numel() for tensor in tensors.values())
    present = sum(
        tensors[key].numel() if mask is None else np.count_nonzero(mask.numpy())
        for key, mask in covered.items()
    )
    coverage = present / entries if entries else 1.0
    return Merged(tensors, {"coverage": coverage}, covered)
