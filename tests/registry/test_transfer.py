"""Artifacts as plain directories: out of the registry, into it, and what is refused."""

from __future__ import annotations

import json
import os
import stat

import pytest

from prufed_registry import (
    Damaged,
    InvalidRequest,
    NotFound,
    Parent,
    Registry,
    RegistryError,
    rewrite_base,
)
from prufed_registry.outside import new_directory
from prufed_registry.transfer import find_imported

CONFIG = {"base_model_name_or_path": "half@v1", "peft_type": "LORA", "r": 4}


@pytest.fixture
def adapter(registry, publish, write_model, tmp_path):
    """An adapter of half@v1, published."""
    half = publish("half", seed=1, kind="pruned")
    write_model(tmp_path / "weights")
    with registry.stage() as staging:
        weights = (tmp_path / "weights" / "model.safetensors").read_bytes()
        (staging.path / "adapter_model.safetensors").write_bytes(weights)
        text = json.dumps(CONFIG, indent=2, sort_keys=True)
        (staging.path / "adapter_config.json").write_text(text)
        return staging.publish(
            "phone",
            "client-adapter",
            parents=[Parent(half.ref, half.digest)],
            recipe={"command": "tune", "seed": 7},
            metrics={"loss": 0.5},
            details={"adapter": {"r": 4}},
        )


def test_export_is_a_plain_copy(registry, publish, tmp_path):
    made = publish()
    target = registry.export("tiny", tmp_path / "out" / "model")
    names = {path.relative_to(target).as_posix() for path in target.rglob("*.*")}
    assert names == {*made.manifest.files, "prufed.json"}
    for path in made.manifest.files:
        assert (target / path).read_bytes() == (made.path / path).read_bytes()
        assert not (target / path).samefile(made.path / path)
    assert stat.S_IMODE((target / "config.json").stat().st_mode) & 0o200, "the copy is yours"
    assert list(target.parent.iterdir()) == [target]


def test_export_needs_a_new_directory_and_sound_bytes(registry, publish, tmp_path):
    made = publish()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(InvalidRequest, match="not empty"):
        registry.export("tiny", tmp_path / "full")
    (made.path / "config.json").chmod(0o644)
    (made.path / "config.json").write_text("{}")
    with pytest.raises(Damaged, match="'config"):
        registry.export("tiny", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_an_exported_adapter_names_the_base_it_is_told(registry, adapter, tmp_path):
    target = registry.export(adapter.ref, tmp_path / "out", base="/models/half")
    config = json.loads((target / "adapter_config.json").read_text())
    assert config == {**CONFIG, "base_model_name_or_path": "/models/half"}
    as_it_is = registry.export(adapter.ref, tmp_path / "same")
    assert json.loads((as_it_is / "adapter_config.json").read_text()) == CONFIG


def test_what_was_exported_comes_back_the_same(registry, adapter, tmp_path):
    for base in (None, '/models/"half" of it', "somebody/half"):
        target = registry.export(
            adapter.ref, tmp_path / f"out-{base is None}-{len(base or '')}", base
        )
        other = Registry(tmp_path / f"elsewhere-{len(base or '')}")
        back = other.import_directory(target)
        assert (back.name, back.kind, back.digest) == ("phone", "client-adapter", adapter.digest)
        assert back.fingerprint == adapter.fingerprint
        assert back.manifest.recipe == adapter.manifest.recipe
        assert back.manifest.details == adapter.manifest.details
        assert back.manifest.metrics == adapter.manifest.metrics
        assert back.parents == adapter.parents
        assert other.verify() == []


def test_a_published_directory_must_match_its_manifest(registry, publish, tmp_path):
    publish()
    changed = registry.export("tiny", tmp_path / "changed")
    (changed / "config.json").write_text("{}")
    missing = registry.export("tiny", tmp_path / "missing")
    (missing / "tokenizer" / "vocabulary.txt").unlink()
    torn = registry.export("tiny", tmp_path / "torn")
    (torn / "prufed.json").write_text((torn / "prufed.json").read_text()[:-20])
    other = Registry(tmp_path / "elsewhere")
    for directory, words in [(changed, "config.json"), (missing, "missing"), (torn, "manifest")]:
        with pytest.raises(Damaged, match=words) as caught:
            other.import_directory(directory)
        assert caught.value.exit_code == 5
        assert "fetch" in (caught.value.hint or "")
    assert other.list() == []


def test_a_manifest_cannot_reach_outside_its_directory(registry, publish, tmp_path):
    from prufed_registry.digests import FileEntry, content_digest, render

    publish()
    source = registry.export("tiny", tmp_path / "out")
    (tmp_path / "secret.txt").write_text("secret")
    payload = json.loads((source / "prufed.json").read_text())
    payload["files"]["../secret.txt"] = {"sha256": "0" * 64, "size": 6}
    files = {path: FileEntry(**entry) for path, entry in payload["files"].items()}
    payload["digest"] = content_digest(files)
    (source / "prufed.json").write_bytes(render(payload))
    with pytest.raises(Damaged, match="does not stay inside"):
        Registry(tmp_path / "elsewhere").import_directory(source)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda payload: payload.update(layout=0), "layout"),
        (lambda payload: payload.update(layout=-3), "layout"),
        (
            lambda payload: payload["files"].update(
                {"prufed.json": {"sha256": "0" * 64, "size": 6}}
            ),
            "lists itself",
        ),
    ],
)
def test_a_manifest_that_no_prufed_wrote(registry, publish, tmp_path, change, words):
    from prufed_registry.digests import FileEntry, content_digest, render

    publish()
    source = registry.export("tiny", tmp_path / "out")
    payload = json.loads((source / "prufed.json").read_text())
    change(payload)
    files = {path: FileEntry(**entry) for path, entry in payload["files"].items()}
    payload["digest"] = content_digest(files)
    (source / "prufed.json").write_bytes(render(payload))
    with pytest.raises(Damaged, match=words):
        Registry(tmp_path / "elsewhere").import_directory(source)


