"""What each client runs, as its configuration says it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prufed_cli.config.pruners import drops_layers
from prufed_cli.errors import USAGE, PrufedError
from prufed_cli.pruning import PruneRequest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from prufed_cli.config import FederationConfig
    from prufed_cli.config.models import ClientConfig
    from prufed_registry import Registry


@dataclass(frozen=True)
class SubModel:
    """What a client runs.

    Attributes:
        label: for people: ``dense``, ``sparsegpt 75 %``, ``top, 16 layers``.
        reference: an artifact that exists, or the base itself; None where it is to be made.
        request: how it is made; None where it exists.
        sparsity: share of entries (or of layers) removed, where the configuration says it.
        layers: how many decoder layers it has; None where nothing says it yet.
        density: share of the full model's decoder entries that it has; None likewise.
    """

    label: str
    reference: str | None
    request: PruneRequest | None
    sparsity: float | None
    layers: int | None
    density: float | None


def whole(base: str, layers: int | None) -> SubModel:
    """Return the full model as a sub-model of itself."""
    return SubModel("dense", base, None, 0.0, layers, 1.0)


def plan_submodel(
    config: FederationConfig,
    client: ClientConfig,
    base: str,
    layers: int | None,
    registry: Registry,
) -> SubModel:
    """Return what a client runs.

    Args:
        config: the run.
        client: one of its clients.
        base: the full model.
        layers: its decoder layers; None where it is not here yet.
        registry: has the sub-models made before.

    Raises:
        PrufedError: a sub-model made before is no artifact, or more layers are kept than there are.
        NotFound: there is no such artifact.
    """
    if client.base is not None:
        return _made_before(client, client.base, base, layers, registry)
    pruner = config.pruner_of(client)
    if client.keep_layers is not None and pruner.name == "explicit":
        _check_list(client, pruner.settings, layers)
    if client.sparsity == 0 or (client.keep_layers is not None and client.keep_layers == layers):
        return whole(base, layers)
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
    sparsity, kept = _sparsity(client), layers
    density = None if sparsity is None else 1 - sparsity
    if client.keep_layers is not None or drops_layers(pruner.name):
        kept = _kept(client, layers)
        density = kept / layers if kept and layers else None
    return SubModel(_label(pruner.name, client), None, request, sparsity, kept, density)


def _check_list(client: ClientConfig, settings: Mapping[str, Any], layers: int | None) -> None:
    """Refuse a list of layers that is not as long as the client says.

    Raises:
        PrufedError: as said.
    """
    listed = settings.get("layers")
    kept = None if listed is None else len(listed)
    if listed is None and layers is not None:
        kept = layers - len(settings.get("drop_layers") or ())
    if kept is not None and kept != client.keep_layers:
        raise PrufedError(
            f"client {client.name} keeps {client.keep_layers} layers, but its list leaves {kept}",
            "make keep_layers and the list of explicit agree",
            USAGE,
        )


def _kept(client: ClientConfig, layers: int | None) -> int | None:
    """Return how many layers a client keeps whose pruner drops layers."""
    if client.keep_layers is not None or layers is None:
        return client.keep_layers
    return layers - round(layers * (client.sparsity or 0.0))


def _made_before(
    client: ClientConfig, reference: str, base: str, layers: int | None, registry: Registry
) -> SubModel:
    if "/" in reference:
        raise PrufedError(
            f"client {client.name}: its base {reference} is not an artifact, so nothing "
            f"tells that it was made from {base}",
            "name an artifact that `prufed prune` made, such as my-model@v3",
            USAGE,
        )
    artifact = registry.resolve(reference)
    details = artifact.manifest.details
    kept = len(details["kept_layers"]) if details.get("kept_layers") else layers
    entries = float(details["sparsity"]) if details.get("result") == "masked" else 0.0
    density = (1 - entries) * kept / layers if kept and layers else None
    return SubModel(reference, artifact.ref, None, None, kept, density)


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
