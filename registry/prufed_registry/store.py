"""The registry: immutable, versioned model directories as plain files, safe to share and to kill.

Anything may read at any time without a lock, because a version appears and disappears whole.
"""

from __future__ import annotations

import builtins
import difflib
import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prufed_registry import names, versions
from prufed_registry.artifact import Artifact
from prufed_registry.durable import (
    fsync,
    make_directory,
    storage_errors,
    write_atomically,
)
from prufed_registry.errors import Damaged, InvalidRequest, NotFound
from prufed_registry.index import DAMAGED, Index, Location, parse_record, read_facts
from prufed_registry.layout import Layout
from prufed_registry.names import Reference, parse_reference
from prufed_registry.staging import Staging

if TYPE_CHECKING:
    from prufed_registry.gc import GcReport
    from prufed_registry.lineage import Lineage
    from prufed_registry.verify import Problem


class Registry:
    """The artifacts under one directory, which is created at the first write.

    Attributes:
        root: the directory.
    """

    def __init__(self, root: Path) -> None:
        """Open the registry at `root`.

        Raises:
            InvalidRequest: `root` holds something else, or a newer prufed's registry.
        """
        self.root = Path(root).absolute()
        self._layout = Layout(self.root)
        self._layout.exists()
        self._index = Index(self._layout.records)

    def stage(self) -> Staging:
        """Return a directory to write a new artifact into, for a ``with`` statement."""
        return Staging(self._layout)

    def names(self) -> builtins.list[str]:
        """Return the names that have a living version, sorted."""
        return [
            name for name in versions.all_names(self._layout) if versions.living(self._layout, name)
        ]

    def list(self, name: str | None = None, kind: str | None = None) -> builtins.list[Artifact]:
        """Return the living versions, by name and then oldest first.

        A version whose manifest cannot be read is listed with the kind ``damaged``.

        Args:
            name: only this name's; none where it is unknown.
            kind: only this kind's.

        Raises:
            InvalidRequest: `name` or `kind` is malformed.
        """
        if name is not None:
            names.check_name(name)
        if kind is not None:
            names.check_kind(kind)
        chosen = versions.all_names(self._layout) if name is None else [name]
        found = self._artifacts(
            [location for each in chosen for location in versions.living(self._layout, each)]
        )
        # The kind stands first in the facts, so none has to be parsed.
        start = "[" if kind is None else f'["{kind}"'
        return [artifact for artifact in found if artifact.facts.startswith(start)]

    def resolve(self, reference: str) -> Artifact:
        """Return the version that a reference means now.

        Args:
            reference: ``name``, ``name@latest``, ``name@v3``, ``name@alias`` or
                ``name@sha256:`` and at least six digits.

        Raises:
            InvalidRequest: the reference is malformed, or the digits fit several contents.
            NotFound: there is no such version; the message names near ones.
            Damaged: its manifest is not what was published.
        """
        location = self._locate(parse_reference(reference))
        # One manifest is read faster than the cache of all.
        facts = read_facts(location.directory, location.ref)
        artifact = Artifact(location.name, location.version, location.directory, facts)
        if artifact.kind == DAMAGED:
            if not versions.find_version(self._layout, location.name, location.version):
                return self.resolve(reference)  # it was removed between finding and reading it
            artifact.manifest  # noqa: B018  raises with the reason
            raise Damaged(f"{artifact.ref} is damaged", f"run 'prufed verify {artifact.ref}'")
        return artifact

    def find(
        self, fingerprint: str, kind: str | None = None, name: str | None = None
    ) -> Artifact | None:
        """Return the newest living artifact made by the same recipe from the same parents.

        Args:
            fingerprint: of the recipe and the parents.
            kind: what it has to be; None for any kind.
            name: what it has to be called; None for any name.
        """
        if not fingerprint:
            return None
        found = [
            each
            for each in self.list(kind=kind)
            if name in {None, each.name}
            and fingerprint in each.facts
            and each.fingerprint == fingerprint
        ]
        return max(found, key=lambda artifact: artifact.created, default=None)

    def set_alias(self, name: str, alias: str, version: int) -> None:
        """Make ``name@alias`` mean one version, whatever it meant before.

        Raises:
            InvalidRequest: a malformed or reserved alias.
            NotFound: the version does not exist.
        """
        names.check_name(name)
        names.check_alias(alias)
        self._layout.create()
        with storage_errors(f"set the alias {name}@{alias}"), self._layout.changing():
            self._locate(Reference(name, version=version))
            make_directory(self._layout.aliases(name))
            write_atomically(self._layout.aliases(name) / alias, str(version).encode())

    def remove_alias(self, name: str, alias: str) -> None:
        """Forget an alias.

        Raises:
            NotFound: there is no such alias.
        """
        names.check_name(name)
        names.check_alias(alias)
        if alias not in versions.read_aliases(self._layout, name):
            raise NotFound(f"{name} has no alias {alias!r}", self._alias_hint(name))
        with storage_errors(f"remove the alias {name}@{alias}"), self._layout.changing():
            (self._layout.aliases(name) / alias).unlink(missing_ok=True)
            fsync(self._layout.aliases(name))

    def aliases(self, name: str) -> dict[str, int]:
        """Return the aliases of a name with the version of each; unreadable ones are left out."""
        names.check_name(name)
        found = versions.read_aliases(self._layout, name)
        numbers = {alias: versions.alias_version(text) for alias, text in found.items()}
        return {alias: number for alias, number in numbers.items() if number is not None}

    def children(self, reference: str) -> builtins.list[Artifact]:
        """Return the living artifacts made from this one, whatever name they know it by."""
        digest = self.resolve(reference).digest
        return [
            each for each in self.list() if any(parent.digest == digest for parent in each.parents)
        ]

    def lineage(self, reference: str) -> Lineage:
        """Return what an artifact was made from, and what that was made from, to the roots."""
        from prufed_registry.lineage import trace

        return trace(self.resolve(reference), self.list())

    def remove(self, reference: str) -> None:
        """Delete a version for good; its number is never used again, its aliases go with it.

        Raises:
            InvalidRequest: a living artifact was made from it.
            NotFound: there is no such version.
        """
        from prufed_registry.removal import remove

        remove(self, self._layout, self._locate(parse_reference(reference)))

    def gc(self, dry_run: bool = False) -> GcReport:
        """Delete what no artifact uses: blobs, dead writers' staging, unfinished removals.

        Args:
            dry_run: only say what would be deleted.
        """
        from prufed_registry.gc import collect

        return collect(self._layout, self._index, dry_run=dry_run)

    def verify(self, references: Iterable[str] | None = None) -> builtins.list[Problem]:
        """Read every byte and return what is not as it was published; nothing if all is well.

        Args:
            references: only these; everything if None, aliases and numbering included.
        """
        from prufed_registry import verify

        if references is None:
            return verify.check_registry(self._layout)
        located = [self._locate(parse_reference(reference)) for reference in references]
        return verify.check_versions(self._layout, located)

    def check_outside(self, directory: Path) -> None:
        """Refuse a directory of the registry's own, but for those that are being staged.

        Raises:
            InvalidRequest: it lies in the registry.
        """
        place, staged, root = (
            Path(os.path.realpath(path)) for path in (directory, self._layout.staging, self.root)
        )
        if place.is_relative_to(root) and not place.is_relative_to(staged):
            raise InvalidRequest(f"{directory} lies in the registry", "choose a place outside it")

    def export(
        self,
        reference: str,
        directory: Path,
        base: str | None = None,
        *,
        leave_out: Collection[str] = (),
    ) -> Path:
        """Copy an artifact to a new directory outside the registry, manifest included.

        Args:
            reference: the artifact.
            directory: where to; it must not exist, or be empty.
            base: what an adapter's configuration shall name as its base model, a path or a name;
                left as it is if None.
            leave_out: files that are not copied, by their paths in the artifact.

        Returns:
            The directory.

        Raises:
            InvalidRequest: it holds something.
            Damaged: the artifact's bytes are not what was published.
        """
        from prufed_registry.transfer import export

        return export(self.resolve(reference), Path(directory), base, leave_out)

    def import_directory(
        self,
        directory: Path,
        name: str | None = None,
        kind: str = "base",
        *,
        source: str | None = None,
        move: bool = False,
    ) -> Artifact:
        """Publish a copy of a directory in Hugging Face layout.

        A directory that carries a manifest must match it, and keeps its kind, parents, recipe
        and details. Where a sound version of that name is the same already, it is returned.

        Args:
            directory: where it is.
            name: what to publish it under; the manifest's name or the directory's if None.
            kind: what it is, where no manifest says so.
            source: where it is from, where no manifest says so; the directory's name if None.
            move: take its files instead of copying them; only for a stage of this registry.

        Raises:
            NotFound: there is no such directory.
            InvalidRequest: a link, a pickle, no configuration or no weights in it.
            Damaged: a file is truncated or not what the manifest says.
        """
        from prufed_registry.transfer import import_directory

        return import_directory(self, Path(directory), name, kind, source, move=move)

    def save_evaluation(
        self, artifact_digest: str, task_digest: str, payload: Mapping[str, Any]
    ) -> None:
        """Record one artifact's result on one task, beside it; a later one replaces it."""
        names.check_digest(artifact_digest)
        names.check_digest(task_digest)
        self._layout.create()
        path = self._layout.evaluation(artifact_digest, task_digest)
        content = json.dumps(dict(payload), indent=1, sort_keys=True).encode()
        with storage_errors("record the evaluation"), self._layout.changing():
            make_directory(path.parent)
            write_atomically(path, content)

    def evaluations(self, artifact_digest: str) -> dict[str, dict[str, Any]]:
        """Return the recorded results of one artifact's content, by task digest.

        Raises:
            Damaged: a result cannot be read.
        """
        names.check_digest(artifact_digest)
        directory = self._layout.evaluation(artifact_digest, "").parent
        results = {}
        for path in sorted(directory.glob("[0-9a-f]*.json")):
            try:
                results[f"sha256:{path.stem}"] = json.loads(path.read_bytes())
            except ValueError as error:
                raise Damaged(
                    f"the evaluation {path} cannot be read", "delete it and run 'prufed eval' again"
                ) from error
        return results

    def _artifacts(self, locations: Sequence[Location]) -> builtins.list[Artifact]:
        """Return the versions with their facts, less those removed meanwhile."""
        return [
            Artifact(name, version, directory, facts)
            for (name, version, _, directory), facts in zip(
                locations, self._index.lookup(locations), strict=True
            )
            if not facts.startswith(f'["{DAMAGED}"')
            or versions.find_version(self._layout, name, version)
        ]

    def _locate(self, reference: Reference) -> Location:
        """Return the version a reference means, without reading its manifest where possible."""
        name, version = reference.name, reference.version
        if reference.alias is not None:
            version = self.aliases(name).get(reference.alias)
            if version is None and versions.living(self._layout, name):
                raise NotFound(f"{name} has no alias {reference.alias!r}", self._alias_hint(name))
        if version is not None:
            if found := versions.find_version(self._layout, name, version):
                return found
            raise self._no_version(name, version)
        newest = versions.newest(self._layout, name)
        if newest is None:
            raise NotFound(f"there is no artifact {name!r}", self._near_hint(name))
        if reference.digest_prefix is None:
            return newest
        return self._by_digest(reference.digest_prefix, name)

    def _by_digest(self, prefix: str, name: str) -> Location:
        living = versions.living(self._layout, name)
        records = [parse_record(facts) for facts in self._index.lookup(living)]
        fitting = [
            (each, record.digest)
            for each, record in zip(living, records, strict=True)
            if record.digest.startswith(prefix)
        ]
        contents = sorted({digest for _, digest in fitting})
        if not fitting:
            raise NotFound(
                f"{name} has no version with the digest {prefix}", f"run 'prufed list {name}'"
            )
        if len(contents) > 1:
            raise InvalidRequest(
                f"{name}@{prefix} fits {len(contents)} contents",
                f"give more digits: {', '.join(digest[:23] for digest in contents[:4])}",
            )
        return fitting[-1][0]

    def _no_version(self, name: str, version: int) -> NotFound:
        living = versions.living(self._layout, name)
        if not living:
            return NotFound(f"there is no artifact {name!r}", self._near_hint(name))
        was = "was removed" if version in versions.tombstones(self._layout, name) else "is missing"
        numbers = ", ".join(f"v{each.version}" for each in living[-5:])
        return NotFound(f"{name}@v{version} {was}", f"the newest versions are {numbers}")

    def _near_hint(self, name: str) -> str:
        near = difflib.get_close_matches(name, self.names(), n=3, cutoff=0.5)
        return f"did you mean {', '.join(near)}?" if near else "run 'prufed list'"

    def _alias_hint(self, name: str) -> str:
        known = ", ".join(self.aliases(name))
        return f"its aliases are {known}" if known else f"run 'prufed alias {name} ...' to set one"