def test_importing_a_model(registry, write_model, tmp_path):
    source = tmp_path / "My Model"
    write_model(source)
    (source / ".git").mkdir()
    (source / ".git" / "HEAD").write_text("x")
    made = registry.import_directory(source)
    assert (made.ref, made.kind) == ("my-model@v1", "base")
    assert set(made.manifest.files) == {
        "config.json",
        "model.safetensors",
        "tokenizer/vocabulary.txt",
    }
    again = registry.import_directory(source, "other")
    assert again.fingerprint == made.fingerprint
    assert (source / "config.json").stat().st_mode & 0o200, "the source stays as it was"
    assert registry.verify() == []


def test_what_a_directory_was_imported_as_is_found(registry, write_model, tmp_path):
    """By its content: not where a byte differs, and not under another kind."""
    directory = tmp_path / "model"
    write_model(directory)
    assert find_imported(registry, directory, "base") is None
    made = registry.import_directory(directory, kind="base")
    assert find_imported(registry, directory, "base") == made
    assert find_imported(registry, directory, "pruned") is None
    weights = directory / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert find_imported(registry, directory, "base") is None


def test_importing_the_same_again_makes_no_second_version(registry, write_model, tmp_path):
    source = tmp_path / "model"
    write_model(source)
    made = registry.import_directory(source)
    assert registry.import_directory(source) == made
    assert registry.import_directory(registry.export(made.ref, tmp_path / "out")) == made
    write_model(source, seed=1)
    second = registry.import_directory(source)
    assert second.ref == "model@v2"
    write_model(source)
    assert registry.import_directory(source) == made, "an earlier version is as good"
    weights = made.path / "model.safetensors"
    weights.chmod(0o644)
    with weights.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"!")
    assert registry.import_directory(source).ref == "model@v3", "a damaged one is not"
    registry.remove("model@v3")
    assert registry.import_directory(source).ref == "model@v4"


def test_an_exported_adapter_comes_back_as_the_version_it_is(registry, adapter, tmp_path):
    target = registry.export(adapter.ref, tmp_path / "out", base="/models/half")
    assert registry.import_directory(target) == adapter
    assert registry.import_directory(target, "other").ref == "other@v1"


def test_what_a_link_leads_to_is_written(registry, publish, tmp_path):
    publish()
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    registry.export("tiny", tmp_path / "link")
    assert (tmp_path / "real" / "prufed.json").exists()
    assert (tmp_path / "link").is_symlink()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(RegistryError, match="loop"):
        registry.export("tiny", tmp_path / "loop")


def test_places_in_the_registry_are_known(registry, tmp_path):
    for inside in (registry.root, registry.root / "artifacts" / "zz", registry.root / "blobs"):
        with pytest.raises(InvalidRequest, match="lies in the registry"):
            registry.check_outside(inside)
    registry.check_outside(tmp_path / "out")


