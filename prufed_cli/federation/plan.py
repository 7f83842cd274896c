"""What a run will do, decided and checked before torch is imported.

A plan reads the configuration, every client's rows and the base's config.json; it refuses what
cannot work while nothing has been spent yet.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prufed_cli.data import Row, read_records, read_rows, rows_digest
from prufed_cli.disk import check_room
from prufed_cli.errors import INTEGRITY, NOT_FOUND, USAGE, PrufedError
from prufed_cli.federation.seeds import derive
from prufed_cli.federation.submodels import SubModel, plan_submodel, whole
from prufed_cli.partitioning import split_records
from prufed_plugins.api import ClientInfo
from prufed_plugins.discover import build
from prufed_registry.errors import NotFound

if TYPE_CHECKING:
    from prufed_cli.config import FederationConfig
    from prufed_cli.config.models import AdapterConfig, ClientConfig, TunerConfig
    from prufed_plugins.api import Sampler
    from prufed_registry import Registry


@dataclass(frozen=True)
class ClientPlan:
    """One client, with everything the configuration decides about it.

    Attributes:
        name: unique in the federation.
        submodel: what it runs.
        rows: its training data.
        data_digest: of those rows.
        adapter: rank, scaling, masks.
        tuner: how it trains.
        weight: extra factor on its weight, that of its tier included.
    """

    name: str
    submodel: SubModel
    rows: tuple[Row, ...]
    data_digest: str
    adapter: AdapterConfig
    tuner: TunerConfig
    weight: float

    @property
    def categories(self) -> Mapping[str, int]:
        """Return how many rows of each category the client has."""
        return Counter(row.category or "none" for row in self.rows)


@dataclass(frozen=True)
class Plan:
    """A whole run.

    Attributes:
        config: the validated configuration.
        base: reference, path or Hub id of the full model.
        layers: decoder layers of the full model; None where its configuration is not here yet.
        clients: in the order of the configuration.
        sampled: names of the clients of every round, as far as the sparsities of sub-models that
            are still to be made decide it.
        server: what the server trains on rows of its own; None where the aggregator needs none.
    """

    config: FederationConfig
    base: str
    layers: int | None
    clients: tuple[ClientPlan, ...]
    sampled: tuple[tuple[str, ...], ...]
    server: ClientPlan | None = None

    @property
    def training(self) -> tuple[ClientPlan, ...]:
        """Return everybody who trains: the clients, and the server where it does."""
        return self.clients if self.server is None else (*self.clients, self.server)

    @property
    def digest(self) -> str:
        """Return a digest of everything that decides the run's result."""
        content = {
            "config": self.config.model_dump(mode="json"),
            "base": self.base,
            "data": {one.name: one.data_digest for one in self.training},
        }
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def make_plan(config: FederationConfig, registry: Registry) -> Plan:
    """Return the plan of a configuration.

    Raises:
        PrufedError: data, references, layers or disk space do not allow the run.
        MethodError: the data cannot be partitioned as asked.
    """
    from prufed_cli.models.base import default_base

    base = config.base or default_base()
    document = base_config(base, registry)
    layers = _layers(document) if document is not None else None
    rows = _rows(config)
    clients = tuple(
        _client(config, client, plan_submodel(config, client, base, layers, registry), rows)
        for client in config.clients
    )
    plan = Plan(
        config=config,
        base=base,
        layers=layers,
        clients=clients,
        sampled=_sampled(config, clients, layers),
        server=_server(config, base, layers),
    )
    _check_space(plan, registry)
    return plan


def sample_rounds(
    config: FederationConfig, infos: Sequence[ClientInfo]
) -> tuple[tuple[str, ...], ...]:
    """Return the names of the clients of every round.

    Raises:
        PrufedError: a round has no clients.
    """
    sampler: Sampler = build("sampler", config.sampler.name, config.sampler.settings)
    sampled = tuple(
        tuple(sampler.sample(index, infos, derive(config.seed, "sampler", index)))
        for index in range(config.rounds)
    )
    for number, names in enumerate(sampled, start=1):
        if not names:
            raise PrufedError(
                f"the sampler chose no client in round {number}",
                "raise the sampler's fraction",
                USAGE,
            )
    return sampled


