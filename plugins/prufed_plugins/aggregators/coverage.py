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

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from prufed_plugins.api import Merged, Part
from prufed_plugins.memory import scratch, zeros

Fallback = Literal["keep", "zero"]
"""What an entry that too few clients have becomes: its old value, or 0 as in Algorithm 2."""

RUN: Final = 2**15
"""Entries of a piece: their sums, in float64, and what one client sends of them."""

_BITS: Final = {torch.float32: torch.int32, torch.float64: torch.int64}


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


class Reader(Protocol):
    """Reads one client's share of one tensor, piece by piece, checked as in :class:`Part`."""

    @property
    def client(self) -> str:
        """The client's name."""

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Return the entries from ``start`` to before ``stop`` and their mask, both flat.

        Raises:
            UpdateError: an entry that exists is NaN or infinite.
        """


@runtime_checkable
class InPieces(Protocol):
    """Parts of a module that can be read piece by piece too."""

    def readers(self, key: str) -> Sequence[Reader] | None:
        """Return a reader per client; None where some client's tensor can only be had whole."""


@dataclass(frozen=True)
class _Mean:
    """What the mean is of: the arguments of :func:`coverage_mean` by those names."""

    weights: Mapping[str, float]
    min_count: int
    fallback: Fallback
    include_global: GlobalShare | None
    absent_as_zero: bool

    def add(self, total: CoverageSum, client: str, values: Tensor, mask: Tensor | None) -> None:
        """Add one client's entries."""
        if self.absent_as_zero and mask is not None:
            values, mask = select(values, mask), None
        total.add(values, mask, self.weights[client])


