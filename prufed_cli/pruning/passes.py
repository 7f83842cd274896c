"""One pass of a pruner over a model on disk, from the plan to the published sub-models."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import torch

from prufed_cli import interrupts
from prufed_cli.errors import USAGE, Interrupted, PrufedError
from prufed_cli.evaluation.perplexity import Perplexity, check_token_ids
from prufed_cli.models.activations import Activations
from prufed_cli.models.base import base_masks, share_cores, threads_restored
from prufed_cli.models.decoder import check_matrices
from prufed_cli.models.skeleton import Skeleton, open_skeleton
from prufed_cli.models.streaming import StreamedDecoder
from prufed_cli.pruning.blocks import BlockStore
from prufed_cli.pruning.job import Job
from prufed_cli.pruning.plan import (
    Plan,
    check_disks,
    in_batches,
    make_plan,
    warn_of_few_tokens,
)
from prufed_cli.pruning.publish import (
    SubModelParts,
    made_before,
    masked_submodel,
    publish,
    sliced_submodel,
)
from prufed_cli.pruning.scores import perplexity_report
from prufed_cli.pruning.work import WorkDirectory, take_work
from prufed_plugins.api import KeptLayers, PrunedMatrix, PruneTarget
from prufed_plugins.errors import MethodError
from prufed_plugins.memory import give_back, mapped_above
from prufed_registry.durable import storage_errors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from prufed_cli.progress import Task
    from prufed_plugins.api import (
        CheckingPruner,
        NestedPruner,
        NestedSurveyingPruner,
        Progress,
        SurveyingPruner,
    )
    from prufed_registry import Artifact

_MAPPED: Final = 2**20
"""Bytes from which on pieces of memory are mapped by themselves: a block's matrices among them. In
glibc's heap small tensors would hold the place of matrices that are gone."""


@threads_restored()
@mapped_above(_MAPPED)  # the plan too, which measures how fast memory comes
def run_pass(job: Job, wanted: Sequence[int], further: int = 0) -> list[tuple[Artifact, bool]]:
    """Prune, and publish those sub-models of the pass that are wanted.

    Another process at the same work is waited for.

    Args:
        job: the pass.
        wanted: indices of its sub-models.
        further: how many sub-models of later passes the disk needs room for.

    Returns:
        The sub-models, each with whether that other process made it.

    Raises:
        PrufedError: the base cannot be pruned, or memory or disk space does not suffice.
        MethodError: the method cannot meet the target on this model.
        Interrupted: Ctrl-C after at least one block; says how it goes on.
    """
    started = time.monotonic()
    skeleton, decoder = _open(job)
    job = in_batches(job, skeleton, decoder)
    with take_work(job.workplace, job.fingerprint, job.reporter.note) as work:
        if job.options.force:
            work.begin_anew()
        elif all(found := [made_before(job, job.submodels[each]) for each in wanted]):
            return [(artifact, True) for artifact in found if artifact is not None]
        with _can_be_resumed(job, work, len(decoder.blocks)), storage_errors("prune"):
            if damage := work.forget_damaged(len(job.submodels), len(decoder.blocks)):
                job.reporter.warn(damage)
            _use_threads_of(work)
            plan = _told_plan(job, skeleton, decoder, work, len(wanted) + further)
            score = _scorer(job, work)
            parts = _prune(job, skeleton, decoder, work, plan)
            artifacts = [
                publish(job, job.submodels[each], parts[each], score, time.monotonic() - started)
                for each in wanted
            ]
        work.clear()
    return [(artifact, False) for artifact in artifacts]


@threads_restored()
@mapped_above(_MAPPED)
def plan_pass(job: Job) -> Plan:
    """Return what a pass would take.

    Raises:
        PrufedError: as :func:`run_pass`.
    """
    skeleton, decoder = _open(job)
    job = in_batches(job, skeleton, decoder)
    return make_plan(job, skeleton, decoder, _left_off(job, len(decoder.blocks)))


def _left_off(job: Job, blocks: int) -> int:
    """Return after how many blocks a pass would go on."""
    work = WorkDirectory(job.workplace / job.fingerprint)
    if job.options.force and not work.begun_anew:
        return 0
    return work.sound(len(job.submodels), blocks)


