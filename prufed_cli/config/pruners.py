"""Which pruners drop layers and which remove entries, as their parameters tell.

A pruner itself says what it makes, but to import it is to import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prufed_plugins.discover import catalog
from prufed_plugins.errors import MethodError
from prufed_plugins.params import (
    ElementParams,
    ExplicitParams,
    FedSpaLLMParams,
    LayerDropParams,
)

if TYPE_CHECKING:
    from pydantic import BaseModel


def drops_layers(name: str) -> bool:
    """Return whether a pruner is known to drop whole layers; False where there is none."""
    return _has_params(name, LayerDropParams, ExplicitParams)


def removes_entries(name: str) -> bool:
    """Return whether a pruner is known to remove single entries; False where there is none."""
    return _has_params(name, ElementParams, FedSpaLLMParams)


def _has_params(name: str, *models: type[BaseModel]) -> bool:
    try:
        return issubclass(catalog().get("pruner", name).method.params, models)
    except MethodError:
        return False
