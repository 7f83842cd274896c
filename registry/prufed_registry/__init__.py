"""The ground floor: immutable, versioned model artifacts as plain files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prufed_registry.artifact import Artifact
from prufed_registry.digests import FileEntry, Parent, fingerprint
from prufed_registry.errors import Damaged, InvalidRequest, NotFound, RegistryError
from prufed_registry.layout import default_home
from prufed_registry.names import ADAPTER_KINDS, KINDS
from prufed_registry.staging import Staging
from prufed_registry.store import Registry

if TYPE_CHECKING:
    from prufed_registry.manifest import Manifest

__all__ = [
    "ADAPTER_KINDS",
    "KINDS",
    "Artifact",
    "Damaged",
    "FileEntry",
    "InvalidRequest",
    "Manifest",
    "NotFound",
    "Parent",
    "Registry",
    "RegistryError",
    "Staging",
    "default_home",
    "fingerprint",
]


def __getattr__(name: str) -> Any:
    # The one class that needs pydantic, which costs more to import than everything else here.
    if name == "Manifest":
        from prufed_registry.manifest import Manifest

        return Manifest
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
