"""Masked LoRA adapters on a resident base: make, attach, detach, merge.

One base serves many clients: :func:`attach` puts a client's adapter on, the tuner trains it,
``detach`` leaves the base as it was, module for module, and the next client's adapter goes on.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prufed_cli.errors import INTEGRITY, USAGE, PrufedError
from prufed_cli.models.adapter_files import AdapterFacts, load_adapter, save_adapter
from prufed_cli.models.adapter_spec import ALL_LINEAR, PRESETS, AdapterSpec, adapter_spec
from prufed_cli.models.layer_names import to_global, to_local
from prufed_cli.models.masked_lora import (
    MaskedLora,
    feature_counts,
    folded,
    is_transposed,
)
from prufed_plugins.factor_masks import factor_masks

__all__ = [
    "PRESETS",
    "AdapterFacts",
    "AdapterSpec",
    "AttachedAdapter",
    "adapter_spec",
    "attach",
    "client_masks",
    "init_global",
    "load_adapter",
    "merge",
    "save_adapter",
    "target_layers",
    "target_shapes",
    "to_global",
    "to_local",
]

_WRONG_BASE = "the adapter and the base do not belong together"


# --- which layers --------------------------------------------------------------------------------


def target_layers(model: nn.Module, target_modules: Sequence[str]) -> dict[str, nn.Module]:
    """Return the linear layers whose names end in one of ``target_modules``, in model order.

    ``all-linear`` means every linear layer but the output embedding, as in PEFT.

    Raises:
        PrufedError: a target matches no such layer.
    """
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not _embedding(model, "output")
    }
    found = {
        target: [
            name for name in linears if target == ALL_LINEAR or f".{name}".endswith(f".{target}")
        ]
        for target in target_modules
    }
    missing = [target for target, names in found.items() if not names]
    if missing:
        leaves = sorted({name.rpartition(".")[2] for name in linears})
        raise PrufedError(
            f"target module {missing[0]!r} matches no linear layer of {type(model).__name__}",
            f"choose from {', '.join(leaves)} or {ALL_LINEAR}",
            USAGE,
        )
    matched = {name for names in found.values() for name in names}
    return {name: module for name, module in linears.items() if name in matched}


def target_shapes(model: nn.Module, target_modules: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Return (d, k) of each target layer by its name; ``model`` may be on the meta device."""
    layers = target_layers(model, target_modules)
    return {name: feature_counts(layer) for name, layer in layers.items()}


def _embedding(model: nn.Module, end: str) -> nn.Module | None:
    get: Callable[[], nn.Module | None] | None = getattr(model, f"get_{end}_embeddings", None)
    return None if get is None else get()


# --- the first adapter ---------------------------------------------------------------------------


