"""Lineage: parents to the roots, children, and what is not here."""

from __future__ import annotations

import time

from prufed_registry import Lineage, Parent


def walk(node: Lineage, depth: int = 0) -> list[tuple[int, str, bool]]:
    found = [(depth, node.ref, node.missing)]
    for parent in node.parents:
        found += walk(parent, depth + 1)
    return found


def test_from_an_adapter_to_its_root(registry, publish):
    base = publish("base-model")
    half = publish("half", seed=1, kind="pruned", parents=(base,))
    phone = publish("phone", seed=2, kind="client-adapter", parents=(half,))
    laptop = publish("laptop", seed=3, kind="client-adapter", parents=(base,))
    merged = publish("global", seed=4, kind="global-adapter", parents=(phone, laptop))
    assert walk(registry.lineage("global")) == [
        (0, "global@v1", False),
        (1, "phone@v1", False),
        (2, "half@v1", False),
        (3, "base-model@v1", False),
        (1, "laptop@v1", False),
        (2, "base-model@v1", False),
    ]
    assert registry.lineage("global").artifact == merged
    assert registry.children("base-model") == [half, laptop]
    assert registry.children("global") == []


def test_a_parent_that_is_not_here_is_marked(registry):
    foreign = Parent("somebody/llama", "sha256:" + "ab" * 32)
    with registry.stage() as staging:
        (staging.path / "a.txt").write_text("a")
        staging.publish("tiny", "pruned", parents=[foreign], recipe={})
    [parent] = registry.lineage("tiny").parents
    assert parent.missing
    assert (parent.ref, parent.digest, parent.parents) == (foreign.ref, foreign.digest, ())
    assert registry.verify() == []


def test_a_parent_under_another_name_is_found_by_its_digest(registry, publish):
    made = publish("here")
    with registry.stage() as staging:
        (staging.path / "a.txt").write_text("a")
        parent = Parent("there@v7", made.digest)
        staging.publish("tiny", "pruned", parents=[parent], recipe={})
    [found] = registry.lineage("tiny").parents
    assert found.artifact == made


def test_an_artifact_that_names_itself_ends(registry):
    digest = None
    for _ in range(2):
        with registry.stage() as staging:
            (staging.path / "a.txt").write_text("a")
            parents = [Parent("elsewhere", digest)] if digest else []
            digest = staging.publish("tiny", "base", parents=parents, recipe={}).digest
    registry.remove("tiny@v1")
    [parent] = registry.lineage("tiny@v2").parents
    assert parent.missing or parent.artifact.version == 2


def test_many_rounds_are_a_graph_and_not_a_tree(registry):
    """Two adapters in each of 25 rounds: 2^25 paths, and 76 artifacts."""

    def make(name, content, parents):
        with registry.stage() as staging:
            (staging.path / "a.txt").write_text(content)
            refs = [Parent(parent.ref, parent.digest) for parent in parents]
            return staging.publish(name, "global-adapter", parents=refs, recipe={})

    last = make("round", "start", [])
    for number in range(25):
        clients = [make("client", f"{number} {side}", [last]) for side in "ab"]
        last = make("round", f"round {number}", clients)
    started = time.perf_counter()
    node = registry.lineage("round")
    assert time.perf_counter() - started < 10
    depth = 0
    while node.parents:
        assert not node.missing
        node, depth = node.parents[0], depth + 1
    assert depth == 50
