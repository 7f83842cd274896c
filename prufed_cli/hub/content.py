"""What a repository on the Hub holds: an artifact's files, two of them in the Hub's own form.

In the packed form, ``prufed-packed/`` holds the weights and masks in place of the plain files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prufed_cli.errors import INTEGRITY, PrufedError
from prufed_cli.hub.card import model_card
from prufed_cli.hub.connection import MANIFEST, ORIGINALS
from prufed_cli.packing.directories import PACKED, to_be_packed
from prufed_registry.durable import hash_file

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoSibling

    from prufed_cli.hub.places import Place
    from prufed_registry import Artifact, Lineage, Registry

Content = Path | bytes


def repository_files(
    artifact: Artifact, lineage: Lineage, base: Place | None, packed: Path | None = None
) -> dict[str, Content]:
    """Return what a repository shall hold, by path.

    The model card gets the metadata that the Hub reads, and an adapter names its base by
    repository and revision; the published bytes of both lie under :data:`ORIGINALS`.

    Args:
        artifact: what is pushed.
        lineage: of the artifact, for the card.
        base: where the model it was made from is on the Hub, if it is there.
        packed: the directory that holds its packed files; None for the plain form.
    """
    files: dict[str, Content] = {
        path: artifact.path / path for path in (*artifact.manifest.files, MANIFEST)
    }
    if packed is not None:
        for path in to_be_packed(artifact.manifest.files):
            del files[path]
            files[PACKED + path] = packed / PACKED / path
    card = model_card(lineage, artifact, base, packed=packed is not None)
    replaced: dict[str, bytes] = {"README.md": card.encode()}
    if "adapter_config.json" in files and base is not None:
        config = json.loads((artifact.path / "adapter_config.json").read_text(encoding="utf-8"))
        config |= {"base_model_name_or_path": base.repository, "revision": base.revision}
        replaced["adapter_config.json"] = (json.dumps(config, indent=2) + "\n").encode()
    for path, content in replaced.items():
        if path in files:
            files[ORIGINALS + path] = files[path]
        files[path] = content
    return files


def manifest_at(
    api: HfApi, registry: Registry, repository: str, revision: str
) -> dict[str, Any] | None:
    """Return the manifest at a revision, unchecked; None if there is none that can be read.

    It passes through a staging directory of the registry.
    """
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    with registry.stage() as staging:
        try:
            path = api.hf_hub_download(
                repository, MANIFEST, revision=revision, local_dir=staging.path
            )
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            return None
        try:
            stated = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError:
            return None
    return stated if isinstance(stated, dict) else None


def stale_files(
    api: HfApi, registry: Registry, repository: str, head: str, files: Mapping[str, Content]
) -> list[str]:
    """Return what an earlier version left at ``head`` and this one does not have.

    Files that prufed did not put there stay.
    """
    earlier = manifest_at(api, registry, repository, head)
    stated = earlier.get("files") if earlier else None
    if not isinstance(stated, dict):
        return []
    present = api.list_repo_files(repository, revision=head)
    ours = {path for path in present if path in stated or path.startswith((ORIGINALS, PACKED))}
    return sorted(ours - files.keys())


def check_arrived(
    api: HfApi, repository: str, commit: str, artifact: Artifact, files: Mapping[str, Content]
) -> None:
    """Compare every file at a commit with what was sent: SHA-256, or git's hash of small ones.

    Raises:
        PrufedError: a file is not there, or is another one.
    """
    info = api.model_info(repository, revision=commit, files_metadata=True)
    arrived = {sibling.rfilename: sibling for sibling in info.siblings or []}
    for path, content in files.items():
        entry = artifact.manifest.files.get(path) if isinstance(content, Path) else None
        sha256 = entry.sha256 if entry else None
        if path not in arrived or not _is_same(arrived[path], content, sha256):
            raise PrufedError(
                f"{path} did not arrive whole in {repository}",
                "run it again; nothing was tagged",
                INTEGRITY,
            )


def _is_same(stored: RepoSibling, content: Content, sha256: str | None) -> bool:
    if stored.lfs is not None:
        return stored.lfs.sha256 == (sha256 or _sha256(content))
    data = _bytes(content)
    return stored.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _sha256(content: Content) -> str:
    if isinstance(content, Path):
        return hash_file(content)
    return hashlib.sha256(content).hexdigest()


def _bytes(content: Content) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()
