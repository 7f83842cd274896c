"""Make a shallower model out of some of a model's decoder layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prufed_cli.errors import USAGE, PrufedError
from prufed_cli.models.decoder import find_stack
from prufed_cli.models.experts import unfuse_experts

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def slice_layers(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """Keep only some decoder layers, in place.

    The layers are renumbered, so that the key-value cache and the saved names count from 0, and the
    configuration's number of layers and its per-layer lists follow: what ``save_pretrained``
    writes loads as an ordinary model of that depth.

    Args:
        model: a loaded causal language model; changed.
        kept: indices of the layers that stay, ascending.

    Returns:
        The same model.

    Raises:
        PrufedError: the indices are not ascending layers of the model, or the model is no decoder.
    """
    from torch import nn

    unfuse_experts(model)  # find_stack knows no fused ones
    path = find_stack(model)
    stack = model.get_submodule(path)
    assert isinstance(stack, nn.ModuleList)
    if not kept or list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= len(stack):
        raise PrufedError(
            f"layers {list(kept)} are not ascending layers of a model that has {len(stack)}",
            f"list layers between 0 and {len(stack) - 1}, each once",
            USAGE,
        )
    for local, layer in enumerate(kept):
        for module in stack[layer].modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", local)  # noqa: B010 (nn.Module types attributes as tensors)
    model.set_submodule(path, nn.ModuleList(stack[layer] for layer in kept))
    _slice_config(model.config.get_text_config(), kept)
    return model


def _slice_config(config: PretrainedConfig, kept: Sequence[int]) -> None:
    """Trim the per-layer lists (``layer_types`` and the like) and set the number of layers."""
    before = config.num_hidden_layers
    for name, value in vars(config).items():
        if "layer" in name and isinstance(value, list | tuple) and len(value) == before:
            trimmed: Any = [value[layer] for layer in kept]
            setattr(config, name, trimmed)
    config.num_hidden_layers = len(kept)
