"""How the updates of a round lie to one another: coverage, sizes, directions, and the cross term.

Everything is in the common scale, and an update is its change Δ_i = θ_i − g on the entries that the
client has; an entry it lacks counts as no change.

The clients' changes of one factor lie side by side, in runs of entries that bound the memory
whatever the number of clients: directions and the cross term are then products of matrices. Those
are taken in float32, and in float64 where that overflows; sums over runs and modules are float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from prufed_plugins.aggregators.pieces import Buffers
from prufed_plugins.aggregators.validation import check_facts, in_order, load_part, open_share
from prufed_plugins.api import GlobalState, Update
from prufed_plugins.errors import UpdateError
from prufed_plugins.memory import scratch
from prufed_plugins.names import by_module, in_layers
from prufed_plugins.tensor_files import Buffer

_KEYS: Final = ("lora_A.weight", "lora_B.weight")

EXACT_CROSS_TERM: Final = 128
"""Ranks of all clients together up to which the cross term is computed exactly, at a cost that is
their square."""

PROBES: Final = 32
"""Random vectors that the cross term of more ranks is estimated with: to a few per cent, and to an
eighth where a single direction holds all of it."""

LARGEST_RUN: Final = 1 << 24
"""Entries of all clients together that lie side by side. A factor with more is taken in runs, each
of which reads every client again, and has no cross term."""

_PIECE: Final = 1 << 15

Array = np.ndarray[Any, Any]


@dataclass
class Measurement:
    """What one round's updates are like.

    Attributes:
        modules: by module. ``coverage_histogram``: how many entries exactly 0, 1, 2, ... clients
            have. ``norm_min``, ``norm_mean``, ``norm_max``: of ‖Δ_i‖ over both factors.
            ``cosine_min``, ``cosine_mean``: of the angle between Δ_i and the plain mean of all.
            ``cross_term``: ‖Σ p (B_i − B̄)(A_i − Ā)‖ / ‖B̄ Ā‖ with p = 1/n, what averaging the
            factors loses of the mean product where nothing is masked; means and deviations are
            over the entries that clients have. An estimate where there are many ranks, absent
            where there are too many entries.
        norms: ‖Δ_i‖ of the whole adapter, by client.
        cosines: with the mean, over the modules that the client has.
    """

    modules: dict[str, dict[str, Any]] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)
    cosines: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Sending:
    """Which part of the global adapter the clients of a round began with.

    Attributes:
        windows: the global ranks of each client, in its order; the first ones where it has none.
        personal: factors, of A and B, that every client keeps for itself: no change of theirs is
            anybody else's, so it is neither measured nor clipped.
        own: whether clients began with adapters of their own, which the global one, the mean of
            all, is only near: changes are still measured from it, but no A must be its.
    """

    windows: Mapping[str, Sequence[int]] = field(default_factory=dict)
    personal: frozenset[str] = frozenset()
    own: bool = False

    def ranks(self, client: str, rank: int) -> Tensor:
        """Return a client's global ranks (r_i,)."""
        return torch.tensor(self.windows.get(client, range(rank)), dtype=torch.int64)


WHOLE: Final = Sending()
"""Every client has the first ranks of both factors."""


def measure(updates: Sequence[Update], state: GlobalState, sending: Sending = WHOLE) -> Measurement:
    """Measure a round's updates, one factor of all clients at a time.

    An update that cannot be read or does not fit is left out: the merge says what is wrong with it.

    Raises:
        UpdateError: two updates have one name.
    """
    ordered = in_order(updates)
    while True:
        try:
            return _measure(ordered, state, sending)
        except UpdateError as error:
            ordered = [update for update in ordered if update.client != error.client]


def _measure(updates: Sequence[Update], state: GlobalState, sending: Sending) -> Measurement:
    for update in updates:
        check_facts(update, state, mixes_ranks=True)
    found = Measurement()
    place = {update.client: row for row, update in enumerate(updates)}
    totals = np.zeros((3, len(updates)))
    for module, names in by_module(state.tensors).items():
        holders = [update for update in updates if in_layers(module, update.kept_layers)]
        if not holders:
            continue
        sums, found.modules[module] = _module(holders, names, state, sending)
        totals[:, [place[update.client] for update in holders]] += sums
    for client, (square, dot, size) in zip(place, totals.T.tolist(), strict=True):
        found.norms[client] = math.sqrt(square)
        if square:
            found.cosines[client] = _cosine(dot, square, size)
    return found


