"""The top floor: what a person does, on the command line and from Python.

The use cases are the Python API: ``prufed_cli.prune``, ``federate``, ``evaluate``, ``push`` and so
on. Each is imported when it is first asked for, so that importing this package stays cheap.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from prufed_cli.errors import PrufedError
    from prufed_cli.evaluation import EvaluationReport, evaluate, evaluate_model
    from prufed_cli.exporting import PackedExport, export, export_merged, export_packed
    from prufed_cli.federation.federate import FederateResult, federate, plan_federation
    from prufed_cli.home import open_registry
    from prufed_cli.hub import PullResult, PushResult, pull, push
    from prufed_cli.importing import import_directory
    from prufed_cli.inspection import Inspection, inspect
    from prufed_cli.models.base import Loaded, load_reference
    from prufed_cli.partitioning import PartitionRequest, partition
    from prufed_cli.progress import Reporter
    from prufed_cli.pruning import PruneRequest, PruneResult, prune, prune_several
    from prufed_registry import Artifact, Registry

__version__ = "0.1.0"

# Large pages come faster by far and leave smaller gaps in memory. torch looks at this once, when it
# makes its first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__all__ = [
    "Artifact",
    "EvaluationReport",
    "FederateResult",
    "Inspection",
    "Loaded",
    "PackedExport",
    "PartitionRequest",
    "PrufedError",
    "PruneRequest",
    "PruneResult",
    "PullResult",
    "PushResult",
    "Registry",
    "Reporter",
    "evaluate",
    "evaluate_model",
    "export",
    "export_merged",
    "export_packed",
    "federate",
    "import_directory",
    "inspect",
    "load_reference",
    "open_registry",
    "partition",
    "plan_federation",
    "prune",
    "prune_several",
    "pull",
    "push",
]

_MODULES: Final = {
    "prufed_cli.errors": ("PrufedError",),
    "prufed_cli.evaluation": ("EvaluationReport", "evaluate", "evaluate_model"),
    "prufed_cli.exporting": ("PackedExport", "export", "export_merged", "export_packed"),
    "prufed_cli.federation.federate": ("FederateResult", "federate", "plan_federation"),
    "prufed_cli.home": ("open_registry",),
    "prufed_cli.hub": ("PullResult", "PushResult", "pull", "push"),
    "prufed_cli.importing": ("import_directory",),
    "prufed_cli.inspection": ("Inspection", "inspect"),
    "prufed_cli.models.base": ("Loaded", "load_reference"),
    "prufed_cli.partitioning": ("PartitionRequest", "partition"),
    "prufed_cli.progress": ("Reporter",),
    "prufed_cli.pruning": ("PruneRequest", "PruneResult", "prune", "prune_several"),
    "prufed_registry": ("Artifact", "Registry"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
