"""Score several references side by side, taking what was measured before from the registry."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from prufed_cli.errors import USAGE, PrufedError
from prufed_cli.evaluation.bootstrap import PairedDifference, paired_bootstrap
from prufed_cli.evaluation.footprint import Footprint, measure_footprint
from prufed_cli.evaluation.model import columns_of, score_tasks, score_text
from prufed_cli.evaluation.perplexity import Perplexity, TextFile, read_text
from prufed_cli.evaluation.scores import Scores, TaskScore
from prufed_cli.evaluation.tasks import TaskSet, find_tasks
from prufed_cli.home import open_registry
from prufed_cli.models.base import (
    ADAPTER_KINDS,
    EMBEDDED_NAME,
    Loaded,
    base_of,
    find_artifact,
    load_reference,
)
from prufed_cli.progress import SILENT, Reporter
from prufed_registry.errors import NotFound, RegistryError

if TYPE_CHECKING:
    from prufed_registry import Artifact, Registry

_VERSION: Final = 1
"""Of what is stored; a change makes everything be measured anew."""


@dataclass(frozen=True)
class Row:
    """One reference's scores.

    Attributes:
        reference: ``name@vN``.
        digest: of the artifact.
        kind: of the artifact.
        base: reference of the model an adapter was merged into; None for a model.
        bytes: of the artifact's files.
        scores: what was measured.
        cached: whether everything was measured before and nothing was run.
    """

    reference: str
    digest: str
    kind: str
    base: str | None
    bytes: int
    scores: Scores
    cached: bool


@dataclass(frozen=True)
class Comparison:
    """One reference against the first, on the same documents.

    Attributes:
        first: what is compared against.
        second: what is compared.
        metric: per-document metric compared.
        paired: the difference ``second - first``.
    """

    first: str
    second: str
    metric: str
    paired: PairedDifference


@dataclass(frozen=True)
class EvaluationReport:
    """Several references on the same tasks and text."""

    rows: tuple[Row, ...]
    comparisons: tuple[Comparison, ...]


def evaluate(
    references: Sequence[str] = (),
    *,
    tasks: Sequence[str] = (),
    include_path: Path | None = None,
    perplexity: Path | None = None,
    limit: int | None = None,
    num_fewshot: int = 0,
    batch_size: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    registry: Registry | None = None,
    reporter: Reporter = SILENT,
    refresh: bool = False,
) -> EvaluationReport:
    """Score references on lm-eval tasks and a text, side by side.

    Every result is recorded with its artifact; what was measured before on the same artifact, the
    same task, documents, limit and lm-eval version is not measured again. References, tasks and
    files are checked before a model is loaded.

    Args:
        references: artifacts (an adapter is merged into its base), directories or Hub ids; the
            default base when empty.
        tasks: lm-eval tasks, groups or tags; the embedded ones when neither tasks nor a text are
            given and the models stem from the embedded model.
        include_path: a directory of task YAML files, searched first.
        perplexity: a UTF-8 text file.
        limit: at most so many documents per task.
        num_fewshot: labelled examples before each document.
        batch_size: sequences per forward pass.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        trust_remote_code: run code that comes with a model.
        registry: where references are looked up and results recorded.
        reporter: receives progress.
        refresh: measure again what was measured before.

    Raises:
        PrufedError: an unknown task or reference, or an unreadable file; nothing is recorded then.
    """
    registry = registry or open_registry()
    wanted: Sequence[str | None] = references or [None]
    artifacts = [find_artifact(each, registry, reporter) for each in wanted]
    bases = [base_of(each, registry) if each.kind in ADAPTER_KINDS else each for each in artifacts]
    text = read_text(perplexity) if perplexity is not None else None
    names = tasks or ([] if text else _embedded_tasks(bases, registry))
    found = find_tasks(
        names, include_path=include_path, limit=limit, num_fewshot=num_fewshot, reporter=reporter
    )
    rows = []
    for artifact, base in zip(artifacts, bases, strict=True):
        load = functools.partial(
            load_reference,
            artifact.ref,
            registry,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        )
        context = f"{base.digest} {dtype}"
        store = _Store(registry, artifact.digest, context, reporter, refresh=refresh)
        measuring = _Measuring(load, store, batch_size, reporter)
        rows.append(_row(artifact, base, measuring.scores(found, text), measuring))
    return EvaluationReport(tuple(rows), compare(rows))


def _row(artifact: Artifact, base: Artifact, scores: Scores, measuring: _Measuring) -> Row:
    cached = measuring.loaded is None
    if cached:
        measuring.reporter.note(f"{artifact.ref}: measured before (--refresh measures again)")
    return Row(
        reference=artifact.ref,
        digest=artifact.digest,
        kind=artifact.kind,
        base=None if base is artifact else base.ref,
        bytes=sum(file.size for file in artifact.manifest.files.values()),
        scores=scores,
        cached=cached,
    )


def compare(rows: Sequence[Row], metric: str = "acc") -> tuple[Comparison, ...]:
    """Compare every row with the first by a paired bootstrap; rows without the metric are left out.

    Without ``metric`` anywhere, the metric that the first task's table shows is used.
    """
    if len(rows) < 2 or not rows[0].scores.tasks:
        return ()
    if not rows[0].scores.answers(metric):
        metric = next(iter(rows[0].scores.tasks.values())).primary
    first = rows[0]
    found = []
    for row in rows[1:]:
        paired = paired_bootstrap(first.scores.answers(metric), row.scores.answers(metric))
        if paired is not None:
            found.append(Comparison(first.reference, row.reference, metric, paired))
    return tuple(found)


class _Store:
    """One artifact's recorded results, by what was measured."""

    def __init__(
        self, registry: Registry, digest: str, context: str, reporter: Reporter, *, refresh: bool
    ) -> None:
        self._registry = registry
        self._digest = digest
        self._context = context
        self._reporter = reporter
        self._refused = False
        self._known: Mapping[str, Any] = {} if refresh else registry.evaluations(digest)

    def get(self, measured: str) -> Mapping[str, Any] | None:
        """Return what was recorded, or None."""
        return self._known.get(self._key(measured))

    def put(self, measured: str, payload: Mapping[str, Any]) -> None:
        """Record a result; a registry that takes none costs nothing that was measured."""
        if self._refused:
            return
        try:
            self._registry.save_evaluation(self._digest, self._key(measured), dict(payload))
        except RegistryError as error:
            self._refused = True
            self._reporter.warn(f"what is measured is not recorded: {error.message}")

    def _key(self, measured: str) -> str:
        text = json.dumps([_VERSION, measured, self._context])
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