def _open(job: Job) -> tuple[Skeleton, StreamedDecoder]:
    options = job.options
    skeleton = open_skeleton(
        job.base.path, job.base.ref, options.compute, trust_remote_code=options.trust_remote_code
    )
    if options.device.type == "cpu":
        share_cores(skeleton.model.num_parameters())
    if job.calibration is not None:
        check_token_ids(skeleton.model, max(int(each.max()) for each in job.calibration.batches))
    decoder = StreamedDecoder(skeleton, options.device, Activations())
    if job.pruner.result == "masked":
        _check_dtype(job, skeleton, decoder)
    if getattr(job.pruner, "needs_matrices", True):
        check_matrices(skeleton.model, skeleton.prefix)
    if hasattr(job.pruner, "check"):
        targets = [each.target for each in job.submodels]
        cast("CheckingPruner", job.pruner).check(decoder, targets)
    return skeleton, decoder


def _check_dtype(job: Job, skeleton: Skeleton, decoder: StreamedDecoder) -> None:
    """Refuse to compute in a dtype that the weights that stay would be rounded to.

    Raises:
        PrufedError: as said, with the first such matrix.
    """
    compute = job.options.compute
    for index in range(len(decoder.blocks)):
        for name in decoder.shapes(index):
            stored = skeleton.stored[f"{name}.weight"].dtype
            if torch.promote_types(stored, compute) != compute:
                wide = stored == torch.float64
                raise PrufedError(
                    f"{_bare(compute)} would round {name}.weight of {job.base.ref}, which is "
                    f"stored in {_bare(stored)}",
                    "store the base in float32" if wide else f"use --dtype {_bare(stored)}",
                    USAGE,
                )


