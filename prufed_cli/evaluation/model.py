"""Score a loaded model: the part every round of a federation calls."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from prufed_cli.evaluation.footprint import measure_footprint
from prufed_cli.evaluation.perplexity import (
    Perplexity,
    TextFile,
    measure_perplexity,
    model_window,
    read_text,
)
from prufed_cli.evaluation.scores import Scores, TaskScore, pool, task_score
from prufed_cli.evaluation.session import contained, evaluation_mode, padding_token
from prufed_cli.evaluation.tasks import TaskSet, find_tasks
from prufed_cli.progress import SILENT, Reporter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LARGEST_BATCH: Final = 64
_LOGITS_BUDGET: Final = 2**28
_BOOTSTRAP_ITERATIONS: Final = 1000
"""For lm-eval's standard errors of metrics that are no means (F1, Matthews correlation)."""


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tasks: TaskSet | Sequence[str] = (),
    include_path: Path | None = None,
    perplexity: Path | TextFile | None = None,
    limit: int | None = None,
    num_fewshot: int = 0,
    batch_size: int | None = None,
    reporter: Reporter = SILENT,
) -> Scores:
    """Score a loaded model, and leave it, its tokenizer and all generators as they were.

    Whoever calls this repeatedly finds the tasks once (``find_tasks``) and passes the set: its
    documents and requests are kept.

    Args:
        model: a causal language model on its device; an attached adapter counts.
        tokenizer: its tokenizer.
        tasks: a set of tasks, or names to be found.
        include_path: where names are looked for first; not used with a set.
        perplexity: a text file to score.
        limit: documents per task; not used with a set.
        num_fewshot: labelled examples before each document; not used with a set.
        batch_size: sequences per forward pass; by default up to 64, fewer for a large vocabulary.
        reporter: receives progress.

    Raises:
        PrufedError: an unknown task, an unreadable file, or a likelihood that is not a number.
    """
    if not isinstance(tasks, TaskSet):
        tasks = find_tasks(
            tasks,
            include_path=include_path,
            limit=limit,
            num_fewshot=num_fewshot,
            reporter=reporter,
        )
    text = read_text(perplexity) if isinstance(perplexity, Path) else perplexity
    leaves, speed = score_tasks(model, tokenizer, tasks, batch_size=batch_size, reporter=reporter)
    measured = None
    if text is not None:
        measured = score_text(model, tokenizer, text, batch_size=batch_size, reporter=reporter)
    return Scores(columns_of(tasks, leaves), leaves, measure_footprint(model), measured, speed)


def columns_of(tasks: TaskSet, leaves: dict[str, TaskScore]) -> dict[str, TaskScore]:
    """Return what a table shows: groups pooled, single tasks as they are."""
    return {
        column: pool(column, [leaves[name] for name in members])
        for column, members in tasks.columns.items()
    }


def score_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: TaskSet,
    names: Sequence[str] | None = None,
    *,
    batch_size: int | None = None,
    reporter: Reporter = SILENT,
) -> tuple[dict[str, TaskScore], float | None]:
    """Score the single tasks of a set (all, or those named) and return tokens per second too."""
    built = tasks.build(names)
    if not built:
        return {}, None
    from lm_eval.evaluator import evaluate

    from prufed_cli.evaluation.scorer import Scorer, tokenizer_digest

    embeddings = model.get_input_embeddings().weight.shape[0]
    started = time.perf_counter()
    with contained(), evaluation_mode(model), padding_token(tokenizer, embeddings):
        scorer = Scorer(
            model,
            tokenizer,
            batch_size=batch_size or _default_batch(model, embeddings),
            encodings=tasks.encodings(tokenizer_digest(tokenizer)),
            reporter=reporter,
        )
        found = evaluate(
            scorer,
            {"tasks": built, "groups": {}, "group_map": {}},
            limit=tasks.limit,
            bootstrap_iters=_BOOTSTRAP_ITERATIONS,
        )
    elapsed = time.perf_counter() - started
    leaves = {
        name: task_score(name, found["results"][name], found["samples"][name]) for name in built
    }
    return leaves, scorer.tokens_read / elapsed if scorer.tokens_read else None


def score_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: TextFile,
    *,
    batch_size: int | None = None,
    reporter: Reporter = SILENT,
) -> Perplexity:
    """Measure perplexity in evaluation mode."""
    with evaluation_mode(model):
        return measure_perplexity(model, tokenizer, text, batch_size=batch_size, reporter=reporter)


def _default_batch(model: PreTrainedModel, vocabulary: int) -> int:
    """Return how many sequences of usual length keep the logits within 1 GiB in float32."""
    length = min(model_window(model), 512)
    return max(1, min(LARGEST_BATCH, _LOGITS_BUDGET // (length * vocabulary)))
