"""``prufed prune``: make a sub-model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from prufed_cli.commands.options import Device, Dtype, Json, Quiet, Settings, TrustRemoteCode

if TYPE_CHECKING:
    from prufed_cli.pruning import PruneResult
    from prufed_cli.pruning.submodels import PruneOptions


def command(
    base: Annotated[
        str | None,
        typer.Option(
            help="Reference, directory or Hub id. Default: $PRUFED_BASE or the embedded model."
        ),
    ] = None,
    method: Annotated[
        str, typer.Option(help="A pruner; `prufed plugins` lists them.")
    ] = "sparsegpt",
    sparsity: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE[,SHARE...]",
            help="Share of entries (or layers) to remove, in [0, 1); several make as many models.",
        ),
    ] = None,
    nested: Annotated[
        bool,
        typer.Option("--nested", help="Several sparsities in one pass, one inside the other."),
    ] = False,
    pattern: Annotated[
        str | None, typer.Option(help="n:m, n of every m consecutive inputs removed: 2:4.")
    ] = None,
    layers: Annotated[
        int | None, typer.Option(help="Number of decoder layers to drop; layer methods only.")
    ] = None,
    settings: Settings = None,
    compat: Annotated[
        str | None,
        typer.Option(
            metavar="reference", help="Count entries as the method's published code does."
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="File (text, JSON, CSV, Parquet), datasets directory or Hub data set. "
            "Default: the embedded text, for the embedded model."
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option(min=1, help="Calibration sequences; a short text gives fewer.")
    ] = 128,
    length: Annotated[
        int | None,
        typer.Option(
            min=2, help="Tokens per calibration sequence. Default: the context, at most 2048."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Which calibration sequences are drawn.")] = 0,
    perplexity: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Text to score on, before and after; for the report."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the artifact. Default: base, method and target.")
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Memory to use: 8GB. Default: nine tenths of what is free."
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Make it again, as a new version, from the first block."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, and stop.")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make a smaller model out of a larger one and print its reference.

    Element-wise methods (sparsegpt, wanda, magnitude) take --sparsity or --pattern; layer methods
    (top, symmetric, contribution, angular ...) take --layers, --sparsity or --set keep=N;
    fedspallm merges what clients pruned: --set clients=a,b,c. `prufed plugins` lists all of them.

    The model may be larger than memory. An interrupted prune of entries goes on after its last
    finished block when the same command is given again, and ends with the same bytes.
    """
    from prufed_cli.output import emit_json, print_line, reporter
    from prufed_cli.plugins_report import warn_failures
    from prufed_cli.pruning import (
        PruneRequest,
        at_sparsities,
        parse_sparsities,
        plan_prune,
        prune_several,
    )
    from prufed_cli.pruning.memory import parse_size
    from prufed_plugins.discover import parse_settings

    request = PruneRequest(
        base=base,
        method=method,
        pattern=pattern,
        layers=layers,
        settings=parse_settings(settings or []),
        compat=compat,
        calibration=calibration,
        samples=samples,
        length=length,
        seed=seed,
        perplexity=perplexity,
        name=name,
    )
    requests = [request] if sparsity is None else at_sparsities(request, parse_sparsities(sparsity))
    telling = reporter(quiet=quiet or as_json)
    warn_failures(telling)
    options: PruneOptions = {
        "nested": nested,
        "device": device,
        "dtype": dtype,
        "max_memory": None if max_memory is None else parse_size(max_memory),
        "force": force,
        "trust_remote_code": trust_remote_code,
        "reporter": telling,
    }
    if dry_run:
        plan = plan_prune(requests, **options)
        if as_json:
            emit_json(plan.document())
        else:
            print_line("\n".join(plan.lines()))
        return
    results = prune_several(requests, **options)
    if as_json:
        documents = [_document(result) for result in results]
        emit_json(documents[0] if len(documents) == 1 else {"results": documents})
        return
    for result in results:
        telling.note(f"{result.artifact.ref}: {_summary(result)}")
    for result in results:
        print_line(result.artifact.ref)


def _document(result: PruneResult) -> dict[str, Any]:
    artifact = result.artifact
    return {
        "reference": artifact.ref,
        "digest": artifact.digest,
        "path": str(artifact.path),
        "reused": result.reused,
        "details": artifact.manifest.details,
        "report": result.report,
    }


def _summary(result: PruneResult) -> str:
    details = result.artifact.manifest.details
    sliced = result.report.get("result") == "sliced"
    if sliced and details["layers"] == result.report["layers_before"]:
        text = f"kept all {details['layers']} layers, since so little drops none"
    elif sliced:
        text = f"kept layers {details['kept_layers']}"
    else:
        text = f"sparsity {details['sparsity']:.2%} of the decoder matrices, as counted"
    if scores := result.report.get("perplexity"):
        before, after = (
            "not finite" if scores[key] is None else f"{scores[key]:.4g}"
            for key in ("base", "pruned")
        )
        text += f"; perplexity {before} before, {after} after"
    return "; ".join([text, *_remarks(result.report)])


_REMARKS: Final = (
    ("partial_group", "a last group that is not full in {}"),
    ("damping_retries", "damping raised in {}"),
    ("dead_channels", "silent inputs in {}"),
    ("unrouted", "no token routed to {}, which stay as they were"),
    ("uncovered", "no client pruned {}, which stay as they were"),
)


def _remarks(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is out of the ordinary, with the number of matrices it is true of."""
    matrices = report.get("matrices", ())
    for key, text in _REMARKS:
        count = sum(bool(matrix.get(key)) for matrix in matrices)
        if count:
            yield text.format(f"{count} of {len(matrices)} matrices")
