"""A small random Llama, text of its own, and configurations of a federation over it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXT = "the cat sees a red dog and then two small birds sing near an old stone bridge"
WORDS = TEXT.split()
CATEGORIES = ("brainstorming", "closed_qa", "open_qa", "summarization")


@pytest.fixture(scope="session")
def base_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of four layers in Hugging Face layout, with a tokenizer of words."""
    directory = tmp_path_factory.mktemp("bases") / "tiny"
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=None,
        )
    )
    model.save_pretrained(directory)
    special = ["[UNK]", "</s>", "Below", "###", "Instruction:", "Input:", "Response:", "."]
    vocabulary = {word: index for index, word in enumerate([*special, *dict.fromkeys(WORDS)])}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="</s>", model_max_length=64
    ).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eighty rows in four categories."""
    draw = random.Random(1)

    def sentence(length: int) -> str:
        return " ".join(draw.choices(WORDS, k=length))

    rows = [
        {
            "instruction": sentence(5),
            "context": sentence(4) if index % 2 else "",
            "response": sentence(6),
            "category": CATEGORIES[index % 4],
        }
        for index in range(80)
    ]
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def calibration_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = random.Random(2)
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text("\n".join(" ".join(draw.choices(WORDS, k=40)) for _ in range(100)))
    return path


def make_configuration(base: Path, data: Path, calibration: Path) -> dict[str, Any]:
    """Return four clients of unequal size over two rounds."""
    return {
        "base": str(base),
        "name": "fed",
        "rounds": 2,
        "device": "cpu",
        "sampler": {"name": "all"},
        "pruner": {
            "name": "sparsegpt",
            "calibration": str(calibration),
            "samples": 8,
            "length": 32,
        },
        "adapter": {"r": 4, "alpha": 8, "target_modules": ["q_proj", "down_proj"]},
        "tuner": {
            "name": "lora",
            "epochs": 1,
            "batch_size": 10,
            "micro_batch_size": 10,
            "lr": 0.01,
            "cutoff": 48,
        },
        "aggregator": {"name": "heteagg"},
        "data": {"path": str(data), "partition": {"name": "by-category"}},
        "clients": [
            {"name": "dense"},
            {"name": "half", "sparsity": 0.5},
            {"name": "pattern", "pattern": "2:4"},
            {"name": "shallow", "keep_layers": 2, "pruner": {"name": "bottom"}},
        ],
    }


@pytest.fixture(scope="session")
def shared_configuration() -> Callable[[Path, Path, Path], dict[str, Any]]:
    return make_configuration


@pytest.fixture
def configuration(base_directory: Path, data_file: Path, calibration_file: Path) -> dict[str, Any]:
    return make_configuration(base_directory, data_file, calibration_file)


@pytest.fixture
def write_configuration(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    def write(document: dict[str, Any]) -> Path:
        path = tmp_path / "clients.yaml"
        path.write_text(yaml.safe_dump(document))
        return path

    return write
