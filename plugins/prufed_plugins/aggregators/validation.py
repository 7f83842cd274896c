"""What a client may send: checked before it is merged, so that nothing is dropped in silence.

A name that matches nothing, a missing layer or a tensor of another shape is an error, never
skipped: a merge that loads what fits and ignores the rest has "federated" nothing and not said so.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

from prufed_plugins.aggregators.coverage_sum import as_float, select
from prufed_plugins.aggregators.pieces import Buffers
from prufed_plugins.api import GlobalState, Part, Update
from prufed_plugins.entries import is_finite
from prufed_plugins.errors import MethodError, UpdateError
from prufed_plugins.names import in_layers, split_factor
from prufed_plugins.tensor_files import Entries, entries_of

_SAME_RUN = "every client must start from this run's global adapter"


def in_order(updates: Sequence[Update]) -> list[Update]:
    """Return the updates by client name.

    Raises:
        UpdateError: two have the same name.
    """
    ordered = sorted(updates, key=lambda update: update.client)
    for one, other in itertools.pairwise(ordered):
        if one.client == other.client:
            raise UpdateError(one.client, "sent two updates", "give every client its own name")
    return ordered


def check_facts(update: Update, state: GlobalState, *, mixes_ranks: bool) -> None:
    """Check everything about an update that can be known without reading a tensor.

    Raises:
        UpdateError: a number is out of range, or a tensor or mask is missing or unknown.
    """
    _check_numbers(update)
    _check_layers(update, state.layers)
    if update.rank != state.rank and not mixes_ranks:
        raise UpdateError(
            update.client,
            f"rank {update.rank} is not the global rank {state.rank}",
            f"train every client at rank {state.rank}, or choose an aggregator that mixes ranks",
        )
    expected = {name for name in state.tensors if in_layers(name, update.kept_layers)}
    sent = set(update.tensors)
    _refuse_names(update.client, "has no tensor", expected - sent)
    _refuse_names(update.client, "sent an unknown tensor", sent - expected)
    _refuse_names(update.client, "sent a mask of an unknown tensor", set(update.masks or ()) - sent)


def load_part(update: Update, names: Mapping[str, str], state: GlobalState) -> Part:
    """Read one client's share of one module and bring it into the common scale.

    With s_i the client's scaling and s the global one, both factors are multiplied by sqrt(s_i/s),
    so that s · B A is what s_i · B_i A_i was. Entries that are masked out are never looked at; if
    one of them is NaN or infinite, all of them are set to zero.

    Args:
        update: what the client sent.
        names: global tensor names by the keys of :class:`Part`.
        state: the global adapter before the round.

    Raises:
        UpdateError: a shape or dtype is wrong, or an entry that exists is NaN or infinite.
    """
    tensors: dict[str, Tensor] = {}
    masks: dict[str, Tensor | None] = {}
    factor = _scale(update, state)
    for key, name in names.items():
        mask = read_mask(update, name)
        tensor = _finite(update.client, name, _read_tensor(update, name, state), mask)
        tensors[key] = tensor if factor == 1.0 else tensor * factor
        masks[key] = mask
    return Part(update.client, tensors, masks, update.samples, update.weight, update.rank)


class Share(NamedTuple):
    """One client's share of one tensor, read piece by piece; otherwise as :func:`load_part`.

    Attributes:
        client: the client's name.
        name: the tensor's global name.
        values: the entries.
        mask: which of them exist; None where all do.
        factor: what brings them into the common scale.
        masks_digest: as in :class:`Update`.
    """

    client: str
    name: str
    values: Entries
    mask: Entries | None
    factor: float
    masks_digest: str | None

    @property
    def masked(self) -> bool:
        """Whether the client may lack entries."""
        return self.mask is not None

    def read(
        self,
        start: int,
        stop: int,
        buffers: Buffers | None = None,
        *,
        checked: bool = True,
        with_mask: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the entries from ``start`` to before ``stop`` and their mask, both flat.

        Raises:
            UpdateError: the file cannot be read; or, if ``checked``, an entry that exists is NaN or
                infinite.
        """
        try:
            own, others = buffers or (None, None)
            values = as_float(self.values.read(start, stop, own))
            mask = self.mask.read(start, stop, others) if with_mask and self.mask else None
        except MethodError as error:
            raise UpdateError(self.client, error.message, error.hint) from error
        if checked and not is_finite(values):
            # the error counts the bad entries of the whole tensor
            size = math.prod(self.values.shape)
            whole = None if self.mask is None else self.mask.read(0, size, None)
            _finite(self.client, self.name, as_float(self.values.read(0, size, None)), whole)
            values = values if mask is None else select(values, mask)
        return values if self.factor == 1.0 else values * self.factor, mask


