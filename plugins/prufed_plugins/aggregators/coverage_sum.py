"""Sums over clients of what each has of a tensor: values, weights and counts, entry by entry.

Sums are float64 whatever the clients send and are cast once at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor

from prufed_plugins.entries import is_finite
from prufed_plugins.memory import scratch

Fallback = Literal["keep", "zero"]
"""What an entry that too few clients have becomes: its old value, or 0 as in Algorithm 2."""

MOST_IN_A_BYTE: Final = 255
"""Up to so many clients are counted in bytes: several times faster to add to than int32."""

_BITS: Final = {torch.float32: torch.int32, torch.float64: torch.int64}

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class GlobalShare:
    """The global adapter as one more party to the mean.

    It fills the entries it is given a mask for, but is no client: ``min_count`` ignores it.

    Attributes:
        weight: w_g.
        masks: bool tensors by key; a key that is absent, or None, means every entry.
    """

    weight: float
    masks: Mapping[str, Tensor | None]


@dataclass(frozen=True)
class Mean:
    """What the mean is of: the arguments of ``coverage_mean`` by those names."""

    weights: Mapping[str, float]
    min_count: int
    fallback: Fallback
    include_global: GlobalShare | None
    absent_as_zero: bool

    def add(
        self,
        total: CoverageSum,
        client: str,
        values: Tensor,
        mask: Tensor | None,
        *,
        cleared: bool = False,
    ) -> None:
        """Add one client's entries; ``cleared`` where those it lacks are 0."""
        if self.absent_as_zero and mask is not None:
            values, mask = values if cleared else select(values, mask), None
        total.add(values, mask, self.weights[client], cleared=cleared)


