"""Make a sub-model: prune a base with one method and publish the result."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prufed_cli.errors import USAGE, PrufedError
from prufed_cli.model_card import licence, render_card
from prufed_cli.progress import SILENT, Reporter

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from prufed_cli.models.calibration import Calibration
    from prufed_plugins.api import Pruner, PruneTarget
    from prufed_registry import Artifact, Registry

REPORT_FILE = "prufed-report.json"
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth")
_NOT_COPIED = {"config.json", "generation_config.json", "prufed.json", "README.md", REPORT_FILE}


@dataclass(frozen=True)
class PruneRequest:
    """Everything that decides what a sub-model is.

    Attributes:
        base: reference, path or Hub id; None for the default base.
        method: a pruner's name.
        sparsity: share of entries, or of layers, to remove, in [0, 1).
        pattern: ``n:m``, n of every m removed.
        layers: number of decoder layers to drop.
        settings: parameters of the method.
        calibration: text, JSONL, directory or Hub data set; None for the embedded text.
        samples: calibration sequences.
        length: tokens per calibration sequence; None for the model's own limit, at most 2048.
        seed: decides which calibration sequences are drawn.
        name: of the artifact; None for one made from base, method and target.
    """

    base: str | None = None
    method: str = "sparsegpt"
    sparsity: float | None = None
    pattern: str | None = None
    layers: int | None = None
    settings: Mapping[str, Any] | None = None
    calibration: str | None = None
    samples: int = 128
    length: int | None = None
    seed: int = 0
    name: str | None = None


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
    force: bool = False,
    trust_remote_code: bool = False,
    reporter: Reporter = SILENT,
) -> PruneResult:
    """Prune a base and publish the sub-model as a new artifact of kind ``pruned``.

    The same recipe on the same base is not run twice unless ``force`` or another name is given.

    Raises:
        PrufedError: the request, the base or the calibration data is not usable.
        MethodError: the method cannot meet the target on this model.
    """
    from prufed_cli.home import open_registry
    from prufed_cli.models.base import choose_device, choose_dtype, find_base, load_tokenizer
    from prufed_cli.models.calibration import LONGEST, calibration_batches
    from prufed_plugins.discover import build
    from prufed_registry import Parent, fingerprint
    from prufed_registry.names import check_name

    if request.name is not None:
        check_name(request.name)
    target = parse_target(request)
    pruner: Pruner = build("pruner", request.method, dict(request.settings or {}))
    _check_target(pruner, target, request)
    choose_dtype(dtype, choose_device(device))
    registry = registry or open_registry()
    base = find_base(request.base, registry)
    reporter.note(f"base {base.ref}")
    calibration = None
    if pruner.needs_calibration:
        positions = _positions(base)
        _check_length(request, base, positions)
        with reporter.task("read calibration text"):
            calibration = calibration_batches(
                request.calibration,
                load_tokenizer(base, trust_remote_code=trust_remote_code),
                samples=request.samples,
                length=request.length,
                longest=min(positions or LONGEST, LONGEST),
                seed=request.seed,
            )
    recipe = _recipe(request, calibration, dtype)
    parents = [Parent(ref=base.ref, digest=base.digest)]
    known = registry.find(fingerprint("pruned", parents, recipe), kind="pruned")
    if known is not None and not force and request.name in {None, known.name}:
        reporter.note(f"{known.ref} was made by the same recipe; --force makes it again")
        return PruneResult(known, reused=True, report=read_report(known))
    return _run(
        request,
        pruner,
        target,
        base,
        calibration,
        recipe,
        registry=registry,
        options={"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code},
        reporter=reporter,
    )


def parse_target(request: PruneRequest) -> PruneTarget:
    """Return what to remove.

    Raises:
        PrufedError: two targets at once, or one out of range.
    """
    from prufed_plugins.api import PruneTarget

    given = [
        flag
        for flag, value in (
            ("--sparsity", request.sparsity),
            ("--pattern", request.pattern),
            ("--layers", request.layers),
        )
        if value is not None
    ]
    if len(given) > 1:
        raise PrufedError(f"{' and '.join(given)} exclude each other", "give one of them", USAGE)
    if request.sparsity is not None and not 0 <= request.sparsity < 1:
        raise PrufedError(
            f"sparsity {request.sparsity:g} is outside [0, 1)",
            "0.75 removes three quarters of the entries",
            USAGE,
        )
    pattern = parse_pattern(request.pattern) if request.pattern is not None else None
    if request.layers is not None and request.layers < 1:
        raise PrufedError(f"--layers {request.layers} drops nothing", "give 1 or more", USAGE)
    return PruneTarget(sparsity=request.sparsity, pattern=pattern, layers=request.layers)


def parse_pattern(text: str) -> tuple[int, int]:
    """Return (n, m) of ``n:m``: n of every m consecutive inputs are removed."""
    parts = text.split(":")
    if len(parts) == 2 and all(part.isdecimal() for part in parts):
        n, m = int(parts[0]), int(parts[1])
        if 0 < n < m:
            return n, m
    raise PrufedError(
        f"pattern {text!r} is not n:m with 0 < n < m", "for example --pattern 2:4", USAGE
    )


def read_report(artifact: Artifact) -> dict[str, Any]:
    """Return the report stored with a sub-model; empty where there is none."""
    path = artifact.path / REPORT_FILE
    if not path.is_file():
        return {}
    report: dict[str, Any] = json.loads(path.read_text())
    return report


def _check_target(pruner: Pruner, target: PruneTarget, request: PruneRequest) -> None:
    """Refuse a target of the wrong kind before any work."""
    empty = target.sparsity is None and target.pattern is None and target.layers is None
    if pruner.result == "masked" and empty:
        raise PrufedError(
            f"{request.method} needs to know how much to remove",
            "add --sparsity 0.5 or --pattern 2:4",
            USAGE,
        )
    if pruner.result == "masked" and target.layers is not None:
        raise PrufedError(
            f"{request.method} removes entries, not layers",
            "use --sparsity, or a method such as top with --layers",
            USAGE,
        )
    if pruner.result == "sliced" and target.pattern is not None:
        raise PrufedError(
            f"{request.method} removes layers; a pattern does not apply",
            "use --layers 8 or --sparsity 0.25",
            USAGE,
        )


def _positions(base: Artifact) -> int | None:
    """Return how many tokens the base takes; None where its configuration does not say."""
    config = json.loads((base.path / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config", config)
    for key in ("max_position_embeddings", "n_positions", "n_ctx"):
        if isinstance(config.get(key), int) and config[key] > 0:
            return int(config[key])
    return None


def _check_length(request: PruneRequest, base: Artifact, positions: int | None) -> None:
    if request.length is not None and positions is not None and request.length > positions:
        raise PrufedError(
            f"calibration length {request.length} is more than the {positions} positions of "
            f"{base.ref}",
            f"use --length {positions} or less",
            USAGE,
        )


def _recipe(request: PruneRequest, calibration: Calibration | None, dtype: str) -> dict[str, Any]:
    from prufed_plugins.discover import catalog

    entry = catalog().get("pruner", request.method)
    params = entry.method.params.model_validate(dict(request.settings or {}))
    recipe: dict[str, Any] = {
        "command": "prune",
        "plugin": entry.method.name,
        "plugin_version": f"{entry.distribution} {entry.version}",
        "params": params.model_dump(mode="json"),
        "target": {
            "sparsity": request.sparsity,
            "pattern": request.pattern,
            "layers": request.layers,
        },
        "dtype": dtype,
    }
    if calibration is not None:
        recipe["calibration"] = {
            "digest": calibration.digest,
            "source": calibration.description,
            "samples": request.samples,
            "seed": request.seed,
        }
    return recipe


def _run(
    request: PruneRequest,
    pruner: Pruner,
    target: PruneTarget,
    base: Artifact,
    calibration: Calibration | None,
    recipe: dict[str, Any],
    *,
    registry: Registry,
    options: dict[str, Any],
    reporter: Reporter,
) -> PruneResult:
    from prufed_cli.environment import versions
    from prufed_cli.models.base import load_model
    from prufed_registry import Parent

    started = time.monotonic()
    with reporter.task(f"load {base.ref}"):
        model = load_model(base, **options)
    outcome = _apply(pruner, model, base, calibration, target, request.method, reporter)
    with registry.stage() as staging:
        with reporter.task("write the sub-model"):
            _write(staging.path, outcome, base)
            (staging.path / "README.md").write_text(_card(request, base, outcome.details))
        artifact = staging.publish(
            name=request.name or _default_name(base, request),
            kind="pruned",
            parents=[Parent(ref=base.ref, digest=base.digest)],
            recipe=recipe,
            environment=versions(),
            metrics={"seconds": round(time.monotonic() - started, 3)},
            details=outcome.details,
        )
    return PruneResult(artifact, reused=False, report=outcome.report)


@dataclass(frozen=True)
class _Outcome:
    """A pruned model in memory, and what is known about it."""

    model: PreTrainedModel
    masks: Mapping[str, Tensor]
    details: dict[str, Any]
    report: dict[str, Any]


def _apply(
    pruner: Pruner,
    model: PreTrainedModel,
    base: Artifact,
    calibration: Calibration | None,
    target: PruneTarget,
    method: str,
    reporter: Reporter,
) -> _Outcome:
    """Run the pruner over the model and collect its masks, or the layers it keeps."""
    from prufed_cli.models.base import base_masks, stored_dtype
    from prufed_cli.models.decoder import open_decoder
    from prufed_plugins.api import KeptLayers

    decoder = open_decoder(model, stored_dtype(base))
    batches = [batch.to(model.device) for batch in calibration.batches] if calibration else None
    masks: dict[str, Tensor] = {}
    matrices: list[dict[str, Any]] = []
    with reporter.task(f"prune with {method}", total=len(decoder.blocks)) as task:

        def progress(what: str, done: int, total: int) -> None:
            task.update(f"prune with {method}: {what} {done}/{total}", total=total)
            task.advance()

        for result in pruner.prune(decoder, batches, target, progress):
            if isinstance(result, KeptLayers):
                return _sliced(model, result, base, base_masks(base))
            masks[result.name] = result.mask.cpu()
            matrices.append({"name": result.name, **result.report})
    return _masked(model, masks, matrices, base)


def _masked(
    model: PreTrainedModel,
    masks: dict[str, Tensor],
    matrices: list[dict[str, Any]],
    base: Artifact,
) -> _Outcome:
    from prufed_plugins.masks import digest

    total = sum(mask.numel() for mask in masks.values())
    kept = sum(int(mask.sum()) for mask in masks.values())
    details: dict[str, Any] = {
        "result": "masked",
        "sparsity": round(1 - kept / total, 6) if total else 0.0,
        "masks_digest": digest(masks),
        "layers": model.config.get_text_config().num_hidden_layers,
    }
    if "kept_layers" in base.manifest.details:
        details["kept_layers"] = base.manifest.details["kept_layers"]
    # Seconds differ from run to run; the stored report must not, or equal sub-models would not
    # have equal digests.
    stable = [{k: v for k, v in row.items() if k != "seconds"} for row in matrices]
    return _Outcome(model, masks, details, {"result": "masked", "matrices": stable})


def _sliced(
    model: PreTrainedModel, result: Any, base: Artifact, masks: Mapping[str, Tensor] | None
) -> _Outcome:
    from prufed_cli.models.layer_names import to_local
    from prufed_cli.models.slicing import slice_layers

    before = model.config.get_text_config().num_hidden_layers
    upstream: Sequence[int] = base.manifest.details.get("kept_layers") or list(range(before))
    kept_masks: dict[str, Tensor] = {}
    for name, mask in (masks or {}).items():
        local = to_local(name, result.layers)
        if local is not None:
            kept_masks[local] = mask
    details: dict[str, Any] = {
        "result": "sliced",
        "sparsity": round(1 - len(result.layers) / before, 6),
        "kept_layers": [upstream[layer] for layer in result.layers],
        "layers": len(result.layers),
    }
    report: dict[str, Any] = {"result": "sliced", "kept_layers": list(result.layers)}
    if result.scores is not None:
        report["scores"] = list(result.scores)
    return _Outcome(slice_layers(model, result.layers), kept_masks, details, report)


def copy_tokenizer(source: Path, directory: Path) -> None:
    """Copy what lies beside a model's weights and configuration: tokenizer, template, licence."""
    for file in sorted(source.iterdir()):
        skipped = file.name in _NOT_COPIED or file.name.endswith(_WEIGHTS)
        if file.is_file() and not skipped:
            shutil.copyfile(file, directory / file.name)


