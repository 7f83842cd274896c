"""What an evaluation found: metrics per task with standard errors, and every document's answer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from prufed_cli.evaluation.footprint import Footprint
from prufed_cli.evaluation.perplexity import Perplexity

PREFERRED: Final = ("acc", "exact_match", "acc_norm", "f1")
"""The metric a table shows where a task has several, in order of preference."""


@dataclass(frozen=True)
class Metric:
    """A value and its standard error (None: not known)."""

    value: float
    stderr: float | None = None


@dataclass(frozen=True)
class TaskScore:
    """One model's result on one task, or on a group of tasks pooled.

    Attributes:
        name: of the task or group.
        metrics: ``acc``, ``acc_norm``, ...; a metric behind a named filter is ``metric,filter``.
        documents: how many were scored.
        per_document: metric to one value per document, in the order of the data set; only for
            metrics that are numbers of a document.
    """

    name: str
    metrics: Mapping[str, Metric]
    documents: int
    per_document: Mapping[str, tuple[float, ...]] = field(default_factory=dict, repr=False)

    @property
    def primary(self) -> str:
        """The metric a table shows."""
        return next((name for name in PREFERRED if name in self.metrics), next(iter(self.metrics)))

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object that ``from_json`` reads back."""
        return asdict(self)

    @classmethod
    def from_json(cls, payload: Mapping[str, Any]) -> TaskScore:
        """Read what ``to_json`` wrote."""
        return cls(
            payload["name"],
            {name: Metric(**metric) for name, metric in payload["metrics"].items()},
            payload["documents"],
            {name: tuple(values) for name, values in payload["per_document"].items()},
        )


@dataclass(frozen=True)
class Scores:
    """Everything measured on one model.

    Attributes:
        tasks: column of a table (a task or a group) to score.
        leaves: every single task to score; a group's tasks are here one by one.
        footprint: parameters, bytes and zeros.
        perplexity: on the text asked for, if any.
        tokens_per_second: read while the tasks were scored; None where nothing was scored now.
    """

    tasks: Mapping[str, TaskScore]
    leaves: Mapping[str, TaskScore]
    footprint: Footprint
    perplexity: Perplexity | None = None
    tokens_per_second: float | None = None

    def mean(self, metric: str = "acc") -> Metric | None:
        """Return the unweighted mean over the tasks that have a metric, with its standard error.

        The tasks' errors are independent: ``SE = sqrt(sum of SE²) / number of tasks``.
        """
        found = [task.metrics[metric] for task in self.tasks.values() if metric in task.metrics]
        if not found:
            return None
        errors = [each.stderr for each in found if each.stderr is not None]
        stderr = math.hypot(*errors) / len(found) if len(errors) == len(found) else None
        return Metric(math.fsum(each.value for each in found) / len(found), stderr)

    def answers(self, metric: str = "acc") -> dict[str, tuple[float, ...]]:
        """Return task to per-document values, for a paired comparison."""
        return {
            name: task.per_document[metric]
            for name, task in self.tasks.items()
            if metric in task.per_document
        }


def pool(name: str, members: Sequence[TaskScore]) -> TaskScore:
    """Return a group's score: the mean over all documents of its tasks, as lm-eval weighs by size.

    Only metrics that every task has, document by document, are pooled.
    """
    if len(members) == 1:
        return members[0]
    shared = [
        metric
        for metric in members[0].per_document
        if all(metric in member.per_document for member in members)
    ]
    per_document = {
        metric: tuple(value for member in members for value in member.per_document[metric])
        for metric in shared
    }
    metrics = {metric: mean_metric(values) for metric, values in per_document.items()}
    return TaskScore(name, metrics, sum(each.documents for each in members), per_document)


def mean_metric(values: Sequence[float]) -> Metric:
    """Return the mean and its standard error ``s / sqrt(n)`` with the unbiased deviation."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return Metric(mean)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Metric(mean, math.sqrt(variance / count))


def task_score(
    name: str, results: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]
) -> TaskScore:
    """Read one task's part of lm-eval's answer."""
    metrics, per_document = {}, {}
    for key, value in results.items():
        metric, _, filter_name = key.partition(",")
        if not filter_name or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = results.get(f"{metric}_stderr,{filter_name}")
        label = metric if filter_name == "none" else key
        number = float(stderr) if isinstance(stderr, int | float) else None
        metrics[label] = Metric(float(value), number)
        values = [sample.get(metric) for sample in samples if sample["filter"] == filter_name]
        if all(isinstance(each, int | float) for each in values):
            per_document[label] = tuple(float(each) for each in values if each is not None)
    documents = len({sample["doc_id"] for sample in samples})
    return TaskScore(name, metrics, documents, per_document)
