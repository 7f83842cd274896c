"""A causal language model without its weights, and where on disk each of them is."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prufed_cli.models.base import cannot_open, check_complete, opening_errors, quiet_transformers
from prufed_cli.models.checkpoint import find_tensors, refuse_packed_matrices
from prufed_cli.models.decoder import find_stack, refuse_converted
from prufed_cli.models.experts import unfuse_experts

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedModel

    from prufed_cli.models.stored import StoredTensor


@dataclass(frozen=True)
class Skeleton:
    """A model whose parameters have shapes and no values.

    Attributes:
        model: in evaluation mode; its parameters are on the ``meta`` device, its buffers are real.
        prefix: module path of the stack of decoder blocks.
        stored: where the value of each parameter and persistent buffer is, by its name in the
            model. Of weights that are tied only the one that is stored is here.
        tied: the parameter that another one is tied to, by the name of that other.
    """

    model: PreTrainedModel
    prefix: str
    stored: Mapping[str, StoredTensor]
    tied: Mapping[str, str]

    def block_of(self, name: str) -> int | None:
        """Return the index of the block a parameter belongs to; None for one outside the stack."""
        if not name.startswith(f"{self.prefix}."):
            return None
        return int(name.removeprefix(f"{self.prefix}.").partition(".")[0])

    def saved_name(self, name: str) -> str:
        """Return the name a parameter is written under.

        It is the parameter's own, unless the checkpoint has one that transformers translates.
        """
        found = self.stored[name].name
        prefix = f"{self.model.base_model_prefix}."
        plain = {name, name.removeprefix(prefix), f"{prefix}{name}", *self.tied}
        return name if found in plain else found


def open_skeleton(
    directory: Path, ref: str, dtype: torch.dtype, *, trust_remote_code: bool = False
) -> Skeleton:
    """Build a model without weights and find them on disk.

    Args:
        directory: a model directory with safetensors weights.
        ref: what to call it.
        dtype: what it will compute in.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        PrufedError: transformers does not know the architecture, it is no plain decoder, or its
            weights are not those its configuration speaks of.
    """
    model = _build(directory, ref, dtype, trust_remote_code)
    unfuse_experts(model)
    prefix = find_stack(model)
    tensors = find_tensors(directory, ref)
    refuse_packed_matrices(tensors, ref)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    stored = _match(model, expected, tensors)
    tied = _untie(model, stored)
    wrong = [
        (name, found.shape, expected[name])
        for name, found in stored.items()
        if found.shape != expected[name]
    ]
    missing = [name for name in expected if name not in stored and name not in tied]
    if missing := _needed(model, missing):
        refuse_converted(model, missing)  # what cannot be told apart on disk is not missing there
    check_complete(ref, wrong, missing)
    model.eval().requires_grad_(False)
    return Skeleton(model, prefix, stored, tied)


def empty_model(
    config: PretrainedConfig, dtype: torch.dtype, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Build a causal language model whose parameters have no values; its buffers have."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )
    return model


def place(model: nn.Module, name: str, value: Tensor) -> None:
    """Make a tensor the value of a parameter or buffer."""
    from torch import nn

    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[leaf] = value


def _build(
    directory: Path, ref: str, dtype: torch.dtype, trust_remote_code: bool
) -> PreTrainedModel:
    quiet_transformers()
    from transformers import AutoConfig

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=trust_remote_code
        )
        model = empty_model(config, dtype, trust_remote_code=trust_remote_code)
    except opening_errors() as error:
        raise cannot_open(ref, error) from error
    return model


def _match(
    model: PreTrainedModel,
    expected: Mapping[str, Sequence[int]],
    tensors: Mapping[str, StoredTensor],
) -> dict[str, StoredTensor]:
    """Return the stored tensor of each parameter, in the order of the model's parameters.

    A name on disk may lack the base model's prefix or have it too often, and transformers knows
    older names of many architectures; a name that fits nothing is passed over, as there.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    renamings = [
        rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)
    ]
    prefix = f"{model.base_model_prefix}."
    found: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        renamed = name
        for rule in renamings:
            renamed, _ = rule.rename_source_key(renamed)
        for candidate in (renamed, name):
            forms = (candidate, candidate.removeprefix(prefix), f"{prefix}{candidate}")
            known = next((form for form in forms if form in expected), None)
            if known is not None:
                found[known] = tensor
                break
    return {name: found[name] for name in expected if name in found}


def _untie(model: PreTrainedModel, stored: dict[str, StoredTensor]) -> dict[str, str]:
    """Return what is tied to what, and keep one stored tensor of each such pair, in place.

    Weights that are meant to be tied but are stored twice with different values are not tied.
    """
    tied: dict[str, str] = {}
    for target, source in dict(getattr(model, "all_tied_weights_keys", {})).items():
        if target in stored and source in stored:
            if not _same(stored[target], stored[source]):
                continue
            del stored[target]
        elif target in stored:
            stored[source] = stored.pop(target)
        elif source not in stored:
            continue
        tied[target] = source
    return tied


def _same(one: StoredTensor, other: StoredTensor) -> bool:
    if (one.code, one.shape) != (other.code, other.shape):
        return False
    pairs = zip(one.pieces(one.dtype), other.pieces(other.dtype), strict=True)
    return all(first == second for first, second in pairs)


def _needed(model: PreTrainedModel, missing: Sequence[str]) -> list[str]:
    """Return the missing names but those that transformers knows to be absent."""
    ignored: Any = model._keys_to_ignore_on_load_missing or ()
    return [name for name in missing if not any(re.search(pattern, name) for pattern in ignored)]
