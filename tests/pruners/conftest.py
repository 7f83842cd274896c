"""Small models of every architecture, and the plain algorithm to compare with."""

from __future__ import annotations

import importlib.util
import random
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
OPT_SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 16,
}
GPT2_SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "n_embd": 32,
    "n_layer": 6,
    "n_head": 4,
    "n_positions": 64,
}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SHAPE),
    "mistral": ("MistralConfig", SHAPE | {"sliding_window": 8}),
    "qwen2": (
        "Qwen2Config",
        SHAPE | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
    ),
    "qwen3": ("Qwen3Config", SHAPE | {"head_dim": 8}),
    "gemma": ("GemmaConfig", SHAPE | {"head_dim": 8}),
    "gemma2": ("Gemma2Config", SHAPE | {"head_dim": 8, "sliding_window": 8}),
    "gemma3": ("Gemma3TextConfig", SHAPE | {"head_dim": 8, "sliding_window": 8}),
    "opt": ("OPTConfig", OPT_SHAPE),
    "gpt2": ("GPT2Config", GPT2_SHAPE),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=list(ARCHITECTURES))
def model(request: pytest.FixtureRequest) -> Any:
    return make_model(request.param)


@pytest.fixture
def llama() -> Any:
    return make_model("llama")


@pytest.fixture
def gpt2() -> Any:
    return make_model("gpt2")


@pytest.fixture
def new_model() -> Callable[..., Any]:
    return make_model


def make_model(architecture: str, **changes: Any) -> Any:
    """Return a random causal language model; norms and biases random too, so that none is idle."""
    import transformers

    config_class, shape = ARCHITECTURES[architecture]
    config = getattr(transformers, config_class)(**(shape | changes))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 97, (3, 24), generator=torch.Generator().manual_seed(5))


LETTERS = [*string.ascii_letters, *string.digits]


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[Any], Path]:
    """Return a function that saves a model with a tokenizer of letters; returns where."""

    def save(model: Any, name: str = "base") -> Path:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        directory = tmp_path / "saved" / name
        model.save_pretrained(directory)
        # Qwen2's tokenizer is rebuilt as a byte-level BPE whatever was saved, so this is one.
        vocabulary = {word: index for index, word in enumerate(["[UNK]", "</s>", "Ġ", *LETTERS])}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="</s>", model_max_length=64
        ).save_pretrained(directory)
        return directory

    return save


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text of a thousand letters."""
    path = tmp_path / "letters.txt"
    path.write_text("".join(random.Random(3).choices([*LETTERS, " "], k=1000)))
    return path


@pytest.fixture(scope="session")
def plain() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "plain_sparsegpt.py"
    spec = importlib.util.spec_from_file_location("plain_sparsegpt", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
