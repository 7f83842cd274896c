"""Repositories that prufed did not push, friendly and hostile."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hub.conftest import Machine
from tests.hub.server import Hub


@pytest.fixture
def model_files(model_directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in model_directory.iterdir()}


def test_a_foreign_model_becomes_a_base_with_its_source(
    hub: Hub, receiver: Machine, model_files: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    extra = {
        "pytorch_model.bin": b"\x80\x04pickle",
        "modeling_tiny.py": b"raise SystemExit",
        "consolidated.safetensors": b"the same weights again",
        "onnx/model.json": b"{}",
    }
    repository = hub.add("them/Tiny-Model", model_files | extra)
    assert receiver.prufed("pull", "them/Tiny-Model", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["reference"], document["kind"]) == ("tiny-model@v1", "base")
    artifact = receiver.registry.resolve("tiny-model")
    assert artifact.manifest.details["source"] == f"them/Tiny-Model@{repository.head}"
    assert set(artifact.manifest.files) == set(model_files)
    assert not hub.sent(r"(pytorch_model|modeling_tiny|consolidated|onnx)")
    assert receiver.prufed("pull", "them/Tiny-Model", "--json") == 0
    assert json.loads(capsys.readouterr().out)["already"]


def test_pickles_alone_are_refused(
    hub: Hub, receiver: Machine, model_files: dict[str, bytes], failure: Callable[[], str]
) -> None:
    del model_files["model.safetensors"]
    hub.add("them/model", model_files | {"pytorch_model.bin": b"\x80\x04pickle"})
    assert receiver.prufed("pull", "them/model", "-q") == 2
    assert "them/model has no safetensors weights" in failure()
    assert not hub.sent("/resolve/")
    assert receiver.registry.list() == []


def test_a_foreign_adapter_is_refused(
    hub: Hub, receiver: Machine, model_files: dict[str, bytes], failure: Callable[[], str]
) -> None:
    weights = model_files["model.safetensors"]
    hub.add("them/lora", {"adapter_config.json": b"{}", "adapter_model.safetensors": weights})
    assert receiver.prufed("pull", "them/lora", "-q") == 2
    assert "an adapter that prufed did not push" in failure()


def test_a_flipped_byte_of_foreign_weights_is_found(
    hub: Hub, receiver: Machine, model_files: dict[str, bytes], failure: Callable[[], str]
) -> None:
    hub.add("them/model", model_files)
    hub.flip("them/model", "model.safetensors")
    assert receiver.prufed("pull", "them/model", "-q") == 5
    assert "model.safetensors of them/model is not what the repository says" in failure()
    assert receiver.registry.list() == []
    assert receiver.leftovers == []


@pytest.mark.parametrize(
    "name", ["../../outside.json", "/outside.json", "a/../../../outside.json", "..\\outside.json"]
)
@pytest.mark.parametrize("ours", [True, False], ids=["ours", "foreign"])
def test_a_name_that_leaves_the_directory_is_refused(
    hub: Hub,
    sender: Machine,
    receiver: Machine,
    model_files: dict[str, bytes],
    failure: Callable[[], str],
    name: str,
    ours: bool,
) -> None:
    files = model_files
    if ours:
        artifact = sender.registry.resolve("small@v1")
        files = {path.name: path.read_bytes() for path in artifact.path.iterdir()}
    hub.add("them/model", files | {name: b'{"owned": true}'})
    assert receiver.prufed("pull", "them/model", "-q") == 5
    assert "does not stay inside" in failure()
    assert not list(receiver.home.parent.rglob("*outside.json"))
    assert receiver.registry.list() == []
    assert receiver.leftovers == []


def test_a_manifest_that_names_other_places_is_refused(
    hub: Hub, sender: Machine, receiver: Machine, failure: Callable[[], str]
) -> None:
    artifact = sender.registry.resolve("small@v1")
    files = {path.name: path.read_bytes() for path in artifact.path.iterdir()}
    payload = json.loads(files["prufed.json"])
    payload["files"]["../../outside.json"] = payload["files"].pop("config.json")
    files["prufed.json"] = json.dumps(payload).encode()
    hub.add("them/model", files)
    assert receiver.prufed("pull", "them/model", "-q") == 5
    assert "manifest" in failure()
    assert receiver.registry.list() == []


def test_pruning_takes_a_base_from_the_hub_and_fetches_it_once(
    hub: Hub, receiver: Machine, model_files: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add("them/model", model_files)
    prune = ("prune", "--base", "them/model", "--method", "magnitude", "--json", "--sparsity")
    for sparsity in ("0.25", "0.5"):
        assert receiver.prufed(*prune, sparsity) == 0
    assert len(hub.sent("GET /store/")) == 1
    assert [each.name for each in receiver.registry.list(kind="base")] == ["model"]
    newest = json.loads(capsys.readouterr().out.split("\n}\n")[-2] + "}")
    assert receiver.registry.resolve(newest["reference"]).parents[0].ref == "model@v1"
    hub.add("them/model", {"README.md": b"# Another card\n"})
    assert receiver.prufed(*prune, "0.75") == 0
    assert len(hub.sent("GET /store/")) == 2, "the head has moved"
