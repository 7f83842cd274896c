"""A finished pass becomes artifacts: weights, masks, configuration, report and card."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from prufed_cli.errors import USAGE, PrufedError
from prufed_cli.model_card import licence, render_card
from prufed_cli.models.base import stated_dtype
from prufed_cli.models.skeleton import Skeleton
from prufed_cli.models.stored import (
    Spec,
    StoredTensor,
    TensorWriter,
    stored_tensors,
    write_checkpoint,
)
from prufed_cli.pruning.job import REPORT_FILE, Job, SubModelSpec
from prufed_cli.pruning.request import PruneRequest, percent
from prufed_plugins.api import MASKS_FILE
from prufed_plugins.entries import count
from prufed_plugins.mask_files import MaskFile, digest, mask_metadata

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from prufed_cli.pruning.work import WorkDirectory
    from prufed_plugins.api import KeptLayers
    from prufed_registry import Artifact

_LONGEST_NAME: Final = 96

_WEIGHTS = (
    *(".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth"),
    *(".h5", ".h5.index.json", ".msgpack", ".msgpack.index.json", ".ckpt", ".npz", ".pkl"),
    *(".gguf", ".ggml", ".onnx", ".onnx_data", ".mlmodel", ".tflite", ".engine"),
)
"""How the names of weight files end, whatever the format: those of the base stay behind."""

_TEMPLATES: Final = "additional_chat_templates"
"""Where a tokenizer keeps the chat templates that are not its first."""

GENERATION_FILE: Final = "generation_config.json"

_NOT_COPIED = {"config.json", "prufed.json", "README.md", REPORT_FILE}


@dataclass(frozen=True)
class SubModelParts:
    """A sub-model that is still in pieces.

    Attributes:
        model: the skeleton, configured as the sub-model is.
        tensors: where each of its tensors is now, by the name it will be stored under.
        masks: where each packed mask is now.
        mask_shapes: the shape of each mask.
        stored_names: what tensors that have a mask are stored as, where it is not the mask's name.
        details: facts for the manifest.
        report: what is stored as the report.
        seconds: time spent on each matrix.
    """

    model: PreTrainedModel
    tensors: Mapping[str, StoredTensor]
    masks: Mapping[str, StoredTensor]
    mask_shapes: Mapping[str, Sequence[int]]
    stored_names: Mapping[str, str]
    details: dict[str, Any]
    report: dict[str, Any]
    seconds: Mapping[str, float]


def masked_submodel(
    job: Job, skeleton: Skeleton, work: WorkDirectory, submodel: int
) -> SubModelParts:
    """Return what a pass of an element-wise pruner came to for one of its sub-models."""
    config = skeleton.model.config.get_text_config()
    tensors = {skeleton.saved_name(name): stored for name, stored in skeleton.stored.items()}
    masks: dict[str, StoredTensor] = {}
    shapes: dict[str, Sequence[int]] = {}
    rows: list[dict[str, Any]] = []
    kept = 0
    for index in range(config.num_hidden_layers):
        block = work.block(submodel, index)
        facts = block.read_facts()
        rows += facts["rows"]
        shapes |= facts["shapes"]
        kept += sum(facts["kept"].values())
        if block.weights.is_file():
            pruned = stored_tensors(block.weights)
            tensors |= {skeleton.saved_name(name): stored for name, stored in pruned.items()}
            masks |= stored_tensors(block.masks)
    if (job.base.path / MASKS_FILE).is_file():  # of what the pruner never spoke of
        before = MaskFile(job.base.path / MASKS_FILE)
        packed = stored_tensors(job.base.path / MASKS_FILE)
        for name in before.shapes.keys() - shapes.keys():
            masks[name], shapes[name] = packed[name], before.shapes[name]
            kept += count(before[name])
    details: dict[str, Any] = {
        "result": "masked",
        "sparsity": _sparsity(kept, shapes),
        "layers": config.num_hidden_layers,
    }
    if "kept_layers" in job.base.manifest.details:
        details["kept_layers"] = job.base.manifest.details["kept_layers"]
    # Seconds differ from run to run; the stored report must not, or equal sub-models would not
    # have equal digests.
    stable = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    seconds = {row["name"]: round(row["seconds"], 3) for row in rows if "seconds" in row}
    report = {"result": "masked", "matrices": stable}
    saved = {name: skeleton.saved_name(name) for name in masks}
    uses = Counter(saved.values())  # of one tensor that is several parameters, no mask is the mask
    others = {name: other for name, other in saved.items() if name != other and uses[other] == 1}
    return SubModelParts(skeleton.model, tensors, masks, shapes, others, details, report, seconds)


def _sparsity(kept: int, shapes: Mapping[str, Sequence[int]]) -> float:
    """Return the share of the entries of masked matrices that are gone."""
    total = sum(math.prod(shape) for shape in shapes.values())
    return round(1 - kept / total, 6) if total else 0.0


def sliced_submodel(job: Job, skeleton: Skeleton, result: KeptLayers) -> SubModelParts:
    """Return what a pass of a layer pruner came to: the kept blocks under their new numbers."""
    from prufed_cli.models.layer_names import to_local
    from prufed_cli.models.slicing import check_layers, slice_config

    model = copy.copy(skeleton.model)
    model.config = copy.deepcopy(skeleton.model.config)
    before = model.config.get_text_config().num_hidden_layers
    check_layers(result.layers, before)
    slice_config(model.config.get_text_config(), result.layers)
    _check_blocks(job, skeleton, model.config, result.layers)
    upstream: Sequence[int] = job.base.manifest.details.get("kept_layers") or list(range(before))
    tensors: dict[str, StoredTensor] = {}
    for name, stored in skeleton.stored.items():
        saved = skeleton.saved_name(name)
        outside = skeleton.block_of(name) is None  # numbers there may be those of a vision tower
        local = saved if outside else to_local(saved, result.layers)
        if local is not None:
            tensors[local] = stored
    masks: dict[str, StoredTensor] = {}
    shapes: dict[str, Sequence[int]] = {}
    others: dict[str, str] = {}
    kept = 0
    if (job.base.path / MASKS_FILE).is_file():
        packed = stored_tensors(job.base.path / MASKS_FILE)
        earlier = MaskFile(job.base.path / MASKS_FILE)
        for name, shape in earlier.shapes.items():
            local = to_local(name, result.layers)
            if local is not None:
                masks[local], shapes[local] = packed[name], shape
                kept += count(earlier[name])
                other = to_local(skeleton.saved_name(name), result.layers)
                if other is not None and other != local:
                    others[local] = other
    details: dict[str, Any] = {
        "result": "sliced",
        "sparsity": round(1 - len(result.layers) / before, 6),
        "kept_layers": [upstream[layer] for layer in result.layers],
        "layers": len(result.layers),
    }
    if masks:  # what an earlier prune masked stays masked, in the layers that stay
        details |= {"result": "masked", "sparsity": _sparsity(kept, shapes)}
    report: dict[str, Any] = {
        "result": "sliced",
        "kept_layers": list(result.layers),
        "layers_before": before,
    }
    if result.scores is not None:
        report["scores"] = list(result.scores)
    return SubModelParts(model, tensors, masks, shapes, others, details, report, {})


def _check_blocks(
    job: Job, skeleton: Skeleton, config: PretrainedConfig, kept: Sequence[int]
) -> None:
    """Refuse layers that would not be the same ones in the sub-model that a configuration makes.

    Raises:
        PrufedError: as said, or transformers does not accept the configuration.
    """
    from prufed_cli.models.base import first_line, opening_errors
    from prufed_cli.models.decoder import stack_of
    from prufed_cli.models.experts import unfuse_experts
    from prufed_cli.models.skeleton import empty_model
    from prufed_cli.models.slicing import check_blocks

    options = job.options
    try:
        stored = type(config).from_dict(config.to_dict())  # as whoever opens it will read it
        model = empty_model(stored, options.compute, trust_remote_code=options.trust_remote_code)
    except opening_errors() as error:
        raise PrufedError(
            f"{job.base.ref} cannot do without these layers: {first_line(error)}",
            "prune its entries: --method magnitude --sparsity 0.5",
            USAGE,
        ) from error
    unfuse_experts(model)
    model.eval()
    before, after = (stack_of(one, skeleton.prefix) for one in (skeleton.model, model))
    check_blocks(type(model).__name__, list(before), list(after), kept)


def publish(
    job: Job,
    submodel: SubModelSpec,
    parts: SubModelParts,
    score: Callable[[Path], dict[str, Any]],
    seconds: float,
) -> Artifact:
    """Write a sub-model and publish it.

    Args:
        job: the pass.
        submodel: which of its sub-models.
        parts: what it is put together from.
        score: returns what the report says about perplexity, given the written model.
        seconds: how long the pass took.
    """
    from prufed_cli.environment import versions
    from prufed_registry.durable import storage_errors

    metrics: dict[str, Any] = {"seconds": round(seconds, 3)}
    if parts.seconds:
        metrics["matrix_seconds"] = dict(parts.seconds)
    with job.registry.stage() as staging:
        with job.reporter.task("write the sub-model"), storage_errors("write the sub-model"):
            _write(staging.path, job, submodel, parts)
        parts.report.update(score(staging.path))
        report = json.dumps(parts.report, indent=1) + "\n"
        (staging.path / REPORT_FILE).write_text(report)
        (staging.path / "README.md").write_text(_card(submodel.request, job.base, parts.details))
        return staging.publish(
            name=submodel.request.name or default_name(job.base, submodel.request),
            kind="pruned",
            parents=job.parents,
            recipe=submodel.recipe,
            environment=versions(),
            metrics=metrics,
            details=parts.details,
        )


def made_before(job: Job, submodel: SubModelSpec) -> Artifact | None:
    """Return what the same recipe made before, under any name or the one asked for."""
    from prufed_registry import fingerprint

    recipe = fingerprint("pruned", job.parents, submodel.recipe)
    return job.registry.find(recipe, kind="pruned", name=submodel.request.name)


def copy_companion_files(source: Path, directory: Path) -> None:
    """Copy what lies beside a model's weights and configuration: tokenizer, templates, licence."""
    for file in sorted(source.iterdir()):
        skipped = file.name in _NOT_COPIED or file.name.endswith(_WEIGHTS)
        if file.is_file() and not skipped:
            shutil.copyfile(file, directory / file.name)
    for template in sorted(source.glob(f"{_TEMPLATES}/*.jinja")):
        (directory / _TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(template, directory / _TEMPLATES / template.name)


def write_generation_config(source: Path, directory: Path) -> None:
    """Write how a model generates where no file of its own says so, which has been copied.

    Older models say it in ``config.json``. It is written as it is: transformers refuses to save
    what it would only warn of, such as a temperature without sampling.
    """
    from transformers import GenerationConfig

    if (directory / GENERATION_FILE).exists():
        return
    said = GenerationConfig.from_pretrained(
        source, config_file_name="config.json", local_files_only=True
    )
    said.to_json_file(directory / GENERATION_FILE)


def read_report(artifact: Artifact) -> dict[str, Any]:
    """Return the report stored with a sub-model; empty where there is none."""
    path = artifact.path / REPORT_FILE
    if not path.is_file():
        return {}
    report: dict[str, Any] = json.loads(path.read_text())
    return report


def default_name(base: Artifact, request: PruneRequest) -> str:
    """Return e.g. ``llama-7b-sparsegpt-75``: what it was, how, and how much was removed.

    Where that is too long, the base's name is cut.
    """
    from prufed_cli.models.base import slug

    parts = [request.method]
    if request.sparsity is not None:
        parts.append(percent(request.sparsity))
    if request.pattern is not None:
        parts.append(request.pattern.replace(":", "-of-"))
    if request.layers is not None:
        parts.append(f"drop{request.layers}")
    for key, value in sorted((request.settings or {}).items()):
        if key in {"keep", "drop"}:
            parts.append(f"{key}{value}")
    how = slug("-".join(parts))
    return f"{slug(base.name, max(_LONGEST_NAME - len(how) - 1, 2))}-{how}"


def _write(directory: Path, job: Job, submodel: SubModelSpec, parts: SubModelParts) -> None:
    """Write every weight in its own dtype, the tokenizer's files as they are, and the masks."""
    specs = {name: Spec(one.dtype, one.shape) for name, one in parts.tensors.items()}
    write_checkpoint(directory, specs, parts.tensors.__getitem__, job.options.largest_file)
    stated = stated_dtype(job.base) or str(job.dtype).removeprefix("torch.")
    lacking = _write_configuration(directory, parts.model, stated)
    if lacking and submodel is job.submodels[0]:
        job.reporter.note(f"layers for multi-token prediction are left out: {lacking} is now 0")
    copy_companion_files(job.base.path, directory)
    if parts.model.can_generate():
        write_generation_config(job.base.path, directory)
    if parts.masks:
        _write_masks(directory / MASKS_FILE, parts)
    if parts.details["result"] == "masked":
        parts.details["masks_digest"] = _masks_digest(directory / MASKS_FILE, parts)


def _write_configuration(directory: Path, model: PreTrainedModel, dtype: str) -> str | None:
    """Write what a sub-model is; return what counted layers that are not part of it, if anything.

    Layers for multi-token prediction lie beside a model's own, and only what the model itself has
    is carried over. A model whose code builds them has them.
    """
    from prufed_cli.models.slicing import forget_predictors

    config = copy.deepcopy(model.config)
    built = any("mtp" in name for name, _ in model.named_parameters())
    lacking = None if built else forget_predictors(config)
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    config.save_pretrained(directory)
    return lacking


def _write_masks(path: Path, parts: SubModelParts) -> None:
    specs = {name: Spec(one.dtype, one.shape) for name, one in parts.masks.items()}
    metadata = mask_metadata(parts.mask_shapes, parts.stored_names)
    with TensorWriter(path, specs, metadata) as out:
        for name, packed in parts.masks.items():
            out.copy(name, packed)


def _masks_digest(path: Path, parts: SubModelParts) -> str:
    return digest(MaskFile(path) if parts.masks else {})


def _card(request: PruneRequest, base: Artifact, details: Mapping[str, Any]) -> str:
    removed, speed = [], []
    if "kept_layers" in details:
        removed.append(f"it keeps the decoder layers {details['kept_layers']} of the full model")
        speed.append("Fewer layers make it smaller and faster in proportion.")
    if details["result"] == "masked":
        removed.append(f"{details['sparsity']:.2%} of the entries of its decoder matrices are zero")
        speed.append("Zeros are stored explicitly: with dense kernels they make nothing faster.")
    metadata = {
        "library_name": "transformers",
        "tags": ["prufed", "pruned"],
        **licence(base.path),
    }
    return render_card(
        metadata,
        f"# {base.name}, pruned with {request.method}\n\n"
        f"A sub-model of `{base.ref}` ({base.digest}): {'; '.join(removed)}. "
        f"{' '.join(speed)}\n\n"
        "`prufed.json` holds the recipe, the parents' digests and the digest of every file.",
    )
