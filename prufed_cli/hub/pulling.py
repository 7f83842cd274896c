"""Pull a repository: what prufed pushed is checked byte for byte, anything else becomes a base."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from prufed_cli.errors import INTEGRITY, USAGE, PrufedError
from prufed_cli.home import home
from prufed_cli.hub.connection import ORIGINALS, check_repository, connect, hub_errors
from prufed_cli.hub.places import Place, remember
from prufed_cli.progress import SILENT, Reporter

if TYPE_CHECKING:
    from prufed_registry import Artifact, Registry

MANIFEST: Final = "prufed.json"
_FOREIGN: Final = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE*")
"""What is fetched of a repository that prufed did not push: never a pickle, never code."""


@dataclass(frozen=True)
class PullResult:
    """What a pull brought.

    Attributes:
        artifact: the version in the registry.
        repository: where from.
        commit: the commit's hash.
        already: whether the same content was here before.
        base: ``(repository, revision)`` of an adapter's base that is not here.
    """

    artifact: Artifact
    repository: str
    commit: str
    already: bool
    base: tuple[str, str | None] | None = None


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
    scratch = home() / "tmp"
    scratch.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="pull-", dir=scratch))
    try:
        with (
            reporter.task(f"fetch {repository}"),
            hub_errors(f"pull {repository}"),
        ):
            commit, endpoint = _fetch(repository, revision, directory)
        base = _base_on_hub(directory)
        _restore_originals(directory)
        known = _known(directory, registry)
        if known is None and base is not None and with_base:
            pull(base[0], revision=base[1], registry=registry, reporter=reporter)
        artifact = known or _take(directory, registry, name or _name(repository, directory))
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    remember(artifact, Place(endpoint, repository, revision or commit))
    missing = base if base is not None and not _base_is_here(artifact, registry) else None
    return PullResult(artifact, repository, commit, known is not None, missing)


def fetch_base(repository: str, registry: Registry) -> Artifact:
    """Return the base a Hub id stands for, ``owner/name`` or ``owner/name@revision``."""
    name, _, revision = repository.partition("@")
    return pull(name, revision=revision or None, registry=registry).artifact


def _fetch(repository: str, revision: str | None, directory: Path) -> tuple[str, str]:
    """Download the repository; return its commit and the Hub's address."""
    api = connect()
    info = api.model_info(repository, revision=revision)
    names = {sibling.rfilename for sibling in info.siblings or []}
    ours = MANIFEST in names
    if not ours and not any(name.endswith(".safetensors") for name in names):
        raise PrufedError(
            f"{repository} has no safetensors weights",
            "pickled checkpoints are never read; convert it to safetensors first",
            USAGE,
        )
    api.snapshot_download(
        repository,
        revision=info.sha,
        local_dir=directory,
        allow_patterns=None if ours else list(_FOREIGN),
        ignore_patterns=[".gitattributes"],
    )
    shutil.rmtree(directory / ".cache", ignore_errors=True)
    return str(info.sha), str(api.endpoint)


def _base_on_hub(directory: Path) -> tuple[str, str | None] | None:
    """Return where an adapter says its base is."""
    config = _json(directory / "adapter_config.json")
    base = config.get("base_model_name_or_path") if config else None
    if not isinstance(base, str) or base.count("/") != 1:
        return None
    return base, config.get("revision") if config else None


def _restore_originals(directory: Path) -> None:
    """Put the published bytes of files back that the Hub has in another form."""
    originals = directory / ORIGINALS
    manifest = _json(directory / MANIFEST)
    if manifest is None:
        return
    stated = manifest.get("files")
    if not isinstance(stated, dict):
        raise PrufedError("its prufed.json is not a manifest", "pull it again", INTEGRITY)
    if originals.is_dir():
        for file in sorted(originals.iterdir()):
            if file.name in stated:
                file.replace(directory / file.name)
        shutil.rmtree(originals)
    for name in ("README.md",):
        if name not in stated:
            (directory / name).unlink(missing_ok=True)


def _known(directory: Path, registry: Registry) -> Artifact | None:
    """Return the artifact of the same content and making, if it is here already."""
    from prufed_registry import fingerprint
    from prufed_registry.transfer import directory_digest

    digest = directory_digest(directory)
    manifest = _json(directory / MANIFEST)
    key = manifest.get("fingerprint") if manifest else None
    wanted = key or fingerprint("base", [], {"command": "import", "digest": digest})
    found = registry.find(str(wanted))
    return found if found is not None and found.digest == digest else None


def _take(directory: Path, registry: Registry, name: str | None) -> Artifact:
    return registry.import_directory(directory, name=name, kind="base")


def _name(repository: str, directory: Path) -> str | None:
    """Return a name for a foreign repository; ours says its own."""
    from prufed_cli.models.base import slug

    return None if (directory / MANIFEST).is_file() else slug(repository.split("/")[1])


def _base_is_here(artifact: Artifact, registry: Registry) -> bool:
    from prufed_registry.errors import NotFound

    parent = artifact.parents[0] if artifact.parents else None
    if parent is None:
        return True
    here = {each.digest for each in registry.list()}
    try:
        registry.resolve(parent.ref)
    except NotFound:
        return parent.digest in here
    return True


def _json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise PrufedError(f"{path.name} is not JSON", "pull it again", INTEGRITY) from error
    return content if isinstance(content, dict) else None
