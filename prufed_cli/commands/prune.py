"""``prufed prune``: make a sub-model."""

from __future__ import annotations

from typing import Annotated

import typer

from prufed_cli.commands.options import Device, Dtype, Json, Quiet, Settings


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
        float | None, typer.Option(help="Share of entries (or layers) to remove, in [0, 1).")
    ] = None,
    pattern: Annotated[
        str | None, typer.Option(help="n:m, n of every m consecutive inputs removed: 2:4.")
    ] = None,
    layers: Annotated[
        int | None, typer.Option(help="How many decoder layers to drop (layer pruners).")
    ] = None,
    settings: Settings = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Text, JSONL, datasets directory or Hub data set. Default: the embedded text."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration sequences.")] = 128,
    length: Annotated[
        int | None, typer.Option(min=2, help="Tokens per calibration sequence.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Which calibration sequences are drawn.")] = 0,
    name: Annotated[str | None, typer.Option(help="Name of the artifact.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Run even if the same recipe was run before.")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make a smaller model out of a larger one and print its reference.

    Element-wise methods (sparsegpt, wanda, magnitude) take --sparsity or --pattern; layer methods
    (top, bottom, odd-alternate, even-alternate, symmetric, explicit) take --layers, --sparsity or
    --set keep=N.
    """
    from prufed_cli.output import emit_json, print_line, reporter
    from prufed_cli.plugins_report import warn_failures
    from prufed_cli.pruning import PruneRequest, prune
    from prufed_plugins.discover import parse_settings

    request = PruneRequest(
        base=base,
        method=method,
        sparsity=sparsity,
        pattern=pattern,
        layers=layers,
        settings=parse_settings(settings or []),
        calibration=calibration,
        samples=samples,
        length=length,
        seed=seed,
        name=name,
    )
    telling = reporter(quiet=quiet or as_json)
    warn_failures(telling)
    result = prune(
        request,
        device=device,
        dtype=dtype,
        force=force,
        trust_remote_code=trust_remote_code,
        reporter=telling,
    )
    artifact = result.artifact
    if as_json:
        emit_json(
            {
                "reference": artifact.ref,
                "digest": artifact.digest,
                "path": str(artifact.path),
                "reused": result.reused,
                "details": artifact.manifest.details,
                "report": result.report,
            }
        )
        return
    telling.note(_summary(artifact.manifest.details))
    print_line(artifact.ref)


def _summary(details: dict[str, object]) -> str:
    if details["result"] == "sliced":
        return f"kept layers {details['kept_layers']}"
    return f"sparsity {details['sparsity']:.2%} of the decoder matrices, as counted"
