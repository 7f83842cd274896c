"""The embedded model is a trained one."""

from __future__ import annotations

import json
import math
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from prufed_cli import assets
from prufed_cli.assets.recipe.files import END
from prufed_cli.assets.recipe.prose import documents
from prufed_cli.assets.recipe.rows import alpaca
from prufed_cli.assets.recipe.world import build_world
from prufed_cli.pruning import PruneRequest, prune

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


def test_unseen_prose_is_expected() -> None:
    assert loss_on_prose(assets.embedded_model()) < 0.2 * math.log(1408)


def loss_on_prose(directory: Path) -> float:
    """Return the mean loss per token on documents the model has never seen."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    text = END.join(islice(documents(build_world(), 987654), 300))
    ids = AutoTokenizer.from_pretrained(directory)(text, return_tensors="pt")["input_ids"]
    windows = ids[:, : ids.shape[1] // 128 * 128].view(-1, 128)
    with torch.no_grad():
        return float(model(input_ids=windows, labels=windows).loss)


@pytest.mark.parametrize("sparsity", [0.5, 0.75])
def test_sparsegpt_harms_it_less_than_magnitude(sparsity: float, prufed_home: Path) -> None:
    losses = {
        method: loss_on_prose(prune(PruneRequest(method=method, sparsity=sparsity)).artifact.path)
        for method in ("sparsegpt", "magnitude")
    }
    assert losses["sparsegpt"] < losses["magnitude"]


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
    assert right / len(items) > 0.7
