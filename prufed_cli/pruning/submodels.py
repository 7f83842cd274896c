"""The use case: from requests to published sub-models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prufed_cli.errors import USAGE, PrufedError
from prufed_cli.progress import SILENT, Reporter
from prufed_cli.pruning.job import LARGEST_FILE, Job, Made, Options, Score
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
    from prufed_plugins.api import Pruner
    from prufed_registry import Artifact, Registry


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


def prune(
    request: PruneRequest,
    *,
    registry: Registry | None = None,
    device: str = "auto",
    dtype: str = "auto",
    max_memory: int | None = None,
    largest_file: int = LARGEST_FILE,
    force: bool = False,
    trust_remote_code: bool = False,
    reporter: Reporter = SILENT,
) -> PruneResult:
    """Prune a base and publish the sub-model as a new artifact of kind ``pruned``.

    The same recipe on the same base is not run twice unless ``force`` or another name is given. A
    run that was cut off goes on after its last finished block when it is asked for again, and ends
    with the same bytes.

    Args:
        request: what the sub-model is to be.
        registry: where it goes; that of this machine's user by default.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        dtype: what to compute in; ``auto`` is float32 on the CPU.
        max_memory: bytes that may be held; by default what is available.
        largest_file: bytes of the largest weight file; a model that needs more has shards.
        force: run even if the same recipe was run before, and from the first block.
        trust_remote_code: whether code that comes with the model may run.
        reporter: told the plan and how far it is.

    Raises:
        PrufedError: the request, the base or the calibration data is not usable.
        MethodError: the method cannot meet the target on this model.
    """
    (result,) = prune_several(
        [request],
        registry=registry,
        device=device,
        dtype=dtype,
        max_memory=max_memory,
        largest_file=largest_file,
        force=force,
        trust_remote_code=trust_remote_code,
        reporter=reporter,
    )
    return result


def prune_several(
    requests: Sequence[PruneRequest],
    *,
    nested: bool = False,
    registry: Registry | None = None,
    device: str = "auto",
    dtype: str = "auto",
    max_memory: int | None = None,
    largest_file: int = LARGEST_FILE,
    force: bool = False,
    trust_remote_code: bool = False,
    reporter: Reporter = SILENT,
) -> list[PruneResult]:
    """Make several sub-models that differ only in their target, from one calibration text.

    Args:
        requests: what they are to be.
        nested: make them in one pass, each inside the one before; they need ascending sparsities.
        registry: as for :func:`prune`, and so the rest.

    Returns:
        One result per request, in their order.

    Raises:
        PrufedError: as :func:`prune`; or the method cannot make nested sub-models.
    """
    whole = _job(
        requests,
        nested=nested,
        registry=registry,
        device=device,
        dtype=dtype,
        options={
            "max_memory": max_memory,
            "largest_file": largest_file,
            "force": force,
            "trust_remote_code": trust_remote_code,
        },
        reporter=reporter,
    )
    known = [None if force else _known(whole, made) for made in whole.made]
    results = {index: _reused(whole, one) for index, one in enumerate(known) if one is not None}
    wanted = [index for index in range(len(whole.made)) if index not in results]
    if nested and wanted:
        results |= _run(whole, wanted, wanted)
    elif not nested:
        for index in wanted:
            results |= _run(replace(whole, made=(whole.made[index],)), [0], [index])
    return [results[index] for index in range(len(whole.made))]


def plan_prune(
    requests: Sequence[PruneRequest],
    *,
    nested: bool = False,
    registry: Registry | None = None,
    device: str = "auto",
    dtype: str = "auto",
    max_memory: int | None = None,
    trust_remote_code: bool = False,
    reporter: Reporter = SILENT,
) -> Plan:
    """Return what one pass would take, having checked everything :func:`prune_several` checks.

    Raises:
        PrufedError: as :func:`prune_several`.
    """
    from prufed_cli.pruning.passes import plan_pass

    whole = _job(
        requests,
        nested=nested,
        registry=registry,
        device=device,
        dtype=dtype,
        options={"max_memory": max_memory, "trust_remote_code": trust_remote_code},
        reporter=reporter,
    )
    return plan_pass(whole if nested else replace(whole, made=whole.made[:1]))


def _run(job: Job, wanted: Sequence[int], indices: Sequence[int]) -> dict[int, PruneResult]:
    """Run one pass and return what it published, under the requests' indices."""
    from prufed_cli.pruning.passes import run_pass
    from prufed_cli.pruning.publish import read_report

    return {
        index: PruneResult(artifact, reused=False, report=read_report(artifact))
        for index, artifact in zip(indices, run_pass(job, wanted), strict=True)
    }


