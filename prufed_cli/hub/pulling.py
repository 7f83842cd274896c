"""Pull a repository: what prufed pushed is checked byte for byte, anything else becomes a base."""

from __future__ import annotations

import glob
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Final

from prufed_cli.errors import INTEGRITY, USAGE, PrufedError
from prufed_cli.hub.connection import (
    MANIFEST,
    ORIGINALS,
    check_repository,
    connect,
    hub_errors,
)
from prufed_cli.hub.places import Place, remember, seen
from prufed_cli.models.base import ADAPTER_KINDS, slug
from prufed_cli.packing import PACKED, is_packed, restore_packed
from prufed_cli.progress import SILENT, Reporter

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoSibling

    from prufed_registry import Artifact, Manifest, Registry

_FOREIGN: Final = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE*")
"""What is fetched of a repository that prufed did not push: never a pickle, never code."""

_DUPLICATES: Final = ("consolidated*",)
"""The same weights in a layout that transformers does not read."""


_AGAIN: Final = "pull it again, or ask its owner to push it again"


@dataclass(frozen=True)
class BasePlace:
    """Where an adapter says that its base is, and what it must be."""

    repository: str
    revision: str | None
    digest: str


@dataclass(frozen=True)
class PullResult:
    """What a pull brought.

    Attributes:
        artifact: the version in the registry.
        repository: where from.
        commit: the commit's hash.
        already: whether the same content was here before.
        missing_base: where an adapter's base is that is not here.
    """

    artifact: Artifact
    repository: str
    commit: str
    already: bool
    missing_base: BasePlace | None = None


@dataclass(frozen=True)
class _Snapshot:
    """A repository at one commit on disk; the manifest is None if prufed did not push it."""

    directory: Path
    repository: str
    commit: str
    manifest: Manifest | None


def pull(
    repository: str,
    *,
    revision: str | None = None,
    name: str | None = None,
    with_base: bool = False,
    registry: Registry | None = None,
    reporter: Reporter = SILENT,
) -> PullResult:
    """Fetch a repository into the registry.

    Args:
        repository: ``owner/name``.
        revision: tag, branch or commit; the newest by default.
        name: of the artifact; the one it was published under, or the repository's, by default.
        with_base: pull the base of an adapter first, if it is not here.
        registry: where it goes; this machine's by default.
        reporter: is told how far it is.

    Raises:
        PrufedError: there is no such repository or revision, or its bytes are not what its
            manifest says.
    """
    from prufed_cli.home import open_registry

    check_repository(repository)
    registry = registry or open_registry()
    what = f"pull {repository}" + (f" at {revision}" if revision else "")
    # A staging directory goes with a pull that fails, and with gc if the pull is killed.
    with registry.stage() as staging, hub_errors(what):
        api = connect()
        with reporter.task(f"fetch {repository}"):
            snapshot = _fetch(api, registry, repository, revision, staging.path)
        missing = _missing_base(snapshot, registry)
        if missing is not None and with_base:
            _pull_base(missing, registry, reporter)
            missing = None
        _restore_originals(snapshot)
        _restore_packed(snapshot, reporter)
        known = _known(snapshot, registry)
        artifact = known or _take(snapshot, registry, name)
    tag = revision if snapshot.manifest and re.fullmatch(r"v\d+", revision or "") else None
    place = Place(api.endpoint, repository, tag or snapshot.commit, snapshot.commit)
    remember(artifact, place)
    return PullResult(artifact, repository, snapshot.commit, known is not None, missing)


def fetch_base(repository: str, registry: Registry) -> Artifact:
    """Return the base a Hub id stands for, ``owner/name`` or ``owner/name@revision``.

    A commit that was pulled before, and is still here, is not fetched again.
    """
    name, _, revision = repository.partition("@")
    check_repository(name)
    with hub_errors(f"pull {repository}"):
        api = connect()
        commit = api.model_info(name, revision=revision or None).sha
        here = seen(registry, api.endpoint, name, str(commit))
    return here or pull(name, revision=revision or None, registry=registry).artifact


def _fetch(
    api: HfApi, registry: Registry, repository: str, revision: str | None, directory: Path
) -> _Snapshot:
    """Download what is wanted of a repository."""
    info = api.model_info(repository, revision=revision, files_metadata=True)
    siblings, commit = info.siblings or [], str(info.sha)
    names = [sibling.rfilename for sibling in siblings]
    _check_names(repository, names)
    manifest = None
    if MANIFEST in names:
        manifest = _fetch_manifest(api, registry, repository, commit)
        wanted = [
            each
            for each in names
            if each.removeprefix(PACKED) in manifest.files or each.startswith(ORIGINALS)
        ]
        wanted.append(MANIFEST)
    else:
        wanted = _foreign_files(repository, names)
    api.snapshot_download(
        repository,
        revision=commit,
        local_dir=directory,
        allow_patterns=[glob.escape(each) for each in wanted],
    )
    shutil.rmtree(directory / ".cache", ignore_errors=True)
    _check_large_files(repository, directory, siblings)
    return _Snapshot(directory, repository, commit, manifest)


def _check_names(repository: str, names: Sequence[str]) -> None:
    """Refuse a listing that names a place outside the directory it is fetched into."""
    from prufed_registry.names import is_safe_path

    for name in names:
        if not is_safe_path(name):
            raise PrufedError(
                f"{repository} lists {name!r}, which does not stay inside a directory",
                "do not use this repository",
                INTEGRITY,
            )