class _Measuring:
    """Measures what is not recorded; loads the model when the first measurement needs it."""

    def __init__(
        self,
        load: Callable[[], Loaded],
        store: _Store,
        batch_size: int | None,
        reporter: Reporter,
    ) -> None:
        self.loaded: Loaded | None = None
        self._load = load
        self._store = store
        self._batch_size = batch_size
        self.reporter = reporter

    def scores(self, tasks: TaskSet, text: TextFile | None) -> Scores:
        """Return everything asked for, measured now or before."""
        leaves, speed = self._tasks(tasks)
        perplexity = None if text is None else self._perplexity(text)
        return Scores(columns_of(tasks, leaves), leaves, self._footprint(), perplexity, speed)

    def _opened(self) -> Loaded:
        self.loaded = self.loaded or self._load()
        return self.loaded

    def _tasks(self, tasks: TaskSet) -> tuple[dict[str, TaskScore], float | None]:
        known = {name: self._store.get(leaf.digest) for name, leaf in tasks.leaves.items()}
        leaves = {name: TaskScore.from_json(found) for name, found in known.items() if found}
        missing = [name for name in tasks.leaves if name not in leaves]
        if not missing:
            return leaves, None
        tasks.build(missing)  # a bad data file is found out before the model is loaded
        opened = self._opened()
        measured, speed = score_tasks(
            opened.model,
            opened.tokenizer,
            tasks,
            missing,
            batch_size=self._batch_size,
            reporter=self.reporter,
        )
        for name, score in measured.items():
            self._store.put(tasks.leaves[name].digest, score.to_json())
        return {name: (leaves | measured)[name] for name in tasks.leaves}, speed

    def _perplexity(self, text: TextFile) -> Perplexity:
        found = self._store.get(f"perplexity {text.digest}")
        if found:
            return Perplexity(**found)
        opened = self._opened()
        measured = score_text(
            opened.model,
            opened.tokenizer,
            text,
            batch_size=self._batch_size,
            reporter=self.reporter,
        )
        self._store.put(f"perplexity {text.digest}", asdict(measured))
        return measured

    def _footprint(self) -> Footprint:
        found = self._store.get("footprint")
        if found:
            return Footprint(**found)
        measured = measure_footprint(self._opened().model)
        self._store.put("footprint", asdict(measured))
        return measured


def _embedded_tasks(bases: Sequence[Artifact], registry: Registry) -> Sequence[str]:
    """Return the embedded tasks where every model stems from the embedded one."""
    from prufed_cli.assets import EMBEDDED_TASKS

    for base in bases:
        if not _is_embedded(base, registry):
            raise PrufedError(
                f"nothing to score {base.ref} on",
                "give --tasks NAME[,NAME…] or --perplexity FILE",
                USAGE,
            )
    return tuple(EMBEDDED_TASKS)


def _is_embedded(artifact: Artifact, registry: Registry) -> bool:
    if artifact.name == EMBEDDED_NAME:
        return True
    for parent in artifact.manifest.parents:
        if parent.ref.partition("@")[0] == EMBEDDED_NAME:
            return True
        try:
            ancestor = registry.resolve(parent.ref)
        except NotFound:
            continue
        if _is_embedded(ancestor, registry):
            return True
    return False
