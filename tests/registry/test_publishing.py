"""What a published artifact is: immutable files in one directory, equal digests for equal bytes."""

from __future__ import annotations

import os
import stat
import subprocess
import sys

import pytest
from pydantic import ValidationError

from prufed_registry import (
    Damaged,
    InvalidRequest,
    Manifest,
    Parent,
    Registry,
    RegistryError,
    default_home,
    fingerprint,
)


def publish_files(registry: Registry, files: dict[str, str], name: str = "tiny"):
    with registry.stage() as staging:
        for path, content in files.items():
            (staging.path / path).parent.mkdir(parents=True, exist_ok=True)
            (staging.path / path).write_text(content)
        return staging.publish(name, "base", recipe={})


def test_a_manifest_says_everything(registry, publish):
    base = publish("base-model")
    made = publish(
        "child",
        seed=3,
        kind="client-adapter",
        parents=(base,),
        recipe={"command": "tune", "params": {"lr": 3e-4, "modules": ("q_proj",)}},
        environment={"torch": "2.13"},
        metrics={"loss": 0.5},
        details={"round": 2},
    )
    manifest = made.manifest
    assert isinstance(manifest, Manifest)
    assert (manifest.name, manifest.kind, manifest.layout) == ("child", "client-adapter", 1)
    assert manifest.recipe == {"command": "tune", "params": {"lr": 3e-4, "modules": ["q_proj"]}}
    assert manifest.environment == {"torch": "2.13"}
    assert manifest.metrics == {"loss": 0.5}
    assert manifest.details == {"round": 2}
    assert manifest.parents == (Parent("base-model@v1", base.digest),) == made.parents
    assert set(manifest.files) == {"config.json", "model.safetensors", "tokenizer/vocabulary.txt"}
    assert manifest.digest == made.digest
    assert manifest.fingerprint == made.fingerprint
    assert made.size == sum(entry.size for entry in manifest.files.values())
    assert made.created == manifest.created
    with pytest.raises(ValidationError):
        manifest.name = "other"


def test_equal_bytes_have_equal_digests_in_any_registry(tmp_path):
    files = {"config.json": "{}", "a/b.txt": "b", "a.txt": "a"}
    first = publish_files(Registry(tmp_path / "one"), files)
    second = publish_files(Registry(tmp_path / "two"), dict(reversed(files.items())), "other")
    assert first.digest == second.digest
    # By hand: sha256 of "path sha256" lines, sorted by path.
    listing = subprocess.run(
        "for f in a.txt a/b.txt config.json; do echo $f $(sha256sum < $f | cut -c1-64); done"
        " | sha256sum",
        shell=True,
        capture_output=True,
        text=True,
        check=True,
        cwd=first.path,
    ).stdout
    assert first.digest == f"sha256:{listing[:64]}"


def test_files_are_read_only_and_share_their_inodes(registry, publish):
    first, second = publish(seed=1), publish(seed=2)
    for artifact in (first, second):
        assert stat.S_IMODE(artifact.path.stat().st_mode) == 0o555
        assert stat.S_IMODE((artifact.path / "tokenizer").stat().st_mode) == 0o555
        for path in artifact.path.rglob("*.*"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o444
    shared = "tokenizer/vocabulary.txt"
    assert (first.path / shared).samefile(second.path / shared)
    assert not (first.path / "model.safetensors").samefile(second.path / "model.safetensors")


def test_a_file_with_another_name_outside_is_copied(registry, tmp_path):
    outside = tmp_path / "outside.txt"
    outside.write_text("mine")
    with registry.stage() as staging:
        os.link(outside, staging.path / "inside.txt")
        made = staging.publish("tiny", "base", recipe={})
    outside.write_text("changed")
    assert (made.path / "inside.txt").read_text() == "mine"
    assert registry.verify() == []


def test_equal_files_of_one_artifact(registry, assert_sound):
    made = publish_files(registry, {"a.txt": "same", "b.txt": "same", "c/d.txt": "same"})
    assert (made.path / "a.txt").samefile(made.path / "c" / "d.txt")
    assert_sound(registry)


def test_where_links_are_not_possible_an_artifact_keeps_its_copies(
    registry, publish, memory_path, tmp_path
):
    if memory_path.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs two filesystems")
    registry.root.mkdir()
    (registry.root / "prufed-registry.json").write_text('{"layout": 1}')
    (registry.root / "blobs").symlink_to(memory_path)
    made = publish()
    assert (made.path / "config.json").stat().st_nlink == 1
    assert [path for path in memory_path.rglob("*") if path.is_file()] == []
    assert registry.verify() == []
    assert registry.gc(dry_run=True).items == ()


def test_empty_directories_are_not_kept(registry):
    with registry.stage() as staging:
        (staging.path / "a" / "b").mkdir(parents=True)
        (staging.path / "c.txt").write_text("c")
        made = staging.publish("tiny", "base", recipe={})
    assert [path.name for path in sorted(made.path.iterdir())] == ["c.txt", "prufed.json"]
    assert registry.verify() == []


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda path: None, "empty directory"),
        (lambda path: (path / "link").symlink_to("/etc/passwd"), "is a link"),
        (lambda path: (path / "dir").symlink_to("/etc"), "is a link"),
        (lambda path: os.mkfifo(path / "pipe"), "is a link or a device"),
        (lambda path: (path / "a\nb").write_text("x"), "not a name for a stored file"),
        (lambda path: (path / "pytorch_model.bin").write_text("x"), "pickled"),
        (lambda path: (path / "x.pt").write_text("x"), "pickled"),
    ],
)
def test_what_cannot_be_published(registry, prepare, message):
    with registry.stage() as staging:
        prepare(staging.path)
        with pytest.raises(InvalidRequest, match=message):
            staging.publish("tiny", "base", recipe={})
    assert registry.list() == []
    assert list((registry.root / "tmp").iterdir()) == []


