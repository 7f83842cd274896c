"""A small random Llama with a tokenizer of letters, and a directory of multiple-choice tasks."""

from __future__ import annotations

import json
import random
import string
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LETTERS = string.ascii_letters + string.digits + string.punctuation + " \n"

TASK = """\
task: {name}
{extra}dataset_path: json
dataset_kwargs:
  data_files:
    test: {name}.jsonl
    train: {name}.jsonl
output_type: multiple_choice
training_split: train
test_split: test
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1
"""


def make_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """One token per character; no special token but those given."""
    vocabulary = {token: index for index, token in enumerate([*special.values(), *LETTERS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def make_model(seed: int = 0, *, vocabulary: int = 128, positions: int = 64) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def write_task(directory: Path, name: str, rows: list[dict[str, object]], extra: str = "") -> None:
    (directory / f"{name}.yaml").write_text(TASK.format(name=name, extra=extra))
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / f"{name}.jsonl").write_text(lines)


def make_rows(count: int, seed: int) -> list[dict[str, object]]:
    """Questions with four random continuations of different lengths."""
    draw = random.Random(seed)

    def word(length: int) -> str:
        return "".join(draw.choices(string.ascii_lowercase, k=length))

    return [
        {
            "question": word(draw.randint(3, 12)),
            "choices": [word(draw.randint(1, 6)) for _ in range(4)],
            "answer": draw.randrange(4),
        }
        for _ in range(count)
    ]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def model() -> LlamaForCausalLM:
    return make_model()


@pytest.fixture
def task_directory(tmp_path: Path) -> Path:
    directory = tmp_path / "tasks"
    directory.mkdir()
    write_task(directory, "letters", make_rows(24, seed=1))
    write_task(directory, "words", make_rows(16, seed=2), extra="tag: all_words\n")
    (directory / "both.yaml").write_text("group: both\ntask: [letters, words]\n")
    return directory
