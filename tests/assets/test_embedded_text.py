"""The embedded rows and tasks follow from the recipe, do not overlap and fit the tokenizer."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer

from prufed_cli import assets
from prufed_cli.assets.recipe.files import build_files
from prufed_cli.assets.recipe.probes import CATEGORIES
from prufed_cli.assets.recipe.rows import ROWS, alpaca
from prufed_cli.assets.recipe.world import build_world

ROOT = assets.embedded_tasks().parent


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def items(category: str) -> list[dict[str, Any]]:
    return read(assets.embedded_tasks() / f"{category}.jsonl")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(assets.embedded_model() / "tokenizer.json"))


def test_the_recipe_writes_the_committed_files() -> None:
    files = build_files()
    committed = {
        str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
        for folder in ("data", "tasks")
        for path in (ROOT / folder).iterdir()
    }
    assert files == committed


def test_another_seed_makes_another_world() -> None:
    assert build_world(1) != build_world(2)
    assert build_world(2) == build_world(2)


def test_everything_fits_in_six_megabytes() -> None:
    assert sum(path.stat().st_size for path in ROOT.rglob("*") if path.is_file()) <= 6e6


def test_rows_have_dollys_fields_and_proportions() -> None:
    rows = read(assets.embedded_data())
    assert Counter(row["category"] for row in rows) == ROWS
    assert all(set(row) == {"instruction", "context", "response", "category"} for row in rows)
    assert tuple(CATEGORIES) == assets.CATEGORIES


def test_no_row_gives_a_task_item_away() -> None:
    rows = {
        (row["instruction"], row["context"])
        for row in read(assets.embedded_data())
        if row["context"]
    }
    answered = {
        (row["instruction"], row["response"].removesuffix(".").split()[-1])
        for row in read(assets.embedded_data())
    }
    for category in CATEGORIES:
        for item in items(category):
            assert (item["instruction"], item["context"]) not in rows
            assert (item["instruction"], item["choices"][item["answer"]]) not in answered or item[
                "context"
            ]


@pytest.mark.parametrize("category", CATEGORIES)
def test_items_have_four_choices_and_an_unbiased_answer(category: str) -> None:
    held_out = items(category)
    assert len(held_out) == 200
    assert all(len(set(item["choices"])) == 4 for item in held_out)
    assert max(Counter(item["answer"] for item in held_out).values()) < 80
    assert max(Counter(item["choices"][item["answer"]] for item in held_out).values()) < 80
    assert (
        len({(i["instruction"], i["context"], i["choices"][i["answer"]]) for i in held_out}) == 200
    )


@pytest.mark.parametrize("category", CATEGORIES)
def test_each_choice_adds_one_token_to_a_short_prompt(category: str, tokenizer: Tokenizer) -> None:
    for item in items(category)[::4]:
        prompt = alpaca(item["instruction"], item["context"])
        ids = tokenizer.encode(prompt).ids
        assert len(ids) <= 60
        for choice in item["choices"]:
            joint = tokenizer.encode(prompt + choice).ids
            assert joint[:-1] == ids
            assert joint[-1:] == tokenizer.encode(choice).ids


def test_the_tokenizer_gives_text_back(tokenizer: Tokenizer) -> None:
    for text in (
        alpaca("Sort this word: oak.", "Über 3 € — naïve\ttabs"),
        "one\ntwo\n\nthree",
        "日本",
    ):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_tasks_and_group_are_named_as_announced() -> None:
    group = yaml.safe_load((assets.embedded_tasks() / "prufed.yaml").read_text(encoding="utf-8"))
    assert tuple(group["task"]) == assets.EMBEDDED_TASKS
    for category in CATEGORIES:
        text = (assets.embedded_tasks() / f"{category}.yaml").read_text(encoding="utf-8")
        assert yaml.safe_load(text)["task"] == f"prufed_{category}"
