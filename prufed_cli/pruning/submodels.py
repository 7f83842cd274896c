"""The use case: from requests to published sub-models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypedDict, Unpack

from prufed_cli.errors import USAGE, PrufedError
from prufed_cli.progress import SILENT, Reporter
from prufed_cli.pruning.job import LARGEST_FILE, Job, Options, Score, ScoredText, SubModelSpec
from prufed_cli.pruning.recipe import full_recipe, method_recipe
from prufed_cli.pruning.request import (
    PruneRequest,
    check_nested,
    check_target,
    method_settings,
    parse_target,
)

if TYPE_CHECKING:
    from prufed_cli.evaluation.perplexity import Perplexity, TextFile
    from prufed_cli.models.calibration import Calibration
    from prufed_cli.pruning.plan import Plan
    from prufed_plugins.api import Pruner, PruneTarget
    from prufed_registry import Artifact, Registry


_ANY: Final[Mapping[str, Any]] = dict.fromkeys(("sparsity", "pattern", "layers", "name"))
"""What requests of sub-models that are made together may differ in, and nothing in its place."""


@dataclass(frozen=True)
class PruneResult:
    """A published sub-model.

    Attributes:
        artifact: the version in the registry.
        reused: whether the same recipe had been run before and nothing was done.
        report: one entry per pruned matrix, or the kept layers.
    """

    artifact: Artifact
    reused: bool
    report: Mapping[str, Any]


class PruneOptions(TypedDict, total=False):
    """How to work, whatever is to be made; all may be left out.

    Attributes:
        nested: make sub-models of ascending sparsities in one pass, each inside the one before.
        registry: where they go; that of this machine's user by default.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        dtype: what to compute in; ``auto`` is float32 on the CPU.
        max_memory: bytes that may be held; by default what is available.
        largest_file: bytes of the largest weight file; a model that needs more has shards.
        force: run even if the same recipe was run before, and from the first block.
        trust_remote_code: whether code that comes with the model may run.
        reporter: told the plan and how far it is.
    """

    nested: bool
    registry: Registry | None
    device: str
    dtype: str
    max_memory: int | None
    largest_file: int
    force: bool
    trust_remote_code: bool
    reporter: Reporter


def prune(request: PruneRequest, **options: Unpack[PruneOptions]) -> PruneResult:
    """Prune a base and publish the sub-model as a new artifact of kind ``pruned``.

    The same recipe on the same base is not run twice unless ``force`` or another name is given. A
    run that was cut off goes on after its last finished block when it is asked for again, and ends
    with the same bytes.

    Args:
        request: what the sub-model is to be.
        options: how to work, see :class:`PruneOptions`.

    Raises:
        PrufedError: the request, the base or the calibration data is not usable.
        MethodError: the method cannot meet the target on this model.
    """
    (result,) = prune_several([request], **options)
    return result


def prune_several(
    requests: Sequence[PruneRequest], **options: Unpack[PruneOptions]
) -> list[PruneResult]:
    """Make several sub-models that differ only in their target, from one calibration text.

    Returns:
        One result per request, in their order.

    Raises:
        PrufedError: as :func:`prune`; the requests differ in more than target and name; or the
            method cannot make nested sub-models.
    """
    from prufed_cli.pruning.publish import made_before
    from prufed_cli.pruning.work import sweep

    whole = _job(requests, options)
    force = whole.options.force
    known = [None if force else made_before(whole, each) for each in whole.submodels]
    results = {index: _reused(whole, one) for index, one in enumerate(known) if one is not None}
    wanted = [index for index in range(len(whole.submodels)) if index not in results]
    if whole.nested and wanted:
        results |= _run(whole, wanted, wanted)
    elif not whole.nested:
        for done, index in enumerate(wanted, start=1):
            one = replace(whole, submodels=(whole.submodels[index],))
            results |= _run(one, [0], [index], len(wanted) - done)
    sweep(whole.workplace)
    return [results[index] for index in range(len(whole.submodels))]


def plan_prune(requests: Sequence[PruneRequest], **options: Unpack[PruneOptions]) -> Plan:
    """Return what the passes would take, having checked everything :func:`prune_several` checks.

    Where there are several, one after the other, memory is that of one and time that of all.

    Raises:
        PrufedError: as :func:`prune_several`.
    """
    from prufed_cli.pruning.passes import plan_pass
    from prufed_cli.pruning.plan import check_disks
    from prufed_cli.pruning.publish import made_before

    whole = _job(requests, options)
    wanted = len(whole.submodels)
    if not whole.options.force:
        for known in filter(None, (made_before(whole, each) for each in whole.submodels)):
            whole.reporter.note(_already_made(known))
            wanted -= 1
    count = wanted or len(whole.submodels)
    if whole.nested:
        plan = replace(plan_pass(whole), published=count)
    else:
        plan = plan_pass(replace(whole, submodels=whole.submodels[:1]))
        plan = replace(plan, seconds=plan.seconds * count, published=count)
    if wanted:
        check_disks(whole, plan)
    return plan


def _run(
    job: Job, wanted: Sequence[int], indices: Sequence[int], further: int = 0
) -> dict[int, PruneResult]:
    """Run one pass and return what came of it, under the requests' indices."""
    from prufed_cli.pruning.passes import run_pass
    from prufed_cli.pruning.publish import read_report

    came = run_pass(job, wanted, further)
    results = (
        _reused(job, artifact)
        if reused
        else PruneResult(artifact, reused=False, report=read_report(artifact))
        for artifact, reused in came
    )
    return dict(zip(indices, results, strict=True))


