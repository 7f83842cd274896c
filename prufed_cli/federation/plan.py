"""What a run will do, decided and checked before torch is imported.

A plan reads the configuration, every client's rows and the base's config.json; it refuses what
cannot work while nothing has been spent yet.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prufed_cli.data import Row, read_records, read_rows, rows_digest
from prufed_cli.errors import FAILED, INTEGRITY, NOT_FOUND, USAGE, PrufedError
from prufed_cli.partitioning import split_records
from prufed_cli.pruning import PruneRequest
from prufed_registry.errors import NotFound

if TYPE_CHECKING:
    from prufed_cli.config import FederationConfig
    from prufed_cli.config.models import AdapterConfig, ClientConfig, TunerConfig
    from prufed_registry import Registry


@dataclass(frozen=True)
class SubModel:
    """What a client runs.

    Attributes:
        label: for people: ``dense``, ``sparsegpt 75 %``, ``top, 16 layers``.
        reference: an artifact that exists, or the base itself; None where it is to be made.
        request: how it is made; None where it exists.
        sparsity: share of entries (or of layers) removed, where the configuration says it.
    """

    label: str
    reference: str | None
    request: PruneRequest | None
    sparsity: float | None


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
        weight: extra factor on its weight.
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
    """

    config: FederationConfig
    base: str
    layers: int | None
    clients: tuple[ClientPlan, ...]

    @property
    def digest(self) -> str:
        """Return a digest of everything that decides the run's result."""
        content = {
            "config": self.config.model_dump(mode="json"),
            "base": self.base,
            "data": {client.name: client.data_digest for client in self.clients},
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
        ClientPlan(
            name=client.name,
            submodel=_submodel(config, client, base, layers, registry),
            rows=tuple(rows[client.name]),
            data_digest=rows_digest(rows[client.name]),
            adapter=config.adapter_of(client),
            tuner=config.tuner_of(client),
            weight=client.weight,
        )
        for client in config.clients
    )
    plan = Plan(config=config, base=base, layers=layers, clients=clients)
    _check_space(plan, registry)
    return plan


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


def _submodel(
    config: FederationConfig,
    client: ClientConfig,
    base: str,
    layers: int | None,
    registry: Registry,
) -> SubModel:
    if client.base is not None:
        if "/" in client.base:
            raise PrufedError(
                f"client {client.name}: its base {client.base} is not an artifact, so nothing "
                f"tells that it was made from {base}",
                "name an artifact that `prufed prune` made, such as my-model@v3",
                USAGE,
            )
        return SubModel(client.base, registry.resolve(client.base).ref, None, None)
    if client.sparsity == 0 or (client.keep_layers is not None and client.keep_layers == layers):
        return SubModel("dense", base, None, 0.0)
    pruner = config.pruner_of(client)
    settings = dict(pruner.settings)
    if client.keep_layers is not None:
        if layers is not None and client.keep_layers > layers:
            raise PrufedError(
                f"client {client.name} keeps {client.keep_layers} layers, "
                f"but {base} has only {layers}",
                "lower keep_layers",
                USAGE,
            )
        if pruner.name != "explicit":  # which names its layers itself
            settings["keep"] = client.keep_layers
    request = PruneRequest(
        base=base,
        method=pruner.name,
        sparsity=client.sparsity,
        pattern=client.pattern,
        settings=settings,
        calibration=pruner.calibration,
        samples=pruner.samples,
        length=pruner.length,
        seed=config.seed,
    )
    return SubModel(_label(pruner.name, client), None, request, _sparsity(client))


def _label(method: str, client: ClientConfig) -> str:
    if client.keep_layers is not None:
        return f"{method}, {client.keep_layers} layers"
    if client.pattern is not None:
        return f"{method} {client.pattern}"
    return f"{method} {client.sparsity or 0:.0%}"


def _sparsity(client: ClientConfig) -> float | None:
    if client.pattern is not None:
        removed, group = (int(part) for part in client.pattern.split(":"))
        return removed / group
    return client.sparsity


def _check_space(plan: Plan, registry: Registry) -> None:
    """Refuse a run whose sub-models would not fit on the disk."""
    directory = base_directory(plan.base, registry)
    if directory is None or not directory.is_dir():
        return
    size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    made = {client.submodel.label for client in plan.clients if client.submodel.request}
    needed = size * len(made)
    place = registry.root
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise PrufedError(
            f"the sub-models need {needed / 1e9:.1f} GB, but {place} has {free / 1e9:.1f} GB free",
            "free some space (`prufed gc`), or point PRUFED_HOME at a larger disk",
            FAILED,
        )


def describe(plan: Plan) -> dict[str, Any]:
    """Return the plan as a JSON document."""
    config = plan.config
    return {
        "name": config.name,
        "base": plan.base,
        "layers": plan.layers,
        "rounds": config.rounds,
        "seed": config.seed,
        "sampler": config.sampler.model_dump(mode="json"),
        "aggregator": config.aggregator.model_dump(mode="json"),
        "server_optimizer": (
            config.server_optimizer.model_dump(mode="json") if config.server_optimizer else None
        ),
        "screen": config.screen.model_dump(mode="json"),
        "write_back": config.write_back.model_dump(mode="json"),
        "evaluate": config.evaluate.model_dump(mode="json"),
        "digest": plan.digest,
        "clients": [
            {
                "name": client.name,
                "submodel": client.submodel.label,
                "rows": len(client.rows),
                "categories": dict(client.categories),
                "data_digest": client.data_digest,
                "rank": client.adapter.r,
                "preset": client.adapter.preset,
                "weight": client.weight,
            }
            for client in plan.clients
        ],
    }
