"""What a configuration says once only some of a model's decoder layers are left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from prufed_cli.errors import USAGE, PrufedError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig


_PER_LAYER: Final = frozenset({"moe_topk", "moe_intermediate_size", "num_shared_expert"})
"""Lists of something per layer whose names do not say so (HunYuan's)."""

_NUMBERED: Final = frozenset(
    {
        "attn_layer_indices",  # Bamba
        "cross_attention_layers",  # Mllama
        "full_attn_idxs",  # LFM2
        "hybrid_layer_ids",  # Zamba2
        "kv_source_layers",  # Mistral Large 4, each its own source
        "local_layer_ids",  # Inkling
        "moe_layers",  # Llama 4
        "rope_scaling_layers",  # Molmo 2
    }
)
"""Lists of layers by their numbers, which may happen to be as long as the model has layers."""

_PREDICTORS: Final = ("num_mtp_layers", "num_nextn_predict_layers", "mtp_num_hidden_layers")
"""How many layers for multi-token prediction are stored beside a model's own."""

_HINT: Final = "prune its entries: --method magnitude --sparsity 0.5"

_NUMBERS: Final = frozenset(
    {
        *("layer_idx", "layer_id", "layer_index", "layer_number", "training"),
        "store_full_length_kv",  # for later layers, and models with any that use it are refused
    }
)
"""What a module may remember of its place, or of what it is used for."""


def check_layers(kept: Sequence[int], layers: int) -> None:
    """Refuse layers that are not ascending layers of a model.

    Raises:
        PrufedError: as said.
    """
    if not kept or list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= layers:
        raise PrufedError(
            f"layers {list(kept)} are not ascending layers of a model that has {layers}",
            f"list layers between 0 and {layers - 1}, each once",
            USAGE,
        )


def slice_config(config: PretrainedConfig, kept: Sequence[int]) -> None:
    """Let everything that a configuration says of single layers speak of those that stay.

    Raises:
        PrufedError: the model's layers cannot do without one another, or no attention is left.
    """
    _check_independent(config)
    _check_attention(config, kept)
    before = config.num_hidden_layers
    rules = _renumbered(config, kept)
    overrides = config.to_dict().get("per_layer_config")
    for name, value in vars(config).items():
        per_layer = "layer" in name or name in _PER_LAYER
        whole = isinstance(value, list | tuple) and len(value) == before
        if per_layer and whole and name not in rules:
            rules[name] = [value[layer] for layer in kept]
    for name, value in rules.items():
        setattr(config, name, value)
    config.num_hidden_layers = len(kept)
    if overrides is not None:  # set last: its numbers are checked against the number of layers
        by_number = {int(layer): said for layer, said in overrides.items()}
        config.per_layer_config = {
            local: by_number[layer] for local, layer in enumerate(kept) if layer in by_number
        }


def forget_predictors(config: PretrainedConfig) -> str | None:
    """Count no layers for multi-token prediction; return the name of what did, if anything."""
    found = None
    for part in (config.get_text_config(), config):
        for name in _PREDICTORS:
            if getattr(part, name, None):
                setattr(part, name, 0)
                found = found or name
    return found


def check_blocks(
    architecture: str, before: Sequence[nn.Module], after: Sequence[nn.Module], kept: Sequence[int]
) -> None:
    """Refuse a sub-model whose blocks are not built as those that they come from.

    Some compute with their own number or with the number of layers (GPT-2's inverse scaling by
    layer, DiffLlama, MiniCPM3): under another number the same weights are another block.

    Args:
        architecture: what to call the model.
        before: the blocks of the base.
        after: the blocks of the sub-model, as its configuration builds them.
        kept: the block of the base that each of them comes from.

    Raises:
        PrufedError: as said, with the first thing that differs.
    """
    if len(after) != len(kept):
        raise PrufedError(
            f"cannot drop layers of a {architecture}: its configuration still speaks of "
            f"{len(after)} layers where {len(kept)} are left",
            _HINT,
            USAGE,
        )
    for local, layer in enumerate(kept):
        old, new = _built(before[layer]), _built(after[local])
        differs = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
        if differs:
            raise PrufedError(
                f"cannot drop layers of a {architecture}: as layer {local}, layer {layer} would "
                f"have another {differs[0]}",
                _HINT,
                USAGE,
            )


def _built(block: nn.Module) -> dict[str, Any]:
    """Return everything that a block computes with but the values of its parameters."""
    facts: dict[str, Any] = {}
    for path, module in block.named_modules():
        facts[path or "block"] = type(module).__name__
        for name, value in vars(module).items():
            if isinstance(value, bool | int | float | str) and name not in _NUMBERS:
                facts[f"{path}.{name}"] = value
        for name, parameter in module.named_parameters(recurse=False):
            facts[f"{path}.{name}"] = tuple(parameter.shape)
        for name, buffer in module.named_buffers(recurse=False):
            total = None if buffer.is_meta else float(buffer.cpu().double().sum())
            facts[f"{path}.{name}"] = (tuple(buffer.shape), total)
    return facts


def _check_independent(config: PretrainedConfig) -> None:
    """Refuse layers that use what other layers have (Gemma 3n, Gemma 4, Mistral Large 4)."""
    alone = list(range(config.num_hidden_layers))
    sources = getattr(config, "kv_source_layers", None) or alone
    shared = getattr(config, "num_kv_shared_layers", None) or list(sources) != alone
    packed = getattr(config, "hidden_size_per_layer_input", None)
    for found, reason in (
        (shared, "later layers use the keys and values of earlier ones"),
        (packed, "one embedding holds a part for every layer"),
    ):
        if found:
            raise PrufedError(
                f"cannot drop layers of a {config.model_type} model: {reason}",
                _HINT,
                USAGE,
            )


def _check_attention(config: PretrainedConfig, kept: Sequence[int]) -> None:
    """Refuse to drop every attention layer of a hybrid.

    The cache of transformers counts tokens in its attention layers: without one ``generate`` fails,
    unless the whole architecture does without (Mamba).
    """
    attention = _attention_layers(config)
    if attention and not set(attention) & set(kept):
        raise PrufedError(
            f"the sub-model of a {config.model_type} model would have no attention layer left",
            f"keep one of layers {', '.join(map(str, attention))}",
            USAGE,
        )


def _attention_layers(config: PretrainedConfig) -> list[int]:
    """Return the layers that keep keys and values; none where transformers knows no such cache."""
    from transformers.cache_utils import CacheLayerMixin, DynamicCache

    try:
        cache = DynamicCache(config=config)
    except KeyError:  # a type of layer that only the model's own code knows
        return []
    return [index for index, one in enumerate(cache.layers) if isinstance(one, CacheLayerMixin)]


def _renumbered(config: PretrainedConfig, kept: Sequence[int]) -> dict[str, Any]:
    """Return what is said of layers by their numbers, said of their new ones.

    Every n-th layer is no longer every n-th, so the rule becomes a list.
    """
    rules: dict[str, Any] = {}
    for name in _NUMBERED & vars(config).keys():
        if isinstance(numbers := getattr(config, name), list | tuple):
            rules[name] = [local for local, layer in enumerate(kept) if layer in numbers]
    for name in ("first_k_dense_replace", "max_window_layers"):
        if isinstance(first := getattr(config, name, None), int):
            rules[name] = sum(layer < first for layer in kept)
    if isinstance(step := getattr(config, "decoder_sparse_step", None), int):
        dense = set(config.mlp_only_layers or ())
        rules["mlp_only_layers"] = [
            local for local, layer in enumerate(kept) if layer in dense or (layer + 1) % step
        ]
        rules["decoder_sparse_step"] = 1
    if hasattr(config, "attention_types"):  # GPT-Neo: (types, how often), one after the other
        rules["attention_types"] = [[[config.attention_layers[layer]], 1] for layer in kept]
    return rules
