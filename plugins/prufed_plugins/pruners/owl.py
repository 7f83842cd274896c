"""OWL: blocks with more outliers keep more of their weights (Yin et al., 2310.05175).

https://arxiv.org/abs/2310.05175

A block's outlier ratio is the share of its entries whose |W_uv|·‖X_v‖₂ exceeds M times the mean
over the block. The ratios of all blocks, stretched to [0, 2λ], are what each block keeps beyond the
average: block l gets the sparsity s − (r_l − r̄).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import starmap
from typing import TYPE_CHECKING, Final

import torch

from prufed_plugins.pruners.collecting import embed, observe
from prufed_plugins.pruners.hessian import InputNorms
from prufed_plugins.pruners.matrices import float_matrix

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor, nn

    from prufed_plugins.api import Decoder, Progress
    from prufed_plugins.pruners.collecting import Observed

KEPT_AT_LEAST: Final = 0.1
"""The least density of a block, as a share of the target's."""


def outlier_ratio(matrices: Iterable[tuple[Tensor, Tensor]], multiple: float) -> float:
    """Return the share of a block's scores that exceed ``multiple`` times their mean.

    Args:
        matrices: float32 weights (rows, columns), each with the norms of its inputs (columns,).
            They are gone through twice and never held together.
        multiple: M.
    """
    # starmap lets go of a matrix before it asks for the next; the variable of a loop would not
    sums = list(starmap(_summed, matrices))
    entries = sum(count for count, _ in sums)
    if not entries:
        return 0.0
    threshold = multiple * sum(total for _, total in sums) / entries
    return sum(starmap(partial(_count_above, threshold), matrices)) / entries


def _summed(weight: Tensor, norms: Tensor) -> tuple[int, float]:
    """Return how many scores a matrix has, and their sum."""
    return weight.numel(), float((weight.abs() @ norms).sum())


def _count_above(threshold: float, weight: Tensor, norms: Tensor) -> int:
    return int((weight.abs() * norms > threshold).sum())


def owl_sparsities(
    ratios: Sequence[float], entries: Sequence[int], sparsity: float, spread: float
) -> list[float]:
    """Return the sparsity of every block.

    The mean, weighted by the blocks' entries, is the target. Where a block would leave [0, 1), or
    keep less than a tenth of the target's density, all blocks move towards the target alike, so the
    mean stands; hence the sparsities of a block rise with the target.

    Args:
        ratios: outlier ratios.
        entries: prunable entries of each block.
        sparsity: the target, in [0, 1).
        spread: λ; the sparsities of two blocks differ by at most 2λ.
    """
    low, high = min(ratios), max(ratios)
    if low == high:
        return [sparsity] * len(ratios)
    kept = [2 * spread * (ratio - low) / (high - low) for ratio in ratios]
    mean = sum(n * one for n, one in zip(entries, kept, strict=True)) / sum(entries)
    moves = [mean - one for one in kept]
    if not min(moves) < 0 < max(moves):  # λ is zero, or too small to matter
        return [sparsity] * len(ratios)
    room = min(1.0, sparsity / -min(moves), (1 - sparsity) * (1 - KEPT_AT_LEAST) / max(moves))
    return [max(sparsity + room * move, 0.0) for move in moves]


def outlier_ratios(
    decoder: Decoder,
    calibration: Sequence[Tensor] | None,
    names: Collection[str],
    multiple: float,
    progress: Progress,
) -> list[float]:
    """Return the outlier ratio of every block of the dense model, in one forward pass.

    Args:
        decoder: the model, from its first block on.
        calibration: batches of token ids, each (B, T).
        names: the matrices that count; experts that no token reaches do not.
        multiple: M.
        progress: told about the blocks.

    Raises:
        MethodError: there is no calibration text, or activations are not finite.
    """
    states = embed(decoder, calibration)
    total = len(decoder.blocks)
    ratios = []
    for index in range(total):
        observed = observe(decoder, index, names, InputNorms, states, advancing=index + 1 < total)
        with torch.no_grad():
            ratios.append(outlier_ratio(_Scored(decoder.linears(index), observed), multiple))
        progress("survey of block", index + 1, total)
    return ratios


@dataclass(frozen=True)
class _Scored:
    """Float32 matrices of a block with the norms of their inputs, each made when its turn comes.

    Attributes:
        linears: the modules by full name.
        observed: what calibration showed of those that count.
    """

    linears: Mapping[str, nn.Module]
    observed: Mapping[str, Observed[InputNorms]]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for name, one in self.observed.items():
            yield float_matrix(name, self.linears[name]), _norms(one.statistic)


def _norms(inputs: InputNorms) -> Tensor:
    """Return ‖X_v‖₂ over all tokens, (columns,): what an expert seldom sees weighs little."""
    return (inputs.second_moments() * inputs.tokens).sqrt()
