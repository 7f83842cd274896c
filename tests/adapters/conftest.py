from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from prufed_cli.models.adapters import target_layers


@pytest.fixture
def llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    found: nn.Module = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def base_masks(model: nn.Module) -> dict[str, torch.Tensor]:
    """Prune every linear layer of ``model`` to half, at random; return its masks."""
    generator = torch.Generator().manual_seed(2)
    masks = {}
    with torch.no_grad():
        for name, layer in target_layers(model, ["all-linear"]).items():
            masks[f"{name}.weight"] = torch.rand(layer.weight.shape, generator=generator) < 0.5
            layer.weight.mul_(masks[f"{name}.weight"])
    return masks