def init_global(
    shapes: Mapping[str, tuple[int, int]], spec: AdapterSpec, seed: int
) -> dict[str, Tensor]:
    """Return the adapter every client starts from, by global name, in float32.

    A (r, k) is Kaiming-uniform with a = √5, that is uniform in ±1/√k; B (d, r) is zero. Each A has
    its own generator, so it depends on (seed, name, shape) and not on the other layers.

    Args:
        shapes: (d, k) of every target layer of the *full* model, from :func:`target_shapes`.
        spec: the adapter; only its rank counts.
        seed: the federation's seed.
    """
    tensors = {}
    for module, (d, k) in shapes.items():
        text = json.dumps(["lora-init", seed, module, spec.r, k])
        digest = hashlib.sha256(text.encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        A = torch.empty(spec.r, k).uniform_(
            -1 / math.sqrt(k), 1 / math.sqrt(k), generator=generator
        )
        tensors[f"{module}.lora_A.weight"] = A
        tensors[f"{module}.lora_B.weight"] = torch.zeros(d, spec.r)
    return tensors


def client_masks(
    spec: AdapterSpec,
    tensors: Mapping[str, Tensor],
    *,
    model: nn.Module | None = None,
    base_masks: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return the masks of a client's factors by the names of ``tensors``; absent: every entry.

    Args:
        spec: the client's adapter.
        tensors: adapter tensors by global name.
        model: the client's base; only ``structured`` looks at it.
        base_masks: masks of that base by parameter name; only ``structured`` looks at them.

    Raises:
        MethodError: ``structured`` without a base mask that fits.
    """
    masks: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    if spec.factor_mask == "structured" and model is not None and base_masks is not None:
        for name, layer in target_layers(model, spec.target_modules).items():
            key, weight = f"{name}.weight", cast(Tensor, layer.weight)
            if key in base_masks:
                transposed = is_transposed(layer)
                weights[key] = weight.T if transposed else weight
                masks[key] = base_masks[key].T if transposed else base_masks[key]
    return factor_masks(
        spec.factor_mask,
        tensors,
        spec.sparsity,
        seed=spec.seed,
        base_masks=masks,
        base_weights=weights,
    )


# --- on and off ----------------------------------------------------------------------------------


class AttachedAdapter:
    """A base with an adapter on it (:class:`prufed_plugins.api.AdaptedModel`).

    Attributes:
        module: the model; only adapter parameters require gradients while the adapter is on.
        parameters: trainable tensors by local name.
        masks: bool masks by local name, on the parameters' device.
    """

    def __init__(
        self, module: nn.Module, layers: Mapping[str, MaskedLora], masks: Mapping[str, Tensor]
    ) -> None:
        self.module = module
        self._layers = dict(layers)
        self._originals = {name: module.get_submodule(name) for name in layers}
        self._required = {p: p.requires_grad for p in module.parameters()}
        module.requires_grad_(False)
        for name, layer in self._layers.items():
            _replace(module, name, layer)
        self.parameters: Mapping[str, nn.Parameter] = {
            f"{name}.{factor}.weight": cast(nn.Parameter, getattr(layer, factor))
            for name, layer in self._layers.items()
            for factor in ("lora_A", "lora_B")
        }
        self.masks: Mapping[str, Tensor] = {
            name: mask.to(self.parameters[name].device, torch.bool) for name, mask in masks.items()
        }
        self.project()

    def project(self) -> None:
        """Set every masked-out entry of the adapter to exactly zero."""
        with torch.no_grad():
            for name, mask in self.masks.items():
                self.parameters[name].masked_fill_(~mask, 0)

    def state(self) -> dict[str, Tensor]:
        """Return a copy of the adapter tensors by local name, on the CPU in float32."""
        return {
            name: parameter.detach().to("cpu", torch.float32, copy=True)
            for name, parameter in self.parameters.items()
        }

    def detach(self) -> None:
        """Put the base's own layers back. A second call does nothing."""
        for name, layer in self._originals.items():
            _replace(self.module, name, layer)
        for parameter, required in self._required.items():
            parameter.requires_grad_(required)
        self._layers, self._originals, self._required = {}, {}, {}

    def __enter__(self) -> AttachedAdapter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.detach()


def attach(
    model: nn.Module,
    spec: AdapterSpec,
    tensors: Mapping[str, Tensor],
    factor_masks: Mapping[str, Tensor] | None = None,
    product_masks: Mapping[str, Tensor] | None = None,
    residual: Mapping[str, Tensor] | None = None,
) -> AttachedAdapter:
    """Put an adapter on a model, in place; use the result in a ``with`` or call ``detach``.

    Args:
        model: the client's base, with no adapter on it.
        spec: the client's adapter.
        tensors: adapter tensors by local name, in the client's own scale; they are copied.
        factor_masks: bool masks of A and B by local name; absent means every entry.
        product_masks: the base's masks by parameter name, in the parameter's layout; looked at
            only where ``spec.product_mask`` says so, and a layer without one is taken as whole.
        residual: factors A (R, k) and B (d, R) by local name, in the client's own scale, that are
            part of the base while the adapter is on, under the same masks; they are not trained.

    Raises:
        PrufedError: tensors or masks do not fit the model.
    """
    layers = target_layers(model, spec.target_modules)
    masks = dict(factor_masks or {})
    products = (product_masks or {}) if spec.product_mask else {}
    _check_tensors(layers, spec.r, tensors, masks)
    if residual:
        _check_tensors(layers, rank_of(residual), residual, {})
    adapted = {}
    for name, layer in layers.items():
        product = products.get(f"{name}.weight")
        _check_product_mask(name, layer, product)
        if residual:
            A, B = (residual[f"{name}.lora_{factor}.weight"] for factor in "AB")
            layer = folded(layer, A, B, spec.scaling, product)
        adapted[name] = MaskedLora(
            layer,
            tensors[f"{name}.lora_A.weight"],
            tensors[f"{name}.lora_B.weight"],
            scaling=spec.scaling,
            dropout=spec.dropout,
            product_mask=product,
        ).train(layer.training)
    return AttachedAdapter(model, adapted, masks)


def rank_of(tensors: Mapping[str, Tensor]) -> int:
    """Return the rank of an adapter's tensors, by whatever names; 0 where there are none."""
    return next((t.shape[0] for name, t in tensors.items() if name.endswith(".lora_A.weight")), 0)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _check_tensors(
    layers: Mapping[str, nn.Module],
    rank: int,
    tensors: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
) -> None:
    expected: dict[str, tuple[int, int]] = {}
    for name, layer in layers.items():
        d, k = feature_counts(layer)
        expected |= {f"{name}.lora_A.weight": (rank, k), f"{name}.lora_B.weight": (d, rank)}
    odd = sorted(expected.keys() ^ tensors.keys()) or sorted(masks.keys() - expected.keys())
    if odd:
        kind = "lacks" if odd[0] in expected else "has the unknown tensor"
        raise PrufedError(f"the adapter {kind} {odd[0]}", _WRONG_BASE, INTEGRITY)
    for given in (tensors, masks):
        for name, tensor in given.items():
            if tuple(tensor.shape) != expected[name]:
                raise PrufedError(
                    f"{name} has shape {list(tensor.shape)}, the base takes {list(expected[name])}",
                    _WRONG_BASE,
                    INTEGRITY,
                )


def _check_product_mask(name: str, layer: nn.Module, mask: Tensor | None) -> None:
    shape = cast(Tensor, layer.weight).shape
    if mask is not None and mask.shape != shape:
        raise PrufedError(
            f"the mask of {name}.weight has shape {list(mask.shape)}, the weight {list(shape)}",
            "the masks and the base do not belong together",
            INTEGRITY,
        )


# --- merging -------------------------------------------------------------------------------------


def merge(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    scaling: float,
    product_masks: Mapping[str, Tensor] | None = None,
) -> None:
    """Add ``s · B A``, or ``s · M⊙(B A)``, to the model's weights in place.

    Entries that M removes are not touched, so the base's sparsity is kept exactly. The merged
    weights are the ones the attached adapter computes with, bit for bit, where M is given.

    Args:
        model: the base, with no adapter on it.
        tensors: adapter tensors by local name, in the client's own scale.
        scaling: s.
        product_masks: the base's masks by parameter name; a layer without one is taken as whole.

    Raises:
        PrufedError: tensors or masks do not fit the model; the model is then unchanged.
    """
    modules = dict(model.named_modules())
    names = sorted({name.rpartition(".lora_")[0] for name in tensors})
    unknown = [n for n in names if not isinstance(modules.get(n), nn.Linear | Conv1D)]
    if unknown:
        raise PrufedError(f"the base has no linear layer {unknown[0]}", _WRONG_BASE, INTEGRITY)
    layers = {name: modules[name] for name in names}
    _check_tensors(layers, rank_of(tensors), tensors, {})
    masks = {name: (product_masks or {}).get(f"{name}.weight") for name in names}
    for name, layer in layers.items():
        _check_product_mask(name, layer, masks[name])
    for name, layer in layers.items():
        _merge_layer(
            layer,
            tensors[f"{name}.lora_A.weight"],
            tensors[f"{name}.lora_B.weight"],
            scaling,
            masks[name],
        )


def _merge_layer(
    layer: nn.Module, A: Tensor, B: Tensor, scaling: float, mask: Tensor | None
) -> None:
    with torch.no_grad():
        merged = folded(layer, A, B, scaling, mask)
        cast(Tensor, layer.weight).copy_(cast(Tensor, merged.weight))
