"""What can be set on each built-in method: one class per method, validated where a user types it.

A method's description must be readable without torch, so nothing here imports it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from prufed_plugins.api import SUB_MODELS
from prufed_plugins.weighting import Weighting, by_samples


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
        ge=1e-3,
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


class QuantityParams(Params):
    """Parameters of the partitioner ``quantity``."""

    alpha: float = Field(
        default=0.5,
        ge=1e-3,
        le=1e6,
        description="concentration: small makes clients of very unequal size, large of equal size",
    )
    min_samples: int = Field(default=1, ge=1, description="rows every client gets in any case")


class NaturalParams(Params):
    """Parameters of the partitioner ``natural``."""

    key: str = Field(
        default="category",
        min_length=1,
        description="field of a row that says whose it is, such as user or source",
    )


# --- pruners -------------------------------------------------------------------------------------


Threshold = Literal["exact", "reference"]
"""How the entries to remove are counted."""


def _separated(value: Any) -> Any:
    """Return a list of the parts that commas separate in a text; a number is a list of its own."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    return [value] if isinstance(value, int) else value


class ElementParams(Params):
    """What can be set on every pruner that removes single entries."""

    threshold: Threshold = Field(
        default="exact",
        description="how the share is counted: exactly, ties by index, or as the published code",
    )
    include: str | None = Field(
        default=None,
        min_length=1,
        description="prune only matrices of such names: patterns like *.mlp.*, separated by commas",
    )
    exclude: str | None = Field(
        default=None, min_length=1, description="leave out matrices of such names: *.down_proj"
    )
    include_layers: Annotated[tuple[int, ...] | None, BeforeValidator(_separated)] = Field(
        default=None,
        description="prune only these decoder layers, counted from 0: 0,3,5",
    )
    layer_ratio: Literal["uniform", "owl"] = Field(
        default="uniform",
        description="every layer alike, or less from layers with more outliers (needs calibration)",
    )
    owl_m: float = Field(
        default=5.0, gt=0, description="owl: scores above so many times the mean are outliers"
    )
    owl_lambda: float = Field(
        default=0.08, ge=0, le=0.5, description="owl: layers differ by at most twice this sparsity"
    )


class MagnitudeParams(ElementParams):
    """Parameters of the pruner ``magnitude``."""

    group: Literal["layer", "row", "global"] = Field(
        default="layer",
        description="what loses the share together: each matrix, each of its rows, all matrices",
    )

    @model_validator(mode="after")
    def _check_group(self) -> MagnitudeParams:
        if self.threshold == "reference" and self.group != "layer":
            raise ValueError(f"threshold reference knows group layer only, not {self.group}")
        if self.layer_ratio == "owl" and self.group == "global":
            raise ValueError("group global and layer_ratio owl exclude each other")
        return self


class WandaParams(ElementParams):
    """Parameters of the pruner ``wanda``."""


class SparseGPTParams(ElementParams):
    """Parameters of the pruner ``sparsegpt``."""

    block_size: int = Field(
        default=128, ge=1, le=4096, description="columns whose entries are selected together"
    )
    damping: float = Field(
        default=0.01,
        gt=0,
        le=1,
        description="share of the Hessian's mean diagonal added to it; raised tenfold on failure",
    )


class FedSpaLLMParams(Params):
    """Parameters of the pruner ``fedspallm``."""

    clients: Annotated[tuple[Path, ...], BeforeValidator(_separated)] = Field(
        min_length=1,
        max_length=10_000,
        json_schema_extra={SUB_MODELS: True},
        description="sub-models that clients pruned from the base: references, separated by commas",
    )
    values: Literal["mean", "base"] = Field(
        default="mean",
        description="what stays: the mean over clients that kept it, or the base's own (FedPrLLM)",
    )


class LayerDropParams(Params):
    """Parameters of the pruners that drop whole layers; without them the target decides."""

    drop: int | None = Field(default=None, ge=0, description="number of layers to drop")
    keep: int | None = Field(default=None, ge=2, description="number of layers to keep")


class ParameterParams(LayerDropParams):
    """Parameters of the pruner ``parameter``."""

    score: Literal["l1", "l2", "mean-abs", "variance", "movement"] = Field(
        default="l1", description="what a layer's weights are scored by; the lowest scores go"
    )
    reference: Path | None = Field(
        default=None,
        description="directory of the weights before tuning, which movement is measured from",
    )

    @model_validator(mode="after")
    def _check_reference(self) -> ParameterParams:
        if self.score == "movement" and self.reference is None:
            raise ValueError(
                "the score movement needs the weights before tuning: reference=DIRECTORY"
            )
        if self.score != "movement" and self.reference is not None:
            raise ValueError(f"reference is for the score movement; {self.score} needs none")
        return self