def _job(requests: Sequence[PruneRequest], options: PruneOptions) -> Job:
    """Check everything that can be checked before any work, and return it as one job."""
    from prufed_cli.evaluation.perplexity import read_text
    from prufed_cli.home import open_registry
    from prufed_cli.models.base import choose_device, choose_dtype, find_base, stored_dtype
    from prufed_cli.pruning.merged import base_of_sub_models, find_sub_models
    from prufed_plugins.discover import build

    reporter = options.get("reporter", SILENT)
    nested = options.get("nested", False)
    requests, targets, pruner = _checked(requests, nested)
    first = requests[0]
    device = choose_device(options.get("device", "auto"))
    chosen = choose_dtype(options.get("dtype", "auto"), device)
    text = None if first.perplexity is None else read_text(Path(first.perplexity))
    registry = options.get("registry") or open_registry()
    wanted = base_of_sub_models(first, registry) if first.base is None else first.base
    base = find_base(wanted, registry, reporter)
    reporter.note(f"base {base.ref}")
    first, merged = find_sub_models(first, base, registry)
    if merged:
        pruner = build("pruner", first.method, method_settings(first))
    known = {artifact.path: artifact.digest for artifact in merged}
    method = method_recipe(first, reporter, known)
    stored = stored_dtype(base)
    compute = stored if isinstance(chosen, str) else chosen
    calibration = _calibration(first, pruner, base, options, reporter)
    together = [request.sparsity for request in requests] if nested else None
    submodels = tuple(
        SubModelSpec(
            request, target, full_recipe(request, method, calibration, text, compute, together)
        )
        for request, target in zip(requests, targets, strict=True)
    )
    how = Options(
        device,
        compute,
        trust_remote_code=options.get("trust_remote_code", False),
        max_memory=options.get("max_memory"),
        largest_file=options.get("largest_file", LARGEST_FILE),
        force=options.get("force", False),
    )
    scored = None if text is None else _tokenized(text, base, how)
    job = Job(
        submodels=submodels,
        nested=nested,
        pruner=pruner,
        base=base,
        merged=merged,
        dtype=stored,
        calibration=calibration,
        text=scored,
        score=None,
        registry=registry,
        options=how,
        reporter=reporter,
    )
    return job if scored is None else replace(job, score=_score(job, scored))


