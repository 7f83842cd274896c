"""The ground floor: immutable, versioned model artifacts as plain files."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from prufed_registry.artifact import Artifact
from prufed_registry.digests import FileEntry, Parent, fingerprint
from prufed_registry.errors import Damaged, InvalidRequest, NotFound, RegistryError
from prufed_registry.layout import default_home
from prufed_registry.names import ADAPTER_KINDS, KINDS
from prufed_registry.staging import Staging
from prufed_registry.store import Registry

if TYPE_CHECKING:
    from prufed_registry.gc import Garbage, GcReport
    from prufed_registry.lineage import Lineage
    from prufed_registry.manifest import Manifest
    from prufed_registry.transfer import rewrite_base
    from prufed_registry.verify import Problem

__all__ = [
    "ADAPTER_KINDS",
    "KINDS",
    "Artifact",
    "Damaged",
    "FileEntry",
    "Garbage",
    "GcReport",
    "InvalidRequest",
    "Lineage",
    "Manifest",
    "NotFound",
    "Parent",
    "Problem",
    "Registry",
    "RegistryError",
    "Staging",
    "default_home",
    "fingerprint",
    "rewrite_base",
]

# What listing and resolving do not need; the manifest's model alone (pydantic) would cost more
# to import than all the rest.
_ELSEWHERE = {
    "Garbage": "gc",
    "GcReport": "gc",
    "Lineage": "lineage",
    "Manifest": "manifest",
    "Problem": "verify",
    "rewrite_base": "transfer",
}


def __getattr__(name: str) -> Any:
    if name not in _ELSEWHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ELSEWHERE[name]}"), name)
