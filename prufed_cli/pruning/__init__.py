"""Make sub-models: prune a base with one method and publish what comes of it.

The model is never loaded whole. :mod:`~prufed_cli.pruning.passes` goes through it block by block,
:mod:`~prufed_cli.pruning.work` keeps what is finished, :mod:`~prufed_cli.pruning.publish` puts it
together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from prufed_cli.pruning.request import (
    PruneRequest,
    at_sparsities,
    parse_pattern,
    parse_sparsities,
    parse_target,
)

if TYPE_CHECKING:
    from prufed_cli.pruning.job import REPORT_FILE
    from prufed_cli.pruning.publish import read_report
    from prufed_cli.pruning.submodels import PruneResult, plan_prune, prune, prune_several

__all__ = [
    "REPORT_FILE",
    "PruneRequest",
    "PruneResult",
    "at_sparsities",
    "parse_pattern",
    "parse_sparsities",
    "parse_target",
    "plan_prune",
    "prune",
    "prune_several",
    "read_report",
]

_MODULES: Final = {
    "REPORT_FILE": "job",
    "PruneResult": "submodels",
    "plan_prune": "submodels",
    "prune": "submodels",
    "prune_several": "submodels",
    "read_report": "publish",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
