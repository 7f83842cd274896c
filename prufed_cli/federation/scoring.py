"""Score the global adapter and the clients between rounds, on the bases the engine holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prufed_cli.evaluation import Scores, TaskSet, evaluate_model, find_tasks
from prufed_cli.models.adapters import attach
from prufed_cli.progress import Reporter

if TYPE_CHECKING:
    from torch import Tensor

    from prufed_cli.config.models import EvaluateConfig
    from prufed_cli.federation.local import LocalEngine
    from prufed_cli.models.adapters import AdapterSpec
    from prufed_registry import Artifact


@dataclass
class Scoring:
    """What is measured between rounds.

    Attributes:
        config: tasks, text, limit.
        engine: holds the loaded bases.
        reporter: receives progress.
        tasks: found once, so that their documents are read once.
    """

    config: EvaluateConfig
    engine: LocalEngine
    reporter: Reporter
    tasks: TaskSet | None = None

    def score(
        self,
        base: Artifact,
        adapter: tuple[AdapterSpec, Mapping[str, Tensor]] | None = None,
        residual: Mapping[str, Tensor] | None = None,
    ) -> Scores:
        """Score a base, with an adapter (specification, tensors by local name) on it or without.

        A residual, likewise by local name and in the adapter's scale, is part of the base.
        """
        resident = self.engine.bases.get(base)
        if adapter is None:
            return self._evaluate(resident.model, resident.tokenizer)
        spec, tensors = adapter
        with attach(resident.model, spec, tensors, None, resident.masks, residual):
            return self._evaluate(resident.model, resident.tokenizer)

    def find(self) -> TaskSet:
        """Return the tasks; unknown names are found out before anything is trained.

        Raises:
            PrufedError: lm-eval knows no such task.
        """
        if self.tasks is None:
            self.tasks = find_tasks(
                self.config.tasks,
                include_path=self.config.include_path,
                limit=self.config.limit,
                reporter=self.reporter,
            )
        return self.tasks

    def _evaluate(self, model: Any, tokenizer: Any) -> Scores:
        return evaluate_model(
            model,
            tokenizer,
            tasks=self.find(),
            perplexity=self.config.perplexity,
            reporter=self.reporter,
        )


def numbers(scores: Scores) -> dict[str, float]:
    """Return the journal's view of scores: accuracy by task, the mean, perplexity."""
    found = {name: task.metrics[task.primary].value for name, task in scores.tasks.items()}
    mean = scores.mean()
    if mean is not None:
        found["mean"] = mean.value
        if mean.stderr is not None:
            found["mean_stderr"] = mean.stderr
    if scores.perplexity is not None:
        found["perplexity"] = scores.perplexity.value
    return {name: round(value, 6) for name, value in found.items()}
