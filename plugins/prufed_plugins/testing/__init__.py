"""The conformance kit: run these on your own method before you publish it.

Each takes a function that constructs the method, and returns an
:class:`~prufed_plugins.testing.checks.Outcome`; call its ``require()`` in a test.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from prufed_plugins.testing.checks import Check, Outcome, run_checks

if TYPE_CHECKING:
    from prufed_plugins.testing.aggregator import check_aggregator
    from prufed_plugins.testing.optimizer import check_optimizer
    from prufed_plugins.testing.partitioner import check_partitioner
    from prufed_plugins.testing.pruner import check_pruner
    from prufed_plugins.testing.sampler import check_sampler
    from prufed_plugins.testing.tuner import check_tuner

__all__ = [
    "Check",
    "Outcome",
    "check_aggregator",
    "check_optimizer",
    "check_partitioner",
    "check_pruner",
    "check_sampler",
    "check_tuner",
    "run_checks",
]

KITS: Final = {
    "pruner": "check_pruner",
    "aggregator": "check_aggregator",
    "tuner": "check_tuner",
    "sampler": "check_sampler",
    "partitioner": "check_partitioner",
    "optimizer": "check_optimizer",
}
"""The kit of each kind of method that has one."""

_KIND_OF: Final = {name: kind for kind, name in KITS.items()}


def __getattr__(name: str) -> Any:
    """Import a kit when it is asked for: some need torch."""
    if name not in _KIND_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_KIND_OF[name]}"), name)
