"""Take a directory into the registry: a model, an exported artifact, or a packed one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from prufed_cli.errors import NOT_FOUND, PrufedError
from prufed_cli.progress import SILENT, Reporter

if TYPE_CHECKING:
    from prufed_registry import Artifact, Registry


def import_directory(
    directory: Path,
    *,
    name: str | None = None,
    registry: Registry | None = None,
    reporter: Reporter = SILENT,
) -> Artifact:
    """Publish a copy of a directory.

    A directory that prufed exported keeps its kind, recipe and parents and is checked file by file;
    one that it packed is restored first. Any other is imported as a base.

    Raises:
        PrufedError: there is no such directory, or what is packed in it is damaged.
        RegistryError: it holds no model, or not what its manifest says.
    """
    from prufed_cli.home import open_registry
    from prufed_cli.packing import is_packed, unpack_artifact

    if not directory.is_dir():
        raise PrufedError(f"no directory {directory}", "give a model directory", NOT_FOUND)
    registry = registry or open_registry()
    if not is_packed(directory):
        return registry.import_directory(directory, name=name)
    with registry.stage() as staging:
        unpack_artifact(directory, staging.path, reporter)
        return registry.import_directory(staging.path, name=name, move=True)
