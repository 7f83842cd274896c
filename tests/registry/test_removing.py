"""Removing and collecting: numbers stay taken, parents stay, only what nobody uses goes."""

from __future__ import annotations

import pytest

from prufed_registry import InvalidRequest, NotFound


def test_a_number_is_never_used_again(registry, publish, assert_sound):
    publish()
    publish(seed=1)
    registry.remove("tiny")
    assert registry.resolve("tiny").version == 1
    assert publish(seed=2).version == 3
    registry.remove("tiny@v3")
    registry.remove("tiny@v1")
    assert registry.list() == []
    assert registry.names() == []
    assert publish(seed=3).version == 4
    registry.gc()
    assert_sound(registry)


def test_a_parent_stays_while_its_child_lives(registry, publish):
    base = publish("base-model")
    child = publish("child", seed=1, kind="pruned", parents=(base,))
    with pytest.raises(InvalidRequest, match="base-model@v1 is the parent of 1") as caught:
        registry.remove("base-model")
    assert child.ref in (caught.value.hint or "")
    assert registry.resolve("base-model") == base
    registry.remove(child.ref)
    registry.remove(base.ref)
    assert registry.list() == []


def test_a_twin_of_the_parent_may_go(registry, publish):
    parent, twin = publish("base-model"), publish("base-model")
    publish("child", seed=1, parents=(parent,))
    assert parent.digest == twin.digest
    registry.remove(twin.ref)
    with pytest.raises(InvalidRequest):
        registry.remove(parent.ref)


def test_a_parent_known_by_another_name_stays_too(registry, publish):
    parent, twin = publish("base-model"), publish("copy")
    publish("child", seed=1, parents=(parent,))
    (registry.root / "artifacts" / "base-model").rename(registry.root / "artifacts" / "renamed")
    registry.remove(twin.ref)
    with pytest.raises(InvalidRequest):
        registry.remove("renamed@v1")


def test_removing_what_is_not_there(registry, publish):
    publish()
    with pytest.raises(NotFound):
        registry.remove("tiny@v2")
    with pytest.raises(NotFound):
        registry.remove("other")


def test_bytes_go_with_their_last_artifact(registry, publish, assert_sound):
    first, second = publish(seed=1), publish(seed=2)
    own = (first.path / "model.safetensors").stat().st_size
    registry.remove(first.ref)
    planned = registry.gc(dry_run=True)
    assert planned.dry_run
    assert {item.reason for item in planned.items} == {"unused blob"}
    assert len(planned.items) == 2
    assert planned.size == own + len('{"model_type": "llama", "seed": 1}')
    assert registry.gc(dry_run=True) == planned, "a dry run deletes nothing"
    done = registry.gc()
    assert done.items == planned.items
    assert not done.dry_run
    assert registry.resolve("tiny") == second
    assert_sound(registry)


def test_everything_a_crash_can_leave_is_collected(registry, publish, assert_sound):
    publish()
    root = registry.root
    (root / "tmp" / "dead").mkdir()
    (root / "tmp" / "dead" / "half.safetensors").write_bytes(b"x" * 100)
    (root / "tmp" / "dead.lock").touch()
    (root / "tmp" / "alone.lock").touch()
    (root / "artifacts" / "tiny" / "aliases").mkdir()
    (root / "artifacts" / "tiny" / "aliases" / ".prufed-1").write_text("3")
    (root / "artifacts" / "nothing").mkdir()
    (root / "cache" / ".prufed-2").write_text("")
    gone = publish(seed=1)
    (root / "artifacts" / "tiny" / ".gone").mkdir()
    (root / "artifacts" / "tiny" / ".gone" / "v2").touch()
    assert registry.verify() == []
    assert [artifact.version for artifact in registry.list()] == [1]
    planned = registry.gc(dry_run=True)
    assert sorted({item.reason for item in planned.items}) == [
        "dead staging",
        "empty name",
        "stray file",
        "unfinished removal",
        "unused blob",
    ]
    stat_size = sum(path.stat().st_size for path in gone.path.glob("*.*"))
    assert planned.size == 100 + 1 + stat_size
    assert registry.gc().items == planned.items
    assert not gone.path.exists()
    assert publish(seed=3).version == 3
    assert_sound(registry)


def test_the_cache_is_rewritten_with_what_lives(registry, publish):
    publish()
    publish(seed=1)
    registry.list()
    registry.remove("tiny@v1")
    registry.gc()
    lines = (registry.root / "cache" / "records.jsonl").read_text().splitlines()
    assert len(lines) == 1
    assert [artifact.version for artifact in registry.list()] == [2]
