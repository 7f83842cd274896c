"""What clients.yaml may say: one frozen model per section, every key described.

Keys of a method that are not listed here (``fraction``, ``lr``, ``alpha`` ...) are the method's own
parameters. They are kept in ``settings`` and checked against the method's model by
:mod:`prufed_cli.config.methods`, since a plugin may bring methods of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    StringConstraints,
    model_serializer,
    model_validator,
)

from prufed_cli.config.pruners import drops_layers
from prufed_cli.models.adapter_spec import FactorMask, Rescale
from prufed_registry.names import is_name

ROOT: Final = "root"
"""What the server's own adapter is called where it trains one; no client has this name then."""

TARGETS: Final = ("sparsity", "pattern", "keep_layers", "base")
"""The ways to say what a client's sub-model is."""

_NAME: Final = re.compile(r"[a-z0-9](?:[a-z0-9._-]*[a-z0-9])?")
_PATTERN: Final = re.compile(r"([1-9][0-9]{0,3}):([1-9][0-9]{0,3})")
_DEVICE: Final = re.compile(r"auto|cpu|mps|cuda(?::[0-9]{1,3})?")


def canonical(name: str) -> str:
    """Return a method's name with hyphens, as plugins announce them; ``dist:`` stays."""
    head, colon, tail = name.rpartition(":")
    return head + colon + tail.strip().lower().replace("_", "-")


def _identifier(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise ValueError(
            f"{text!r} is not a valid name: lower-case letters, digits, '.', '_' and '-', "
            "beginning and ending with a letter or digit"
        )
    return text


def _artifact_name(text: str) -> str:
    """Refuse what would name no artifact: the global adapter bears the federation's name."""
    if not is_name(text):
        raise ValueError(
            f"{text!r} cannot name an artifact: use 2 letters or more; `latest` and v1, v2, ... "
            "are reserved"
        )
    return text


def _pattern(text: str) -> str:
    match = _PATTERN.fullmatch(text)
    if not match:
        raise ValueError(f"{text!r} is not an n:m pattern such as 2:4")
    if int(match[1]) >= int(match[2]):
        raise ValueError(f"{text!r} removes everything: n must be less than m")
    return text


def _device(text: str) -> str:
    if not _DEVICE.fullmatch(text):
        raise ValueError(f"{text!r} is not a device: auto, cpu, cuda, cuda:N or mps")
    return text


def none_by_name(value: object) -> object:
    """Let ``none`` say that there is no such section."""
    named = value.get("name") if isinstance(value, Mapping) else value
    return None if named == "none" else value


def _one_as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


Int = Annotated[int, Strict()]
Real = Annotated[float, Strict()]
Flag = Annotated[bool, Strict()]
Text = Annotated[str, StringConstraints(min_length=1)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=46), AfterValidator(_identifier)]
FederationName = Annotated[Name, AfterValidator(_artifact_name)]
MethodName = Annotated[str, StringConstraints(min_length=1), AfterValidator(canonical)]
Texts = Annotated[tuple[Text, ...], BeforeValidator(_one_as_list)]
Seed = Annotated[int, Strict(), Field(ge=0, lt=2**63)]


