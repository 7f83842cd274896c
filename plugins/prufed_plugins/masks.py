"""Masks: which entries of a matrix exist.

A mask is a bool tensor, True where the entry exists. Two kinds meet here: the masks of a pruned
base, kept beside its weights bit by bit, and the masks of a client's LoRA factors A (r, k) and
B (d, r), which every party derives alike from (seed, tensor name, shape) and so never sends.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prufed_plugins.errors import MethodError
from prufed_plugins.tensor_files import Buffer, Entries, TensorFile

FactorMask = Literal["none", "nested", "magnitude", "rank", "structured"]
"""Where a client's LoRA factors are zero (LEGO, 2410.18287, readings R1, R2, R5, R6)."""

METADATA_KEY: Final = "prufed-masks"
"""The one metadata entry of a mask file: JSON with the layout version and the shapes."""

_LAYOUT: Final = 1
_FACTOR_A: Final = ".lora_A.weight"
_FACTOR_B: Final = ".lora_B.weight"


def removed_count(sparsity: float, size: int) -> int:
    """Return ⌊sparsity · size⌋, with the sparsity read as the decimal a person typed.

    ``0.29 * 100`` is 28.999… in floating point; here it is 29.

    Raises:
        MethodError: the sparsity is not in [0, 1).
    """
    if not 0 <= sparsity < 1:
        raise MethodError(
            f"sparsity {sparsity} is outside [0, 1)", "give the share of entries to remove"
        )
    return math.floor(Fraction(repr(float(sparsity))) * size)


# --- masks of LoRA factors -----------------------------------------------------------------------


def nested_mask(shape: Sequence[int], sparsity: float, *, seed: int, name: str) -> Tensor:
    """Return a random mask that lies inside every mask of lower sparsity (LEGO, reading R1).

    Each entry has one draw u, the same at every sparsity; the ⌊sparsity · n⌋ entries of lowest u
    are removed, equal draws in the order of their index. The draw depends on (seed, name, shape)
    alone, neither on the device nor on the order of calls.

    Args:
        shape: shape of the tensor to mask.
        sparsity: share of entries to remove, in [0, 1).
        seed: the federation's mask seed.
        name: the tensor's *global* name.
    """
    text = json.dumps(["nested-mask", seed, name, list(shape)])
    entropy = int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")
    size = math.prod(shape)
    # raw output of the bit generator: numpy promises its stream for ever, Generator's it does not
    draws = np.random.PCG64(entropy).random_raw(size)
    order = np.argsort(draws, kind="stable")
    return _without(torch.from_numpy(order), removed_count(sparsity, size)).reshape(tuple(shape))


def magnitude_mask(tensor: Tensor, sparsity: float) -> Tensor:
    """Return the mask that removes the ⌊sparsity · n⌋ smallest magnitudes (reading R2).

    Equal magnitudes are removed in the order of their index.
    """
    order = torch.argsort(tensor.detach().abs().float().flatten().cpu(), stable=True)
    return _without(order, removed_count(sparsity, tensor.numel())).reshape(tensor.shape)


