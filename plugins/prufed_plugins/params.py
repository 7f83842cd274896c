"""What can be set on each built-in method: one class per method, validated where a user types it.

A method's description must be readable without torch, so nothing here imports it.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Params(BaseModel):
    """The base of every built-in method's parameters: immutable, and strict about names."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class NoParams(Params):
    """For a method with nothing to set."""


# --- samplers ------------------------------------------------------------------------------------


class UniformParams(Params):
    """Parameters of the sampler ``uniform``."""

    fraction: float = Field(
        default=0.1, gt=0, le=1, description="share of the clients that train in a round"
    )


class SequentialParams(Params):
    """Parameters of the sampler ``sequential``."""

    fraction: float = Field(
        default=0.1, gt=0, le=1, description="share of the clients that train in a round"
    )


class BySparsityParams(Params):
    """Parameters of the sampler ``by-sparsity``."""

    stratified: bool = Field(
        default=False, description="take clients of every tier each round, not one tier per round"
    )
    fraction: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="share of a tier's clients to take when it has its turn",
    )
    tolerance: float = Field(
        default=0.02, ge=0, lt=1, description="sparsities this close together are one tier"
    )


class ByDepthParams(Params):
    """Parameters of the sampler ``by-depth``."""

    stratified: bool = Field(
        default=False, description="take clients of every tier each round, not one tier per round"
    )
    fraction: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="share of a tier's clients to take when it has its turn",
    )


# --- partitioners --------------------------------------------------------------------------------


class DirichletParams(Params):
    """Parameters of the partitioner ``dirichlet``."""

    alpha: float = Field(
        default=0.5,
        gt=0,
        le=1e6,
        description="concentration: small gives each client few categories, large gives iid",
    )
    min_samples: int = Field(
        default=1, ge=1, description="rows every client must get; draws that give fewer are redone"
    )
    retries: int = Field(
        default=100, ge=1, le=10_000, description="draws to make before giving up on min_samples"
    )


class ShardsParams(Params):
    """Parameters of the partitioner ``shards``."""

    per_client: int = Field(
        default=2, ge=1, description="shards of the category-sorted rows each client gets"
    )
