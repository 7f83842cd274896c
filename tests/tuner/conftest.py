from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from prufed_cli.models.adapters import (
    AttachedAdapter,
    adapter_spec,
    attach,
    client_masks,
    init_global,
    target_layers,
    target_shapes,
)
from prufed_plugins.api import TrainingData


@pytest.fixture
def base() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,  # large enough for a frozen head to say something
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def adapted(base: nn.Module) -> Iterator[AttachedAdapter]:
    """Both masks at one half on every linear layer, and dropout."""
    generator = torch.Generator().manual_seed(2)
    products = {}
    with torch.no_grad():
        for name, layer in target_layers(base, ["all-linear"]).items():
            products[f"{name}.weight"] = torch.rand(layer.weight.shape, generator=generator) < 0.5
            layer.weight.mul_(products[f"{name}.weight"])
    spec = adapter_spec("lego", r=4, alpha=4, sparsity=0.5, target_modules=("all-linear",))
    tensors = init_global(target_shapes(base, spec.target_modules), spec, 0)
    with attach(base, spec, tensors, client_masks(spec, tensors), products) as model:
        yield model


@pytest.fixture
def data() -> TrainingData:
    """Rows of many lengths that count upwards from a random start: something to learn."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for _ in range(50):
        start, length = torch.randint(40, (2,), generator=generator).tolist()
        rows.append([(start + step) % 48 for step in range(4 + length % 17)])
    return TrainingData(input_ids=rows, labels=[[-100, *row[1:]] for row in rows])
