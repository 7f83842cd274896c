"""Artifacts into and out of the registry as plain directories."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from prufed_registry import names
from prufed_registry.artifact import Artifact
from prufed_registry.digests import MANIFEST, FileEntry, content_digest, fingerprint, read_payload
from prufed_registry.durable import hash_file, storage_errors
from prufed_registry.errors import Damaged, InvalidRequest, NotFound
from prufed_registry.manifest import Manifest, parse_manifest
from prufed_registry.outside import new_directory
from prufed_registry.staging import regular_files
from prufed_registry.weights import check_no_pickle, check_readable

if TYPE_CHECKING:
    from prufed_registry.store import Registry

ADAPTER_CONFIG = "adapter_config.json"
_SHARDS = "model.safetensors.index.json"
_BASE = re.compile(r'("base_model_name_or_path"\s*:\s*)(?:"(?:[^"\\]|\\.)*"|null)')


def rewrite_base(config: str, base: str) -> str:
    """Return the text of an ``adapter_config.json`` with another base model named in it.

    Only that one value changes, so writing the old value back restores the old bytes.

    Args:
        config: the file's text.
        base: a path, a reference or a Hub id.

    Raises:
        InvalidRequest: the configuration names no base model.
    """
    rewritten, count = _BASE.subn(lambda match: match[1] + json.dumps(base), config, count=1)
    if not count:
        raise InvalidRequest(
            f"{ADAPTER_CONFIG} has no base_model_name_or_path", "save the adapter with PEFT again"
        )
    return rewritten


def export(
    artifact: Artifact, directory: Path, base: str | None, leave_out: Collection[str]
) -> Path:
    """Copy an artifact's files, checked against the manifest, to a new directory.

    Raises:
        InvalidRequest: the directory holds something.
        Damaged: the artifact's bytes are not what was published.
    """
    with (
        storage_errors(f"export {artifact.ref}", outside=True),
        new_directory(directory) as partial,
    ):
        copied = [path for path in artifact.manifest.files if path not in leave_out]
        _copy(artifact.path, partial, [*copied, MANIFEST])
        _check_copy(artifact, copied, partial)
        config = partial / ADAPTER_CONFIG
        if base is not None and config.exists():
            config.write_text(rewrite_base(config.read_text("utf-8"), base), "utf-8")
    return directory.absolute()


def directory_digest(directory: Path) -> str:
    """Return the digest that `directory` would have as an artifact, without copying it."""
    entries = {
        path: FileEntry(hash_file(directory / path), (directory / path).stat().st_size)
        for path in _content(directory)
    }
    return content_digest(entries)


def find_imported(registry: Registry, directory: Path, kind: str) -> Artifact | None:
    """Return the artifact that `directory` was imported as before, None where there is none.

    Its files are hashed only where an artifact has as many bytes.
    """
    size = sum((directory / path).stat().st_size for path in _content(directory))
    if all(artifact.size != size for artifact in registry.list(kind=kind)):
        return None
    return registry.find(import_fingerprint(directory_digest(directory), kind), kind=kind)


def import_fingerprint(digest: str, kind: str = "base") -> str:
    """Return the fingerprint of what came from outside: its content is its recipe."""
    return fingerprint(kind, [], _import_recipe(digest))


def _import_recipe(digest: str) -> dict[str, str]:
    return {"command": "import", "digest": digest}


def _content(directory: Path) -> list[str]:
    """Return the files of a directory that make it up as an artifact."""
    found = regular_files(directory)
    return [path for path in found if not _is_hidden(path) and path != MANIFEST]


def import_directory(
    registry: Registry,
    directory: Path,
    name: str | None,
    kind: str,
    source: str | None,
    *,
    move: bool,
) -> Artifact:
    """Publish a copy of a directory; see `Registry.import_directory`."""
    if not directory.exists():
        raise NotFound(f"there is no directory {directory}", "check the path")
    if not directory.is_dir():
        raise InvalidRequest(f"{directory} is not a directory", "give a model's directory")
    if (directory / MANIFEST).exists():
        return _import_published(registry, directory, name, move=move)
    source = source or directory.resolve().name
    return _import_model(registry, directory, name, kind, source, move=move)


def _import_model(
    registry: Registry, directory: Path, name: str | None, kind: str, source: str, *, move: bool
) -> Artifact:
    names.check_kind(kind)
    name = _name_or_slug(name, directory.resolve().name)
    found = [path for path in regular_files(directory) if not _is_hidden(path)]
    for path in found:
        check_no_pickle(path)
    _check_configuration(directory, kind)
    _check_weights(directory, kind, found)
    with registry.stage() as staging:
        with storage_errors(f"import {directory}"):
            _copy(directory, staging.path, found, move=move)
            digest = content_digest(staging.seal())
        known = _known(registry, name, digest, import_fingerprint(digest, kind))
        return known or staging.publish(
            name, kind, recipe=_import_recipe(digest), details={"source": names.readable(source)}
        )


def _import_published(
    registry: Registry, directory: Path, name: str | None, *, move: bool
) -> Artifact:
    manifest = foreign_manifest(directory)
    present = set(regular_files(directory))
    for path in manifest.files:
        check_no_pickle(path)
        if path not in present:
            raise Damaged(f"{path!r} is missing from {directory}", "fetch the directory again")
    with registry.stage() as staging:
        with storage_errors(f"import {directory}"):
            _copy(directory, staging.path, manifest.files, move=move)
            _restore_base(staging.path, manifest)
            sealed = staging.seal()
        for path, entry in manifest.files.items():
            if sealed[path] != entry:
                raise Damaged(
                    f"{path!r} in {directory} is not what its manifest says",
                    f"fetch the directory again, or delete {MANIFEST} to import it as it stands",
                )
        name = manifest.name if name is None else name
        known = _known(registry, name, manifest.digest, manifest.fingerprint)
        return known or staging.publish(
            name,
            manifest.kind,
            parents=manifest.parents,
            recipe=manifest.recipe,
            environment=manifest.environment,
            metrics=manifest.metrics,
            details=manifest.details,
        )


def _known(registry: Registry, name: str, digest: str, made: str) -> Artifact | None:
    """Return the newest sound version of a name that has this content and this fingerprint."""
    names.check_name(name)
    same = [one for one in registry.list(name) if (one.digest, one.fingerprint) == (digest, made)]
    return next((one for one in reversed(same) if not registry.verify([one.ref])), None)


def _name_or_slug(name: str | None, source: str) -> str:
    """Return `name`, checked, or one made of the source directory's name."""
    if name is None:
        return names.slug(source)
    names.check_name(name)
    return name