def open_share(update: Update, name: str, state: GlobalState) -> Share | None:
    """Return one client's share of one tensor, not read yet; None where it can only be had whole.

    Raises:
        UpdateError: a shape or dtype is wrong, or a file cannot be read.
    """
    mask = None
    try:
        values = entries_of(update.tensors, name)
        if update.masks is not None:
            with suppress(KeyError):  # as in read_mask
                mask = entries_of(update.masks, name)
                if mask is None:
                    return None
    except MethodError as error:
        raise UpdateError(update.client, error.message, error.hint) from error
    if values is None:
        return None
    _check_tensor(update, name, values.shape, values.dtype, state)
    if mask is not None:
        _check_mask(update.client, name, mask.shape, mask.dtype, values.shape)
    scale = _scale(update, state)
    return Share(update.client, name, values, mask, scale, update.masks_digest)


def _check_numbers(update: Update) -> None:
    for what, value in (
        ("samples", update.samples),
        ("rank", update.rank),
        ("scaling", update.scaling),
        ("weight", update.weight),
    ):
        if not (math.isfinite(value) and value > 0):
            raise UpdateError(update.client, f"{what} is {value}", "give a positive number")


def _check_layers(update: Update, layers: int) -> None:
    kept = update.kept_layers
    if len(set(kept)) != len(kept):
        raise UpdateError(update.client, f"kept layers {list(kept)} repeat", "name each layer once")
    outside = [layer for layer in kept if not 0 <= layer < layers]
    if outside:
        raise UpdateError(
            update.client,
            f"kept layer {outside[0]} is not one of the {layers} layers",
            f"layers are numbered 0 to {layers - 1}, as in the full model",
        )


def _refuse_names(client: str, what: str, names: set[str]) -> None:
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise UpdateError(client, f"{what} {min(names)}{more}", _SAME_RUN)


def _read_tensor(update: Update, name: str, state: GlobalState) -> Tensor:
    try:
        tensor = update.tensors[name]
    except MethodError as error:
        raise UpdateError(update.client, error.message, error.hint) from error
    _check_tensor(update, name, tensor.shape, tensor.dtype, state)
    return as_float(tensor.detach().cpu())


def _check_tensor(
    update: Update, name: str, shape: Sequence[int], dtype: torch.dtype, state: GlobalState
) -> None:
    expected = list(state.tensors[name].shape)
    expected[0 if split_factor(name)[1] == "A" else 1] = update.rank
    if list(shape) != expected:
        raise UpdateError(
            update.client, f"{name} has shape {list(shape)}, not {expected}", _SAME_RUN
        )
    if not dtype.is_floating_point:
        raise UpdateError(update.client, f"{name} has dtype {dtype}", "send it as float32")


def _check_mask(
    client: str, name: str, shape: Sequence[int], dtype: torch.dtype, expected: Sequence[int]
) -> None:
    if tuple(shape) != tuple(expected) or dtype != torch.bool:
        raise UpdateError(
            client,
            f"the mask of {name} is {dtype} of shape {list(shape)}, "
            f"not bool of shape {list(expected)}",
            _SAME_RUN,
        )


def _scale(update: Update, state: GlobalState) -> float:
    return math.sqrt(update.scaling / state.scaling)


def read_mask(update: Update, name: str) -> Tensor | None:
    """Return a client's mask of one tensor; None where it has every entry.

    Raises:
        UpdateError: the mask cannot be read.
    """
    try:
        return update.masks[name].detach().cpu() if update.masks is not None else None
    except KeyError:  # not asked for with ``in`` before: that may read a file twice
        return None
    except MethodError as error:
        raise UpdateError(update.client, error.message, error.hint) from error


def _finite(client: str, name: str, tensor: Tensor, mask: Tensor | None) -> Tensor:
    """Return the tensor if every entry that exists is finite."""
    if mask is not None:
        _check_mask(client, name, mask.shape, mask.dtype, tensor.shape)
    if is_finite(tensor):
        return tensor
    if mask is not None:
        tensor = select(tensor, mask)
    if not is_finite(tensor):
        bad = int((~tensor.isfinite()).sum())
        raise UpdateError(
            client,
            f"{name} has {bad} entries that are NaN or infinite",
            "lower the client's learning rate",
        )
    return tensor
