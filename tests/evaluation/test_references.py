"""``evaluate`` and ``prufed eval``: references side by side, recorded once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from prufed_cli.app import run
from prufed_cli.errors import NOT_FOUND, USAGE, PrufedError
from prufed_cli.evaluation import evaluate, evaluate_model
from prufed_cli.home import open_registry
from prufed_cli.models.adapters import adapter_spec, save_adapter
from prufed_registry import Parent
from tests.evaluation.conftest import make_model, make_rows, write_task


@pytest.fixture
def registry(tokenizer, tmp_path, prufed_home):
    """Two models: ``dense`` and ``sparse``, the same with half of its MLPs zeroed."""
    opened = open_registry()
    model = make_model()
    for name in ("dense", "sparse"):
        directory = tmp_path / name
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        opened.import_directory(directory, name=name)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.up_proj.weight[::2] = 0
    return opened


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("once upon a time there was a small model that had read very little. " * 3)
    return path


def test_two_references_are_scored_and_compared(registry, task_directory, text, model, tokenizer):
    report = evaluate(
        ["dense", "sparse@v1"],
        tasks=["letters", "words"],
        include_path=task_directory,
        perplexity=text,
    )
    dense, sparse = report.rows
    alone = evaluate_model(
        model,
        tokenizer,
        tasks=["letters", "words"],
        include_path=task_directory,
        perplexity=text,
    )
    assert dense.scores.tasks == alone.tasks
    assert dense.scores.perplexity == alone.perplexity
    assert dense.reference == "dense@v1"
    assert (dense.scores.footprint.sparsity, dense.cached) == (0.0, False)
    assert 0 < sparse.scores.footprint.sparsity < 0.5
    assert sparse.scores.tasks != dense.scores.tasks
    (comparison,) = report.comparisons
    assert (comparison.first, comparison.second) == ("dense@v1", "sparse@v1")
    means = [row.scores.mean().value for row in (dense, sparse)]
    assert comparison.paired.difference == pytest.approx(means[1] - means[0])
    assert comparison.paired.documents == 40


def test_a_reference_against_itself_differs_by_nothing(registry, task_directory):
    report = evaluate(["dense", "dense"], tasks=["letters"], include_path=task_directory)
    paired = report.comparisons[0].paired
    assert (paired.difference, paired.low, paired.high) == (0.0, 0.0, 0.0)


def test_an_adapter_is_scored_merged_into_its_base(registry, task_directory, tokenizer):
    base = registry.resolve("dense")
    spec = adapter_spec("dense", r=2, alpha=8, target_modules=("q_proj",))
    merged = make_model()
    tensors = {}
    for index, layer in enumerate(merged.model.layers):
        A, B = torch.randn(2, 32), torch.randn(32, 2)
        name = f"model.layers.{index}.self_attn.q_proj"
        tensors |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
        with torch.no_grad():
            layer.self_attn.q_proj.weight += 4 * B @ A
    with registry.stage() as staging:
        save_adapter(staging.path, tensors, spec, base.ref)
        staging.publish(
            name="adapter",
            kind="client-adapter",
            parents=[Parent(base.ref, base.digest)],
            recipe={"command": "test"},
            details={"adapter": spec.to_dict()},
        )
    settings = {"tasks": ["letters"], "include_path": task_directory}
    plain, adapted = evaluate(["dense", "adapter"], **settings).rows
    assert (adapted.kind, adapted.base, plain.base) == ("client-adapter", "dense@v1", None)
    assert adapted.scores.tasks == evaluate_model(merged, tokenizer, **settings).tasks
    assert adapted.scores.tasks != plain.scores.tasks
    assert adapted.bytes < plain.bytes


def test_what_was_measured_is_not_measured_again(registry, task_directory, text):
    settings = {"include_path": task_directory, "perplexity": text}
    first = evaluate(["dense"], tasks=["letters"], **settings).rows[0]
    second = evaluate(["dense"], tasks=["letters"], **settings).rows[0]
    assert (first.cached, second.cached) == (False, True)
    assert second.scores.tasks == first.scores.tasks
    assert second.scores.perplexity == first.scores.perplexity
    assert second.scores.footprint == first.scores.footprint
    assert not evaluate(["dense"], tasks=["letters"], refresh=True, **settings).rows[0].cached
    more = evaluate(["dense"], tasks=["letters", "words"], **settings).rows[0]
    assert not more.cached
    assert list(more.scores.tasks) == ["letters", "words"]


@pytest.mark.parametrize("changed", ["model", "documents", "limit", "dtype", "text"])
def test_other_bytes_or_settings_are_measured(registry, task_directory, text, changed, tmp_path):
    settings = {"tasks": ["letters"], "include_path": task_directory, "perplexity": text}
    evaluate(["dense"], **settings)
    reference = "dense"
    if changed == "model":
        reference = "sparse"
    elif changed == "documents":
        write_task(task_directory, "letters", make_rows(24, seed=8))
    elif changed == "limit":
        settings["limit"] = 3
    elif changed == "dtype":
        settings["dtype"] = "bfloat16"
    else:
        text.write_text("an entirely different text")
    row = evaluate([reference], **settings).rows[0]
    assert not row.cached
    assert evaluate([reference], **settings).rows[0].cached


def test_an_unknown_task_or_file_leaves_no_record(registry, task_directory, tmp_path):
    with pytest.raises(PrufedError, match="no lm-eval task"):
        evaluate(["dense"], tasks=["letters", "leters"], include_path=task_directory)
    with pytest.raises(PrufedError, match="no text file"):
        evaluate(
            ["dense"],
            tasks=["letters"],
            include_path=task_directory,
            perplexity=tmp_path / "nothing.txt",
        )
    assert registry.evaluations(registry.resolve("dense").digest) == {}


def test_a_model_of_its_own_has_no_default_tasks(registry):
    with pytest.raises(PrufedError, match="nothing to score dense@v1 on") as caught:
        evaluate(["dense"])
    assert caught.value.exit_code == USAGE


def test_the_command_prints_one_table_and_the_comparison(registry, task_directory, text, capsys):
    arguments = ["eval", "dense", "sparse", "--tasks", "letters,words", "--quiet"]
    arguments += ["--include-path", str(task_directory), "--perplexity", str(text)]
    assert run(arguments) == 0
    captured = capsys.readouterr()
    lines = [line.split() for line in captured.out.splitlines() if line.strip()]
    assert lines[1][:3] == ["reference", "letters", "words"]
    assert [line[0] for line in lines[3:5]] == ["dense@v1", "sparse@v1"]
    assert "points of acc, 95% interval" in captured.out
    assert captured.err == ""


def test_the_prefix_all_tasks_share_is_left_out_of_the_table(registry, task_directory, capsys):
    for name in ("zoo_cats", "zoo_dogs"):
        write_task(task_directory, name, make_rows(3, seed=5))
    arguments = ["eval", "dense", "--tasks", "zoo_cats,zoo_dogs", "--quiet"]
    assert run([*arguments, "--include-path", str(task_directory)]) == 0
    title, heading = [line for line in capsys.readouterr().out.splitlines() if line.strip()][:2]
    assert title.strip() == "zoo_: accuracy in % ± one standard error"
    assert heading.split()[:3] == ["reference", "cats", "dogs"]


def test_the_json_document(registry, task_directory, text, capsys):
    arguments = ["eval", "dense", "sparse", "--tasks", "both", "--json", "--limit", "7"]
    arguments += ["--include-path", str(task_directory), "--perplexity", str(text)]
    assert run(arguments) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert captured.err == ""
    assert document["schema"] == 1
    dense, sparse = document["references"]
    assert dense["reference"] == "dense@v1"
    assert dense["digest"] == registry.resolve("dense").digest
    assert dense["tasks"]["both"]["documents"] == 14
    assert set(dense["tasks"]["both"]["metrics"]) == {"acc", "acc_norm"}
    assert set(dense["tasks"]["both"]["metrics"]["acc"]) == {"value", "stderr"}
    assert set(dense["subtasks"]) == {"letters", "words"}
    assert set(dense["mean"]) == {"acc", "acc_norm"}
    assert dense["perplexity"]["value"] > 1
    assert 0 < sparse["footprint"]["sparsity"] < 0.5
    assert dense["bytes"] > 0
    assert document["comparisons"][0].keys() >= {"first", "second", "metric", "difference", "low"}


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["eval", "nothing-here", "--tasks", "letters"], NOT_FOUND, "nothing-here"),
        (["eval", "dense", "--perplexity", "nothing.txt"], NOT_FOUND, "no text file nothing.txt"),
        (["eval", "dense", "--tasks", "letters", "--limit", "0"], USAGE, "limit"),
        (["eval", "dense", "--tasks", "letters", "--batch-size", "0"], USAGE, "batch-size"),
    ],
)
def test_bad_input_is_one_sentence_and_an_exit_code(registry, capsys, arguments, code, words):
    assert run(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err
    assert "hint: " in captured.err


def test_a_registry_that_takes_no_result_costs_none(registry, text, prufed_home, capsys):
    evals = prufed_home / "registry" / "evals"
    if evals.is_dir():
        evals.rmdir()
    evals.write_text("a file where results would go")
    code = run(["eval", "dense", "--perplexity", str(text)])
    out, err = capsys.readouterr()
    assert code == 0
    assert err.count("what is measured is not recorded") == 1
    assert "perplexity" in out
