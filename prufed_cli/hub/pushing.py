"""Push an artifact: one commit on the head we saw, a comparison of what arrived, one tag."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from prufed_cli.errors import FAILED, INTEGRITY, USAGE, PrufedError
from prufed_cli.hub.connection import check_repository, check_signed_in, connect, hub_errors
from prufed_cli.hub.content import (
    Content,
    check_arrived,
    manifest_at,
    repository_files,
    stale_files,
)
from prufed_cli.hub.places import Place, recall, remember
from prufed_cli.models.base import ADAPTER_KINDS, MODEL_KINDS, base_of
from prufed_cli.packing import pack_artifact
from prufed_cli.progress import SILENT, Reporter

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from prufed_registry import Artifact, Registry


@dataclass(frozen=True)
class PushResult:
    """What a push did.

    Attributes:
        artifact: what was pushed.
        repository: where to.
        tag: the version there.
        commit: the commit's hash.
        url: of the tree at the tag.
        already: whether it was there before and nothing was done.
        base: the push of its base, where that was asked for.
    """

    artifact: Artifact
    repository: str
    tag: str
    commit: str
    url: str
    already: bool
    base: PushResult | None = None


def push(
    reference: str,
    repository: str,
    *,
    private: bool = True,
    with_base: bool = False,
    packed: bool = False,
    registry: Registry | None = None,
    reporter: Reporter = SILENT,
) -> PushResult:
    """Publish an artifact on the Hub, tagged with its version.

    Args:
        reference: the artifact.
        repository: ``owner/name``; created if it does not exist.
        private: whether a repository that is created is private.
        with_base: push an adapter's base too, to ``owner/<name of the base>``, if it is not there.
        packed: send the packed form, which is smaller and which only :func:`prufed_cli.pull` opens.
        registry: where the artifact is; this machine's by default.
        reporter: is told how far it is.

    Raises:
        PrufedError: not signed in, no such artifact, the tag is taken by other content, the base of
            an adapter is not on the Hub, or the Hub cannot be reached.
    """
    from prufed_cli.home import open_registry

    check_repository(repository)
    registry = registry or open_registry()
    artifact = registry.resolve(reference)
    problems = registry.verify([artifact.ref])
    if problems:
        raise PrufedError(
            f"{artifact.ref} is damaged: {problems[0].path} {problems[0].message}",
            f"`prufed verify {artifact.ref}` lists everything",
            INTEGRITY,
        )
    what = f"push {artifact.ref} to {repository}"
    check_signed_in(what)
    api = connect()
    base, place = None, None
    with hub_errors(what):
        if artifact.kind in ADAPTER_KINDS:
            model = base_of(artifact, registry)
            place = _place_of(api, model)
            if place is None and with_base:
                base = _push_base(model, repository, private, packed, registry, reporter)
                place = recall(model, api.endpoint)
            elif place is None:
                raise PrufedError(
                    f"the base of {artifact.ref}, {model.ref}, is not on the Hub",
                    f"`prufed push {artifact.ref} {repository} --with-base` pushes both",
                    USAGE,
                )
        else:
            place = _nearest_ancestor(api, artifact, registry)
        with reporter.task(what):
            api.create_repo(repository, private=private, exist_ok=True)
            return _push(api, registry, artifact, repository, place, base, packed=packed)


def _push_base(
    model: Artifact,
    repository: str,
    private: bool,
    packed: bool,
    registry: Registry,
    reporter: Reporter,
) -> PushResult:
    """Push the base of an adapter to a repository of its own beside the adapter's."""
    target = f"{repository.split('/')[0]}/{model.name}"
    if target == repository:
        raise PrufedError(
            f"{repository} cannot hold both the adapter and its base {model.ref}",
            "push the adapter to a repository of another name",
            USAGE,
        )
    return push(
        model.ref, target, private=private, packed=packed, registry=registry, reporter=reporter
    )