def test_truncated_weights_are_not_published(registry, write_model):
    with registry.stage() as staging:
        write_model(staging.path)
        weights = staging.path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-4])
        with pytest.raises(Damaged, match="not a whole safetensors file"):
            staging.publish("tiny", "base", recipe={})
    assert registry.list() == []


@pytest.mark.parametrize(
    "facts",
    [
        {"recipe": {"lr": float("nan")}},
        {"recipe": {}, "metrics": {"loss": float("inf")}},
        {"recipe": {}, "details": {"path": object()}},
        {"recipe": {}, "parents": [Parent("tiny@v1", "sha256:short")]},
    ],
)
def test_facts_that_cannot_be_stored(registry, facts):
    with registry.stage() as staging:
        (staging.path / "a.txt").write_text("a")
        with pytest.raises(InvalidRequest):
            staging.publish("tiny", "base", **facts)
        assert staging.publish("tiny", "base", recipe={}).version == 1


def test_bad_names_and_kinds(registry):
    with registry.stage() as staging:
        (staging.path / "a.txt").write_text("a")
        with pytest.raises(InvalidRequest, match="'Tiny'"):
            staging.publish("Tiny", "base", recipe={})
        with pytest.raises(InvalidRequest, match="'adapter'"):
            staging.publish("tiny", "adapter", recipe={})
        staging.publish("tiny", "base", recipe={})
        with pytest.raises(InvalidRequest, match="already"):
            staging.publish("tiny", "base", recipe={})


def test_staging_that_is_not_published_leaves_nothing(registry):
    with registry.stage() as staging:
        (staging.path / "half.txt").write_text("half")
    assert not staging.path.exists()
    assert list((registry.root / "tmp").iterdir()) == []
    assert registry.list() == []


def test_the_same_recipe_is_found_again(registry, publish):
    base = publish("base-model")
    recipe = {"command": "prune", "params": {"sparsity": 0.5}}
    first = publish("half", seed=1, kind="pruned", parents=(base,), recipe=recipe)
    second = publish("other", seed=2, kind="pruned", parents=(base,), recipe=recipe)
    wanted = fingerprint("pruned", [Parent("elsewhere", base.digest)], recipe)
    assert first.fingerprint == second.fingerprint == wanted
    assert registry.find(wanted) == second
    assert registry.find(wanted, kind="base") is None
    registry.remove("other")
    assert registry.find(wanted) == first
    assert registry.find(fingerprint("merged", [], recipe)) is None
    assert registry.find("") is None


def test_listing_by_name_and_kind(registry, publish):
    base = publish("bb")
    pruned = publish("aa", kind="pruned")
    newer = publish("bb", seed=1)
    assert registry.list() == [pruned, base, newer]
    assert registry.list("bb") == [base, newer]
    assert registry.list(kind="pruned") == [pruned]
    assert registry.list("bb", "pruned") == []
    assert registry.list("unknown") == []
    assert registry.names() == ["aa", "bb"]
    with pytest.raises(InvalidRequest):
        registry.list(kind="nothing")


def test_a_registry_restored_from_a_copy_forgets_the_cache(registry, publish, tmp_path):
    publish(seed=1)
    registry.list()
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", registry.root, copy], check=True)
    other = Registry(copy)
    assert [each.digest for each in other.list()] == [each.digest for each in registry.list()]
    assert other.verify() == []


def test_evaluations_stand_beside_the_artifact(registry, publish):
    made = publish()
    task = "sha256:" + "12" * 32
    before = (made.path / "prufed.json").read_bytes()
    assert registry.evaluations(made.digest) == {}
    registry.save_evaluation(made.digest, task, {"acc": 0.5})
    registry.save_evaluation(made.digest, task, {"acc": 0.75})
    assert registry.evaluations(made.digest) == {task: {"acc": 0.75}}
    assert (made.path / "prufed.json").read_bytes() == before
    with pytest.raises(InvalidRequest):
        registry.save_evaluation("sha256:../../x", task, {})
    [result] = (registry.root / "evals").rglob("*.json")
    result.write_text("{")
    with pytest.raises(Damaged):
        registry.evaluations(made.digest)
    assert [problem.message for problem in registry.verify()] == ["is not JSON"]


def test_the_home_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("PRUFED_HOME", str(tmp_path / "here"))
    assert default_home() == tmp_path / "here"
    monkeypatch.delenv("PRUFED_HOME")
    assert default_home().name == "prufed"


def test_a_directory_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    registry = Registry(tmp_path / "file" / "registry")
    with pytest.raises(RegistryError, match="cannot create the registry"):
        registry.stage().__enter__()


def test_importing_the_registry_is_light():
    code = "import sys, prufed_registry; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    heavy = {"torch", "numpy", "pydantic", "filelock", "safetensors", "platformdirs"}
    assert not heavy & set(loaded.stdout.split())
