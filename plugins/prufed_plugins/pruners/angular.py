"""Drop the run of K consecutive layers that turns the last token's state least.

Gromov et al., https://arxiv.org/abs/2403.17887, eq. 7: with h(l) the state of a sequence's last
token where it enters layer l, and h(L) where it leaves the last one,

    d(l) = E[arccos(cos(h(l), h(l+K)))] / π

over the calibration sequences, for every l in {0, …, L−K}; the layers {l*, …, l*+K−1} of the
smallest distance go.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from prufed_plugins.pruners.block_states import passages
from prufed_plugins.pruners.layers import Dropped, LayerPruner, Subject

if TYPE_CHECKING:
    from torch import Tensor


class Angular(LayerPruner):
    """Drops the K consecutive layers of the smallest angular distance.

    The scores are d(l) in [0, 1], one for every layer that K layers can start at: the first L−K+1.
    """

    needs_calibration = True

    def choose(self, subject: Subject, count: int) -> Dropped:
        """Return the run of the smallest distance, and all distances; nothing where K is 0.

        Raises:
            MethodError: no calibration, or a hidden state that is not finite.
        """
        if count == 0:
            subject.all_seen()
            return set(), None
        distances = angular_distances(last_token_states(subject), count)
        # of equal distances the higher layers go, as with every strategy
        start = min(range(len(distances)), key=lambda index: (distances[index], -index))
        return set(range(start, start + count)), distances


def last_token_states(subject: Subject) -> Tensor:
    """Return the last token's state before every block and after the last one, (L+1, N, H)."""
    layers = subject.layers
    entering: list[list[Tensor]] = [[] for _ in range(layers + 1)]
    for block, batch, before, after in passages(subject.decoder, subject.calibration):
        if block == 0:
            entering[0].append(_last(before))
        entering[block + 1].append(_last(after))
        if batch + 1 == len(subject.calibration or ()):
            subject.progress("block", block + 1, layers)
    return torch.stack([torch.cat(batches) for batches in entering])


def angular_distances(states: Tensor, count: int) -> list[float]:
    """Return d(l) for every start l.

    Args:
        states: (L+1, N, H) in float64: arccos loses half of the digits near 1.
        count: K, layers to drop.
    """
    unit = torch.nn.functional.normalize(states, dim=-1)
    before, after = unit[: len(unit) - count], unit[count:]
    cosines = (before * after).sum(dim=-1)  # (L−K+1, N)
    cosines.masked_fill_((before == after).all(dim=-1), 1.0)  # rounding would tell them apart
    distances: list[float] = (cosines.clamp(-1, 1).arccos() / torch.pi).mean(dim=-1).tolist()
    return distances


def _last(hidden: Tensor) -> Tensor:
    """Return a copy of the last token's state (B, H), in float64 on the CPU."""
    return hidden[:, -1].cpu().to(torch.float64, copy=True)