class CoverageSum:
    """S, C and N of one tensor, or of one piece of it after the other in the same memory.

    Attributes:
        shape: of the tensor.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self._sum = scratch(shape, np.float64)  # S
        self._count: Array | None = None  # N of the masked clients
        self._weight: Array | None = None  # their C, where it differs from N
        self._wide: Array | None = None  # one client's share of S or C, in float64
        self._kept: Tensor | None = None  # one client's entries, zeros where it has none
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self._added = 0
        self._masked = False  # whether any of them had a mask
        self._clients = 0  # clients that had
        self._weighted = False  # whether their C differs from N
        self._dense_count = 0  # N and C of the others: the same for every entry
        self._dense_weight = 0.0

    def add(
        self,
        tensor: Tensor,
        mask: Tensor | None,
        weight: float = 1.0,
        *,
        client: bool = True,
        cleared: bool = False,
    ) -> None:
        """Add one client, or the global adapter.

        Args:
            tensor: θ_i of this sum's shape, float32 or float64. NaN and infinity spoil the sum even
                where they are masked out; see :meth:`is_finite`.
            mask: m_i, bool, of the same shape; None means every entry.
            weight: w_i > 0.
            client: False for the global adapter, which counts in S and C but not in N.
            cleared: whether the entries that are masked out are 0 already.
        """
        if mask is None:
            self._dense_count += client
            self._dense_weight += weight
        else:
            present = mask.contiguous().view(torch.uint8)
            self._add_mask(present.numpy(), weight, client)
            if not cleared:
                tensor = self._cleared(tensor, present)
        values = tensor.numpy()
        if weight != 1.0:
            values = np.multiply(values, weight, out=self._share(), dtype=np.float64)
        if self._added:
            np.add(self._sum, values, out=self._sum)
        else:
            np.copyto(self._sum, values)
        self._added += 1

    def counts(self) -> Tensor:
        """Return N: how many clients have each entry."""
        masked = np.zeros(self.shape, np.uint8) if self._count is None else self._count
        return torch.from_numpy(masked + self._dense_count)

    def set_counts(self, counts: Tensor) -> None:
        """Say how many clients have each entry, after adding all of them whole and of weight 1."""
        if self._count is None:
            self._count = scratch(self.shape, np.uint8)
        np.copyto(self._count, counts.numpy())
        self._masked = True
        self._dense_count, self._dense_weight = 0, 0.0

    def is_finite(self) -> bool:
        """Return whether every entry that was added is finite, those masked out included."""
        return not self._added or is_finite(torch.from_numpy(self._sum))

    def mean(
        self, fallback: Tensor | None, min_count: int = 1, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return S / C where N ≥ min_count, else ``fallback`` (None: 0).

        Args:
            fallback: of this sum's shape, float32 or float64.
            min_count: clients an entry needs.
            out: what the mean is cast and written to, float32 or float64. None takes the memory of
                the sum, in float64: nothing can be added after it.

        Returns:
            The mean, and a bool tensor of where N ≥ min_count; None where that is every entry.
        """
        covered = self._covered(min_count)
        mean = self._sum if out is None else out.numpy()
        if self._added:
            with np.errstate(all="ignore"):  # 0 / 0 where nobody has it
                total = self._total() if self._masked else self._dense_weight
                np.divide(self._sum, total, out=mean, casting="same_kind")
        else:
            mean.fill(0.0)
        if covered is not None:
            # as indices: mostly few, and many still cost less than choosing by a mask
            missing = np.flatnonzero(~covered)
            old = 0.0 if fallback is None else fallback.numpy().reshape(-1)[missing]
            mean.reshape(-1)[missing] = old
        return torch.from_numpy(mean), None if covered is None else torch.from_numpy(covered)

    def _covered(self, min_count: int) -> Array | None:
        if self._dense_count >= min_count:
            return None
        if not self._masked or self._count is None:
            return np.zeros(self.shape, dtype=np.bool_)
        covered: Array = self._count >= min_count - self._dense_count
        return None if covered.all() else covered

    def _total(self) -> Array:
        """Return C of every entry."""
        known = self._weight if self._weighted else self._count
        assert known is not None
        return np.add(known, self._dense_weight, out=self._share(), dtype=np.float64)

    def _add_mask(self, present: Array, weight: float, client: bool) -> None:
        if self._count is None:
            self._count = scratch(self.shape, np.uint8)
        if not self._masked:
            self._masked = True
            self._count.fill(0)
        if not self._weighted and (weight != 1.0 or not client):
            self._weighted = True  # so far each counted one
            if self._weight is None:
                self._weight = scratch(self.shape, np.float64)
            np.copyto(self._weight, self._count)
        if self._weighted:
            assert self._weight is not None
            self._weight += np.multiply(present, weight, out=self._share(), dtype=np.float64)
        if client:
            self._clients += 1
            if self._clients > MOST_IN_A_BYTE:
                self._count = self._count.astype(np.int32, copy=False)
            np.add(self._count, present, out=self._count)

    def _share(self) -> Array:
        if self._wide is None:
            self._wide = scratch(self.shape, np.float64)
        return self._wide

    def _cleared(self, tensor: Tensor, present: Tensor) -> Tensor:
        """Return the entries with zeros where the client has none."""
        if self._kept is None or self._kept.dtype != tensor.dtype:
            self._kept = torch.from_numpy(scratch(self.shape, tensor.numpy().dtype))
        return torch.mul(tensor, self._kept.copy_(present), out=self._kept)


def select(tensor: Tensor, mask: Tensor) -> Tensor:
    """Return ``where(mask, tensor, 0)`` for float32 or float64.

    Multiplying the bit patterns by 0 or 1 keeps or clears them whatever they are, NaN included,
    and is eight times faster on a CPU than ``torch.where``.
    """
    kept = torch.empty_like(tensor)
    bits = _BITS[tensor.dtype]
    np.multiply(tensor.contiguous().view(bits).numpy(), _bytes(mask), out=kept.view(bits).numpy())
    return kept


def as_float(tensor: Tensor) -> Tensor:
    """Return the tensor as float64 if it is float64, else as float32: both lose nothing."""
    return tensor if tensor.dtype in _BITS else tensor.float()


def _bytes(mask: Tensor) -> Array:
    """Return a bool mask as 0 and 1 in uint8, without a copy."""
    return mask.contiguous().view(torch.uint8).numpy()
