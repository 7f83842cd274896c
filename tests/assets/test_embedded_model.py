"""The embedded model is a trained one."""

from __future__ import annotations

import json
import math
from itertools import islice
from typing import Any

import pytest

from prufed_cli import assets
from prufed_cli.assets.recipe.files import alpaca
from prufed_cli.assets.recipe.prose import documents
from prufed_cli.assets.recipe.world import build_world

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(assets.embedded_model(), dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(assets.embedded_model())


def test_weights_are_stored_in_bfloat16() -> None:
    config = json.loads((assets.embedded_model() / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"


def test_unseen_prose_is_expected(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    ids = tokenizer("\n".join(islice(documents(build_world(), 987654), 40)), return_tensors="pt")[
        "input_ids"
    ]
    with torch.no_grad():
        loss = model(input_ids=ids[:, :512], labels=ids[:, :512]).loss.item()
    assert loss < 0.5 * math.log(len(tokenizer))


def test_dense_accuracy_is_well_above_chance(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    items = [
        json.loads(line)
        for category in assets.CATEGORIES
        for line in (assets.embedded_tasks() / f"{category}.jsonl").read_text().splitlines()[:25]
    ]
    right = 0
    with torch.no_grad():
        for item in items:
            ids = tokenizer(alpaca(item["instruction"], item["context"]), return_tensors="pt")[
                "input_ids"
            ]
            choices = [tokenizer(choice)["input_ids"][0] for choice in item["choices"]]
            right += int(model(input_ids=ids).logits[0, -1, choices].argmax()) == item["answer"]
    assert right / len(items) > 0.45
