"""Scores of lm-eval tasks: against plain arithmetic, and without a trace in the process."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from prufed_cli.errors import PrufedError
from prufed_cli.evaluation import evaluate_model, find_tasks
from prufed_cli.progress import Reporter
from tests.evaluation.conftest import make_model, make_rows, make_tokenizer, write_task


def loglikelihood(model, tokenizer, context: str, continuation: str) -> float:
    """Sum of the log-probabilities of the continuation's tokens, one sequence at a time."""
    before = tokenizer.encode(context)
    tokens = tokenizer.encode(context + continuation)
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    return sum(float(logits[place - 1, tokens[place]]) for place in range(len(before), len(tokens)))


def expected_accuracy(model, tokenizer, path: Path) -> tuple[list[float], list[float]]:
    plain, normalised = [], []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        context = f"Q: {row['question']}\nA:"
        found = [loglikelihood(model, tokenizer, context, f" {each}") for each in row["choices"]]
        per_letter = [ll / len(text) for ll, text in zip(found, row["choices"], strict=True)]
        plain.append(float(int(np.argmax(found)) == row["answer"]))
        normalised.append(float(int(np.argmax(per_letter)) == row["answer"]))
    return plain, normalised


def test_scores_equal_those_computed_one_sequence_at_a_time(model, tokenizer, task_directory):
    scores = evaluate_model(
        model, tokenizer, tasks=["letters", "words"], include_path=task_directory
    )
    for name in ("letters", "words"):
        plain, normalised = expected_accuracy(model, tokenizer, task_directory / f"{name}.jsonl")
        task = scores.tasks[name]
        assert list(task.per_document["acc"]) == plain
        assert list(task.per_document["acc_norm"]) == normalised
        assert task.documents == len(plain)
        assert task.metrics["acc"].value == pytest.approx(np.mean(plain))
        error = np.std(plain, ddof=1) / np.sqrt(len(plain))
        assert task.metrics["acc"].stderr == pytest.approx(error)
    assert 0 < scores.mean().value < 1
    errors = [scores.tasks[name].metrics["acc"].stderr for name in ("letters", "words")]
    assert scores.mean().stderr == pytest.approx(np.hypot(*errors) / 2)
    assert scores.tokens_per_second > 0


def test_the_same_set_scores_two_models_on_the_same_requests(tokenizer, task_directory):
    found = find_tasks(["letters"], include_path=task_directory, num_fewshot=2)
    models = [make_model(0, positions=256), make_model(1, positions=256)]
    first, second, again = (
        evaluate_model(each, tokenizer, tasks=found) for each in (*models, models[0])
    )
    assert first.tasks == again.tasks
    assert first.tasks != second.tasks


def test_a_set_scores_models_of_different_tokenizers(model, tokenizer, task_directory):
    found = find_tasks(["letters"], include_path=task_directory)
    other = make_tokenizer(unk_token="<unk>")  # every character has another id
    for each in (tokenizer, other, tokenizer):
        plain, _ = expected_accuracy(model, each, task_directory / "letters.jsonl")
        scores = evaluate_model(model, each, tasks=found)
        assert list(scores.tasks["letters"].per_document["acc"]) == plain


def test_few_shot_examples_are_part_of_the_context(model, tokenizer, task_directory):
    for shots in (0, 2):
        found = find_tasks(["letters"], include_path=task_directory, num_fewshot=shots)
        context = found.build()["letters"].instances[0].args[0]
        assert context.count("Q: ") == shots + 1


def test_a_limit_keeps_the_first_documents(model, tokenizer, task_directory):
    whole = evaluate_model(model, tokenizer, tasks=["letters"], include_path=task_directory)
    some = evaluate_model(model, tokenizer, tasks=["letters"], include_path=task_directory, limit=5)
    answers = whole.tasks["letters"].per_document["acc"]
    assert some.tasks["letters"].per_document["acc"] == answers[:5]