class Section(BaseModel):
    """The base of every section: immutable, strict about names, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class MethodSection(Section):
    """A method's name beside its parameters; ``aggregator: heteagg`` is short for the name alone.

    Attributes:
        settings: the keys this section does not know itself.
    """

    name: MethodName
    settings: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _gather_settings(cls, data: object) -> object:
        if isinstance(data, str):
            return {"name": data}
        if not isinstance(data, Mapping) or isinstance(data.get("settings"), Mapping):
            return data
        known = cls.model_fields.keys() - {"settings"}
        rest = {key: value for key, value in data.items() if key not in known}
        return {**{k: v for k, v in data.items() if k in known}, "settings": rest}

    @model_serializer(mode="wrap")
    def _spread_settings(self, handler: Any) -> dict[str, Any]:
        """Write the settings beside the name, as they were read."""
        document: dict[str, Any] = handler(self)
        settings = document.pop("settings", {})
        return {**document, **settings}


# --- methods -------------------------------------------------------------------------------------


class SamplerConfig(MethodSection):
    """Who trains in a round."""

    name: MethodName = Field(default="all", description="a sampler; `prufed plugins` lists them")


class AggregatorConfig(MethodSection):
    """How the adapters are merged."""

    name: MethodName = Field(
        default="heteagg", description="an aggregator; `prufed plugins` lists them"
    )


class ServerOptimizerConfig(MethodSection):
    """How the global adapter steps towards the merged one."""

    name: MethodName = Field(description="a server optimizer; `prufed plugins` lists them")


class PartitionConfig(MethodSection):
    """How the shared data is split over the clients without data of their own."""

    name: MethodName = Field(
        default="iid", description="a partitioner; `prufed plugins` lists them"
    )


class PrunerConfig(MethodSection):
    """How sub-models are made."""

    name: MethodName = Field(
        default="sparsegpt", description="a pruner; `prufed plugins` lists them"
    )
    calibration: Text | None = Field(
        default=None,
        description="text, JSONL, `datasets` directory or Hub data set; default: embedded text",
    )
    samples: Int = Field(default=128, ge=1, description="calibration sequences")
    length: Int | None = Field(default=None, ge=2, description="tokens per calibration sequence")


class PrunerOverride(MethodSection):
    """What one client changes in the shared ``pruner``."""

    name: MethodName | None = None  # type: ignore[assignment]
    calibration: Text | None = None
    samples: Int | None = Field(default=None, ge=1)
    length: Int | None = Field(default=None, ge=2)


Template = Literal["alpaca", "chat", "plain"]
TrainOn = Literal["all", "response"]


class TunerConfig(MethodSection):
    """How a client trains, and how its rows become tokens."""

    name: MethodName = Field(default="lora", description="a tuner; `prufed plugins` lists them")
    cutoff: Int = Field(default=512, ge=2, description="longest row in tokens")
    template: Template = Field(default="alpaca", description="how a row becomes a prompt")
    train_on: TrainOn = Field(default="all", description="tokens that carry loss")


class TunerOverride(MethodSection):
    """What one client changes in the shared ``tuner``."""

    name: MethodName | None = None  # type: ignore[assignment]
    cutoff: Int | None = Field(default=None, ge=2)
    template: Template | None = None
    train_on: TrainOn | None = None


# --- adapters, data, evaluation ------------------------------------------------------------------

Preset = Literal["lego", "lego-literal", "sparse-peft", "dense"]


class AdapterConfig(Section):
    """The masked LoRA adapter; what the preset decides can be overridden key by key."""

    r: Int = Field(default=16, ge=1, description="rank")
    alpha: Real = Field(default=16.0, gt=0, description="the update is scaled by alpha / r")
    dropout: Real = Field(default=0.05, ge=0, lt=1, description="dropout on the adapter's input")
    target_modules: Texts = Field(
        default=("q_proj",), min_length=1, description="names of the modules that get an adapter"
    )
    preset: Preset = Field(default="lego", description="where the adapter has zeros")
    factor_mask: FactorMask | None = Field(default=None, description="zeros inside A and B")
    product_mask: Flag | None = Field(default=None, description="keep the base's zeros in B A")
    rescale: Rescale | None = Field(default=None, description="multiply the scaling by 1 / density")


class AdapterOverride(Section):
    """What one client changes in the shared ``adapter``."""

    r: Int | None = Field(default=None, ge=1)
    alpha: Real | None = Field(default=None, gt=0)
    dropout: Real | None = Field(default=None, ge=0, lt=1)
    target_modules: Texts | None = Field(default=None, min_length=1)
    preset: Preset | None = None
    factor_mask: FactorMask | None = None
    product_mask: Flag | None = None
    rescale: Rescale | None = None


class DataConfig(Section):
    """One file split over the clients that have no data of their own."""

    path: Path = Field(description="JSONL, JSON, text, a `datasets` directory, or `embedded`")
    partition: PartitionConfig = PartitionConfig()


class EvaluateConfig(Section):
    """What is measured, and when."""

    tasks: Texts = Field(default=(), description="lm-eval tasks")
    include_path: Path | None = Field(
        default=None, description="directory of lm-eval task files, or `embedded`"
    )
    perplexity: Path | None = Field(default=None, description="text file")
    every: Int = Field(
        default=1, ge=1, description="rounds between evaluations; the last one always is"
    )
    limit: Int | None = Field(default=None, ge=1, description="documents per task")
    clients: Flag = Field(
        default=False, description="evaluate every client too, not only the global model"
    )


class ScreenConfig(Section):
    """What an update must be like to be merged, whatever the aggregator."""

    clip: Literal["median"] | Annotated[Real, Field(gt=0)] | None = Field(
        default=None,
        description="scale a larger change down to this norm, or to the round's median norm",
    )
    outlier: Real = Field(
        default=1000.0,
        ge=0,
        description="exclude a change so many times the others' median norm; 0 lets all pass",
    )


class WriteBackConfig(Section):
    """How the global adapter reaches the clients."""

    share: Real = Field(
        default=0.0, ge=0, le=1, description="share of its own values a client keeps"
    )


# --- the federation ------------------------------------------------------------------------------


class ClientConfig(Section):
    """One participant. It names its sub-model in one of four ways; by default it is dense."""

    name: Name = Field(description="unique; part of the names of its artifacts")
    sparsity: Real | None = Field(default=None, ge=0, lt=1, description="share of entries removed")
    pattern: Annotated[Text, AfterValidator(_pattern)] | None = Field(
        default=None, description="n:m, n of every m removed"
    )
    keep_layers: Int | None = Field(default=None, ge=2, description="decoder layers that remain")
    base: Text | None = Field(
        default=None, description="a sub-model made before: reference or path"
    )
    data: Path | None = Field(default=None, description="rows of its own")
    pruner: PrunerOverride | None = Field(default=None, description="changes to the shared pruner")
    tuner: TunerOverride | None = Field(default=None, description="changes to the shared tuner")
    adapter: AdapterOverride | None = Field(
        default=None, description="changes to the shared adapter"
    )
    weight: Real = Field(default=1.0, gt=0, description="factor on its weight in the aggregate")

    @model_validator(mode="before")
    @classmethod
    def _dense_by_default(cls, data: object) -> object:
        if isinstance(data, Mapping) and all(data.get(key) is None for key in TARGETS):
            return {**data, "sparsity": 0.0}
        return data


class FederationConfig(Section):
    """A whole run: the content of clients.yaml."""

    base: Text | None = Field(
        default=None,
        description="reference, path or Hub id; default: $PRUFED_BASE or the embedded model",
    )
    name: FederationName = Field(
        default="federation", description="default: the file's name; names the artifacts"
    )
    rounds: Int = Field(default=1, ge=1, description="rounds of tuning and aggregation")
    seed: Seed = Field(default=0, description="all randomness derives from it")
    device: Annotated[str, AfterValidator(_device)] = Field(
        default="auto", description="auto, cpu, cuda, cuda:N or mps"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="of the base's weights"
    )
    sampler: SamplerConfig = SamplerConfig()
    pruner: PrunerConfig = PrunerConfig()
    adapter: AdapterConfig = AdapterConfig()
    tuner: TunerConfig = TunerConfig()
    aggregator: AggregatorConfig = AggregatorConfig()
    server_optimizer: Annotated[ServerOptimizerConfig | None, BeforeValidator(none_by_name)] = (
        Field(default=None, description="none: the merged adapter is the global one")
    )
    screen: ScreenConfig = ScreenConfig()
    data: DataConfig | None = None
    server_data: Path | None = Field(
        default=None,
        description="rows of the server's own, for aggregators that need them, such as fltrust",
    )
    evaluate: EvaluateConfig = EvaluateConfig()
    write_back: WriteBackConfig = WriteBackConfig()
    tier_weight: Literal["none", "inverse-density", "update-norm"] = Field(
        default="none",
        description="inverse-density: a client with a quarter of the entries weighs four times; "
        "update-norm: as much as its product B A is long",
    )
    min_clients: Int = Field(default=1, ge=1, description="updates a round needs in order to count")
    clients: tuple[ClientConfig, ...] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _empty_sections_are_default(cls, data: object) -> object:
        """Let a section whose keys are all commented out be as good as none."""
        if not isinstance(data, Mapping):
            return data
        return {k: v for k, v in data.items() if v is not None or k not in _SECTIONS}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        from prufed_cli.config.consistency import contradictions

        for problem in contradictions(self.model_dump(exclude_none=True)):
            raise ValueError(problem.message)
        return self

    def pruner_of(self, client: ClientConfig) -> PrunerConfig:
        """Return how the client's sub-model is made."""
        return pruner_for(self.pruner, client.pruner, layers=client.keep_layers is not None)

    def tuner_of(self, client: ClientConfig) -> TunerConfig:
        """Return how the client trains."""
        return merged(self.tuner, client.tuner)

    def adapter_of(self, client: ClientConfig) -> AdapterConfig:
        """Return the client's adapter."""
        return merged(self.adapter, client.adapter)

    def data_of(self, client: ClientConfig) -> Path | None:
        """Return the client's own data file; None where it takes its part of the shared data."""
        return client.data


def pruner_for(shared: PrunerConfig, own: PrunerOverride | None, *, layers: bool) -> PrunerConfig:
    """Return a client's pruner.

    A client that keeps layers and names no pruner gets the shared one where that drops layers,
    else ``top``.
    """
    own = own or PrunerOverride()
    if layers and own.name is None and not drops_layers(shared.name):
        own = own.model_copy(update={"name": "top"})
    return merged(shared, own)


_SECTIONS: Final = frozenset(
    {"sampler", "pruner", "adapter", "tuner", "aggregator", "screen", "evaluate", "write_back"}
)

Shared = TypeVar("Shared", PrunerConfig, TunerConfig, AdapterConfig)


def merged(shared: Shared, own: Section | None) -> Shared:
    """Return ``shared`` with what ``own`` says in its place.

    Another method's name drops the shared method's settings: they are not its own.
    """
    changes = {k: v for k, v in (own or Section()) if v is not None and k != "settings"}
    if isinstance(own, MethodSection) and isinstance(shared, MethodSection):
        kept = shared.settings if own.name in {None, shared.name} else {}
        changes["settings"] = {**kept, **own.settings}
    return shared.model_copy(update=changes)
