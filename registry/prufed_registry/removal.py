"""Removing a version: refused while something was made from it, finished by gc if interrupted.

The tombstone is what removes a version; everything after it is cleaning up.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from prufed_registry import versions
from prufed_registry.artifact import Artifact
from prufed_registry.durable import fsync, make_directory, storage_errors
from prufed_registry.errors import InvalidRequest, NotFound
from prufed_registry.index import Location
from prufed_registry.layout import Layout
from prufed_registry.staging import Staging

if TYPE_CHECKING:
    from prufed_registry.store import Registry


def remove(registry: Registry, layout: Layout, location: Location) -> None:
    """Delete one version and its aliases, and keep its number taken.

    Raises:
        InvalidRequest: a living artifact was made from it.
        NotFound: somebody else removed it meanwhile.
    """
    # The lock is released before the staging directory ends, which takes the bytes with it.
    with storage_errors(f"remove {location.ref}"), Staging(layout) as trash, layout.changing():
        if versions.find_version(layout, location.name, location.version) is None:
            raise NotFound(f"{location.ref} was removed", "run 'prufed list'")
        _refuse_parent(location, registry.list())
        _drop_aliases(layout, location)
        _bury(layout, location)
        move_away(location, trash)


def move_away(location: Location, trash: Staging) -> None:
    """Move a version's directory into a staging directory, which deletes it at its end."""
    directory = Path(location.directory)
    directory.chmod(0o755)
    directory.rename(trash.path / "removed")
    fsync(directory.parent)


def _refuse_parent(location: Location, living: list[Artifact]) -> None:
    digest = next((each.digest for each in living if each.ref == location.ref), "")
    twins = [each for each in living if each.digest == digest and each.ref != location.ref]
    dependents = [
        each.ref
        for each in living
        if each.ref != location.ref and _needs(each, location.ref, digest, bool(twins))
    ]
    if dependents:
        shown = ", ".join(dependents[:5]) + (", ..." if len(dependents) > 5 else "")
        raise InvalidRequest(
            f"{location.ref} is the parent of {len(dependents)} living artifacts",
            f"remove them first: {shown}",
        )


def _needs(artifact: Artifact, ref: str, digest: str, has_twin: bool) -> bool:
    # Of two versions with equal bytes, only the one that was named is needed. Of a damaged
    # version the digest is not known, so the name decides.
    return any(
        (parent.digest == digest or not digest) and (parent.ref == ref or (digest and not has_twin))
        for parent in artifact.parents
    )


def _drop_aliases(layout: Layout, location: Location) -> None:
    for alias, text in versions.read_aliases(layout, location.name).items():
        if versions.alias_version(text) == location.version:
            (layout.aliases(location.name) / alias).unlink()


def _bury(layout: Layout, location: Location) -> None:
    directory = layout.tombstones(location.name)
    make_directory(directory)
    (directory / f"v{location.version}").touch()
    fsync(directory)