def test_two_processes_do_not_write_one_directory(registry, publish, tmp_path):
    publish()
    with new_directory(tmp_path / "out") as partial:
        (partial / "half").write_text("")
        with pytest.raises(InvalidRequest, match="another process writes"):
            registry.export("tiny", tmp_path / "out")
        assert (partial / "half").exists()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["half"]


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (lambda d: (d / "pytorch_model.bin").write_bytes(b"x"), InvalidRequest, "pickled"),
        (lambda d: (d / "extra.pt").write_bytes(b"x"), InvalidRequest, "pickled"),
        (lambda d: (d / "extra.PKL").write_bytes(b"x"), InvalidRequest, "pickled"),
        (lambda d: (d / "config.json").unlink(), InvalidRequest, "no config.json"),
        (lambda d: (d / "config.json").write_text("{"), Damaged, "not JSON"),
        (lambda d: (d / "config.json").write_text("[]"), Damaged, "not a JSON object"),
        (
            lambda d: (d / "config.json").write_text(
                '{"quantization_config": {"sparsity_config": {"format": "sparse-bitmask"}}}'
            ),
            InvalidRequest,
            "sparse format 'sparse-bitmask'",
        ),
        (
            lambda d: (d / "config.json").write_text(
                '{"sparsity_config": {"format": "sparse-bitmask"}}'
            ),
            InvalidRequest,
            "sparse format 'sparse-bitmask'",
        ),
        (
            lambda d: (d / "config.json").write_text(
                '{"text_config": {"compression_config": {"sparsity_config": {"format": "24"}}}}'
            ),
            InvalidRequest,
            "sparse format '24'",
        ),
        (lambda d: (d / "model.safetensors").unlink(), InvalidRequest, "no safetensors"),
        (lambda d: (d / "model.safetensors").write_bytes(b""), Damaged, "not a whole"),
        (
            lambda d: (d / "model.safetensors").write_bytes(b"\x80\x02}q" * 9),
            Damaged,
            "not a whole",
        ),
        (lambda d: (d / "link.txt").symlink_to("/etc/passwd"), InvalidRequest, "is a link"),
        (
            lambda d: (d / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "model-00002.safetensors"}}'
            ),
            Damaged,
            "lacks the shard",
        ),
    ],
)
def test_directories_that_are_no_sound_model(registry, write_model, tmp_path, spoil, error, words):
    source = tmp_path / "source"
    write_model(source)
    spoil(source)
    with pytest.raises(error, match=words) as caught:
        registry.import_directory(source, "tiny")
    assert caught.value.hint
    assert registry.list() == []
    assert list(registry.root.rglob("model.safetensors")) == []


def test_a_sparsity_that_is_stored_densely_is_no_matter(registry, write_model, tmp_path):
    source = tmp_path / "source"
    write_model(source)
    stated = {"quantization_config": {"sparsity_config": {"format": "dense"}}}
    (source / "config.json").write_text(json.dumps(stated))
    assert registry.import_directory(source, "tiny").kind == "base"


def test_every_truncation_of_the_weights_is_refused(registry, write_model, tmp_path):
    source = tmp_path / "source"
    write_model(source)
    whole = (source / "model.safetensors").read_bytes()
    for length in range(0, len(whole), 7):
        (source / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(Damaged, match="not a whole"):
            registry.import_directory(source, "tiny")
    assert registry.list() == []


def test_an_adapter_needs_its_kind(registry, adapter, tmp_path):
    source = registry.export(adapter.ref, tmp_path / "out")
    (source / "prufed.json").unlink()
    with pytest.raises(InvalidRequest, match="has no config") as caught:
        registry.import_directory(source, "mine")
    assert "client-adapter" in (caught.value.hint or "")
    made = registry.import_directory(source, "mine", kind="client-adapter")
    assert made.digest == adapter.digest


def test_sources_that_are_no_directories(registry, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotFound, match="nowhere"):
        registry.import_directory(tmp_path / "nowhere")
    with pytest.raises(InvalidRequest, match="not a directory"):
        registry.import_directory(tmp_path / "file")


def test_rewriting_the_base_changes_one_value_only():
    text = '{\n  "a": "base_model_name_or_path",\n  "base_model_name_or_path": null,\n  "b": 1\n}'
    changed = rewrite_base(text, 'C:\\models\\"x"')
    assert json.loads(changed)["base_model_name_or_path"] == 'C:\\models\\"x"'
    assert rewrite_base(rewrite_base(text, "a\\1"), "b") == text.replace("null", '"b"')
    with pytest.raises(InvalidRequest, match="has no base_model"):
        rewrite_base("{}", "x")
