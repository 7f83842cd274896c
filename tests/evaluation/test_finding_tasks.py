"""Tasks by name: where they are looked for, what identifies them, and what bad ones get."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prufed_cli.errors import NOT_FOUND, USAGE, PrufedError
from prufed_cli.evaluation import find_tasks
from prufed_cli.evaluation.catalogue import own_names
from tests.evaluation.conftest import make_rows, write_task


def digest_of(directory: Path, name: str = "letters", **settings: int) -> str:
    return find_tasks([name], include_path=directory, **settings).leaves[name].digest


def test_a_local_name_is_found_without_reading_lm_evals_files(task_directory):
    before = own_names.cache_info()
    found = find_tasks(["letters", "words", "both"], include_path=task_directory)
    assert list(found.leaves) == ["letters", "words"]
    assert own_names.cache_info() == before


def test_a_name_of_lm_evals_own_is_found_in_its_directory(task_directory):
    notes: list[str] = []

    from prufed_cli.progress import Reporter

    class Noting(Reporter):
        def note(self, message: str) -> None:
            notes.append(message)

    found = find_tasks(["sciq", "letters"], include_path=task_directory, reporter=Noting())
    assert list(found.leaves) == ["sciq", "letters"]
    assert notes == []


def test_the_catalogue_knows_tasks_groups_and_tags():
    names = own_names()
    assert names["hellaswag"].name == "hellaswag"
    assert names["arc_challenge"].name == "arc"
    for elsewhere in ("mmlu", "super-glue-lm-eval-v1", "RC_tasks"):  # a group and two tags
        assert names[elsewhere] is None


def test_a_task_of_lm_evals_own_in_a_directory_of_another_name_is_found():
    assert list(find_tasks(["arc_challenge"]).leaves) == ["arc_challenge"]


def test_an_unknown_name_is_a_usage_error_that_names_near_ones(task_directory):
    with pytest.raises(PrufedError, match="no lm-eval task 'leters'") as caught:
        find_tasks(["leters"], include_path=task_directory)
    assert caught.value.exit_code == USAGE
    assert "letters" in caught.value.hint


def test_a_missing_directory_is_not_found(tmp_path):
    with pytest.raises(PrufedError, match="no directory") as caught:
        find_tasks(["letters"], include_path=tmp_path / "nothing")
    assert caught.value.exit_code == NOT_FOUND


@pytest.mark.parametrize("limit", [0, -3])
def test_a_limit_below_one_is_refused(task_directory, limit):
    with pytest.raises(PrufedError, match="leaves no document"):
        find_tasks(["letters"], include_path=task_directory, limit=limit)


def test_the_digest_follows_documents_configuration_and_settings(task_directory):
    seen = [
        digest_of(task_directory),
        digest_of(task_directory, limit=3),
        digest_of(task_directory, num_fewshot=1),
    ]
    write_task(task_directory, "letters", make_rows(24, seed=9))
    seen.append(digest_of(task_directory))
    path = task_directory / "letters.yaml"
    path.write_text(path.read_text().replace("A:", "Answer:"))
    seen.append(digest_of(task_directory))
    (task_directory / "code.py").write_text("def process_docs(docs):\n    return docs\n")
    seen.append(digest_of(task_directory))
    assert len(set(seen)) == len(seen)


def test_the_digest_does_not_follow_the_place(task_directory, tmp_path):
    moved = tmp_path / "moved"
    before = digest_of(task_directory)
    task_directory.rename(moved)
    assert digest_of(moved) == before


def test_a_function_beside_the_yaml_file_is_called(task_directory):
    (task_directory / "half.py").write_text("def half(docs):\n    return docs.select(range(12))\n")
    path = task_directory / "letters.yaml"
    path.write_text(path.read_text() + "process_docs: !function half.half\n")
    found = find_tasks(["letters"], include_path=task_directory)
    assert len(found.build()["letters"].instances) == 12 * 4


def test_data_files_of_other_formats_are_read_beside_the_yaml_file(
    task_directory, monkeypatch, prufed_home
):
    rows = make_rows(5, seed=4)
    (task_directory / "letters.json").write_text(json.dumps({"rows": rows}))
    path = task_directory / "letters.yaml"
    changed = path.read_text().replace(".jsonl", ".json")
    path.write_text(changed.replace("  data_files:", "  field: rows\n  data_files:"))
    monkeypatch.chdir(task_directory.parent)
    found = find_tasks(["letters"], include_path=task_directory)
    assert len(found.build()["letters"].instances) == 5 * 4
    assert list((prufed_home / "cache" / "datasets").iterdir())


def test_a_group_may_change_its_tasks(task_directory):
    (task_directory / "renamed.yaml").write_text(
        "group: renamed\ntask:\n- task: letters\n  description: 'Think. '\n- group: inner\n  "
        "task: [words]\n"
    )
    found = find_tasks(["renamed"], include_path=task_directory)
    assert found.columns == {"renamed": ("letters", "words")}
    built = found.build()
    assert built["letters"].instances[0].args[0].startswith("Think. ")
    assert not built["words"].instances[0].args[0].startswith("Think. ")
    assert found.leaves["letters"].digest != digest_of(task_directory)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no documents"),
        ('{"question": "a"}\n{"quest', ":2: is not JSON"),
        ("[1, 2]\n", ":1: is a list"),
        ('{"question": "a"}\n{"question": 3}\n', "do not agree on a type"),
    ],
)
def test_a_bad_data_file_is_an_error_with_its_line(task_directory, content, message):
    (task_directory / "letters.jsonl").write_text(content)
    with pytest.raises(PrufedError, match=message) as caught:
        find_tasks(["letters"], include_path=task_directory).build()
    assert caught.value.exit_code == USAGE


def test_a_missing_data_file_is_found_out_before_anything_is_read(task_directory):
    (task_directory / "letters.jsonl").unlink()
    with pytest.raises(PrufedError, match=r"task letters: no data file letters\.jsonl") as caught:
        find_tasks(["letters"], include_path=task_directory)
    assert caught.value.exit_code == NOT_FOUND


def test_a_configuration_lm_eval_refuses_is_one_sentence(task_directory):
    path = task_directory / "letters.yaml"
    path.write_text(path.read_text().replace("output_type: multiple_choice", "output_type: dance"))
    with pytest.raises(PrufedError, match=r"task letters cannot be built.*dance"):
        find_tasks(["letters"], include_path=task_directory).build()


def test_a_task_that_runs_generated_code_is_refused(task_directory):
    path = task_directory / "letters.yaml"
    path.write_text(path.read_text() + "unsafe_code: true\n")
    with pytest.raises(PrufedError, match="runs generated code"):
        find_tasks(["letters"], include_path=task_directory).build()
