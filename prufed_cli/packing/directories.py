"""Pack an artifact's directory and restore it.

A packed directory holds the artifact's files as they are, manifest included, but for its weights
and masks: of ``model.safetensors`` there is ``prufed-packed/model.safetensors``. So nothing in it
can be taken for a model, and what it must become again is what ``prufed.json`` says.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from prufed_cli.disk import check_room
from prufed_cli.errors import INTEGRITY, USAGE, PrufedError
from prufed_cli.progress import SILENT, Reporter
from prufed_plugins.api import MASKS_FILE

if TYPE_CHECKING:
    from torch import Tensor

    from prufed_registry import Artifact, Manifest

PACKED: Final = "prufed-packed/"
"""Where in a packed directory the packed files are."""

_SUFFIX: Final = ".safetensors"


@dataclass(frozen=True)
class Sizes:
    """Bytes of an artifact's safetensors files, as they are and packed."""

    plain: int
    packed: int


def is_packed(directory: Path) -> bool:
    """Say whether a directory is the packed form of an artifact."""
    return (directory / PACKED).is_dir()


def refuse_packed(directory: Path) -> None:
    """Refuse a packed directory where a model is expected.

    Raises:
        PrufedError: it is one.
    """
    if is_packed(directory):
        raise PrufedError(
            f"{directory} is packed and cannot be opened as a model",
            f"import it first: `prufed import {directory}` restores it",
            USAGE,
        )


def to_be_packed(paths: Iterable[str]) -> list[str]:
    """Return which of an artifact's files are packed, the masks first: the weights need them."""
    chosen = [path for path in paths if path.endswith(_SUFFIX)]
    return sorted(chosen, key=lambda path: (path != MASKS_FILE, path))


def pack_artifact(artifact: Artifact, directory: Path, reporter: Reporter = SILENT) -> Sizes:
    """Write the packed form of an artifact's safetensors files into ``directory``.

    Args:
        artifact: a version in the registry.
        directory: gets ``prufed-packed/``; the other files are the caller's.
        reporter: is told how far it is.

    Raises:
        PrufedError: a file is not what the artifact's manifest says.
    """
    from prufed_cli.packing.files import pack_file

    plain = packed = 0
    files = artifact.manifest.files
    chosen = to_be_packed(files)
    masks = _masks(artifact.path) if MASKS_FILE in files else {}
    with _mask_errors(), reporter.task(f"pack {artifact.ref}", total=len(chosen)) as task:
        for path in chosen:
            target = directory / PACKED / path
            target.parent.mkdir(parents=True, exist_ok=True)
            own = {} if path == MASKS_FILE else masks
            made = pack_file(artifact.path / path, target, own)
            if made.sha256 != files[path].sha256:
                raise PrufedError(
                    f"{path} of {artifact.ref} has changed since it was published",
                    f"`prufed verify {artifact.ref}` lists everything",
                    INTEGRITY,
                )
            plain += made.size
            packed += target.stat().st_size
            task.advance()
    return Sizes(plain, packed)


def unpack_artifact(directory: Path, target: Path, reporter: Reporter = SILENT) -> None:
    """Write the files of a packed artifact as they were published, manifest included.

    Args:
        directory: a packed directory; it stays as it is.
        target: an empty directory.
        reporter: is told how far it is.

    Raises:
        PrufedError: a file is missing, damaged, or not what the manifest says.
        RegistryError: the manifest is damaged, or there is a link in the directory.
    """
    from prufed_registry.digests import MANIFEST
    from prufed_registry.staging import regular_files
    from prufed_registry.transfer import ADAPTER_CONFIG, foreign_manifest

    manifest = foreign_manifest(directory)
    present = set(regular_files(directory))
    for path in (MANIFEST, *manifest.files):
        if PACKED + path in present:
            continue
        if path not in present:
            raise PrufedError(
                f"{path} is missing from {directory}", "fetch the directory again", INTEGRITY
            )
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(directory / path, target / path)
        # an exported adapter names another base than its manifest knows; importing undoes that
        if path not in {MANIFEST, ADAPTER_CONFIG}:
            _check_copied(directory, target, path, manifest)
    restore_packed(directory, target, manifest, reporter)


def _check_copied(directory: Path, target: Path, path: str, manifest: Manifest) -> None:
    from prufed_registry.durable import hash_file

    if hash_file(target / path) != manifest.files[path].sha256:
        raise PrufedError(
            f"{path} in {directory} is not what its manifest says",
            "fetch the directory again",
            INTEGRITY,
        )


def restore_packed(
    directory: Path, target: Path, manifest: Manifest, reporter: Reporter = SILENT
) -> None:
    """Unpack the packed files of a directory into ``target``, which may be the same directory.

    Raises:
        PrufedError: one is damaged or not what the manifest says, or there is no room for them.
    """
    from prufed_cli.packing.files import unpack_file

    chosen = [
        path
        for path in to_be_packed(manifest.files)
        if (directory / PACKED / path).is_file() and not (target / path).exists()
    ]
    _check_stated(directory, target, manifest, chosen)
    masks: Mapping[str, Tensor] = {}
    with reporter.task(f"unpack {manifest.name}", total=len(chosen)) as task:
        for path in chosen:
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            with _mask_errors():
                unpack_file(directory / PACKED / path, target / path, masks)
            if path == MASKS_FILE:
                masks = _masks(target)
            task.advance()


def _check_stated(directory: Path, target: Path, manifest: Manifest, paths: list[str]) -> None:
    """Compare what packed files say they become with the manifest and with the space there is."""
    from prufed_cli.packing.files import read_packed

    total = 0
    for path in paths:
        stated, entry = read_packed(directory / PACKED / path), manifest.files[path]
        if (stated.sha256, stated.size) != (entry.sha256, entry.size):
            raise PrufedError(
                f"{PACKED}{path} in {directory} is not the {path} that its manifest names",
                "fetch the directory again",
                INTEGRITY,
            )
        total += stated.size
    check_room(f"what is packed in {directory} needs", {target: total})


def _masks(directory: Path) -> Mapping[str, Tensor]:
    """Return the masks of an artifact by stored name, each read when it is asked for."""
    from prufed_plugins.mask_files import MaskFile

    with _mask_errors():
        return MaskFile(directory / MASKS_FILE).as_stored()


@contextmanager
def _mask_errors() -> Iterator[None]:
    """Turn what is wrong with a mask file, which a method would say, into an integrity error."""
    from prufed_plugins.errors import MethodError

    try:
        yield
    except MethodError as error:
        raise PrufedError(error.message, error.hint, INTEGRITY) from error
