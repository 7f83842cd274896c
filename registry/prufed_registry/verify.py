"""Verifying: read every byte again and report what is not as it was published."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from prufed_registry import names, versions
from prufed_registry.digests import MANIFEST, FileEntry, read_payload, render
from prufed_registry.durable import hash_file
from prufed_registry.errors import RegistryError
from prufed_registry.index import Location
from prufed_registry.layout import Layout
from prufed_registry.manifest import Manifest, parse_manifest
from prufed_registry.weights import safetensors_problem


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is not as it was published.

    Attributes:
        ref: the artifact, or the name where it concerns no single version.
        path: the file in it, empty where it concerns none.
        message: what is wrong, one lower-case phrase.
    """

    ref: str
    path: str
    message: str


def check_registry(layout: Layout) -> list[Problem]:
    """Verify every living version, every alias, the numbering and the recorded evaluations."""
    if not layout.exists():
        return []
    problems: list[Problem] = []
    for name in versions.all_names(layout):
        problems += _check_entries(layout, name)
        problems += _check_numbers(layout, name)
        problems += _check_aliases(layout, name)
        problems += check_versions(layout, versions.living(layout, name))
    return [*problems, *_check_evaluations(layout)]


def check_versions(layout: Layout, locations: Iterable[Location]) -> list[Problem]:
    """Verify some versions: manifest, presence, size, hash, nothing extra, parents."""
    problems = []
    for location in locations:
        found = list(_check_version(layout, location))
        # One that was removed while we read it was not damaged.
        if found and versions.find_version(layout, location.name, location.version):
            problems += found
    return problems


def _check_version(layout: Layout, location: Location) -> Iterator[Problem]:
    ref, directory = location.ref, Path(location.directory)
    try:
        payload = read_payload(directory, ref)
        manifest = parse_manifest(payload, ref)
        content = (directory / MANIFEST).read_bytes()
    except (RegistryError, OSError) as error:
        yield Problem(ref, MANIFEST, str(error))
        return
    # The checksum is over the content; this is over the spaces too.
    if content != render(payload):
        yield Problem(ref, MANIFEST, "its bytes have changed")
    if manifest.name != location.name:
        yield Problem(ref, MANIFEST, f"the manifest is that of {manifest.name!r}")
    for path, entry in manifest.files.items():
        if message := _file_problem(directory / path, entry):
            yield Problem(ref, path, message)
    yield from _check_extra(ref, directory, manifest)
    yield from _check_parents(layout, ref, manifest)


def _file_problem(file: Path, entry: FileEntry) -> str | None:
    if file.is_symlink():
        return "is a link, not a file"
    try:
        size = file.stat().st_size
        if not file.is_file():
            return "is not a file"
        if size != entry.size:
            return f"has {size} bytes, not {entry.size}"
        if hash_file(file) != entry.sha256:
            return "its bytes have changed"
        problem = safetensors_problem(file)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    return f"is not a whole safetensors file: {problem}" if problem else None


def _check_extra(ref: str, directory: Path, manifest: Manifest) -> Iterator[Problem]:
    files = {MANIFEST, *manifest.files}
    directories = {str(parent) for path in manifest.files for parent in Path(path).parents}
    for place, inner, found in os.walk(directory):
        relative = Path(place).relative_to(directory)
        for name in found:
            if (relative / name).as_posix() not in files:
                yield Problem(ref, (relative / name).as_posix(), "is not in the manifest")
        for name in inner:
            if str(relative / name) not in directories:
                yield Problem(ref, (relative / name).as_posix(), "is not in the manifest")


def _check_parents(layout: Layout, ref: str, manifest: Manifest) -> Iterator[Problem]:
    """Compare the digests of the parents that are here; one elsewhere is no damage."""
    for parent in manifest.parents:
        try:
            reference = names.parse_reference(parent.ref)
        except RegistryError:
            continue  # a path or a Hub id
        if reference.version is None:
            continue  # what a moving reference meant then is known by the digest only
        found = versions.find_version(layout, reference.name, reference.version)
        if found is None:
            continue
        try:
            digest = read_payload(Path(found.directory), found.ref).get("digest")
        except RegistryError:
            continue  # reported with the parent itself
        if digest != parent.digest:
            yield Problem(ref, MANIFEST, f"its parent {parent.ref} has another digest here")


def _check_entries(layout: Layout, name: str) -> Iterator[Problem]:
    for entry in sorted(layout.versions(name).iterdir()):
        known = entry.name in ("aliases", ".gone") or names.parse_version(entry.name)
        strange = not known or entry.is_symlink() or not entry.is_dir()
        # Asked last: a version that is removed meanwhile is no directory either.
        if strange and os.path.lexists(entry):
            yield Problem(name, entry.name, "does not belong into the registry")


def _check_numbers(layout: Layout, name: str) -> Iterator[Problem]:
    taken = versions.all_numbers(layout, name)
    for number in range(1, max(taken, default=0)):
        # Looked at again: it may have been published or removed since the numbers were listed.
        if number not in taken and number not in versions.all_numbers(layout, name):
            yield Problem(f"{name}@v{number}", "", "is missing and was never removed")


def _check_aliases(layout: Layout, name: str) -> Iterator[Problem]:
    for alias, text in versions.read_aliases(layout, name).items():
        version = versions.alias_version(text)
        if version is None:
            yield Problem(f"{name}@{alias}", "", f"the alias holds {text!r}, not a version")
        elif _dangles(layout, name, alias, version):
            yield Problem(f"{name}@{alias}", "", f"the alias names v{version}, which is gone")


def _dangles(layout: Layout, name: str, alias: str, version: int) -> bool:
    if versions.find_version(layout, name, version):
        return False
    # Read again: a removal takes the aliases with it, before the version goes.
    return alias in versions.read_aliases(layout, name)


def _check_evaluations(layout: Layout) -> Iterator[Problem]:
    for path in sorted(layout.evaluations.glob("*/*.json")):
        try:
            json.loads(path.read_bytes())
        except ValueError:
            yield Problem("", path.relative_to(layout.root).as_posix(), "is not JSON")
