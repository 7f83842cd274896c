"""Copy an artifact out of the registry, pack it, or merge an adapter into a stand-alone model."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prufed_cli.errors import USAGE, PrufedError
from prufed_cli.models.base import ADAPTER_KINDS, base_of
from prufed_cli.progress import SILENT, Reporter
from prufed_plugins.api import MASKS_FILE
from prufed_registry.outside import new_directory

if TYPE_CHECKING:
    from prufed_cli.packing import Sizes
    from prufed_registry import Artifact, Registry


def export(
    reference: str, directory: Path, *, base: str | None = None, registry: Registry | None = None
) -> Path:
    """Copy an artifact's files, as they were published, to a new directory.

    An adapter's ``base_model_name_or_path`` is rewritten to ``base``, by default the directory of
    its base in the registry, so that PEFT finds it.

    Raises:
        RegistryError: no such artifact, damaged files, or a directory that is not empty.
    """
    from prufed_cli.home import open_registry

    registry = registry or open_registry()
    artifact = registry.resolve(reference)
    base = _base_to_name(artifact, base, registry)
    registry.check_outside(directory)
    return registry.export(artifact.ref, directory, base)


def _base_to_name(artifact: Artifact, base: str | None, registry: Registry) -> str | None:
    """Return what an adapter's configuration shall name as its base; None for a model.

    Raises:
        PrufedError: one is given for a model.
    """
    if artifact.kind in ADAPTER_KINDS:
        return base if base is not None else str(base_of(artifact, registry).path)
    if base is not None:
        raise PrufedError(
            f"{artifact.ref} is no adapter, so it names no base", "leave --base out", USAGE
        )
    return None


@dataclass(frozen=True)
class PackedExport:
    """A packed artifact outside the registry.

    Attributes:
        path: its directory.
        sizes: of its weights and masks.
    """

    path: Path
    sizes: Sizes


def export_packed(
    reference: str,
    directory: Path,
    *,
    base: str | None = None,
    registry: Registry | None = None,
    reporter: Reporter = SILENT,
) -> PackedExport:
    """Write an artifact to a new directory as its masks and the values they keep.

    The directory cannot be opened as a model; :func:`prufed_cli.import_directory` restores the
    artifact bit for bit.

    Raises:
        PrufedError: the directory is not empty, or a file is not what was published.
        RegistryError: no such artifact, or damaged files.
    """
    from prufed_cli.home import open_registry
    from prufed_cli.packing import pack_artifact
    from prufed_cli.packing.directories import to_be_packed

    registry = registry or open_registry()
    artifact = registry.resolve(reference)
    base = _base_to_name(artifact, base, registry)
    registry.check_outside(directory)
    with new_directory(directory) as partial:
        registry.export(
            artifact.ref, partial, base, leave_out=to_be_packed(artifact.manifest.files)
        )
        sizes = pack_artifact(artifact, partial, reporter)
    return PackedExport(directory.absolute(), sizes)


def export_merged(
    reference: str,
    directory: Path,
    *,
    registry: Registry | None = None,
    reporter: Reporter = SILENT,
) -> Path:
    """Write a stand-alone model: an adapter merged into its base, in the base's dtype.

    Where the adapter has a product mask, the result is exactly as sparse as its base, and has its
    masks; any other adapter fills the zeros.

    Raises:
        PrufedError: the reference is no adapter, or the directory is not empty.
    """
    from transformers import GenerationConfig

    from prufed_cli.home import open_registry
    from prufed_cli.models.base import keeps_masks, load_reference, stored_dtype
    from prufed_cli.pruning.publish import (
        GENERATION_FILE,
        copy_companion_files,
        write_generation_config,
    )

    registry = registry or open_registry()
    artifact = registry.resolve(reference)
    if artifact.kind not in ADAPTER_KINDS:
        raise PrufedError(
            f"{artifact.ref} is a {artifact.kind}; there is no adapter to merge",
            f"`prufed export {artifact.ref} DIR` copies it as it is",
            USAGE,
        )
    registry.check_outside(directory)
    base = base_of(artifact, registry)
    with (
        new_directory(directory) as partial,
        reporter.task(f"merge {artifact.ref} into {base.ref}"),
    ):
        model = load_reference(artifact.ref, registry, device="cpu").model
        model.generation_config = GenerationConfig()  # some of them refuse to be saved
        model.to(stored_dtype(base)).save_pretrained(partial)
        (partial / GENERATION_FILE).unlink(missing_ok=True)
        copy_companion_files(base.path, partial)
        if model.can_generate():
            write_generation_config(base.path, partial)
        if keeps_masks(artifact) and (base.path / MASKS_FILE).is_file():
            shutil.copyfile(base.path / MASKS_FILE, partial / MASKS_FILE)
    return directory.absolute()