def _job(
    requests: Sequence[PruneRequest],
    *,
    nested: bool,
    registry: Registry | None,
    device: str,
    dtype: str,
    options: Mapping[str, Any],
    reporter: Reporter,
) -> Job:
    """Check everything that can be checked before any work, and return it as one job."""
    from prufed_cli.evaluation.perplexity import read_text
    from prufed_cli.home import open_registry
    from prufed_cli.models.base import choose_device, choose_dtype, find_base, stored_dtype
    from prufed_cli.pruning.work import sweep
    from prufed_plugins.discover import build, canonical
    from prufed_registry.names import check_name

    for request in requests:
        if request.name is not None:
            check_name(request.name)
    requests = [replace(each, method=canonical("pruner", each.method)) for each in requests]
    first = requests[0]
    targets = [parse_target(request) for request in requests]
    pruner: Pruner = build("pruner", first.method, method_settings(first))
    for request, target in zip(requests, targets, strict=True):
        check_target(pruner, target, request)
    if nested:
        check_nested(pruner, requests)
    method = method_recipe(first, reporter)
    where = choose_device(device)
    chosen = choose_dtype(dtype, where)
    text = read_text(Path(first.perplexity)) if first.perplexity else None
    registry = registry or open_registry()
    base = find_base(first.base, registry)
    reporter.note(f"base {base.ref}")
    calibration = _calibration(first, pruner, base, bool(options["trust_remote_code"]), reporter)
    stored = stored_dtype(base)
    together = [request.sparsity for request in requests] if nested else None
    made = [
        Made(request, target, full_recipe(request, method, calibration, text, dtype, together))
        for request, target in zip(requests, targets, strict=True)
    ]
    compute = stored if isinstance(chosen, str) else chosen
    job = Job(
        tuple(made),
        nested,
        pruner,
        base,
        stored,
        calibration,
        text,
        None,
        registry,
        Options(where, compute, **options),
        reporter,
    )
    sweep(job.workplace)
    return job if text is None else replace(job, score=_score(job, text))


def _score(job: Job, text: TextFile) -> Score:
    """Return what scores models on a text, the base only once."""
    from prufed_cli.pruning.scores import streamed_perplexity

    @cache
    def score(directory: Path) -> Perplexity:
        return streamed_perplexity(
            directory,
            job.base,
            text,
            job.dtype,
            job.options,
            job.workplace,
            reporter=job.reporter,
        )

    return score


def _calibration(
    request: PruneRequest, pruner: Pruner, base: Artifact, trust: bool, reporter: Reporter
) -> Calibration | None:
    from prufed_cli.models.base import load_tokenizer
    from prufed_cli.models.calibration import LONGEST, calibration_batches

    if not pruner.needs_calibration:
        return None
    positions = _positions(base)
    if request.length is not None and positions is not None and request.length > positions:
        raise PrufedError(
            f"calibration length {request.length} is more than the {positions} positions of "
            f"{base.ref}",
            f"use --length {positions} or less",
            USAGE,
        )
    with reporter.task("read calibration text"):
        return calibration_batches(
            request.calibration,
            load_tokenizer(base, trust_remote_code=trust),
            samples=request.samples,
            length=request.length,
            longest=min(positions or LONGEST, LONGEST),
            seed=request.seed,
        )


def _positions(base: Artifact) -> int | None:
    """Return how many tokens the base takes; None where its configuration does not say."""
    import json

    config = json.loads((base.path / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config", config)
    for key in ("max_position_embeddings", "n_positions", "n_ctx"):
        if isinstance(config.get(key), int) and config[key] > 0:
            return int(config[key])
    return None


def _known(job: Job, made: Made) -> Artifact | None:
    """Return what the same recipe made before, under any name or the one asked for."""
    from prufed_registry import Parent, fingerprint

    parents = [Parent(ref=job.base.ref, digest=job.base.digest)]
    known = job.registry.find(fingerprint("pruned", parents, made.recipe), kind="pruned")
    if known is None or made.request.name not in {None, known.name}:
        return None
    return known


def _reused(job: Job, known: Artifact) -> PruneResult:
    from prufed_cli.pruning.publish import read_report

    job.reporter.note(f"{known.ref} was made by the same recipe; --force makes it again")
    return PruneResult(known, reused=True, report=read_report(known))
