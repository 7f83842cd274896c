"""Where an artifact comes from, to the roots, as far as this registry knows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from prufed_registry.artifact import Artifact
from prufed_registry.digests import Parent


@dataclass(frozen=True, eq=False)
class Lineage:
    """An artifact and what it was made from.

    Ancestors that are reached on several ways are one and the same object, so walk it with a set
    of those seen: a federation's rounds make a graph with very many paths.

    Attributes:
        ref: its reference here, or the one its child knew it by where it is missing.
        digest: its content's digest.
        artifact: the artifact, or None where it is not in this registry.
        parents: what it was made from; empty where it is missing.
    """

    ref: str
    digest: str
    artifact: Artifact | None
    parents: tuple[Lineage, ...] = field(default=(), repr=False)

    @property
    def missing(self) -> bool:
        """Whether this registry does not hold it."""
        return self.artifact is None


def trace(artifact: Artifact, living: Iterable[Artifact]) -> Lineage:
    """Return the lineage of `artifact`, its parents looked up by digest among the living.

    The walk keeps its own stack: a run of a thousand rounds is deeper than Python's.
    """
    known: dict[str, list[Artifact]] = {}
    for each in living:
        known.setdefault(each.digest, []).append(each)
    done: dict[str, Lineage] = {}
    open_refs: set[str] = set()
    stack = [artifact]
    while stack:
        current = stack[-1]
        found = [_lookup(parent, known) for parent in current.parents]
        waiting = [
            each for each in found if each and each.ref not in done and each.ref not in open_refs
        ]
        open_refs.add(current.ref)
        if waiting:
            stack += waiting
            continue
        stack.pop()
        if current.ref not in done:
            done[current.ref] = _node(current, found, done)
    return done[artifact.ref]


def _lookup(parent: Parent, known: Mapping[str, list[Artifact]]) -> Artifact | None:
    twins = known.get(parent.digest, [])
    return next((each for each in twins if each.ref == parent.ref), twins[-1] if twins else None)


def _node(
    artifact: Artifact, found: Sequence[Artifact | None], done: Mapping[str, Lineage]
) -> Lineage:
    # An artifact that names its own content as parent would never end: there it stays missing.
    parents = tuple(
        done[each.ref] if each and each.ref in done else Lineage(parent.ref, parent.digest, None)
        for parent, each in zip(artifact.parents, found, strict=True)
    )
    return Lineage(artifact.ref, artifact.digest, artifact, parents)