def _write(directory: Path, outcome: _Outcome, base: Artifact) -> None:
    """Save weights in the base's own dtype, its tokenizer files as they are, masks and report."""
    from prufed_cli.models.base import MASKS_FILE, stored_dtype
    from prufed_plugins.masks import save_masks

    outcome.model.to(stored_dtype(base)).save_pretrained(directory)
    copy_tokenizer(base.path, directory)
    if outcome.masks:
        save_masks(directory / MASKS_FILE, outcome.masks)
    (directory / REPORT_FILE).write_text(json.dumps(outcome.report, indent=1) + "\n")


def _default_name(base: Artifact, request: PruneRequest) -> str:
    """Return e.g. ``llama-7b-sparsegpt-75``: what it was, how, and how much was removed."""
    from prufed_cli.models.base import slug

    parts = [base.name, request.method]
    if request.sparsity is not None:
        parts.append(f"{request.sparsity * 100:g}".replace(".", "_"))
    if request.pattern is not None:
        parts.append(request.pattern.replace(":", "-of-"))
    if request.layers is not None:
        parts.append(f"drop{request.layers}")
    for key, value in sorted((request.settings or {}).items()):
        if key in {"keep", "drop"}:
            parts.append(f"{key}{value}")
    return slug("-".join(parts))


def _card(request: PruneRequest, base: Artifact, details: Mapping[str, Any]) -> str:
    if details["result"] == "masked":
        removed = f"{details['sparsity']:.2%} of the entries of its decoder matrices are zero"
        speed = (
            "Zeros are stored explicitly: with dense kernels the model is no faster than its base."
        )
    else:
        removed = f"it keeps the decoder layers {details['kept_layers']} of its base"
        speed = "Fewer layers make it smaller and faster in proportion."
    metadata = {
        "library_name": "transformers",
        "tags": ["prufed", "pruned"],
        **licence(base.path),
    }
    return render_card(
        metadata,
        f"# {base.name}, pruned with {request.method}\n\n"
        f"A sub-model of `{base.ref}` ({base.digest}): {removed}. {speed}\n\n"
        "`prufed.json` holds the recipe, the parents' digests and the digest of every file.",
    )