def factor_masks(
    kind: FactorMask,
    tensors: Mapping[str, Tensor],
    sparsity: float,
    *,
    seed: int,
    base_masks: Mapping[str, Tensor] | None = None,
    base_weights: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return the masks of one client's LoRA factors by the names of ``tensors``.

    - ``none``, and sparsity 0 of any kind: no masks; every entry exists.
    - ``nested``: :func:`nested_mask` of every factor.
    - ``magnitude``: :func:`magnitude_mask` of every factor. A factor that is zero throughout, as B
      is before the first epoch, has no magnitudes to go by and gets no mask.
    - ``rank``: the first ⌈(1 - sparsity) r⌉ ranks, as HetLoRA (2401.06432) truncates.
    - ``structured``: A keeps the input features with the most survivors in the base's mask, B the
      output features of largest L1 norm in ``base_weights``, or of most survivors without them.

    Args:
        kind: how to choose.
        tensors: ``<module>.lora_A.weight`` (r, k) and ``<module>.lora_B.weight`` (d, r).
        sparsity: share of each factor to remove, in [0, 1).
        seed: seed of the nested draw.
        base_masks: masks of the pruned base by ``<module>.weight``, each (d, k).
        base_weights: weights of the pruned base by the same names, each (d, k).

    Returns:
        bool masks; a name that is absent means every entry.

    Raises:
        MethodError: a name is no LoRA factor, or ``structured`` lacks a base mask that fits.
    """
    if kind == "none" or sparsity == 0:
        return {}
    masks = {}
    for name, tensor in tensors.items():
        module, factor = split_factor(name)
        if kind == "nested":
            masks[name] = nested_mask(tensor.shape, sparsity, seed=seed, name=name)
        elif kind == "magnitude":
            if bool(tensor.any()):
                masks[name] = magnitude_mask(tensor, sparsity)
        elif kind == "rank":
            masks[name] = _rank_mask(tensor, factor, sparsity)
        else:
            weight = f"{module}.weight"
            scores = _feature_scores(factor, weight, base_masks or {}, base_weights or {})
            masks[name] = _feature_mask(name, tensor, factor, scores, sparsity)
    return masks


def split_factor(name: str) -> tuple[str, Literal["A", "B"]]:
    """Return (module, factor) of an adapter tensor's name.

    Raises:
        MethodError: the name ends neither in ``.lora_A.weight`` nor in ``.lora_B.weight``.
    """
    if name.endswith(_FACTOR_A):
        return name.removesuffix(_FACTOR_A), "A"
    if name.endswith(_FACTOR_B):
        return name.removesuffix(_FACTOR_B), "B"
    raise MethodError(
        f"{name!r} is not the name of an adapter tensor",
        f"names look like model.layers.0.self_attn.q_proj{_FACTOR_A}",
    )


def _without(order: Tensor, removed: int) -> Tensor:
    """Return a flat mask that is False at the first ``removed`` indices of ``order``."""
    mask = torch.ones(order.numel(), dtype=torch.bool)
    mask[order[:removed]] = False
    return mask


def _rank_mask(tensor: Tensor, factor: Literal["A", "B"], sparsity: float) -> Tensor:
    rank = tensor.shape[0] if factor == "A" else tensor.shape[1]
    kept = torch.arange(rank) < rank - removed_count(sparsity, rank)
    return (kept[:, None] if factor == "A" else kept[None, :]).expand(tensor.shape).clone()


def _feature_scores(
    factor: Literal["A", "B"],
    weight: str,
    base_masks: Mapping[str, Tensor],
    base_weights: Mapping[str, Tensor],
) -> Tensor:
    """Return one score per input feature (k,) for A, per output feature (d,) for B."""
    if weight not in base_masks:
        raise MethodError(
            f"factor mask 'structured' needs the base's mask of {weight}",
            "use a base pruned by a masking method, or factor_mask: nested",
        )
    mask = base_masks[weight].cpu()  # (d, k)
    if factor == "A":
        return mask.sum(dim=0)
    if weight in base_weights:  # Wanda leaves every row equally dense: density cannot rank rows
        return (base_weights[weight].detach().cpu().abs().float() * mask).sum(dim=1)
    return mask.sum(dim=1)


def _feature_mask(
    name: str, tensor: Tensor, factor: Literal["A", "B"], scores: Tensor, sparsity: float
) -> Tensor:
    features = tensor.shape[1] if factor == "A" else tensor.shape[0]
    if scores.numel() != features:
        raise MethodError(
            f"{name} has {features} features, the base's mask has {scores.numel()}",
            "the adapter and the base do not belong together",
        )
    order = torch.argsort(scores, stable=True)
    kept = _without(order, removed_count(sparsity, features))
    return (kept[None, :] if factor == "A" else kept[:, None]).expand(tensor.shape).clone()


# --- storage -------------------------------------------------------------------------------------


def pack(mask: Tensor) -> Tensor:
    """Return the mask as uint8, eight entries a byte, the first in the lowest bit."""
    bits = mask.detach().to("cpu", torch.bool).contiguous().flatten().numpy()
    return torch.from_numpy(np.packbits(bits, bitorder="little"))


def unpack(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the bool mask of ``shape`` that :func:`pack` turned into ``packed``.

    Raises:
        MethodError: ``packed`` is not uint8, has another length than ``shape`` asks for, or has
            bits set beyond the last entry.
    """
    _check_packed(packed.dtype, tuple(packed.shape), shape)
    bits = np.unpackbits(packed.cpu().contiguous().numpy(), bitorder="little").view(np.bool_)
    size = math.prod(shape)
    _check_rest(bits[size:], shape)
    return torch.from_numpy(bits[:size]).reshape(tuple(shape))


def _check_packed(dtype: torch.dtype, stored: tuple[int, ...], shape: Sequence[int]) -> None:
    size = (math.prod(shape) + 7) // 8
    if dtype != torch.uint8 or stored != (size,):
        raise MethodError(
            f"a packed mask of shape {list(shape)} takes {size} bytes, "
            f"not {list(stored)} of {dtype}",
            "the mask file is damaged; prune the base again",
        )


def _check_rest(bits: np.ndarray[Any, Any], shape: Sequence[int]) -> None:
    if bits.any():
        raise MethodError(
            f"a packed mask of shape {list(shape)} has bits beyond its last entry",
            "the mask file is damaged; prune the base again",
        )


def save_masks(path: Path, masks: Mapping[str, Tensor]) -> None:
    """Write masks to a safetensors file: one packed tensor each, shapes in the metadata.

    The bytes depend on the masks alone.
    """
    names = sorted(masks)
    shapes = {name: list(masks[name].shape) for name in names}
    save_file({name: pack(masks[name]) for name in names}, path, metadata=mask_metadata(shapes))


def mask_metadata(
    shapes: Mapping[str, Sequence[int]], stored: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return the metadata of a mask file.

    Args:
        shapes: of the masks, by parameter name.
        stored: by parameter name, what the weights' file calls those that it calls otherwise.
    """
    stated: dict[str, Any] = {"layout": _LAYOUT, "shapes": {n: list(s) for n, s in shapes.items()}}
    if stored:
        stated["stored"] = dict(stored)
    # safetensors does not order metadata entries: with one entry there is one order
    return {METADATA_KEY: json.dumps(stated, sort_keys=True)}


class MaskFile(Mapping[str, Tensor]):
    """The masks of a file, each unpacked when it is asked for.

    Unpacked, the masks of a model take a byte per weight; whoever adapts one matrix per block need
    not pay for the rest.

    Raises:
        MethodError: when opened, the file is missing or damaged, is no mask file, comes from a
            newer layout, or its tensors and its stated shapes differ; on access, a mask is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
        except (OSError, SafetensorError) as error:
            raise MethodError(
                f"cannot read masks from {path}: {error}", "prune the base again"
            ) from error
        self._packed = TensorFile(path)
        self._shapes, self._stored = _stated(path, metadata)
        self._renamed: Mapping[str, str] = {}
        if odd := sorted(self._shapes.keys() ^ set(self._packed)):
            raise MethodError(
                f"{path} and its stated shapes differ in {', '.join(odd[:3])}",
                "prune the base again",
            )

    @property
    def shapes(self) -> Mapping[str, Sequence[int]]:
        """The shape of every mask."""
        return self._shapes

    def as_stored(self) -> MaskFile:
        """Return the same masks under the names that the weights' file has for their tensors."""
        if not self._stored:
            return self
        renamed = copy.copy(self)
        renamed._renamed = {self._stored.get(name, name): name for name in self._shapes}
        renamed._shapes = {new: self._shapes[old] for new, old in renamed._renamed.items()}
        return renamed

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        return unpack(self._packed[self._renamed.get(name, name)], shape)

    def entries(self, name: str) -> Entries:
        """Return one mask to be read piece by piece.

        Raises:
            KeyError: there is no such mask.
            MethodError: it is damaged.
        """
        shape = self._shapes[name]
        packed = self._packed.entries(self._renamed.get(name, name))
        _check_packed(packed.dtype, packed.shape, shape)

        def read(start: int, stop: int, buffer: Buffer | None) -> Tensor:
            first = start // 8
            piece = packed.read(first, (stop + 7) // 8, buffer)
            bits = np.unpackbits(piece.numpy(), bitorder="little").view(np.bool_)
            if stop == math.prod(shape):
                _check_rest(bits[stop - 8 * first :], shape)
            return torch.from_numpy(bits[start - 8 * first : stop - 8 * first])

        return Entries(torch.bool, tuple(shape), read)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._shapes))

    def __len__(self) -> int:
        return len(self._shapes)


def load_masks(path: Path) -> dict[str, Tensor]:
    """Return all masks that :func:`save_masks` wrote, unpacked.

    Raises:
        MethodError: as :class:`MaskFile`.
    """
    return dict(MaskFile(path))


def _stated(
    path: Path, metadata: Mapping[str, str] | None
) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Return the shapes in a mask file's metadata, and the other names that tensors are stored by.

    Raises:
        MethodError: it is no mask file, damaged, or of a newer layout.
    """
    if not metadata or METADATA_KEY not in metadata:
        raise MethodError(f"{path} is not a mask file", "give a file that prufed prune wrote")
    try:
        stated: Any = json.loads(metadata[METADATA_KEY])
        layout, shapes, stored = stated["layout"], stated["shapes"], stated.get("stored", {})
        valid = all(type(n) is int and n >= 0 for shape in shapes.values() for n in shape)
        valid &= stored.keys() <= shapes.keys() and set(map(type, stored.values())) <= {str}
        valid &= len({stored.get(name, name) for name in shapes}) == len(shapes)
    except (ValueError, TypeError, KeyError, AttributeError):
        valid = False
    if not valid:
        raise MethodError(f"{path} has unreadable metadata", "prune the base again")
    if layout != _LAYOUT:
        raise MethodError(
            f"{path} has mask layout {layout}, this version reads {_LAYOUT}", "upgrade prufed"
        )
    return dict(shapes), dict(stored)


def digest(masks: Mapping[str, Tensor]) -> str:
    """Return ``sha256:…`` over names, shapes and entries, independent of the order of names."""
    state = hashlib.sha256()
    for name in sorted(masks):
        state.update(json.dumps([name, list(masks[name].shape)]).encode() + b"\n")
        state.update(pack(masks[name]).numpy().tobytes())
    return f"sha256:{state.hexdigest()}"
