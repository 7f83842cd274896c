"""Artifacts exported in the packed form and imported again, on the command line."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import prufed_cli
from prufed_cli.main import main
from prufed_registry import Registry
from prufed_registry.digests import FileEntry, content_digest, render

Refused = Callable[..., str]


@pytest.fixture
def packed(registry: Registry, tmp_path: Path) -> Path:
    return prufed_cli.export_packed("sparse", tmp_path / "packed").path


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Registry]:
    """Go on with another home."""

    def move() -> Registry:
        monkeypatch.setenv("PRUFED_HOME", str(tmp_path / "elsewhere"))
        return Registry(tmp_path / "elsewhere" / "registry")

    return move


def assert_nothing_written(registry: Registry) -> None:
    assert registry.list() == []
    assert list((registry.root / "tmp").glob("*")) == []


@pytest.mark.parametrize("name", ["sparse", "short", "tiny"])
def test_an_artifact_comes_back_bit_for_bit(
    registry: Registry,
    tmp_path: Path,
    elsewhere: Callable[[], Registry],
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    sent = registry.resolve(name)
    assert main(["export", name, str(tmp_path / "packed"), "--packed", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["path"] == str(tmp_path / "packed")
    assert document["packed_bytes"] < document["bytes"]
    other = elsewhere()
    assert main(["import", str(tmp_path / "packed"), "-q"]) == 0
    assert capsys.readouterr().out.strip() == f"{name}@v1"
    back = other.resolve(name)
    assert (back.digest, back.kind, back.fingerprint) == (sent.digest, sent.kind, sent.fingerprint)
    assert back.parents == sent.parents
    assert back.manifest.details == sent.manifest.details
    for path in sent.manifest.files:
        assert (back.path / path).read_bytes() == (sent.path / path).read_bytes()
    assert other.verify() == []
    assert list((other.root / "tmp").glob("*")) == []
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_masks_are_stored_once_and_most_of_the_rest_not_at_all(
    registry: Registry, packed: Path
) -> None:
    made = registry.resolve("sparse")
    files = {path.relative_to(packed).as_posix() for path in packed.rglob("*") if path.is_file()}
    weights = {path for path in made.manifest.files if path.endswith(".safetensors")}
    assert files == {
        "prufed.json",
        *(made.manifest.files.keys() - weights),
        *(f"prufed-packed/{path}" for path in weights),
    }
    for path in files - {f"prufed-packed/{path}" for path in weights}:
        assert (packed / path).read_bytes() == (made.path / path).read_bytes()
    assert stat.S_IMODE((packed / "config.json").stat().st_mode) & 0o200, "the copy is yours"
    small = (packed / "prufed-packed" / "model.safetensors").stat().st_size
    assert small < 0.5 * made.manifest.files["model.safetensors"].size


def test_an_adapter_comes_back_too(
    registry: Registry, tmp_path: Path, elsewhere: Callable[[], Registry]
) -> None:
    from peft import LoraConfig, get_peft_model

    from prufed_registry import Parent

    base = registry.resolve("sparse")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base.path), LoraConfig(target_modules=["q_proj"])
    )
    model.peft_config["default"].base_model_name_or_path = base.ref
    with registry.stage() as staging:
        model.save_pretrained(staging.path)
        sent = staging.publish(
            "tuned",
            "client-adapter",
            parents=[Parent(base.ref, base.digest)],
            recipe={"command": "test"},
        )
    made = prufed_cli.export_packed("tuned", tmp_path / "packed")
    config = json.loads((made.path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base.path)
    back = prufed_cli.import_directory(made.path, registry=elsewhere())
    assert (back.digest, back.kind) == (sent.digest, sent.kind)


def test_a_packed_directory_is_taken_for_no_model(
    registry: Registry, packed: Path, tmp_path: Path, refused: Refused
) -> None:
    before = [each.ref for each in registry.list()]
    prune = ("prune", "--method", "magnitude", "--sparsity", "0.5", "-q", "--base")
    assert "is packed and cannot be opened as a model" in refused(*prune, packed, code=2)
    assert "is packed" in refused("eval", packed, "--perplexity", packed / "README.md", code=2)
    assert [each.ref for each in registry.list()] == before
    sharded = prufed_cli.export_packed("tiny", tmp_path / "sharded").path
    for directory in (packed, sharded, packed / "prufed-packed"):
        with pytest.raises((OSError, ValueError)):
            AutoModelForCausalLM.from_pretrained(directory)


def test_a_prune_of_what_was_imported_is_one_of_the_original(
    registry: Registry, packed: Path, elsewhere: Callable[[], Registry]
) -> None:
    request = prufed_cli.PruneRequest(base="sparse", method="top", layers=1)
    first = prufed_cli.prune(request).artifact
    other = elsewhere()
    prufed_cli.import_directory(packed)
    assert prufed_cli.prune(request, registry=other).artifact.digest == first.digest


def test_export_writes_whole_directories_only(
    registry: Registry, tmp_path: Path, refused: Refused
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    assert "not empty" in refused("export", "sparse", tmp_path / "full", "--packed", code=2)
    both = refused("export", "sparse", tmp_path / "out", "--packed", "--merge", code=2)
    assert "exclude each other" in both
    weights = registry.resolve("sparse").path / "model.safetensors"
    content = weights.read_bytes()
    weights.chmod(0o644)
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    damaged = refused("export", "sparse", tmp_path / "out", "--packed", "-q", code=5)
    assert "model.safetensors of sparse@v1 has changed" in damaged
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "home"]


def change_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def rewrite_manifest(directory: Path, files: dict[str, dict[str, object]]) -> None:
    """Make a manifest that holds together and says something else of some files."""
    payload = json.loads((directory / "prufed.json").read_text())
    payload["files"] |= files
    entries = {path: FileEntry(**entry) for path, entry in payload["files"].items()}
    payload["digest"] = content_digest(entries)
    del payload["checksum"]
    (directory / "prufed.json").write_bytes(render(payload))


def point_outside(directory: Path) -> None:
    (directory.parent / "secret.safetensors").write_bytes(b"secret")
    rewrite_manifest(directory, {"../secret.safetensors": {"sha256": "0" * 64, "size": 6}})


def link_outside(directory: Path) -> None:
    file = directory / "prufed-packed" / "model.safetensors"
    shutil.move(file, directory.parent / "weights")
    file.symlink_to(directory.parent / "weights")


def swap_weights(directory: Path) -> None:
    """Make the packed weights those of another artifact."""
    other = prufed_cli.export_packed("short", directory.with_name("other")).path
    name = "prufed-packed/model.safetensors"
    shutil.copyfile(other / name, directory / name)


@pytest.mark.parametrize(
    ("spoil", "code", "words"),
    [
        (lambda d: change_byte(d / "prufed-packed/model.safetensors"), 5, "model.safetensors"),
        (lambda d: change_byte(d / "prufed-packed/prufed-masks.safetensors"), 5, "prufed-masks"),
        (lambda d: (d / "config.json").write_text("{}"), 5, "config.json in"),
        (lambda d: (d / "config.json").unlink(), 5, "config.json is missing"),
        (lambda d: (d / "prufed.json").unlink(), 5, "manifest"),
        (lambda d: (d / "prufed-packed/model.safetensors").unlink(), 5, "safetensors is missing"),
        (lambda d: (d / "prufed-packed/prufed-masks.safetensors").unlink(), 5, "is missing"),
        (lambda d: os.truncate(d / "prufed-packed/model.safetensors", 500), 5, "unpacked"),
        (swap_weights, 5, "is not the model.safetensors that its manifest names"),
        (point_outside, 5, "does not stay inside"),
        (link_outside, 2, "is a link"),
    ],
)
def test_a_damaged_directory_is_refused(
    registry: Registry,
    packed: Path,
    elsewhere: Callable[[], Registry],
    refused: Refused,
    spoil: Callable[[Path], object],
    code: int,
    words: str,
) -> None:
    spoil(packed)
    other = elsewhere()
    assert words in refused("import", packed, "-q", code=code)
    assert_nothing_written(other)


def test_what_the_disk_cannot_hold_is_refused_before_it_is_unpacked(
    registry: Registry, packed: Path, elsewhere: Callable[[], Registry], refused: Refused
) -> None:
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    file = packed / "prufed-packed" / "model.safetensors"
    with safe_open(file, framework="np") as opened:
        stated = json.loads(opened.metadata()["prufed-packed"]) | {"size": 10**18}
    save_file(load_file(file), file, metadata={"prufed-packed": json.dumps(stated)})
    entry = {"sha256": stated["sha256"], "size": 10**18}
    rewrite_manifest(packed, {"model.safetensors": entry})
    other = elsewhere()
    assert "1.0 EB on disk, but" in refused("import", packed, "-q", code=1)
    assert_nothing_written(other)


def test_masks_that_are_none_are_refused(
    registry: Registry, tmp_path: Path, elsewhere: Callable[[], Registry], refused: Refused
) -> None:
    """Nothing is wrong with the bytes, but the file of that name holds no masks."""
    from safetensors.torch import save_file

    with registry.stage() as staging:
        save_file({"w": torch.zeros(3)}, staging.path / "prufed-masks.safetensors")
        save_file({"w": torch.zeros(3)}, staging.path / "model.safetensors")
        staging.publish("odd", "base", recipe={"command": "test"})
    assert "not a mask file" in refused("export", "odd", tmp_path / "out", "--packed", code=5)
    assert not (tmp_path / "out").exists()
