"""Score models and adapters: lm-eval tasks, perplexity, sparsity, and paired comparisons.

``evaluate`` scores references side by side and records the results with their artifacts;
``evaluate_model`` scores a loaded model, as every round of a federation does.
"""

from __future__ import annotations

from prufed_cli.evaluation.bootstrap import PairedDifference, paired_bootstrap
from prufed_cli.evaluation.compare import Comparison, EvaluationReport, Row, compare, evaluate
from prufed_cli.evaluation.footprint import Footprint, measure_footprint
from prufed_cli.evaluation.model import evaluate_model
from prufed_cli.evaluation.perplexity import Perplexity, measure_perplexity, read_text
from prufed_cli.evaluation.scores import Metric, Scores, TaskScore
from prufed_cli.evaluation.tasks import TaskSet, find_tasks

__all__ = [
    "Comparison",
    "EvaluationReport",
    "Footprint",
    "Metric",
    "PairedDifference",
    "Perplexity",
    "Row",
    "Scores",
    "TaskScore",
    "TaskSet",
    "compare",
    "evaluate",
    "evaluate_model",
    "find_tasks",
    "measure_footprint",
    "measure_perplexity",
    "paired_bootstrap",
    "read_text",
]