def _fetch_manifest(api: HfApi, registry: Registry, repository: str, commit: str) -> Manifest:
    """Return the manifest of what prufed pushed.

    It is fetched apart: into a directory that holds something, the client takes what is there for
    the snapshot if the listing fails.
    """
    from prufed_registry.digests import read_payload
    from prufed_registry.errors import Damaged
    from prufed_registry.manifest import parse_manifest

    with registry.stage() as staging:
        api.hf_hub_download(repository, MANIFEST, revision=commit, local_dir=staging.path)
        try:
            return parse_manifest(read_payload(staging.path, repository), repository)
        except Damaged as error:
            raise PrufedError(error.message, _AGAIN, INTEGRITY) from error


def _foreign_files(repository: str, names: Sequence[str]) -> list[str]:
    """Return what to fetch of a repository that prufed did not push."""
    top = [name for name in names if "/" not in name and not _fits(name, _DUPLICATES)]
    if not any(name.endswith(".safetensors") for name in top):
        raise PrufedError(
            f"{repository} has no safetensors weights",
            "pickled checkpoints are never read; convert it to safetensors first",
            USAGE,
        )
    if "config.json" not in top:
        kind = "an adapter that prufed did not push" if "adapter_config.json" in top else "no model"
        raise PrufedError(
            f"{repository} is {kind}: it has no config.json",
            "pull the repository of a transformers model",
            USAGE,
        )
    return [name for name in top if _fits(name, _FOREIGN)]


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _check_large_files(repository: str, directory: Path, siblings: Sequence[RepoSibling]) -> None:
    """Compare what came from the large-file storage with the hashes the repository states."""
    from prufed_registry.durable import hash_file

    for sibling in siblings:
        path = directory / sibling.rfilename
        if sibling.lfs and path.is_file() and hash_file(path) != sibling.lfs.sha256:
            raise PrufedError(
                f"{sibling.rfilename} of {repository} is not what the repository says",
                _AGAIN,
                INTEGRITY,
            )


def _missing_base(snapshot: _Snapshot, registry: Registry) -> BasePlace | None:
    """Return where an adapter's base is, if that is not here."""
    manifest = snapshot.manifest
    if manifest is None or manifest.kind not in ADAPTER_KINDS or not manifest.parents:
        return None
    digest = manifest.parents[0].digest
    if any(each.digest == digest for each in registry.list()):
        return None
    try:
        text = (snapshot.directory / "adapter_config.json").read_text(encoding="utf-8")
        config = json.loads(text)
        repository, revision = str(config["base_model_name_or_path"]), config.get("revision")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # the comparison with the manifest says what is wrong with the file
    return BasePlace(repository, str(revision) if revision else None, digest)


def _pull_base(base: BasePlace, registry: Registry, reporter: Reporter) -> None:
    """Pull an adapter's base, and refuse one that the adapter was not trained on."""
    pulled = pull(base.repository, revision=base.revision, registry=registry, reporter=reporter)
    if pulled.artifact.digest != base.digest:
        raise PrufedError(
            f"{base.repository} holds {pulled.artifact.digest[:19]}, "
            f"but the adapter was trained on {base.digest[:19]}",
            "ask the adapter's owner where its base is",
            INTEGRITY,
        )


def _restore_originals(snapshot: _Snapshot) -> None:
    """Put the published bytes of files back that the Hub has in another form."""
    originals = snapshot.directory / ORIGINALS
    if snapshot.manifest is None or not originals.is_dir():
        return
    for file in sorted(originals.iterdir()):
        if file.name in snapshot.manifest.files and file.is_file():
            file.replace(snapshot.directory / file.name)
    shutil.rmtree(originals)


def _restore_packed(snapshot: _Snapshot, reporter: Reporter) -> None:
    """Unpack what was pushed in the packed form."""
    directory, manifest = snapshot.directory, snapshot.manifest
    if manifest is not None and is_packed(directory):
        restore_packed(directory, directory, manifest, reporter)
        shutil.rmtree(directory / PACKED)


def _known(snapshot: _Snapshot, registry: Registry) -> Artifact | None:
    """Return the artifact of the same content and making, if it is here already."""
    from prufed_registry.transfer import directory_digest, import_fingerprint

    manifest = snapshot.manifest
    if manifest is None:
        digest = directory_digest(snapshot.directory)
        made = import_fingerprint(digest)
    else:
        _check_content(snapshot, manifest)
        digest, made = manifest.digest, manifest.fingerprint
    found = registry.find(made)
    return found if found is not None and found.digest == digest else None


def _check_content(snapshot: _Snapshot, manifest: Manifest) -> None:
    from prufed_registry.durable import hash_file

    for path, entry in manifest.files.items():
        file = snapshot.directory / path
        if not file.is_file() or hash_file(file) != entry.sha256:
            raise PrufedError(
                f"{path} of {snapshot.repository} is not what its manifest says",
                _AGAIN,
                INTEGRITY,
            )


def _take(snapshot: _Snapshot, registry: Registry, name: str | None) -> Artifact:
    """Publish what was fetched; a foreign base records where it is from."""
    if snapshot.manifest is None:
        name = name or slug(snapshot.repository.split("/")[1])
    source = f"{snapshot.repository}@{snapshot.commit}"
    return registry.import_directory(
        snapshot.directory, name=name, kind="base", source=source, move=True
    )