def _bare(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _use_threads_of(work: WorkDirectory) -> None:
    """Go on with as many threads as the work was begun with: others round sums differently."""
    begun = work.answer("threads", lambda: {"threads": torch.get_num_threads()})
    torch.set_num_threads(begun["threads"])


def _told_plan(
    job: Job, skeleton: Skeleton, decoder: StreamedDecoder, work: WorkDirectory, published: int
) -> Plan:
    """Return the plan of what is left to do, and tell it before any of it is done."""
    plan = make_plan(job, skeleton, decoder, work.finished(len(job.submodels), len(decoder.blocks)))
    plan = replace(plan, published=published)
    decoder.release()
    for line in plan.lines():
        job.reporter.note(line)
    check_disks(job, plan)
    warn_of_few_tokens(job, decoder)
    return plan


def _prune(
    job: Job, skeleton: Skeleton, decoder: StreamedDecoder, work: WorkDirectory, plan: Plan
) -> Sequence[SubModelParts]:
    total = len(decoder.blocks)
    finished = work.finished(len(job.submodels), total)
    decoder.hold_in(work.path if plan.in_file else None)
    decoder.masks = base_masks(job.base) or {}
    store = BlockStore(work, skeleton, decoder, len(job.submodels))
    with job.reporter.task(f"prune with {job.method}", total=total) as task:
        task.reach(finished)

        def progress(what: str, done: int, of: int) -> None:
            interrupts.check()
            task.update(f"prune with {job.method}: {what} {done}/{of}", total=of)
            task.reach(done)

        try:
            if job.pruner.result == "sliced":
                return [sliced_submodel(job, skeleton, _kept_layers(job, decoder, progress))]
            if store.finished < total:
                for results in _results(job, decoder, work, progress):
                    store.take(results)
                    del results  # with its mask, before the next matrix comes
                    give_back()
            store.close()
            decoder.release()
        finally:
            store.discard()
    return [masked_submodel(job, skeleton, work, index) for index in range(len(job.submodels))]


def _kept_layers(job: Job, decoder: StreamedDecoder, progress: Progress) -> KeptLayers:
    """Return the one result of a layer pruner.

    Raises:
        MethodError: the pruner gave none, several, or something else.
    """
    results = list(job.pruner.prune(decoder, _batches(job), job.submodels[0].target, progress))
    if len(results) != 1 or not isinstance(results[0], KeptLayers):
        raise MethodError(
            f"the pruner {job.method} prunes layers, but did not say once which to keep",
            f"`prufed plugins check {job.method}` says what it has to do",
        )
    return results[0]


def _results(
    job: Job, decoder: StreamedDecoder, work: WorkDirectory, progress: Progress
) -> Iterator[Sequence[PrunedMatrix]]:
    """Yield one result per sub-model for every matrix that is still to be pruned."""
    targets = _surveyed(job, decoder, work)
    if job.nested:
        pruner = cast("NestedPruner", job.pruner)
        yield from pruner.prune_nested(decoder, _batches(job), targets, progress)
        return
    for result in job.pruner.prune(decoder, _batches(job), targets[0], progress):
        if not isinstance(result, PrunedMatrix):
            raise MethodError(
                f"the pruner {job.method} prunes matrices, but gave a {type(result).__name__}",
                f"`prufed plugins check {job.method}` says what it has to do",
            )
        yield (result,)


def _surveyed(job: Job, decoder: StreamedDecoder, work: WorkDirectory) -> Sequence[PruneTarget]:
    """Return the targets, refined by the pruner's survey where it makes one.

    The survey is kept with the work: a prune that goes on is given the answer of its beginning.
    """
    if not hasattr(job.pruner, "survey"):
        return [each.target for each in job.submodels]

    def ask() -> Mapping[str, Any]:
        with ExitStack() as stack:
            tasks: list[Task] = []

            def progress(what: str, done: int, of: int) -> None:
                interrupts.check()
                if not tasks:  # a pruner that has nothing to look for says nothing
                    opened = job.reporter.task("survey the model", total=of)
                    tasks.append(stack.enter_context(opened))
                tasks[0].update(f"{what} {done}/{of}", total=of)
                tasks[0].reach(done)

            return {"targets": [vars(one) for one in _survey(job, decoder, progress)]}

    return [_target_of(answer) for answer in work.answer("survey", ask)["targets"]]


def _survey(job: Job, decoder: StreamedDecoder, progress: Progress) -> Sequence[PruneTarget]:
    """Ask the pruner to look at the model: once for all targets, where it can."""
    targets = [each.target for each in job.submodels]
    if hasattr(job.pruner, "survey_nested"):
        nested = cast("NestedSurveyingPruner", job.pruner)
        return nested.survey_nested(decoder, _batches(job), targets, progress)
    pruner = cast("SurveyingPruner", job.pruner)
    return [pruner.survey(decoder, _batches(job), one, progress) for one in targets]


def _target_of(answer: Mapping[str, Any]) -> PruneTarget:
    """Return a target that went through JSON, which knows no tuples."""
    pattern = answer["pattern"]
    return PruneTarget(**{**answer, "pattern": None if pattern is None else tuple(pattern)})


def _batches(job: Job) -> Sequence[Any] | None:
    return job.calibration.batches if job.calibration else None


def _scorer(job: Job, work: WorkDirectory) -> Callable[[Path], dict[str, Any]]:
    """Return what scores a written sub-model; the base is scored here."""
    text, score = job.text, job.score
    if text is None or score is None:
        return lambda directory: {}
    base = Perplexity(**work.answer("perplexity", lambda: asdict(score(job.base.path).checked())))
    return lambda directory: perplexity_report(text.file, base, score(directory))


@contextmanager
def _can_be_resumed(job: Job, work: WorkDirectory, total: int) -> Iterator[None]:
    """Say how work that is cut off goes on, and drop work that a method refuses to finish."""

    def how() -> str | None:
        done = work.stated(len(job.submodels), total)
        if done == 0 or job.pruner.result == "sliced":
            return None
        return f"the same command goes on after block {done} of {total}"

    try:
        yield
    except KeyboardInterrupt as interrupt:
        hint = how()
        if hint is None:
            raise
        raise Interrupted(hint) from interrupt
    except MethodError:
        work.clear()
        raise
    except Exception as error:
        hint = how()
        if hint is not None:
            error.add_note(hint)  # Ctrl-C in compiled code may end as an error of its own
        raise