def _push(
    api: HfApi,
    registry: Registry,
    artifact: Artifact,
    repository: str,
    place: Place | None,
    base: PushResult | None,
    *,
    packed: bool,
) -> PushResult:
    """Commit, compare and tag, unless that is all done."""
    tag = f"v{artifact.version}"
    url = f"{api.endpoint}/{repository}/tree/{tag}"
    tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(repository).tags}
    commit = tags.get(tag)
    if commit is not None:
        _check_same(api, registry, artifact, repository, tag)
    else:
        lineage = registry.lineage(artifact.ref)
        with registry.stage() as staging:  # what is packed into it goes with it
            if packed:
                pack_artifact(artifact, staging.path)
            form = staging.path if packed else None
            files = repository_files(artifact, lineage, place, form)
            commit = _commit(api, registry, artifact, repository, files)
            check_arrived(api, repository, commit, artifact, files)
        api.create_tag(repository, tag=tag, revision=commit)
    remember(artifact, Place(api.endpoint, repository, tag, commit))
    return PushResult(artifact, repository, tag, commit, url, already=tag in tags, base=base)


def _check_same(
    api: HfApi, registry: Registry, artifact: Artifact, repository: str, tag: str
) -> None:
    """Refuse a tag that holds something else than the artifact."""
    manifest = manifest_at(api, registry, repository, tag)
    there = str(manifest.get("digest")) if manifest else None
    if there != artifact.digest:
        raise PrufedError(
            f"{repository} has another {tag} ({there[:19] if there else 'not of prufed'}), "
            f"not {artifact.digest[:19]}",
            "push to another repository, or delete the tag there",
            FAILED,
        )


def _place_of(api: HfApi, artifact: Artifact) -> Place | None:
    """Return where an artifact is on the Hub, if what was seen there still is."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    place = recall(artifact, api.endpoint)
    if place is None:
        return None
    try:
        info = api.model_info(place.repository, revision=place.revision)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return None
    return place if info.sha == place.commit else None


def _nearest_ancestor(api: HfApi, artifact: Artifact, registry: Registry) -> Place | None:
    """Return where the nearest model that this one was made from is on the Hub."""
    waiting = deque(registry.lineage(artifact.ref).parents)
    looked_at = set()
    while waiting:
        node = waiting.popleft()
        if node.artifact is None or node.digest in looked_at:
            continue
        looked_at.add(node.digest)
        if node.artifact.kind in MODEL_KINDS and (place := _place_of(api, node.artifact)):
            return place
        waiting += node.parents
    return None


def _commit(
    api: HfApi,
    registry: Registry,
    artifact: Artifact,
    repository: str,
    files: Mapping[str, Content],
) -> str:
    """Make one commit on the head that leaves exactly this version, and return its hash."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    head = str(api.model_info(repository).sha)
    stale = stale_files(api, registry, repository, head, files)
    deletions = [CommitOperationDelete(path) for path in stale]
    with ExitStack() as stack:
        xet = _speaks_xet(api, repository)
        additions = [
            CommitOperationAdd(path, _whole(content) if xet else _opened(content, stack))
            for path, content in sorted(files.items())
        ]
        made = api.create_commit(
            repository,
            [*additions, *deletions],
            commit_message=f"{artifact.ref} ({artifact.digest})",
            parent_commit=head,
        )
    return str(made.oid)


def _speaks_xet(api: HfApi, repository: str) -> bool:
    """Say whether the Hub gives a token for Xet; the client itself does not ask before it starts.

    Where it does not, files given as open objects go over LFS.
    """
    from huggingface_hub import get_session
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    url = f"{api.endpoint}/api/models/{repository}/xet-write-token/main"
    return bool(get_session().get(url, headers=build_hf_headers()).is_success)


def _whole(content: Content) -> str | bytes:
    return content if isinstance(content, bytes) else str(content)


def _opened(content: Content, stack: ExitStack) -> BinaryIO:
    if isinstance(content, Path):
        return stack.enter_context(content.open("rb"))
    return io.BytesIO(content)
