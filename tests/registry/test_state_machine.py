"""Any sequence of operations does what a dictionary in memory would do."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from prufed_registry import InvalidRequest, NotFound, Parent, Registry

NAMES = st.sampled_from(["tiny", "tinier", "phone-50"])
ALIASES = st.sampled_from(["best", "stable"])
KINDS = st.sampled_from(["base", "pruned", "merged"])
CONTENTS = st.sampled_from(["alpha", "beta", "gamma"])
INDEX = st.integers(0, 1000)


class RegistryMachine(RuleBasedStateMachine):
    """The model: living versions as (name, number) -> facts, taken numbers, aliases."""

    def __init__(self) -> None:
        super().__init__()
        memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
        self.directory = Path(tempfile.mkdtemp(prefix="prufed-machine-", dir=memory))
        self.registry = Registry(self.directory / "registry")
        self.living: dict[tuple[str, int], dict[str, object]] = {}
        self.taken: dict[str, int] = {}
        self.aliases: dict[tuple[str, str], int] = {}

    def teardown(self) -> None:
        for path in self.directory.rglob("*"):
            if path.is_dir():
                path.chmod(0o700)
        shutil.rmtree(self.directory)

    def pick(self, index: int) -> tuple[str, int]:
        return sorted(self.living)[index % len(self.living)]

    @rule(name=NAMES, kind=KINDS, content=CONTENTS, parent=st.none() | INDEX)
    def publish(self, name, kind, content, parent):
        parents = []
        if parent is not None and self.living:
            key = self.pick(parent)
            parents = [Parent(f"{key[0]}@v{key[1]}", self.living[key]["digest"])]
        with self.registry.stage() as staging:
            (staging.path / "content.txt").write_text(content)
            made = staging.publish(name, kind, parents=parents, recipe={"content": content})
        number = self.taken.get(name, 0) + 1
        assert made.version == number
        self.taken[name] = number
        self.living[name, number] = {
            "kind": kind,
            "content": content,
            "digest": made.digest,
            "fingerprint": made.fingerprint,
            "parents": [(parent.ref, parent.digest) for parent in parents],
        }

    @precondition(lambda self: self.living)
    @rule(index=INDEX, alias=ALIASES)
    def set_alias(self, index, alias):
        name, number = self.pick(index)
        self.registry.set_alias(name, alias, number)
        self.aliases[name, alias] = number

    @rule(name=NAMES, alias=ALIASES)
    def remove_alias(self, name, alias):
        if (name, alias) in self.aliases:
            self.registry.remove_alias(name, alias)
            del self.aliases[name, alias]
        else:
            with pytest.raises(NotFound):
                self.registry.remove_alias(name, alias)

    @rule(name=NAMES, number=st.integers(1, 4))
    def set_alias_to_anything(self, name, number):
        if (name, number) in self.living:
            self.registry.set_alias(name, "any", number)
            self.aliases[name, "any"] = number
        else:
            with pytest.raises(NotFound):
                self.registry.set_alias(name, "any", number)

    @precondition(lambda self: self.living)
    @rule(index=INDEX)
    def remove(self, index):
        key = self.pick(index)
        ref = f"{key[0]}@v{key[1]}"
        if self.is_needed(key, ref):
            with pytest.raises(InvalidRequest, match="parent"):
                self.registry.remove(ref)
            return
        self.registry.remove(ref)
        del self.living[key]
        self.aliases = {
            (name, alias): number
            for (name, alias), number in self.aliases.items()
            if (name, number) != key
        }

    def is_needed(self, key: tuple[str, int], ref: str) -> bool:
        digest = self.living[key]["digest"]
        others = {other: facts for other, facts in self.living.items() if other != key}
        if any((ref, digest) in facts["parents"] for facts in others.values()):
            return True
        twin = any(facts["digest"] == digest for facts in others.values())
        named = any(digest == parent for facts in others.values() for _, parent in facts["parents"])
        return named and not twin

    @rule()
    def gc(self):
        assert self.registry.gc().dry_run is False
        assert self.registry.gc(dry_run=True).items == ()
        assert self.registry.verify() == []

    @rule()
    def reopen(self):
        self.registry = Registry(self.registry.root)

    @rule()
    def lose_the_cache(self):
        shutil.rmtree(self.registry.root / "cache", ignore_errors=True)

    @rule(name=NAMES)
    def resolve_latest(self, name):
        numbers = [number for living, number in self.living if living == name]
        for reference in (name, f"{name}@latest"):
            if numbers:
                assert self.registry.resolve(reference).version == max(numbers)
            else:
                with pytest.raises(NotFound):
                    self.registry.resolve(reference)

    @rule(name=NAMES, number=st.integers(1, 6))
    def resolve_version(self, name, number):
        if facts := self.living.get((name, number)):
            found = self.registry.resolve(f"{name}@v{number}")
            assert (found.path / "content.txt").read_text() == facts["content"]
            assert found.manifest.digest == facts["digest"]
        else:
            with pytest.raises(NotFound):
                self.registry.resolve(f"{name}@v{number}")

    @precondition(lambda self: self.living)
    @rule(index=INDEX, length=st.integers(6, 64))
    def resolve_digest(self, index, length):
        key = self.pick(index)
        digest = self.living[key]["digest"]
        found = self.registry.resolve(f"{key[0]}@{digest[: len('sha256:') + length]}")
        twins = [
            number
            for (name, number), facts in self.living.items()
            if name == key[0] and facts["digest"] == digest
        ]
        assert found.version == max(twins)

    @invariant()
    def lists_what_lives(self):
        listed = {(each.name, each.version): each for each in self.registry.list()}
        assert listed.keys() == self.living.keys()
        for key, facts in self.living.items():
            assert listed[key].kind == facts["kind"]
            assert listed[key].digest == facts["digest"]
        assert self.registry.names() == sorted({name for name, _ in self.living})

    @invariant()
    def aliases_resolve(self):
        for (name, alias), number in self.aliases.items():
            assert self.registry.resolve(f"{name}@{alias}").version == number
        for name in self.taken:
            known = {alias: n for (owner, alias), n in self.aliases.items() if owner == name}
            assert self.registry.aliases(name) == known

    @invariant()
    def recipes_are_found(self):
        for (name, number), facts in self.living.items():
            found = self.registry.find(facts["fingerprint"], facts["kind"])
            assert found is not None
            assert (found.name, found.version) in self.living
            assert self.living[found.name, found.version]["fingerprint"] == facts["fingerprint"]
            assert self.living[name, number]["kind"] == found.kind


@pytest.mark.slow
def test_any_sequence_of_operations():
    run_state_machine_as_test(
        RegistryMachine, settings=settings(max_examples=25, stateful_step_count=30, deadline=None)
    )
