"""Checkpoints that are broken, hostile or incomplete, and adapters on the wrong base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from prufed_registry import Artifact, Parent, Registry

Call = Callable[..., Any]
WEIGHTS = "model.safetensors"


def truncate(directory: Path) -> None:
    content = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(content[: len(content) // 2])


def flip_header(directory: Path) -> None:
    content = bytearray((directory / WEIGHTS).read_bytes())
    content[0] ^= 0xFF
    (directory / WEIGHTS).write_bytes(content)


def empty(directory: Path) -> None:
    (directory / WEIGHTS).write_bytes(b"")


def pickled(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    torch.save({"lm_head.weight": torch.ones(2)}, directory / "pytorch_model.bin")


def pickled_under_another_name(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    torch.save({"lm_head.weight": torch.ones(2)}, directory / WEIGHTS)


def no_weights(directory: Path) -> None:
    (directory / WEIGHTS).unlink()


def no_configuration(directory: Path) -> None:
    (directory / "config.json").unlink()


def half_a_configuration(directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": "lla')


def configured(**changes: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | changes))

    return change


def not_a_number(directory: Path) -> None:
    tensors = load_file(directory / WEIGHTS)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def quantized(method: str, **facts: Any) -> Callable[[Path], None]:
    """Say of a checkpoint what quantizing tools write into its configuration."""
    return configured(quantization_config={"quant_method": method, **facts})


def stored(part: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    """Put something in the place of one matrix."""

    def change(directory: Path) -> None:
        tensors = load_file(directory / WEIGHTS)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors[f"model.layers.1.mlp.up_proj.{part}"] = tensor
        save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})

    return change


WHOLE = torch.zeros(64, 32)


def code_of_its_own(directory: Path) -> None:
    (directory / "own.py").write_text("raise SystemExit('this code was run')\n")
    configured(model_type="own", auto_map={"AutoModelForCausalLM": "own.Model"})(directory)


@pytest.mark.parametrize(
    ("damage", "code", "words"),
    [
        (truncate, 5, "'model.safetensors' is not a whole safetensors file"),
        (flip_header, 5, "'model.safetensors' is not a whole safetensors file"),
        (empty, 5, "'model.safetensors' is not a whole safetensors file"),
        (pickled, 2, "'pytorch_model.bin' is a pickled checkpoint"),
        (pickled_under_another_name, 5, "'model.safetensors' is not a whole safetensors file"),
        (no_weights, 2, "has no safetensors weights"),
        (no_configuration, 2, "has no config.json"),
        (half_a_configuration, 5, "config.json is not JSON"),
    ],
)
@pytest.mark.parametrize("verb", ["prune", "eval", "federate", "import"])
def test_directories_that_are_no_model(
    prufed: Call,
    nothing_made: Call,
    base_directory: Path,
    tmp_path: Path,
    configuration: dict[str, Any],
    clients_file: Callable[[dict[str, Any]], Path],
    damage: Callable[[Path], None],
    code: int,
    words: str,
    verb: str,
) -> None:
    directory = tmp_path / "tiny"
    shutil.copytree(base_directory, directory)
    damage(directory)
    clients = clients_file({**configuration, "base": str(directory)})
    arguments = {
        "prune": ["--base", directory, "--method", "magnitude", "--sparsity", "0.5"],
        "eval": [directory, "--perplexity", configuration["data"]["path"]],
        "federate": ["--clients", clients],
        "import": [directory],
    }
    called = prufed(verb, *arguments[verb])
    called.refused(called.code, str(directory) if verb == "federate" else words)
    assert called.code in ({2, 3, 5} if verb == "federate" else {code})
    nothing_made()


@pytest.mark.parametrize(
    ("damage", "code", "words"),
    [
        (configured(num_hidden_layers=6), 5, "lacks weights that its config.json speaks of"),
        (configured(hidden_size=64), 5, "but config.json makes it"),
        (configured(model_type="unheard-of"), 1, "cannot be opened as a causal language model"),
        (configured(model_type="vit"), 1, "transformers makes none of a ViTConfig"),
        (not_a_number, 2, "up_proj.weight holds NaN or infinity"),
        (code_of_its_own, 1, "cannot be opened as a causal language model"),
    ],
    ids=[
        "missing-tensors",
        "wrong-shape",
        "unknown-architecture",
        "no-decoder",
        "nan",
        "code-of-its-own",
    ],
)
def test_models_that_cannot_be_pruned(
    prufed: Call,
    nothing_made: Call,
    base_directory: Path,
    tmp_path: Path,
    damage: Callable[[Path], None],
    code: int,
    words: str,
) -> None:
    directory = tmp_path / "tiny"
    shutil.copytree(base_directory, directory)
    damage(directory)
    wanted = ("--method", "magnitude", "--sparsity", "0.5", "--device", "cpu")
    called = prufed("prune", "--base", directory, *wanted)
    called.refused(code, words)
    assert "this code was run" not in called.err
    nothing_made("tiny@v1")


def flip_in_the_registry(artifact: Artifact) -> None:
    file = artifact.path / WEIGHTS
    file.chmod(0o644)
    content = bytearray(file.read_bytes())
    content[-1] ^= 0xFF
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (quantized("gptq", bits=4), "it is quantized (gptq)"),
        (quantized("awq", bits=4), "it is quantized (awq)"),
        (quantized("bitsandbytes", load_in_4bit=True), "it is quantized (bitsandbytes)"),
        (quantized("compressed-tensors", format="int-quantized"), "it is quantized (compressed-"),
        (
            quantized("compressed-tensors", sparsity_config={"format": "sparse-bitmask"}),
            "the sparse format 'sparse-bitmask', which transformers would pass over",
        ),
    ],
)
@pytest.mark.parametrize("verb", ["prune", "federate"])
def test_quantized_and_sparse_checkpoints_are_no_bases(
    prufed: Call,
    nothing_made: Call,
    base_directory: Path,
    tmp_path: Path,
    configuration: dict[str, Any],
    clients_file: Callable[[dict[str, Any]], Path],
    change: Callable[[Path], None],
    words: str,
    verb: str,
) -> None:
    directory = tmp_path / "tiny"
    shutil.copytree(base_directory, directory)
    change(directory)
    arguments = {
        "prune": ["--base", directory, "--method", "magnitude", "--sparsity", "0.5"],
        "federate": ["--clients", clients_file({**configuration, "base": str(directory)})],
    }
    prufed(verb, *arguments[verb]).refused(2, words)
    nothing_made()


PACKED_MATRICES = [
    (stored("qweight", torch.zeros(8, 32, dtype=torch.int32)), "up_proj.qweight, part of a quant"),
    (stored("weight_packed", torch.zeros(64, 4, dtype=torch.int32)), "up_proj.weight_packed"),
    (stored("W_q", torch.zeros(64, 4, dtype=torch.uint8)), "up_proj.W_q, part of a quantized"),
    (stored("bitmask", torch.zeros(64, 4, dtype=torch.uint8)), "up_proj.bitmask, part of a sparse"),
    (stored("weight.crow_indices", torch.zeros(65, dtype=torch.int64)), "part of a sparse format"),
]


@pytest.mark.parametrize("verb", ["prune", "import"])
@pytest.mark.parametrize(("change", "words"), PACKED_MATRICES)
def test_matrices_that_transformers_would_pass_over_are_not_imported(
    prufed: Call,
    nothing_made: Call,
    base_directory: Path,
    tmp_path: Path,
    change: Callable[[Path], None],
    words: str,
    verb: str,
) -> None:
    directory = tmp_path / "tiny"
    shutil.copytree(base_directory, directory)
    change(directory)
    wanted = {
        "prune": ["--base", directory, "--method", "magnitude", "--sparsity", "0.5"],
        "import": [directory],
    }
    prufed(verb, *wanted[verb]).refused(2, words, "replace with random weights")
    nothing_made()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (stored("weight", WHOLE.to(torch.int8)), "up_proj.weight is stored as I8"),
        (stored("weight", WHOLE.to(torch.float8_e4m3fn)), "up_proj.weight is stored as F8_E4M3"),
    ],
)
def test_packed_matrices_are_seen_whatever_the_configuration_says(
    prufed: Call,
    nothing_made: Call,
    base_directory: Path,
    calibration_file: Path,
    tmp_path: Path,
    change: Callable[[Path], None],
    words: str,
) -> None:
    directory = tmp_path / "tiny"
    shutil.copytree(base_directory, directory)
    change(directory)
    wanted = ("--base", directory, "--method", "magnitude", "--sparsity", "0.5")
    prufed("prune", *wanted).refused(2, "cannot be a base", words)
    nothing_made("tiny@v1")
    scored = prufed("eval", "tiny@v1", "--perplexity", calibration_file, "--device", "cpu")
    scored.refused(2, "cannot be a base", words)


def test_bytes_that_changed_after_publishing(prufed: Call, base_directory: Path) -> None:
    prufed("import", base_directory)
    registry = Registry(Path(prufed("path", "tiny").out.strip()).parents[2])
    flip_in_the_registry(registry.resolve("tiny"))
    checked = prufed("verify")
    assert checked.code == 5
    assert WEIGHTS in checked.out
    prufed("export", "tiny", base_directory.parent / "out").refused(5, WEIGHTS)
    assert not (base_directory.parent / "out").exists()


@pytest.fixture
def adapter(
    prufed: Call,
    registry: Registry,
    configuration: dict[str, Any],
    clients_file: Callable[[dict[str, Any]], Path],
) -> Artifact:
    """An adapter of the tiny model, made by one round."""
    path = clients_file({**configuration, "rounds": 1, "clients": [{"name": "dense"}]})
    called = prufed("federate", "--clients", path, "--quiet")
    return registry.resolve(called.out.strip())


def republished(
    registry: Registry,
    adapter: Artifact,
    parents: list[Parent],
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> Artifact:
    """Publish the adapter once more, on other parents or with other tensors."""
    with registry.stage() as staging:
        for file in adapter.manifest.files:
            shutil.copyfile(adapter.path / file, staging.path / file)
        if tensors is not None:
            save_file(dict(tensors), staging.path / "adapter_model.safetensors")
        return staging.publish(
            name="odd",
            kind=adapter.kind,
            parents=parents,
            recipe={"command": "test"},
            details=adapter.manifest.details,
        )


def merging_and_scoring(prufed: Call, text: Path, directory: Path) -> list[Any]:
    return [
        prufed("export", "odd", directory, "--merge"),
        prufed("eval", "odd", "--perplexity", text, "--device", "cpu", "-q"),
    ]


def test_an_adapter_whose_base_has_another_digest(
    prufed: Call, registry: Registry, adapter: Artifact, calibration_file: Path, tmp_path: Path
) -> None:
    republished(registry, adapter, [Parent(ref="tiny@v1", digest="sha256:" + "0" * 64)])
    for called in merging_and_scoring(prufed, calibration_file, tmp_path / "out"):
        called.refused(5, "odd@v1 was made from tiny@v1", "but that is now")
    assert not (tmp_path / "out").exists()


def test_an_adapter_whose_base_is_not_here(
    prufed: Call, registry: Registry, adapter: Artifact, calibration_file: Path, tmp_path: Path
) -> None:
    republished(registry, adapter, [Parent(ref="gone@v1", digest="sha256:" + "0" * 64)])
    for called in merging_and_scoring(prufed, calibration_file, tmp_path / "out"):
        called.refused(3, "the base of odd@v1 is not in the registry")
    assert not (tmp_path / "out").exists()


def wrong_shape(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = next(iter(tensors))
    return {**tensors, name: torch.zeros(3, 5)}


def one_missing(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = next(iter(tensors))
    return {key: value for key, value in tensors.items() if key != name}


def one_too_many(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name, tensor = next(iter(tensors.items()))
    return {**tensors, name.replace("layers.0", "layers.9"): tensor.clone()}


@pytest.mark.parametrize("change", [wrong_shape, one_missing, one_too_many])
def test_an_adapter_whose_tensors_do_not_fit_its_base(
    prufed: Call,
    registry: Registry,
    adapter: Artifact,
    calibration_file: Path,
    tmp_path: Path,
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
) -> None:
    tensors = load_file(adapter.path / "adapter_model.safetensors")
    parents = [Parent(ref=p.ref, digest=p.digest) for p in adapter.manifest.parents]
    republished(registry, adapter, parents, change(tensors))
    for called in merging_and_scoring(prufed, calibration_file, tmp_path / "out"):
        called.refused(called.code, "lora_")
        assert called.code in {1, 2, 5}
    assert not (tmp_path / "out").exists()


def test_a_client_whose_base_is_of_another_family(
    prufed: Call,
    nothing_made: Call,
    base_directory: Path,
    tmp_path: Path,
    configuration: dict[str, Any],
    clients_file: Callable[[dict[str, Any]], Path],
) -> None:
    directory = tmp_path / "relative"
    shutil.copytree(base_directory, directory)
    configured(rms_norm_eps=1e-5)(directory)
    prufed("import", base_directory)
    prufed("import", directory, "--name", "other")
    document = {**configuration, "base": "tiny", "clients": [{"name": "a", "base": "other"}]}
    path = clients_file(document)
    prufed("federate", "--clients", path).refused(2, "other@v1 was not made from tiny@v1")
    document["clients"][0]["base"] = str(directory)
    path = clients_file(document)
    prufed("federate", "--clients", path).refused(2, f"its base {directory} is not an artifact")
    nothing_made("other@v1", "tiny@v1")
