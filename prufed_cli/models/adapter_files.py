"""Adapters on disk: a directory that PEFT loads, and that says the same thing byte for byte.

``adapter_config.json`` and ``adapter_model.safetensors`` as PEFT 0.21 writes them: sorted keys,
tensors named ``base_model.model.<module>.lora_A.weight`` with the sub-model's own layer numbers, no
times and no paths. A product mask is not PEFT's to know: it applies ``W + s · B A``, so such an
adapter must be merged by us before others use it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from prufed_cli.errors import INTEGRITY, PrufedError
from prufed_cli.models.adapter_spec import ALL_LINEAR, AdapterSpec

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"
PICKLE_FILE: Final = "adapter_model.bin"

_PREFIX: Final = "base_model.model."
_FACTORS: Final = (".lora_A.weight", ".lora_B.weight")

_FIXED: Final[Mapping[str, Any]] = {
    "alpha_pattern": {},
    "auto_mapping": None,
    "bias": "none",
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "modules_to_save": None,
    "peft_type": "LORA",
    "rank_pattern": {},
    "revision": None,
    "task_type": "CAUSAL_LM",
    "use_dora": False,
    "use_rslora": False,
}
_WITHOUT_EFFECT: Final = frozenset(
    {
        *("peft_type", "task_type", "peft_version", "auto_mapping", "inference_mode"),
        *("base_model_name_or_path", "revision", "target_modules", "exclude_modules"),
        *("layers_to_transform", "layers_pattern", "fan_in_fan_out", "ensure_weight_tying"),
        *("r", "lora_alpha", "use_rslora", "lora_dropout", "megatron_core", "qalora_group_size"),
        *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    }
)
"""Settings that say where an adapter sits or how it began, not what it computes."""


@dataclass(frozen=True)
class AdapterFacts:
    """What an adapter's configuration says.

    Attributes:
        r: LoRA rank.
        scaling: s, the factor on B A.
        target_modules: suffixes of module names.
        base: ``base_model_name_or_path``, None where it is not set.
    """

    r: int
    scaling: float
    target_modules: tuple[str, ...]
    base: str | None


def save_adapter(
    directory: Path,
    tensors: Mapping[str, Tensor],
    spec: AdapterSpec,
    base_reference: str,
    *,
    fan_in_fan_out: bool = False,
) -> None:
    """Write a PEFT directory whose scaling is exactly ``spec.scaling``.

    Args:
        directory: made if it does not exist.
        tensors: adapter tensors by local name, in the client's own scale.
        spec: the adapter.
        base_reference: reference of the base, for ``base_model_name_or_path``; never a path.
        fan_in_fan_out: whether the target layers keep their weights as (k, d), as GPT-2's do.

    Raises:
        PrufedError: a tensor is NaN or infinite, or has a name that is not an adapter's.
    """
    _check_values(directory, tensors)
    directory.mkdir(parents=True, exist_ok=True)
    alpha = spec.scaling * spec.r
    config = {
        **_FIXED,
        "base_model_name_or_path": base_reference,
        "fan_in_fan_out": fan_in_fan_out,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": spec.dropout,
        "r": spec.r,
        "target_modules": _target_modules(spec, tensors),
    }
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (directory / CONFIG_FILE).write_text(text, encoding="utf-8")
    stored = {
        f"{_PREFIX}{name}": tensors[name].detach().to("cpu", torch.float32).contiguous()
        for name in sorted(tensors)
    }
    save_file(stored, directory / WEIGHTS_FILE, metadata={"format": "pt"})


def load_adapter(directory: Path) -> tuple[dict[str, Tensor], AdapterFacts]:
    """Return the adapter tensors by local name, in float32, and what the configuration says.

    Raises:
        PrufedError: a file is missing, damaged or pickled; the adapter is not plain LoRA; a tensor
            has an unknown name, the wrong shape, no partner, or holds NaN or infinity.
    """
    config = _read_config(directory)
    facts = _facts(directory, config)
    stored = _read_tensors(directory)
    tensors = {}
    for key, tensor in stored.items():
        name = key.removeprefix(_PREFIX)
        if name == key or not name.endswith(_FACTORS):
            raise _damaged(directory, f"holds the unknown tensor {key}")
        tensors[name] = tensor.to(torch.float32)
    if not tensors:
        raise _damaged(directory, "holds no tensors")
    _check_shapes(directory, tensors, facts.r)
    _check_values(directory, tensors)
    return tensors, facts


def _damaged(directory: Path, what: str) -> PrufedError:
    return PrufedError(
        f"adapter {directory} {what}", "train it again, or export it again with PEFT", INTEGRITY
    )


def _target_modules(spec: AdapterSpec, tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the suffixes that PEFT is to match; PEFT too writes ``all-linear`` out in full."""
    if ALL_LINEAR not in spec.target_modules:
        return sorted(spec.target_modules)
    return sorted({name.rpartition(".lora_")[0].rpartition(".")[2] for name in tensors})


def _read_config(directory: Path) -> dict[str, Any]:
    try:
        config = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _damaged(directory, f"has no {CONFIG_FILE}") from None
    except (OSError, ValueError) as error:
        raise _damaged(directory, f"has an unreadable {CONFIG_FILE}: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise _damaged(directory, "is not a LoRA adapter")
    for key, value in config.items():
        neutral = not value or (key, value) == ("bias", "none")
        if key not in _WITHOUT_EFFECT and not neutral:
            raise _damaged(directory, f"uses {key}: {value!r}, which plain LoRA does not have")
    return config


def _facts(directory: Path, config: Mapping[str, Any]) -> AdapterFacts:
    r, alpha = config.get("r"), config.get("lora_alpha")
    targets, base = config.get("target_modules"), config.get("base_model_name_or_path")
    if type(r) is not int or r < 1:
        raise _damaged(directory, f"states rank {r!r}")
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise _damaged(directory, f"states lora_alpha {alpha!r}")
    targets = [targets] if isinstance(targets, str) else targets
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise _damaged(directory, f"states target_modules {targets!r}")
    if base is not None and not isinstance(base, str):
        raise _damaged(directory, f"states base {base!r}")
    scaling = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
    return AdapterFacts(r, scaling, tuple(targets), base)


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    path = directory / WEIGHTS_FILE
    if not path.exists() and (directory / PICKLE_FILE).exists():
        raise PrufedError(
            f"adapter {directory} is pickled: {PICKLE_FILE} can run code when it is read",
            f"load it with PEFT where you trust it and save it again as {WEIGHTS_FILE}",
            INTEGRITY,
        )
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise _damaged(directory, f"has an unreadable {WEIGHTS_FILE}: {error}") from error


def _check_shapes(directory: Path, tensors: Mapping[str, Tensor], rank: int) -> None:
    for name, tensor in tensors.items():
        module, factor = name.rpartition(".lora_")[::2]
        partner = f"{module}.lora_{'B' if factor.startswith('A') else 'A'}.weight"
        if partner not in tensors:
            raise _damaged(directory, f"lacks {partner}")
        inner = tensor.shape[0 if factor.startswith("A") else -1] if tensor.ndim == 2 else None
        if inner != rank:
            raise _damaged(
                directory, f"states rank {rank}, and {name} has shape {list(tensor.shape)}"
            )


def _check_values(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not name.endswith(_FACTORS):
            raise _damaged(directory, f"holds the unknown tensor {name}")
        if not bool(torch.isfinite(tensor).all()):
            raise _damaged(directory, f"holds NaN or infinity in {name}")
