"""The global adapter before the first round: zero in its product, the same A for every client."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from prufed_cli.federation.clients import make_spec
from prufed_cli.models.adapters import AdapterSpec, init_global, target_layers, target_shapes
from prufed_plugins.api import GlobalState

if TYPE_CHECKING:
    from prufed_cli.config import FederationConfig


@dataclass(frozen=True)
class Beginning:
    """What all clients start from.

    Attributes:
        spec: the global adapter.
        state: its tensors.
        transposed: whether the target layers keep their weights as (k, d).
    """

    spec: AdapterSpec
    state: GlobalState
    transposed: bool


def begin(config: FederationConfig, directory: Path) -> Beginning:
    """Return the global adapter of a run.

    Args:
        config: the run.
        directory: of the full model; its weights are not read.

    Raises:
        PrufedError: the model has none of the target modules.
    """
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(directory, local_files_only=True)
        )
    spec = make_spec(config.adapter, config.seed, sparsity=0.0, depth_pruned=False)
    targets = target_layers(skeleton, spec.target_modules)
    state = GlobalState(
        tensors=init_global(target_shapes(skeleton, spec.target_modules), spec, config.seed),
        rank=spec.r,
        scaling=spec.scaling,
        layers=int(skeleton.config.get_text_config().num_hidden_layers),
    )
    transposed = any(isinstance(layer, Conv1D) for layer in targets.values())
    return Beginning(spec, state, transposed)
