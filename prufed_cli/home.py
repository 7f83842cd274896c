"""Where prufed keeps its files on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prufed_registry import Registry


def home() -> Path:
    """Return ``$PRUFED_HOME``, or the user's data directory for prufed."""
    from prufed_registry import default_home

    return default_home()


def open_registry() -> Registry:
    """Return the registry of this machine's user."""
    from prufed_registry import Registry

    return Registry(home() / "registry")


def runs_directory() -> Path:
    """Return the directory that holds one directory per run."""
    return home() / "runs"


def prunes_directory(registry: Registry) -> Path:
    """Return the directory beside a registry that holds what prunes into it left unfinished."""
    return registry.root.parent / "prunes"