class ContributionParams(LayerDropParams):
    """Parameters of the pruner ``contribution``."""

    threshold: float | None = Field(
        default=None,
        ge=-1,
        le=1,
        description="drop every layer whose input and output have a mean cosine above this",
    )


class ExplicitParams(Params):
    """Parameters of the pruner ``explicit``: one of the two lists."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"layers": [0, 2]}]})

    layers: tuple[int, ...] | None = Field(
        default=None, description="layers to keep, counted from 0: [0, 1, 4]"
    )
    drop_layers: tuple[int, ...] | None = Field(
        default=None, description="layers to drop, counted from 0: [2, 3]"
    )

    @model_validator(mode="after")
    def _check_one_list(self) -> ExplicitParams:
        if (self.layers is None) == (self.drop_layers is None):
            raise ValueError("give one list, layers=[0,1,5] to keep them or drop_layers=[3,4]")
        return self


# --- tuners --------------------------------------------------------------------------------------


class LoraParams(Params):
    """Parameters of the tuner ``lora``."""

    epochs: int = Field(default=1, ge=1, description="passes over the client's data")
    batch_size: int = Field(default=64, ge=1, description="rows per optimizer step")
    micro_batch_size: int = Field(
        default=8, ge=1, description="rows per forward pass; changes memory, not the result"
    )
    lr: float = Field(default=3e-4, gt=0, description="learning rate at its highest")
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled weight decay")
    warmup_steps: int = Field(default=0, ge=0, description="steps of linear warm-up")
    max_grad_norm: float = Field(default=1.0, gt=0, description="clip of the gradient's norm")
    max_steps: int | None = Field(
        default=None, ge=1, description="at most so many optimizer steps per round"
    )


class FfaParams(LoraParams):
    """Parameters of the tuner ``ffa``."""


class RoloraParams(LoraParams):
    """Parameters of the tuner ``rolora``."""


class FedProxParams(LoraParams):
    """Parameters of the tuner ``fedprox``."""

    mu: float = Field(
        default=0.01, ge=0, description="μ, weight of the pull towards the global adapter"
    )


class HetLoraTunerParams(LoraParams):
    """Parameters of the tuner ``hetlora``."""

    gamma: float = Field(
        default=0.99, gt=0, lt=1, description="γ, share of the ranks that stay; one goes at least"
    )
    lam: float = Field(default=1e-3, ge=0, description="λ, weight of the last ranks' size")
    r_min: int = Field(default=1, ge=1, description="ranks below which none is pruned")


# --- aggregators ---------------------------------------------------------------------------------


class FedAvgParams(Params):
    """Parameters of the aggregator ``fedavg``."""

    beta: float = Field(
        default=1.0, ge=0, le=4, description="clients weigh n^beta: 1 by samples, 0 all alike"
    )


class HeteAggParams(Params):
    """Parameters of the aggregator ``heteagg``."""

    include_global: Literal["auto"] | bool = Field(
        default="auto",
        description="the global adapter joins the mean; auto: when one client trained in the round",
    )
    global_weight: float = Field(
        default=1.0, gt=0, description="weight of the global adapter, relative to a mean client"
    )
    fallback: Literal["keep", "zero"] = Field(
        default="keep", description="what an entry that too few clients have becomes"
    )
    mask: Literal["explicit", "nonzero"] = Field(
        default="explicit", description="which entries a client has: by its mask, or where not 0"
    )
    beta: float = Field(
        default=0.0, ge=0, le=4, description="clients weigh n^beta: 1 by samples, 0 all alike"
    )
    min_count: int = Field(
        default=1, ge=1, examples=[2], description="clients an entry needs to move"
    )
    compat: Literal["lego-alg2"] | None = Field(
        default=None, description="lego-alg2: the paper's letter, fallback zero and mask nonzero"
    )

    @model_validator(mode="before")
    @classmethod
    def _apply_compat(cls, given: Any) -> Any:
        """Let ``compat`` set what it stands for; a contradiction is an error, not a surprise."""
        if not isinstance(given, dict) or given.get("compat") != "lego-alg2":
            return given
        for key, value in (("fallback", "zero"), ("mask", "nonzero")):
            if given.get(key, value) != value:
                raise ValueError(f"compat lego-alg2 means {key} {value}, not {given[key]}")
        return {**given, "fallback": "zero", "mask": "nonzero"}


class HeteAggLayerParams(Params):
    """Parameters of the aggregator ``heteagg-layer``."""

    group_weighting: Literal["client", "group"] = Field(
        default="client", description="clients count alike, or their depths do"
    )
    beta: float = Field(
        default=0.0, ge=0, le=4, description="clients weigh n^beta: 1 by samples, 0 all alike"
    )


class HetLoraParams(Params):
    """Parameters of the aggregator ``hetlora``."""

    weights: Literal["norm", "samples"] = Field(
        default="norm", description="clients weigh by the norm of their update, or by samples"
    )
    normalize: Literal["zeros", "coverage"] = Field(
        default="zeros",
        description="a rank that a client lacks counts as zero, or its mean leaves the client out",
    )

    @property
    def weighting(self) -> Weighting:
        """Return the norm of the update as the weight, or the samples."""
        if self.weights == "samples":
            return by_samples(1)
        return Weighting("by the norm of the update, w = weight · ‖B A‖")


class FlexLoraParams(Params):
    """Parameters of the aggregators ``flexlora`` and ``raflora``."""

    beta: float = Field(
        default=1.0, ge=0, le=4, description="clients weigh n^beta: 1 by samples, 0 all alike"
    )
    split: Literal["left", "balanced"] = Field(
        default="left", description="singular values go into B, or their roots into both factors"
    )


class FloraParams(Params):
    """Parameters of the aggregator ``flora``."""

    beta: float = Field(
        default=1.0, ge=0, le=4, description="clients weigh n^beta: 1 by samples, 0 all alike"
    )


class FedExParams(Params):
    """Parameters of the aggregator ``fedex``."""

    beta: float = Field(
        default=0.0, ge=0, le=4, description="clients weigh n^beta: 1 by samples, 0 all alike"
    )
    residual_rank: int | None = Field(
        default=None,
        ge=1,
        description="ranks of the residual to keep, the largest; all of them if not set",
    )


class MedianParams(NoParams):
    """Parameters of the aggregator ``median``."""

    @property
    def weighting(self) -> Weighting:
        """Return that nothing weighs: what clients say of themselves may be false."""
        return Weighting("all clients alike, whatever their weight", extra=False)


class TrimmedMeanParams(Params):
    """Parameters of the aggregator ``trimmed-mean``."""

    trim: float = Field(
        default=0.2, ge=0, lt=0.5, description="share of an entry's clients cut at either end"
    )

    @property
    def weighting(self) -> Weighting:
        """Return that nothing weighs: what clients say of themselves may be false."""
        return Weighting("all clients alike, whatever their weight", extra=False)


class KrumParams(Params):
    """Parameters of the aggregator ``krum``."""

    byzantine: int = Field(
        default=1, ge=0, description="f, bad clients to withstand; a round needs 2 f + 3 clients"
    )

    @property
    def weighting(self) -> Weighting:
        """Return that nothing weighs: one client is taken."""
        return Weighting("one client is taken, whatever its weight", extra=False)


class MultiKrumParams(KrumParams):
    """Parameters of the aggregator ``multi-krum``."""

    select: int | None = Field(
        default=None, ge=1, description="clients to average; all but f if not set"
    )

    @property
    def weighting(self) -> Weighting:
        """Return the extra weight alone: what clients say of their samples may be false."""
        return by_samples(0)


class FLTrustParams(NoParams):
    """Parameters of the aggregator ``fltrust``."""

    @property
    def weighting(self) -> Weighting:
        """Return the agreement with the server, which only training shows."""
        return Weighting("by agreement with the server's own change, w = weight · max(0, cos)")


class TiesParams(Params):
    """Parameters of the aggregator ``ties``."""

    density: float = Field(
        default=0.2, gt=0, le=1, description="share of a client's changes to keep, the largest"
    )
    scale: float = Field(default=1.0, gt=0, le=10, description="factor on the merged change")

    @property
    def weighting(self) -> Weighting:
        """Return the extra weight alone."""
        return by_samples(0)


class DareParams(Params):
    """Parameters of the aggregator ``dare``."""

    drop: float = Field(default=0.9, ge=0, lt=1, description="probability to drop a change")
    then: Literal["mean", "ties"] = Field(
        default="mean", description="how what is left is merged: its mean, or by elected signs"
    )
    seed: int = Field(default=0, ge=0, description="of the draw")

    @property
    def weighting(self) -> Weighting:
        """Return the extra weight alone."""
        return by_samples(0)


class LoraFairParams(Params):
    """Parameters of the aggregator ``lora-fair``."""

    beta: float = Field(
        default=1.0, ge=0, le=4, description="clients weigh n^beta: 1 by samples, 0 all alike"
    )
    ridge: float = Field(
        default=0.01, ge=0, description="how strongly B is held to its mean; 0 corrects fully"
    )


class FjordParams(Params):
    """Parameters of the aggregator ``fjord``."""

    beta: float = Field(
        default=1.0, ge=0, le=4, description="clients weigh n^beta: 1 by samples, 0 all alike"
    )


class HeteAggLsParams(Params):
    """Parameters of the aggregator ``heteagg-ls``."""

    beta: float = Field(
        default=0.0, ge=0, le=4, description="clients weigh n^beta: 1 by samples, 0 all alike"
    )
    ridge: float = Field(
        default=0.05,
        gt=0,
        le=1e6,
        description="how strongly B is held to its mean, in units of the mean square of A's rows",
    )
    refine: Literal["b", "both"] = Field(
        default="b", description="solve for B alone, or for A too, given the new B"
    )


class InclusiveFlParams(Params):
    """Parameters of the aggregator ``inclusivefl``."""

    momentum: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="share of the deeper clients' layers in a shallow client's last one",
    )
    beta: float = Field(
        default=1.0, ge=0, le=4, description="clients weigh n^beta: 1 by samples, 0 all alike"
    )


class FedSaParams(Params):
    """Parameters of the aggregator ``fedsa``."""

    beta: float = Field(
        default=1.0, ge=0, le=4, description="clients weigh n^beta: 1 by samples, 0 all alike"
    )
    global_b: Literal["mean", "keep"] = Field(
        default="mean",
        description="B of the global adapter, which no client gets: the mean, or as it was",
    )


class FedRolexParams(Params):
    """Parameters of the aggregator ``fedrolex``."""

    beta: float = Field(
        default=0.0, ge=0, le=4, description="clients weigh n^beta: 1 by samples, 0 all alike"
    )


class UserCentricParams(Params):
    """Parameters of the aggregator ``user-centric``."""

    beta: float = Field(
        default=0.0, ge=0, le=4, description="clients weigh n^beta: 1 by samples, 0 all alike"
    )
    batch_size: int = Field(
        default=8, ge=1, description="rows of a mini-batch, whose gradients say what noise is"
    )
    batches: int | None = Field(
        default=None, ge=2, description="mini-batches to look at; all of a client's if not set"
    )
    streams: Annotated[int, Field(ge=1)] | Literal["auto"] | None = Field(
        default=None,
        description="groups of clients that share a mean, auto: as many as are told apart best; "
        "every client its own if not set",
    )

    @property
    def weighting(self) -> Weighting:
        """Return the likeness of the gradients, for every client another."""
        rule = by_samples(self.beta).words
        return Weighting(f"by how alike two clients' first gradients are; {rule}")


# --- server optimizers ---------------------------------------------------------------------------


class FedAvgMParams(Params):
    """Parameters of the server optimizer ``fedavgm``."""

    lr: float = Field(default=1.0, gt=0, description="η, length of the server's step")
    momentum: float = Field(
        default=0.9, ge=0, lt=1, description="β, share of the last rounds' step that goes on"
    )


class FedAdagradParams(Params):
    """Parameters of the server optimizer ``fedadagrad``."""

    lr: float = Field(
        default=0.01, gt=0, description="η, about how far an entry moves in the first round"
    )
    beta1: float = Field(default=0.0, ge=0, lt=1, description="β₁ of the first moment")
    tau: float = Field(default=1e-3, gt=0, description="τ, adaptivity: small is more adaptive")


class FedYogiParams(Params):
    """Parameters of the server optimizer ``fedyogi``."""

    lr: float = Field(
        default=0.01, gt=0, description="η, about how far an entry moves in a round at most"
    )
    beta1: float = Field(default=0.9, ge=0, lt=1, description="β₁ of the first moment")
    beta2: float = Field(default=0.99, ge=0, lt=1, description="β₂ of the second moment")
    tau: float = Field(default=1e-3, gt=0, description="τ, adaptivity: small is more adaptive")
    bias_correction: bool = Field(
        default=False, description="start both moments at 0 and divide by 1 − βᵗ; not the paper's"
    )


class FedAdamParams(FedYogiParams):
    """Parameters of the server optimizer ``fedadam``."""