def test_a_group_is_one_column_over_all_its_documents(model, tokenizer, task_directory):
    scores = evaluate_model(model, tokenizer, tasks=["both"], include_path=task_directory)
    assert list(scores.tasks) == ["both"]
    assert list(scores.leaves) == ["letters", "words"]
    apart = [scores.leaves[name].per_document["acc"] for name in ("letters", "words")]
    assert scores.tasks["both"].documents == 40
    assert scores.tasks["both"].metrics["acc"].value == pytest.approx(
        np.mean([*apart[0], *apart[1]])
    )


def test_a_tag_is_one_column_per_task(model, tokenizer, task_directory):
    scores = evaluate_model(model, tokenizer, tasks=["all_words"], include_path=task_directory)
    assert list(scores.tasks) == ["words"]


def test_generators_modes_and_tokenizer_stay_as_they_were(model, task_directory):
    tokenizer = make_tokenizer(eos_token="</s>")
    trained = make_model(3)
    trained.train()
    trained.model.layers[0].eval()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = random.random(), np.random.rand(), float(torch.rand(()))
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    level = logging.getLogger("lm_eval").level
    evaluate_model(trained, tokenizer, tasks=["letters"], include_path=task_directory)
    assert (random.random(), np.random.rand(), float(torch.rand(()))) == expected
    assert trained.training
    assert not trained.model.layers[0].training
    assert trained.model.layers[1].mlp.training
    assert tokenizer.pad_token is None
    assert logging.getLogger("lm_eval").level == level


def test_nothing_is_printed(model, tokenizer, task_directory, capfd):
    evaluate_model(model, tokenizer, tasks=["letters"], include_path=task_directory)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_nothing_is_written_outside_the_home(
    model, tokenizer, task_directory, monkeypatch, tmp_path
):
    cache = tmp_path / "cache"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(cache))
    evaluate_model(model, tokenizer, tasks=["letters"], include_path=task_directory)
    assert not cache.exists()


@pytest.mark.parametrize("special", [{}, {"pad_token": "<pad>"}, {"unk_token": "<unk>"}])
def test_a_tokenizer_without_end_or_beginning_token_works(model, task_directory, special):
    tokenizer = make_tokenizer(**special)
    write_task(task_directory, "bare", make_rows(3, seed=3))
    text = (task_directory / "bare.yaml").read_text()
    (task_directory / "bare.yaml").write_text(
        text.replace('doc_to_text: "Q: {{question}}\\nA:"', 'doc_to_text: ""')
    )
    scores = evaluate_model(model, tokenizer, tasks=["bare", "words"], include_path=task_directory)
    assert scores.tasks["words"].documents == 16
    assert scores.tasks["bare"].documents == 3


def test_a_padding_token_the_model_does_not_know_is_not_used(task_directory):
    tokenizer = make_tokenizer(eos_token="</s>")
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    small = make_model(vocabulary=len(tokenizer) - 1)
    scores = evaluate_model(small, tokenizer, tasks=["letters"], include_path=task_directory)
    assert scores.tasks["letters"].documents == 24
    assert tokenizer.pad_token == "<pad>"


def test_a_token_the_model_does_not_know_is_an_error(tokenizer, task_directory):
    small = make_model(vocabulary=20)
    with pytest.raises(PrufedError, match="the model has 20 embeddings"):
        evaluate_model(small, tokenizer, tasks=["letters"], include_path=task_directory)


def test_a_model_with_nan_is_an_error_and_not_a_score(tokenizer, task_directory):
    broken = make_model()
    with torch.no_grad():
        broken.lm_head.weight[5] = torch.nan
    with pytest.raises(PrufedError, match="not a number"):
        evaluate_model(broken, tokenizer, tasks=["letters"], include_path=task_directory)


def test_progress_reaches_its_total(model, tokenizer, task_directory):
    from contextlib import contextmanager

    steps: dict[str, list[float]] = {}

    class Counting(Reporter):
        @contextmanager
        def task(self, description, total=None):
            from prufed_cli.progress import Task

            steps[description] = [0.0, total]

            class Counted(Task):
                def advance(self, count: float = 1) -> None:
                    steps[description][0] += count

            yield Counted()

    evaluate_model(
        model, tokenizer, tasks=["letters"], include_path=task_directory, reporter=Counting()
    )
    done, total = steps["scoring"]
    assert done == total == 24 * 4
