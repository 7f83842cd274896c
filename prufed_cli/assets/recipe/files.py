"""The data files that follow from the world: instruction rows, task items, calibration text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, Final

from prufed_cli.assets.recipe.pretraining import pretraining_text
from prufed_cli.assets.recipe.probes import CATEGORIES
from prufed_cli.assets.recipe.rows import alpaca, items, rows
from prufed_cli.assets.recipe.world import SEED, build_world

CALIBRATION_DOCUMENTS: Final = 3000
END: Final = "<|endoftext|>"


def build_files(seed: int = SEED) -> dict[str, str]:
    """Path below the assets -> text, for every data file that follows from `seed`."""
    world = build_world(seed)
    files = {"data/train.jsonl": _lines(rows(world, seed))}
    calibration = islice(pretraining_text(world, seed + 1, opening=0), CALIBRATION_DOCUMENTS)
    files["data/calibration.txt"] = f"\n{END}\n".join(calibration) + "\n"
    for name, draw in CATEGORIES.items():
        files[f"tasks/{name}.jsonl"] = _lines(items(world, name, draw, seed))
        files[f"tasks/{name}.yaml"] = task_yaml(name)
    files["tasks/prufed.yaml"] = group_yaml()
    return files


def _lines(records: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(record, separators=(",", ":")) + "\n" for record in records)


def task_yaml(name: str) -> str:
    """The lm-eval definition of one category's task."""
    plain = alpaca("{{instruction}}", "").rstrip("\n")
    paired = alpaca("{{instruction}}", "{{context}}").rstrip("\n")
    prompt = f"{{% if context %}}{paired}{{% else %}}{plain}{{% endif %}}"
    return "\n".join(
        (
            f"task: prufed_{name}",
            "dataset_path: json",
            "dataset_kwargs:",
            "  data_files:",
            f"    test: {name}.jsonl",
            "test_split: test",
            "output_type: multiple_choice",
            f"doc_to_text: {json.dumps(prompt)}",
            'target_delimiter: "\\n"',
            'doc_to_choice: "{{choices}}"',
            "doc_to_target: answer",
            "metric_list:",
            "  - metric: acc",
            "    aggregation: mean",
            "    higher_is_better: true",
            "  - metric: acc_norm",
            "    aggregation: mean",
            "    higher_is_better: true",
            "metadata:",
            "  version: 1.0",
            "",
        )
    )


def group_yaml() -> str:
    """The lm-eval definition of the group of the eight tasks."""
    members = [f"  - prufed_{name}" for name in CATEGORIES]
    metrics = [
        line
        for metric in ("acc", "acc_norm")
        for line in (f"  - metric: {metric}", "    aggregation: mean", "    weight_by_size: true")
    ]
    head, middle = ["group: prufed", "task:"], ["aggregate_metric_list:"]
    return "\n".join((*head, *members, *middle, *metrics, "metadata:", "  version: 1.0", ""))
