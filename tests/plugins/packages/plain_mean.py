"""An aggregator as somebody else would write it, the implementation next to the description."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from prufed_plugins.api import Merged, Method, hookimpl
from prufed_plugins.errors import MethodError

PRUFED_API = (1, 0)


class PlainMeanParams(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


@hookimpl
def prufed_aggregators():
    return [
        Method(
            name="plain-mean",
            target="plain_mean:PlainMean",
            params=PlainMeanParams,
            summary="the mean of what clients have, by samples",
        )
    ]


class PlainMean:
    """g' = sum(n m theta) / sum(n m) where a client has the entry; else g."""

    def __init__(self, params):
        self.params = params

    def prepare(self, updates, state):
        for update in updates:
            if update.rank != state.rank:
                raise MethodError(
                    f"plain-mean cannot mix rank {update.rank} with {state.rank}",
                    "give every client the same rank",
                )

    def merge(self, module, parts, current):
        import torch

        sums = {key: torch.zeros_like(value, dtype=torch.float64) for key, value in current.items()}
        weights = {key: torch.zeros_like(value) for key, value in sums.items()}
        for part in parts:
            weight = part.samples * part.weight
            for key, value in part.tensors.items():
                mask = part.masks.get(key)
                here = torch.ones_like(value, dtype=torch.bool) if mask is None else mask
                sums[key] += weight * torch.where(here, value.double(), 0.0)
                weights[key] += weight * here
        merged = {
            key: torch.where(weights[key] > 0, sums[key] / weights[key], old.double()).to(old.dtype)
            for key, old in current.items()
        }
        return Merged(merged)
