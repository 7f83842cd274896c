"""Whatever changes in a published artifact, verify says where."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prufed_registry import Artifact, Damaged, Registry

FILES = ("config.json", "model.safetensors", "prufed.json", "tokenizer/vocabulary.txt")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, publish_into) -> tuple[Registry, Artifact]:
    registry = Registry(tmp_path_factory.mktemp("flips") / "registry")
    base = publish_into(registry, "other")
    facts = {"details": {"sparsity": 0.5}, "metrics": {"loss": 0.25}}
    return registry, publish_into(registry, seed=1, parents=(base,), **facts)


def overwrite(path: Path, content: bytes) -> None:
    """Change a file in place, as a failing disk does."""
    path.chmod(0o644)
    path.write_bytes(content)
    path.chmod(0o444)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_flipped_byte_of_any_file(stored, data):
    registry, artifact = stored
    path = data.draw(st.sampled_from(FILES))
    file = artifact.path / path
    original = file.read_bytes()
    position = data.draw(st.integers(0, len(original) - 1))
    changed = bytearray(original)
    changed[position] ^= data.draw(st.integers(1, 255))
    overwrite(file, bytes(changed))
    try:
        problems = registry.verify()
        assert (artifact.ref, path) in {(problem.ref, problem.path) for problem in problems}
        assert registry.verify([artifact.ref]) != []
    finally:
        overwrite(file, original)
    assert registry.verify() == []


@pytest.mark.parametrize("path", FILES)
@pytest.mark.parametrize("change", [lambda content: content[:-1], lambda content: content + b"\n"])
def test_a_shorter_or_longer_file(registry, publish, path, change):
    artifact = publish()
    file = artifact.path / path
    overwrite(file, change(file.read_bytes()))
    assert [(problem.ref, problem.path) for problem in registry.verify()] == [("tiny@v1", path)]


@pytest.mark.parametrize("path", FILES)
def test_a_missing_file(registry, publish, path):
    artifact = publish()
    artifact.path.chmod(0o755)
    (artifact.path / path).parent.chmod(0o755)
    (artifact.path / path).unlink()
    assert [(problem.ref, problem.path) for problem in registry.verify()] == [("tiny@v1", path)]


def test_a_file_that_became_a_link_to_the_same_bytes(registry, publish, tmp_path):
    artifact = publish()
    artifact.path.chmod(0o755)
    copy = tmp_path / "config.json"
    copy.write_bytes((artifact.path / "config.json").read_bytes())
    (artifact.path / "config.json").unlink()
    (artifact.path / "config.json").symlink_to(copy)
    assert [problem.message for problem in registry.verify()] == ["is a link, not a file"]


def test_additional_files_and_directories(registry, publish):
    artifact = publish()
    artifact.path.chmod(0o755)
    (artifact.path / "pytorch_model.bin").write_text("x")
    (artifact.path / "empty").mkdir()
    found = {(problem.path, problem.message) for problem in registry.verify()}
    extra = "is not in the manifest"
    assert found == {("pytorch_model.bin", extra), ("empty", extra)}


def test_a_parent_with_other_bytes(registry, publish):
    base = publish("base-model")
    child = publish("child", seed=1, parents=(base,))
    registry_elsewhere = Registry(registry.root.parent / "elsewhere")
    with registry_elsewhere.stage() as staging:
        (staging.path / "other.txt").write_text("another artifact under the same reference")
        other = staging.publish("base-model", "base", recipe={})
    base.path.chmod(0o755)
    base.path.rename(registry.root.parent / "away")
    other.path.rename(base.path)
    assert [(each.ref, each.message) for each in registry.verify()] == [
        (child.ref, "its parent base-model@v1 has another digest here")
    ]


def test_a_version_deleted_by_hand(registry, publish):
    publish()
    publish(seed=1)
    (registry.root / "artifacts" / "tiny" / "v1").rename(registry.root.parent / "gone")
    assert [(each.ref, each.message) for each in registry.verify()] == [
        ("tiny@v1", "is missing and was never removed")
    ]


def test_aliases_that_name_nothing(registry, publish):
    publish()
    registry.set_alias("tiny", "best", 1)
    aliases = registry.root / "artifacts" / "tiny" / "aliases"
    (aliases / "worst").write_text("7")
    (aliases / "nonsense").write_text("seven")
    assert {problem.ref for problem in registry.verify()} == {"tiny@worst", "tiny@nonsense"}


def test_entries_that_do_not_belong(registry, publish):
    publish()
    (registry.root / "artifacts" / "tiny" / "v1 copy").mkdir()
    assert [problem.path for problem in registry.verify()] == ["v1 copy"]


def test_a_damaged_manifest_stops_its_users_but_not_the_listing(registry, publish):
    healthy = publish()
    broken = publish(seed=1)
    overwrite(broken.path / "prufed.json", b"{")
    reopened = Registry(registry.root)
    (registry.root / "cache" / "records.jsonl").unlink(missing_ok=True)
    assert [artifact.kind for artifact in reopened.list()] == ["base", "damaged"]
    assert reopened.list(kind="base") == [healthy]
    with pytest.raises(Damaged, match="tiny@v2"):
        reopened.resolve("tiny")
    assert [problem.ref for problem in reopened.verify()] == ["tiny@v2"]
    reopened.remove("tiny@v2")
    assert reopened.resolve("tiny") == healthy
    assert reopened.verify() == []


def test_new_artifacts_do_not_share_damaged_bytes(registry, publish):
    first = publish()
    overwrite(first.path / "tokenizer" / "vocabulary.txt", b"damaged")
    second = publish(seed=1)
    assert [problem.ref for problem in registry.verify()] == [first.ref]
    third = publish(seed=2)
    shared = "tokenizer/vocabulary.txt"
    assert (second.path / shared).samefile(third.path / shared)