def _module(
    holders: Sequence[Update], names: Mapping[str, str], state: GlobalState, sending: Sending
) -> tuple[Array, dict[str, Any]]:
    """Return the sums, as in :class:`_Factor`, over both factors of a module, and its numbers."""
    for kind in (np.float32, np.float64):
        with np.errstate(over="ignore", invalid="ignore"):
            A, B = (
                _Columns(holders, axis, names[key], state, sending, np.dtype(kind)).measure()
                for axis, key in enumerate(_KEYS)
            )
        sums = A.sums + B.sums
        if np.isfinite(sums).all():
            break  # NaN, or changes above 1e19, whose squares have no room in float32
    squares, dots, sizes = sums.tolist()
    cosines = [_cosine(*numbers) for numbers in zip(dots, squares, sizes, strict=True)]
    return sums, {
        "coverage_histogram": (A.histogram + B.histogram).tolist(),
        **_summary("norm", [math.sqrt(square) for square in squares]),
        **_summary("cosine", cosines),
        **_cross_term(A, B, len(holders)),
    }


@dataclass(frozen=True)
class _Factor:
    """What is known of one factor of n clients.

    Attributes:
        sums: ‖Δ_i‖², Δ_i · Δ̄ and ‖Δ̄‖² by client, (3, n) float64.
        histogram: how many entries 0, 1, ..., n clients have, (n + 1,).
        mean: Ā (r, k), or B̄ (d, r), over the clients that have each entry; None where there are too
            many.
        deviations: [A_1 − Ā; ...] (n r, k), or [B_1 − B̄, ...] (d, n r); None likewise.
    """

    sums: Array
    histogram: Array
    mean: Array | None = None
    deviations: Array | None = None


@dataclass(frozen=True)
class _Run:
    """Some entries of one factor of n clients.

    Attributes:
        before: g, (entries,).
        changes: Δ_i, (n, entries).
        present: which entries each client has, (n, entries) bool; None where all have all.
        squares: ‖Δ_i‖², (n,).
    """

    before: Array
    changes: Array
    present: Array | None
    squares: Array