class CoverageSum:
    """S, C and N of one tensor."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self._sum: np.ndarray[Any, Any] | None = None  # S, once there is any
        self._count = zeros((0,), np.uint8)  # N of the masked clients, once there are any
        self._masked = 0  # how many those are
        self._chosen: Tensor | None = None  # one client's entries, the others cleared
        self._weight: np.ndarray[Any, Any] | None = None  # their C, where it differs from N
        self._dense_count = 0  # N and C of the clients without a mask: the same for every entry
        self._dense_weight = 0.0

    def add(
        self, tensor: Tensor, mask: Tensor | None, weight: float = 1.0, *, client: bool = True
    ) -> None:
        """Add one client, or the global adapter.

        Args:
            tensor: θ_i of this sum's shape, float32 or float64. NaN is ignored where masked out.
            mask: m_i, bool, of the same shape; None means every entry.
            weight: w_i > 0.
            client: False for the global adapter, which counts in S and C but not in N.
        """
        if mask is None:
            self._dense_count += client
            self._dense_weight += weight
        else:
            self._add_mask(mask, weight, client)
            if self._chosen is None or self._chosen.dtype != tensor.dtype:
                self._chosen = torch.from_numpy(scratch(self.shape, tensor.numpy().dtype))
            tensor = select(tensor, mask, out=self._chosen)
        self._add_values(tensor, weight)

    def covered(self, min_count: int = 1) -> Tensor | None:
        """Return where N ≥ min_count; None where that is every entry."""
        if self._dense_count >= min_count:
            return None
        if not self._count.size:
            return torch.zeros(self.shape, dtype=torch.bool)
        covered = torch.from_numpy(self._count >= min_count - self._dense_count)
        return None if covered.numpy().all() else covered

    def mean(self, fallback: Tensor | None, min_count: int = 1) -> Tensor:
        """Return S / C where N ≥ min_count, else ``fallback`` (None: 0), as float64."""
        total: Any = self._dense_weight
        if self._count.size:
            total = total + (self._count if self._weight is None else self._weight)
        covered = self.covered(min_count)
        if self._sum is None:
            self._sum = zeros(self.shape, np.float64)
        mean = scratch(self.shape, np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):  # 0 / 0, where nothing is covered
            np.divide(self._sum, total, out=mean)
        if covered is None:
            return torch.from_numpy(mean)
        # dividing only where it is covered takes ten times as long
        chosen = select(torch.from_numpy(mean), covered)
        if fallback is not None:
            bits = chosen.view(torch.int64)
            bits |= select(fallback.double(), ~covered).view(torch.int64)
        return chosen

    def _add_mask(self, mask: Tensor, weight: float, client: bool) -> None:
        present = _bytes(mask)
        if not self._count.size:
            self._count = zeros(self.shape, np.uint8)
        if self._weight is None and (weight != 1.0 or not client):
            self._weight = self._count.astype(np.float64)  # so far each counted one
        if self._weight is not None:
            self._weight += np.multiply(present, weight, dtype=np.float64)
        if client:
            self._masked += 1
            # the narrowest integers that hold the count: eight times faster to add to than int32
            self._count = self._count.astype(np.min_scalar_type(self._masked), copy=False)
            self._count += present

    def _add_values(self, tensor: Tensor, weight: float) -> None:
        values = tensor.numpy()
        if self._sum is None:
            self._sum = scratch(self.shape, np.float64)
            np.multiply(values, weight, out=self._sum, dtype=np.float64)
            return
        if weight != 1.0:
            weighted = scratch(self.shape, np.float64)
            values = np.multiply(values, weight, out=weighted, dtype=np.float64)
        np.add(self._sum, values, out=self._sum)


def select(tensor: Tensor, mask: Tensor, out: Tensor | None = None) -> Tensor:
    """Return ``where(mask, tensor, 0)`` for float32 or float64.

    Multiplying the bit patterns by 0 or 1 keeps or clears them whatever they are, NaN included,
    and is eight times faster on a CPU than ``torch.where``.
    """
    kept = torch.empty_like(tensor) if out is None else out
    bits = _BITS[tensor.dtype]
    np.multiply(tensor.contiguous().view(bits).numpy(), _bytes(mask), out=kept.view(bits).numpy())
    return kept


def coverage_mean(
    parts: Iterable[Part],
    current: Mapping[str, Tensor],
    weights: Mapping[str, float],
    *,
    min_count: int = 1,
    fallback: Fallback = "keep",
    include_global: GlobalShare | None = None,
    absent_as_zero: bool = False,
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
    """
    if include_global is not None:
        fallback = "keep"
    mean = _Mean(weights, min_count, fallback, include_global, absent_as_zero)
    if isinstance(parts, InPieces):
        readers = {key: parts.readers(key) for key in current}
        if None not in readers.values():
            done = {
                key: _mean_in_pieces(mean, key, readers[key] or (), old)
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


def _mean_in_pieces(
    mean: _Mean, key: str, readers: Sequence[Reader], current: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return the mean of one tensor, in the dtype of ``current``, and where it is covered."""
    old = current.contiguous().reshape(-1)
    new = torch.empty_like(old)
    coverage: list[Tensor | None] = []
    share = mean.include_global
    present = share.masks.get(key) if share else None
    for start in range(0, old.numel(), RUN):
        run = slice(start, min(start + RUN, old.numel()))
        total = CoverageSum((run.stop - run.start,))
        for reader in readers:
            mean.add(total, reader.client, *reader.read(run.start, run.stop))
        if share is not None:
            mask = None if present is None else present.reshape(-1)[run]
            total.add(as_float(old[run]), mask, share.weight, client=False)
        fallback = old[run] if mean.fallback == "keep" else None
        new[run] = total.mean(fallback, mean.min_count)
        coverage.append(total.covered(mean.min_count))
    return new.reshape(current.shape), _joined(coverage, current)


def _joined(coverage: Sequence[Tensor | None], current: Tensor) -> Tensor | None:
    """Return the coverage of a tensor from that of its pieces; None where it is every entry."""
    if all(piece is None for piece in coverage):
        return None
    joined = torch.ones(current.numel(), dtype=torch.bool)
    for index, piece in enumerate(coverage):
        if piece is not None:
            joined[index * RUN : index * RUN + piece.numel()] = piece
    return joined.reshape(current.shape)


def finish(
    sums: Mapping[str, CoverageSum],
    current: Mapping[str, Tensor],
    *,
    min_count: int = 1,
    fallback: Fallback = "keep",
) -> Merged:
    """Return the means of ``sums``, cast to the dtypes of ``current``, and their coverage."""
    covered = {key: total.covered(min_count) for key, total in sums.items()}
    tensors = {
        key: total.mean(current[key] if fallback == "keep" else None, min_count).to(
            current[key].dtype
        )
        for key, total in sums.items()
    }
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


def as_float(tensor: Tensor) -> Tensor:
    """Return the tensor as float64 if it is float64, else as float32: both lose nothing."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _bytes(mask: Tensor) -> np.ndarray[Any, Any]:
    """Return a bool mask as 0 and 1 in uint8, without a copy."""
    return mask.contiguous().view(torch.uint8).numpy()
