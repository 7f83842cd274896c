"""A pruner as somebody else would write it: the plugin module, and what it can be told."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel, ConfigDict, Field

from prufed_plugins.api import Method, hookimpl

PRUFED_API = (1, 0)


class RandomMaskParams(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = Field(default=0, ge=0, description="which entries go")


@hookimpl
def prufed_pruners() -> Iterator[Method]:
    yield Method(
        name="random-mask",
        target="random_mask_method:RandomMask",
        params=RandomMaskParams,
        summary="remove entries at random",
    )