@dataclass(frozen=True)
class _Columns:
    """One factor of the clients that have its module, to be read.

    Attributes:
        holders: the clients.
        axis: of ranks: 0 for A (r, k), 1 for B (d, r).
        name: the factor's global name.
        state: the global adapter.
        sending: which part of it each client began with.
        kind: what is computed in.
    """

    holders: Sequence[Update]
    axis: int
    name: str
    state: GlobalState
    sending: Sending
    kind: np.dtype[Any]

    def measure(self) -> _Factor:
        """Read every client and return what is known of the factor."""
        count = len(self.holders)
        before = self._before()
        width = max(1, LARGEST_RUN // count)
        sums, histogram = np.zeros((3, count)), np.zeros(count + 1, dtype=np.int64)
        for start in range(0, before.size, width):
            run = self._read(before, slice(start, min(start + width, before.size)))
            total = run.changes.sum(axis=0)
            coverage = None if run.present is None else run.present.sum(axis=0, dtype=np.int32)
            mean = total / self.kind.type(count)
            sums[0] += run.squares
            sums[1] += _products(run.changes, mean)
            sums[2] += _products(mean, mean)
            if coverage is None:
                histogram[count] += mean.size
            else:
                histogram += np.bincount(coverage, minlength=count + 1)
            if before.size <= width:
                mean, deviations = self._deviations(run, total, coverage, before.shape)
                return _Factor(sums, histogram, mean, deviations)
        return _Factor(sums, histogram)

    def _before(self) -> Array:
        """Return g, with zeros for the ranks that only clients have."""
        old = self.state.tensors[self.name].detach().cpu()
        missing = max(0, *(update.rank - old.shape[self.axis] for update in self.holders))
        pad = (0, missing) if self.axis else (0, 0, 0, missing)
        wanted = torch.float64 if self.kind == np.float64 else torch.float32
        whole: Array = torch.nn.functional.pad(old.to(wanted), pad).numpy()
        return whole

    def _read(self, before: Array, where: slice) -> _Run:
        """Return the entries ``where`` of every client."""
        shape = (len(self.holders), where.stop - where.start)
        changes, present = scratch(shape, self.kind), None
        squares = np.zeros(len(self.holders))
        old = before.reshape(-1)[where]
        buffers = Buffer(8 * shape[1]), Buffer(shape[1])
        for row, update in enumerate(self.holders):
            values, mask = self._load(update, before.shape, where, buffers)
            change = changes[row]
            if "AB"[self.axis] in self.sending.personal:
                change.fill(0)
            else:
                np.subtract(values, old, out=change, casting="same_kind")
            if mask is not None:
                if present is None:
                    present = scratch(shape, np.bool_)
                    present.fill(True)
                present[row] = mask
                change *= present[row]
            squares[row] = _products(change, change)
        return _Run(old, changes, present, squares)

    def _load(
        self, update: Update, shape: tuple[int, ...], where: slice, buffers: Buffers
    ) -> tuple[Array, Array | None]:
        """Return entries of a client's factor among all ranks, and which of them it has."""
        if update.rank == shape[self.axis] and update.client not in self.sending.windows:
            share = open_share(update, self.name, self.state)
            if share is not None:
                # NaN shows in the sums, which are then taken anew in float64: see _module
                checked = self.kind == np.float64
                values, mask = share.read(where.start, where.stop, buffers, checked=checked)
                return values.numpy(), None if mask is None else mask.numpy()
        key = _KEYS[self.axis]
        part = load_part(update, {key: self.name}, self.state)
        values, mask = part.tensors[key], part.masks[key]
        if update.rank < shape[self.axis] or update.client in self.sending.windows:
            ranks = self.sending.ranks(update.client, update.rank)
            there = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
            values = torch.zeros(shape, dtype=values.dtype).index_copy_(self.axis, ranks, values)
            mask = torch.zeros(shape, dtype=torch.bool).index_copy_(self.axis, ranks, there)
        entries = values.reshape(-1)[where].numpy()
        return entries, None if mask is None else mask.reshape(-1)[where].numpy()

    def _deviations(
        self, run: _Run, total: Array, coverage: Array | None, shape: tuple[int, ...]
    ) -> tuple[Array, Array]:
        """Return the mean and the deviations from it, as in :class:`_Factor`.

        Where a client lacks an entry it deviates by nothing: parts of one adapter agree.
        """
        count = len(self.holders)
        change = total / (self.kind.type(count) if coverage is None else np.maximum(coverage, 1))
        change = change.astype(self.kind, copy=False)
        mean = run.before + change
        if coverage is not None:
            mean *= coverage > 0
        # (n, r, k), or (d, n, r): ranks side by side, and no second copy of A
        order = (1, 0, 2) if self.axis else (0, 1, 2)
        changes = run.changes.reshape(count, *shape).transpose(order)
        deviations = scratch(changes.shape, self.kind) if self.axis else changes
        np.subtract(changes, change.reshape(1, *shape).transpose(order), out=deviations)
        if run.present is not None:
            deviations *= run.present.reshape(count, *shape).transpose(order)
        ranks = count * shape[self.axis]
        return mean.reshape(shape), deviations.reshape((-1, ranks) if self.axis else (ranks, -1))


def _cross_term(A: _Factor, B: _Factor, clients: int) -> dict[str, float]:
    """Return ‖Σ p (B_i − B̄)(A_i − Ā)‖ relative to ‖B̄ Ā‖, without forming a d × k matrix."""
    if A.mean is None or B.mean is None or A.deviations is None or B.deviations is None:
        return {}
    size = _product_norm(B.mean, A.mean)
    exact = len(A.deviations) <= EXACT_CROSS_TERM
    lost = (_product_norm if exact else _estimated_norm)(B.deviations, A.deviations) / clients
    return {"cross_term": lost / size} if size and math.isfinite(lost / size) else {}


def _product_norm(left: Array, right: Array) -> float:
    """Return ‖U V‖ in the Frobenius norm, of U (d, r) and V (r, k).

    Its square is the sum of the products of the entries of UᵀU and V Vᵀ.
    """
    grams = (left.T @ left).astype(np.float64) * (right @ right.T)
    return math.sqrt(max(0.0, float(grams.sum())))


def _estimated_norm(left: Array, right: Array) -> float:
    """Return about ‖U V‖: for random signs S (k, m), ‖U V S‖² / m is its square in expectation."""
    image = left @ (right @ _signs(right.shape[1], right.dtype.str))
    return math.sqrt(float(np.square(image, dtype=np.float64).sum()) / PROBES)


@lru_cache(maxsize=4)
def _signs(features: int, kind: str) -> Array:
    """Return the same random signs (features, m) every time."""
    # raw output: numpy promises that stream for ever, Generator's it does not
    draws = np.random.PCG64(0).random_raw(features).view(np.uint8)
    signs: Array = np.unpackbits(draws).reshape(features, 64)[:, :PROBES].astype(kind)
    return signs * 2 - 1


def _products(left: Array, right: Array) -> Array:
    """Return the inner products of each row of ``left`` (..., entries) with ``right`` (entries,).

    Long sums of float32 lose digits: they are taken piece by piece, and the pieces in float64.
    """
    total = np.zeros(left.shape[:-1])
    for start in range(0, right.size, _PIECE):
        total += left[..., start : start + _PIECE] @ right[start : start + _PIECE]
    return total


def _summary(what: str, values: Sequence[float]) -> dict[str, float]:
    summary = {f"{what}_min": min(values), f"{what}_mean": sum(values) / len(values)}
    return summary | ({f"{what}_max": max(values)} if what == "norm" else {})


def _cosine(dot: float, one: float, other: float) -> float:
    """Return the cosine from the product and the squared norms; 0 where a vector is 0."""
    size = math.sqrt(one * other)
    return max(-1.0, min(1.0, dot / size)) if size else 0.0