def _client(
    config: FederationConfig,
    client: ClientConfig,
    submodel: SubModel,
    rows: Mapping[str, Sequence[Row]],
) -> ClientPlan:
    return ClientPlan(
        name=client.name,
        submodel=submodel,
        rows=tuple(rows[client.name]),
        data_digest=rows_digest(rows[client.name]),
        adapter=config.adapter_of(client),
        tuner=config.tuner_of(client),
        weight=client.weight * _tier_weight(config, client.name, submodel),
    )


def _server(config: FederationConfig, base: str, layers: int | None) -> ClientPlan | None:
    """Return the server's own part: the full model, and the shared adapter and tuner."""
    from prufed_cli.config.methods import needs_server_data
    from prufed_cli.config.models import ROOT

    if config.server_data is None or not needs_server_data(config.aggregator):
        return None
    rows = tuple(read_rows(config.server_data))
    return ClientPlan(
        name=ROOT,
        submodel=whole(base, layers),
        rows=rows,
        data_digest=rows_digest(rows),
        adapter=config.adapter,
        tuner=config.tuner,
        weight=1.0,
    )


def _tier_weight(config: FederationConfig, name: str, submodel: SubModel) -> float:
    """Return the factor of the client's tier on its weight, as far as it is known beforehand."""
    if config.tier_weight != "inverse-density":
        return 1.0
    if submodel.density is None:
        raise PrufedError(
            f"client {name}: the density of its sub-model is not known before the base is here, "
            f"and tier_weight {config.tier_weight} needs it",
            "`prufed pull` the base first, or leave out tier_weight",
            USAGE,
        )
    return 1 / submodel.density


def _sampled(
    config: FederationConfig, clients: Sequence[ClientPlan], layers: int | None
) -> tuple[tuple[str, ...], ...]:
    infos = []
    for client in clients:
        density = 1.0 if client.submodel.density is None else client.submodel.density
        depth = layers if client.submodel.layers is None else client.submodel.layers
        infos.append(ClientInfo(client.name, len(client.rows), 1 - density, depth or 0))
    return sample_rounds(config, infos)


def base_config(base: str, registry: Registry) -> dict[str, Any] | None:
    """Return the content of the base's config.json, None for a Hub id that is not here yet.

    Raises:
        PrufedError: neither an artifact, nor a directory, nor a Hub id; or it is no JSON object.
    """
    path = base_directory(base, registry)
    if path is None:
        return None
    file = path / "config.json"
    if not file.is_file():
        raise PrufedError(f"{base} has no config.json", "give a model directory", NOT_FOUND)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PrufedError(
            f"{file} is not JSON: {error}", "fetch the model again", INTEGRITY
        ) from error
    if not isinstance(content, dict):
        raise PrufedError(f"{file} is not a JSON object", "fetch the model again", INTEGRITY)
    return content


def base_directory(base: str, registry: Registry) -> Path | None:
    """Return the directory of a base that is here; None for a Hub id.

    Raises:
        NotFound: neither a directory, nor an artifact, nor a Hub id.
    """
    from prufed_cli.models.base import EMBEDDED_NAME

    directory = Path(base).expanduser()
    if base.startswith((".", "/", "~")) or (directory / "config.json").is_file():
        return directory
    if base.count("/") == 1:
        return None
    try:
        return registry.resolve(base).path
    except NotFound:
        if base == EMBEDDED_NAME:
            from prufed_cli.assets import embedded_model

            return embedded_model()
        raise


def _layers(document: Mapping[str, Any]) -> int | None:
    text = document.get("text_config", document)
    for key in ("num_hidden_layers", "n_layer"):
        if key in text:
            return int(text[key])
    return None


def _rows(config: FederationConfig) -> dict[str, Sequence[Row]]:
    """Return every client's rows: its own file's, or its part of the shared data."""
    rows: dict[str, Sequence[Row]] = {}
    sharing = []
    for client in config.clients:
        own = config.data_of(client)
        if own is not None:
            rows[client.name] = read_rows(own)
        else:
            sharing.append(client.name)
    if sharing and config.data is not None:
        method = config.data.partition
        shared = read_records(config.data.path)
        parts = split_records(shared, method.name, method.settings, sharing, config.seed)
        for name, records in parts.items():
            rows[name] = [record.row for record in records if record.row is not None]
    return rows


def _check_space(plan: Plan, registry: Registry) -> None:
    """Refuse a run whose sub-models would not fit on the disk."""
    directory = base_directory(plan.base, registry)
    if directory is None or not directory.is_dir():
        return
    size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    made = {client.submodel.label for client in plan.clients if client.submodel.request}
    check_room("the sub-models need", {registry.root: size * len(made)})