def foreign_manifest(directory: Path) -> Manifest:
    """Return the manifest in a directory outside the registry.

    Raises:
        Damaged: it is missing, or not what was written.
    """
    try:
        return parse_manifest(read_payload(directory, str(directory)), str(directory))
    except Damaged as error:
        raise Damaged(
            error.message,
            f"fetch the directory again, or delete {MANIFEST} to import it as it stands",
        ) from error


def _restore_base(staged: Path, manifest: Manifest) -> None:
    """Undo what export and push do to an adapter: name the base as the manifest's bytes did."""
    config, entry = staged / ADAPTER_CONFIG, manifest.files.get(ADAPTER_CONFIG)
    if entry is None or hash_file(config) == entry.sha256:
        return
    text = config.read_text("utf-8", errors="replace")
    for parent in manifest.parents:
        if not _BASE.search(text):
            return
        config.write_text(rewrite_base(text, parent.ref), "utf-8")
        if hash_file(config) == entry.sha256:
            return


def _check_configuration(directory: Path, kind: str) -> None:
    is_adapter = kind in names.ADAPTER_KINDS
    required = ADAPTER_CONFIG if is_adapter else "config.json"
    path = directory / required
    if not path.exists():
        other = directory / ("config.json" if is_adapter else ADAPTER_CONFIG)
        hint = "give the directory that save_pretrained wrote"
        if other.exists():
            hint = f"it holds {other.name}: give its kind, one of {', '.join(names.KINDS)}"
        raise InvalidRequest(f"{directory} has no {required}", hint)
    _read_object(path)
    for config in _configurations(directory):
        _check_not_sparse(directory, config)


def _configurations(directory: Path) -> list[dict[str, object]]:
    """Return a model's configuration, and that of the text model in it; nothing of an adapter."""
    path = directory / "config.json"
    config = _read_object(path) if path.exists() else {}
    text = config.get("text_config")
    return [config, text] if isinstance(text, dict) else [config]


def _check_not_sparse(directory: Path, config: dict[str, object]) -> None:
    """Refuse weights in a sparse format: transformers finds none of them and draws random ones.

    compressed-tensors writes such a checkpoint and says so in ``sparsity_config``, on its own or in
    the configuration of a quantization.
    """
    for stated in (config, config.get("compression_config"), config.get("quantization_config")):
        sparsity = stated.get("sparsity_config") if isinstance(stated, dict) else None
        form = sparsity.get("format") if isinstance(sparsity, dict) else None
        if form not in (None, "dense"):
            raise InvalidRequest(
                f"{directory} holds its weights in the sparse format {form!r}, which transformers "
                "would pass over and replace with random ones",
                "decompress it with the tool that wrote it, and import what save_pretrained writes",
            )


def _check_weights(directory: Path, kind: str, found: Iterable[str]) -> None:
    expected = {path for path in found if path.endswith(".safetensors")}
    if kind in names.ADAPTER_KINDS:
        expected &= {"adapter_model.safetensors"}
    if not expected:
        raise InvalidRequest(
            f"{directory} has no safetensors weights", "save the model with save_pretrained"
        )
    if (directory / _SHARDS).exists():
        weights = _read_object(directory / _SHARDS).get("weight_map")
        shards = set(weights.values()) if isinstance(weights, dict) else set()
        if missing := sorted(str(shard) for shard in shards if shard not in expected):
            raise Damaged(f"{directory} lacks the shard {missing[0]!r}", "fetch it again")
    quantized = any(each.get("quantization_config") for each in _configurations(directory))
    for path in sorted(expected):
        check_readable(directory / path, quantized=quantized)


def _read_object(path: Path) -> dict[str, object]:
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise Damaged(f"{path} is not JSON: {error}", "fetch it again") from error
    if not isinstance(value, dict):
        raise Damaged(f"{path} is not a JSON object", "fetch it again")
    return value


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def _copy(source: Path, target: Path, paths: Iterable[str], *, move: bool = False) -> None:
    for path in paths:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        if move:
            (source / path).rename(target / path)
            continue
        shutil.copyfile(source / path, target / path, follow_symlinks=False)


def _check_copy(artifact: Artifact, paths: Iterable[str], copy: Path) -> None:
    for path in paths:
        if hash_file(copy / path) != artifact.manifest.files[path].sha256:
            raise Damaged(
                f"{path!r} of {artifact.ref} has changed since it was published",
                f"run 'prufed verify {artifact.ref}'",
            )
