"""Push an artifact: one commit on the head we saw, one tag, and a comparison of what arrived."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from prufed_cli.errors import FAILED, INTEGRITY, USAGE, PrufedError
from prufed_cli.hub.card import model_card
from prufed_cli.hub.connection import ORIGINALS, check_repository, connect, hub_errors
from prufed_cli.hub.places import Place, recall, remember
from prufed_cli.models.base import ADAPTER_KINDS, base_of
from prufed_cli.progress import SILENT, Reporter

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from prufed_registry import Artifact, Registry

MANIFEST: Final = "prufed.json"
_KEPT: Final = frozenset({".gitattributes"})

Content = Path | bytes


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
    registry: Registry | None = None,
    reporter: Reporter = SILENT,
) -> PushResult:
    """Publish an artifact on the Hub, tagged with its version.

    Args:
        reference: the artifact.
        repository: ``owner/name``; created if it does not exist.
        private: whether a repository that is created is private.
        with_base: push an adapter's base too, to ``owner/<name of the base>``, if it is not there.
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
    api = connect()
    with hub_errors(f"push {artifact.ref} to {repository}"):
        base, place = _base_place(api, artifact, repository, private, with_base, registry, reporter)
        with reporter.task(f"push {artifact.ref} to {repository}"):
            return _push(api, artifact, repository, private, place, base)


def _push(
    api: HfApi,
    artifact: Artifact,
    repository: str,
    private: bool,
    base_place: Place | None,
    base: PushResult | None,
) -> PushResult:
    tag = f"v{artifact.version}"
    api.create_repo(repository, private=private, exist_ok=True)
    url = f"{api.endpoint}/{repository}/tree/{tag}"
    there = _digest_at(api, repository, tag)
    if there is not None and there != artifact.digest:
        raise PrufedError(
            f"{repository} has another {tag} ({there[:19]})",
            "push to another repository, or delete the tag there",
            FAILED,
        )
    if there is not None:
        commit = str(api.model_info(repository, revision=tag).sha)
        remember(artifact, Place(api.endpoint, repository, tag))
        return PushResult(artifact, repository, tag, commit, url, already=True, base=base)
    head = api.model_info(repository).sha
    files = repository_files(artifact, base_place)
    commit = _commit(api, repository, files, artifact, head)
    api.create_tag(repository, tag=tag, revision=commit, exist_ok=False)
    _compare(api, repository, tag, artifact)
    remember(artifact, Place(api.endpoint, repository, tag))
    return PushResult(artifact, repository, tag, commit, url, already=False, base=base)


def _base_place(
    api: HfApi,
    artifact: Artifact,
    repository: str,
    private: bool,
    with_base: bool,
    registry: Registry,
    reporter: Reporter,
) -> tuple[PushResult | None, Place | None]:
    """Return where the base of an adapter, or of a sub-model, is on the Hub; push it if asked."""
    if artifact.kind in ADAPTER_KINDS:
        base = base_of(artifact, registry)
    elif artifact.parents:
        base = registry.resolve(artifact.parents[0].ref)
        return None, recall(base, api.endpoint)
    else:
        return None, None
    place = recall(base, api.endpoint)
    if place is not None and _exists(api, place):
        return None, place
    if not with_base:
        raise PrufedError(
            f"the base of {artifact.ref}, {base.ref}, is not on the Hub",
            f"`prufed push {artifact.ref} {repository} --with-base` pushes both",
            USAGE,
        )
    owner = repository.split("/")[0]
    pushed = push(
        base.ref, f"{owner}/{base.name}", private=private, registry=registry, reporter=reporter
    )
    return pushed, Place(api.endpoint, pushed.repository, pushed.tag)


def _exists(api: HfApi, place: Place) -> bool:
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        api.model_info(place.repository, revision=place.revision)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return False
    return True


def _digest_at(api: HfApi, repository: str, tag: str) -> str | None:
    """Return the artifact digest stated at a tag; None if there is no such tag."""
    if tag not in {ref.name for ref in api.list_repo_refs(repository).tags}:
        return None
    from huggingface_hub.errors import EntryNotFoundError

    try:
        path = api.hf_hub_download(repository, MANIFEST, revision=tag)
    except EntryNotFoundError:
        return "an unknown digest"
    stated = json.loads(Path(path).read_text(encoding="utf-8"))
    return str(stated.get("digest", "an unknown digest"))


def repository_files(artifact: Artifact, base: Place | None) -> dict[str, Content]:
    """Return what a repository holds: the artifact's files, two of them in the Hub's own form.

    The model card gets the metadata that the Hub reads, and an adapter names its base by
    repository and revision; the published bytes of both lie under :data:`ORIGINALS`.
    """
    files: dict[str, Content] = {
        path: artifact.path / path for path in (*artifact.manifest.files, MANIFEST)
    }
    replaced: dict[str, bytes] = {"README.md": model_card(artifact, base).encode()}
    if "adapter_config.json" in files and base is not None:
        config = json.loads((artifact.path / "adapter_config.json").read_text(encoding="utf-8"))
        config |= {"base_model_name_or_path": base.repository, "revision": base.revision}
        replaced["adapter_config.json"] = (json.dumps(config, indent=2) + "\n").encode()
    for path, content in replaced.items():
        if path in files:
            files[ORIGINALS + path] = files[path]
        files[path] = content
    return files


def _commit(
    api: HfApi,
    repository: str,
    files: Mapping[str, Content],
    artifact: Artifact,
    head: str | None,
) -> str:
    """Make one commit on ``head`` that leaves exactly these files, and return its hash."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.errors import HfHubHTTPError

    present = set(api.list_repo_files(repository, revision=head))
    stale = sorted(present - files.keys() - _KEPT)
    deletions = [CommitOperationDelete(path_in_repo=path) for path in stale]

    def send(additions: list[CommitOperationAdd]) -> str:
        made = api.create_commit(
            repository,
            [*additions, *deletions],
            commit_message=f"{artifact.ref} ({artifact.digest})",
            parent_commit=head,
        )
        return str(made.oid)

    try:
        return send([CommitOperationAdd(path, _plain(files[path])) for path in sorted(files)])
    except HfHubHTTPError as error:
        if "xet-write-token" not in str(getattr(error.response, "url", "")):
            raise
    # This Hub does not speak Xet. Files given as open objects go over LFS.
    with ExitStack() as stack:
        opened = {
            path: content if isinstance(content, bytes) else stack.enter_context(content.open("rb"))
            for path, content in files.items()
        }
        return send([CommitOperationAdd(path, opened[path]) for path in sorted(opened)])


def _plain(content: Content) -> str | bytes:
    return content if isinstance(content, bytes) else str(content)


def _compare(api: HfApi, repository: str, tag: str, artifact: Artifact) -> None:
    """Compare the large files' SHA-256 and every file's size with the manifest."""
    info = api.model_info(repository, revision=tag, files_metadata=True)
    arrived = {sibling.rfilename: sibling for sibling in info.siblings or []}
    for path, entry in artifact.manifest.files.items():
        stored = arrived.get(ORIGINALS + path) or arrived.get(path)
        if stored is None:
            raise PrufedError(f"{path} did not arrive in {repository}", "push again", INTEGRITY)
        if stored.lfs is not None and stored.lfs.sha256 != entry.sha256:
            raise PrufedError(
                f"{path} arrived in {repository} with another SHA-256", "push again", INTEGRITY
            )
        if stored.size is not None and stored.size != entry.size:
            raise PrufedError(
                f"{path} arrived in {repository} with {stored.size} bytes, not {entry.size}",
                "push again",
                INTEGRITY,
            )
