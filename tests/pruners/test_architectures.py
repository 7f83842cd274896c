"""Decoders of every supported architecture are seen, pruned and sliced alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3nTextConfig,
    GPTNeoConfig,
    LlamaConfig,
    PreTrainedModel,
)

from prufed_cli.errors import PrufedError
from prufed_plugins.api import PruneTarget
from prufed_plugins.discover import build
from tests.pruners.whole_models import open_decoder, slice_layers


@torch.no_grad()
def outputs_of_blocks(model: Any, blocks: Any, ids: Tensor) -> list[Tensor]:
    seen: list[Tensor] = []
    handles = [block.register_forward_hook(lambda m, a, o: seen.append(o)) for block in blocks]
    model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def test_blocks_run_one_by_one_give_the_models_own_hidden_states(model: Any, ids: Tensor) -> None:
    decoder = open_decoder(model)
    expected = outputs_of_blocks(model, decoder.blocks, ids)
    with torch.no_grad():
        ((hidden, arguments),) = decoder.embed([ids])
        for index, output in enumerate(expected):
            hidden = decoder.run_block(index, hidden, arguments)
            assert torch.equal(hidden, output), f"block {index}"


def test_every_matrix_of_the_blocks_is_pruned_and_nothing_else(model: Any, ids: Tensor) -> None:
    decoder = open_decoder(model)
    results = build("pruner", "sparsegpt", {}).prune(
        decoder, [ids], PruneTarget(pattern=(2, 4)), lambda *_: None
    )
    names = {result.name for result in results}
    expected = {
        name
        for name, parameter in model.named_parameters()
        if name.startswith(decoder.prefix) and parameter.dim() == 2
    }
    assert names == expected
    assert torch.isfinite(model(input_ids=ids).logits).all()


@torch.no_grad()
def test_a_sliced_model_loads_as_an_ordinary_one(model: Any, ids: Tensor, tmp_path: Path) -> None:
    blocks = open_decoder(model).blocks
    sliced = slice_layers(model, [0, 2, 5])
    assert list(open_decoder(sliced).blocks) == [blocks[0], blocks[2], blocks[5]]
    sliced.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.get_text_config().num_hidden_layers == 3
    assert torch.equal(loaded(ids).logits, sliced(ids).logits)


@torch.no_grad()
def test_a_sliced_model_generates_with_its_cache(model: Any, ids: Tensor) -> None:
    sliced = slice_layers(model, [1, 2, 4])
    options: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(ids[:1])
    cached = sliced.generate(ids[:1], use_cache=True, **options)
    assert torch.equal(cached, sliced.generate(ids[:1], use_cache=False, **options))


def test_per_layer_lists_of_the_configuration_follow(new_model: Callable[..., Any]) -> None:
    types = ["full_attention", "sliding_attention"] * 3
    sliced = slice_layers(new_model("gemma3", layer_types=types), [0, 2, 3])
    assert list(sliced.config.layer_types) == [types[0], types[2], types[3]]
    assert [layer.self_attn.layer_idx for layer in sliced.model.layers] == [0, 1, 2]


def test_a_type_stored_per_layer_is_kept_where_a_rule_would_give_another(
    new_model: Callable[..., Any], ids: Tensor, tmp_path: Path
) -> None:
    """Qwen2's sliding window begins at ``max_window_layers``, Gemma3's pattern counts to six."""
    for name in ("qwen2", "gemma3"):
        sliced = slice_layers(new_model(name), [1, 4, 5])
        sliced.save_pretrained(tmp_path / name)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert list(loaded.config.layer_types) == list(sliced.config.layer_types)
        windows = [layer.self_attn.sliding_window for layer in sliced.model.layers]
        assert [layer.self_attn.sliding_window for layer in loaded.model.layers] == windows


def test_where_the_sliding_window_begins_follows(new_model: Callable[..., Any]) -> None:
    """Other software reads ``max_window_layers`` alone; without the list it says the same."""
    sliced = slice_layers(new_model("qwen2"), [1, 4, 5])
    said = sliced.config.to_dict()
    types = said.pop("layer_types")
    assert said["max_window_layers"] == 1
    assert type(sliced.config)(**said).layer_types == types


@torch.no_grad()
def test_layers_that_number_themselves_otherwise(ids: Tensor, tmp_path: Path) -> None:
    config = GPTNeoConfig(
        vocab_size=97,
        hidden_size=32,
        num_layers=6,
        num_heads=4,
        attention_types=[[["global", "local"], 3]],
        window_size=8,
        max_position_embeddings=64,
    )
    sliced = slice_layers(AutoModelForCausalLM.from_config(config).eval(), [0, 2, 5])
    options: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(ids[:1])
    cached = sliced.generate(ids[:1], use_cache=True, **options)
    assert torch.equal(cached, sliced.generate(ids[:1], use_cache=False, **options))
    sliced.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.attention_layers == ["global", "global", "local"]
    assert torch.equal(loaded(ids).logits, sliced(ids).logits)


@pytest.mark.parametrize("kept", [[], [2, 1], [0, 0, 1], [-1, 2], [4, 6]])
def test_layers_that_cannot_be_kept_are_refused(llama: Any, kept: list[int]) -> None:
    with pytest.raises(PrufedError, match="not ascending layers of a model that has 6"):
        slice_layers(llama, kept)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_kv_shared_layers": 2}, "the keys and values of earlier ones"),
        ({"num_kv_shared_layers": 0}, "one embedding holds a part for every layer"),
    ],
)
def test_layers_that_cannot_do_without_one_another_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    config = Gemma3nTextConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=5,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=31,
        layer_types=["full_attention"] * 5,
        **settings,
    )
    with pytest.raises(PrufedError, match=f"cannot drop layers of a gemma3n.*{message}"):
        slice_layers(AutoModelForCausalLM.from_config(config), [0, 1])


def test_an_encoder_decoder_is_refused_by_name() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=31, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    with pytest.raises(PrufedError, match="cannot prune a T5ForConditionalGeneration"):
        open_decoder(T5ForConditionalGeneration(config))


class TupleBlock(nn.Module):
    """A block of the older convention: a tuple out, and a positional argument in."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden_states: Tensor, scale: float) -> tuple[Tensor, None]:
        return hidden_states + scale * self.linear(hidden_states), None


class TupleStack(PreTrainedModel):
    """A model whose blocks return tuples."""

    config_class = LlamaConfig
    base_model_prefix = "none"

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, 8)
        self.layers = nn.ModuleList(TupleBlock() for _ in range(config.num_hidden_layers))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        hidden = self.embedding(input_ids)
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, index + 1.0)[0]
        return SimpleNamespace(logits=hidden)


def test_blocks_may_return_tuples_and_take_positional_arguments() -> None:
    model = TupleStack(LlamaConfig(vocab_size=31, num_hidden_layers=3))
    decoder = open_decoder(model)
    ids = torch.randint(0, 31, (2, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ((hidden, arguments),) = decoder.embed([ids])
        for index in range(3):
            hidden = decoder.run_block(index, hidden, arguments)
        assert torch.equal(hidden, model(ids).logits)
