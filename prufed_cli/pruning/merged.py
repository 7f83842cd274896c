"""The sub-models that a pruner merges: what users refer to, once it is known to fit the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

from prufed_cli.errors import USAGE, PrufedError
from prufed_plugins.settings import holds_sub_models

if TYPE_CHECKING:
    from prufed_cli.pruning.request import PruneRequest
    from prufed_registry import Artifact, Registry


def find_sub_models(
    request: PruneRequest, base: Artifact, registry: Registry
) -> tuple[PruneRequest, tuple[Artifact, ...]]:
    """Return a request with directories in the place of references, and what lies there.

    They are ordered by their digests: what is merged hangs on what they are, not on what they are
    called or in which order they are given.

    Raises:
        NotFound: there is no such artifact.
        PrufedError: one is no sub-model of the base with all its layers, or is given twice.
    """
    found: list[Artifact] = []
    settings: dict[str, Any] = dict(request.settings or {})
    for key, references in _references(request).items():
        artifacts = [_sub_model(reference, base, registry) for reference in references]
        artifacts.sort(key=lambda artifact: artifact.digest)
        settings[key] = [str(artifact.path) for artifact in artifacts]
        found += artifacts
    for one, other in pairwise(found):
        if one.digest == other.digest:
            raise PrufedError(
                f"{one.ref} and {other.ref} are the same sub-model"
                if one.ref != other.ref
                else f"{one.ref} is given twice",
                "give each client's once; other text gives another sub-model",
                USAGE,
            )
    return replace(request, settings=settings), tuple(found)


def base_of_sub_models(request: PruneRequest, registry: Registry) -> str | None:
    """Return the model that sub-models were pruned from, where a request names any.

    Raises:
        NotFound: there is no such sub-model.
        PrufedError: the model is not in the registry.
    """
    from prufed_cli.models.base import base_of

    first = next(chain.from_iterable(_references(request).values()), None)
    if first is None:
        return None
    artifact = _named(first, registry)
    return base_of(artifact, registry).ref if artifact.kind == "pruned" else None


def _references(request: PruneRequest) -> Mapping[str, Sequence[str]]:
    """Return what a request names in each parameter that takes sub-models."""
    from prufed_cli.pruning.request import method_settings
    from prufed_plugins.discover import catalog

    params = catalog().get("pruner", request.method).method.params
    keys = [name for name, field in params.model_fields.items() if holds_sub_models(field)]
    if not keys:
        return {}
    given = params.model_validate(method_settings(request))
    return {key: list(map(str, getattr(given, key))) for key in keys}


def _named(reference: str, registry: Registry) -> Artifact:
    if "/" in reference:
        raise PrufedError(
            f"{reference} is no artifact",
            "`prufed import DIR` makes one of what a client sent, and checks it",
            USAGE,
        )
    return registry.resolve(reference)


def _sub_model(reference: str, base: Artifact, registry: Registry) -> Artifact:
    artifact = _named(reference, registry)
    details = artifact.manifest.details
    if artifact.kind != "pruned" or details.get("result") != "masked":
        raise PrufedError(
            f"{artifact.ref} has no masks that could be merged",
            "name a sub-model that an element-wise method made, such as sparsegpt",
            USAGE,
        )
    if details.get("kept_layers") != base.manifest.details.get("kept_layers"):
        raise PrufedError(
            f"{artifact.ref} lacks layers of {base.ref}",
            "merge sub-models that have all of the base's layers",
            USAGE,
        )
    if artifact.manifest.parents[0].digest != base.digest:
        raise PrufedError(
            f"{artifact.ref} was pruned from {artifact.manifest.parents[0].ref}, not {base.ref}",
            f"only sub-models of one base can be merged: --base {artifact.manifest.parents[0].ref}",
            USAGE,
        )
    return artifact