def _tokenized(text: TextFile, base: Artifact, options: Options) -> ScoredText:
    from prufed_cli.evaluation.perplexity import tokenize
    from prufed_cli.models.base import load_tokenizer

    tokenizer = load_tokenizer(base, trust_remote_code=options.trust_remote_code)
    return ScoredText(text, tokenize(tokenizer, text))


def _checked(
    requests: Sequence[PruneRequest], nested: bool
) -> tuple[list[PruneRequest], list[PruneTarget], Pruner]:
    """Return requests under their method's one name, their targets and their pruner.

    Raises:
        PrufedError: a request makes no sense, whatever the base.
        MethodError: there is no such method, or a setting is not accepted.
    """
    from prufed_plugins.discover import build, canonical
    from prufed_registry.names import check_name

    common = [replace(one, **_ANY) for one in requests]
    if any(one != common[0] for one in common):
        raise PrufedError(
            "sub-models that are made together differ in their targets and names alone",
            "call prune() for each of them",
            USAGE,
        )
    for request in requests:
        if request.name is not None:
            check_name(request.name)
    targets = [parse_target(request) for request in requests]
    checked = [
        replace(each, method=canonical("pruner", each.method), pattern=_spelled(target))
        for each, target in zip(requests, targets, strict=True)
    ]
    pruner: Pruner = build("pruner", checked[0].method, method_settings(checked[0]))
    for request, target in zip(checked, targets, strict=True):
        check_target(pruner, target, request)
    if nested:
        check_nested(pruner, checked)
    return checked, targets, pruner


def _spelled(target: PruneTarget) -> str | None:
    """Return a target's pattern as it is recorded, however it was typed."""
    return None if target.pattern is None else "{}:{}".format(*target.pattern)


def _score(job: Job, text: ScoredText) -> Score:
    """Return what scores models on a text, the base only once."""
    from prufed_cli.pruning.scores import streamed_perplexity

    @cache
    def score(directory: Path) -> Perplexity:
        return streamed_perplexity(
            directory,
            job.base,
            text,
            job.options,
            job.workplace,
            reporter=job.reporter,
        )

    return score


def _calibration(
    request: PruneRequest,
    pruner: Pruner,
    base: Artifact,
    options: PruneOptions,
    reporter: Reporter,
) -> Calibration | None:
    from prufed_cli.models.base import load_tokenizer, open_configuration, positions_of
    from prufed_cli.models.calibration import LONGEST, calibration_batches

    if not pruner.needs_calibration:
        if request.calibration is not None:
            reporter.warn(f"{request.method} does not calibrate; {request.calibration} is not read")
        return None
    trust = options.get("trust_remote_code", False)
    # before the tokenizer is opened, whose errors would speak of itself
    config = open_configuration(base, trust_remote_code=trust)
    positions = positions_of(config.get_text_config().to_dict())
    if request.length is not None and positions is not None and request.length > positions:
        raise PrufedError(
            f"calibration length {request.length} is more than the {positions} positions of "
            f"{base.ref}",
            f"use --length {positions} or less",
            USAGE,
        )
    with reporter.task("read calibration text"):
        found = calibration_batches(
            request.calibration,
            load_tokenizer(base, trust_remote_code=trust),
            samples=request.samples,
            length=request.length,
            longest=min(positions or LONGEST, LONGEST),
            seed=request.seed,
        )
    if (sequences := sum(map(len, found.batches))) < request.samples:
        reporter.note(f"the calibration text gives {sequences} of {request.samples} sequences")
    return found


def _reused(job: Job, known: Artifact) -> PruneResult:
    from prufed_cli.pruning.publish import read_report

    job.reporter.note(_already_made(known))
    return PruneResult(known, reused=True, report=read_report(known))


def _already_made(known: Artifact) -> str:
    return f"{known.ref} was made by the same recipe; --force makes it again"
