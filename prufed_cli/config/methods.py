"""Method names and their settings, checked against the installed plugins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from prufed_cli.config.messages import Problem, near
from prufed_cli.config.models import (
    AggregatorConfig,
    MethodSection,
    PartitionConfig,
    PrunerConfig,
    PrunerOverride,
    SamplerConfig,
    ServerOptimizerConfig,
    TunerConfig,
    TunerOverride,
    merged,
    none_by_name,
    pruner_for,
)
from prufed_cli.config.pruners import drops_layers, removes_entries
from prufed_plugins.discover import catalog, check_settings
from prufed_plugins.errors import MethodError

if TYPE_CHECKING:
    from prufed_cli.config.yaml_source import KeyPath
    from prufed_plugins.api import Kind

AnySection = TypeVar("AnySection", bound=MethodSection)


def method_problems(document: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield what the plugins say about every method that ``document`` names.

    Sections are taken one by one from the plain document, so that a typing error in one does not
    hide what is wrong with another.
    """
    yield from _plain(document, "sampler", SamplerConfig, ("sampler",))
    yield from _plain(document, "aggregator", AggregatorConfig, ("aggregator",))
    yield from _server_data(document)
    if none_by_name(document.get("server_optimizer")) is not None:
        yield from _plain(document, "optimizer", ServerOptimizerConfig, ("server_optimizer",))
    data = document.get("data")
    if isinstance(data, Mapping):
        yield from _plain(data, "partitioner", PartitionConfig, ("data", "partition"))
    clients = document.get("clients")
    clients = clients if isinstance(clients, list | tuple) else []
    yield from _pruners(_section(PrunerConfig, document.get("pruner")), clients)
    yield from _tuners(_section(TunerConfig, document.get("tuner")), clients)


def needs_server_data(aggregator: AggregatorConfig) -> bool:
    """Return whether an aggregator needs rows of the server's own.

    Raises:
        MethodError: there is no such aggregator.
    """
    return catalog().get("aggregator", aggregator.name).method.needs_server_data


def _server_data(document: Mapping[str, Any]) -> Iterator[Problem]:
    aggregator = _section(AggregatorConfig, document.get("aggregator"))
    if aggregator is None or document.get("server_data") is not None:
        return
    with suppress(MethodError):  # which is another problem
        if needs_server_data(aggregator):
            message = f"{aggregator.name} needs rows that the server trusts; give `server_data`"
            yield Problem(("aggregator",), message)


def _pruners(pruner: PrunerConfig | None, clients: Sequence[Any]) -> Iterator[Problem]:
    if pruner is None:
        return
    shared = list(section_problems("pruner", pruner, ("pruner",)))
    yield from shared
    for index, client in _mappings(clients):
        own = _section(PrunerOverride, client.get("pruner"))
        if own is not None:
            effective = pruner_for(pruner, own, layers=client.get("keep_layers") is not None)
            path: KeyPath = ("clients", index)
            yield from _own(section_problems("pruner", effective, (*path, "pruner")), shared)
            yield from _unfit(effective.name, client, path)


def _tuners(tuner: TunerConfig | None, clients: Sequence[Any]) -> Iterator[Problem]:
    if tuner is None:
        return
    shared = list(section_problems("tuner", tuner, ("tuner",)))
    yield from shared
    for index, client in _mappings(clients):
        own = _section(TunerOverride, client.get("tuner"))
        if own is not None:
            path: KeyPath = ("clients", index, "tuner")
            yield from _own(section_problems("tuner", merged(tuner, own), path), shared)


def _mappings(clients: Sequence[Any]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    return ((i, client) for i, client in enumerate(clients) if isinstance(client, Mapping))


def validate_settings(kind: Kind, name: str, settings: Mapping[str, Any]) -> list[Problem]:
    """Return what the method ``name`` does not accept; paths are relative to its section.

    An unknown method is one problem, at ``name``.
    """
    try:
        entry = catalog().get(kind, name)
    except MethodError as error:
        message = error.message + (f"; {error.hint}" if error.hint else "")
        return [Problem(("name",), message)]
    return [
        Problem(tuple(filter(None, problem.key.split("."))), problem.message)
        for problem in check_settings(entry.method.params, settings)
    ]


def section_problems(kind: Kind, section: MethodSection, path: KeyPath) -> Iterator[Problem]:
    """Yield the problems of one section that stands at ``path``."""
    for problem in validate_settings(kind, section.name, section.settings):
        first = str(problem.path[0]) if problem.path else ""
        if first in section.settings and first not in (known := _keys(kind, section)):
            message = f"unknown key for the {kind} {section.name}" + near(first, known)
            yield Problem((*path, first), message, at_key=True)
        else:
            yield Problem((*path, *problem.path), problem.message)


def _keys(kind: Kind, section: MethodSection) -> set[str]:
    """Return every key the section may have: ours and the method's."""
    fields = catalog().get(kind, section.name).method.params.model_fields
    own = {field.alias or name for name, field in fields.items()}
    return own | (type(section).model_fields.keys() - {"settings"})


def _own(found: Iterator[Problem], shared: list[Problem]) -> Iterator[Problem]:
    """Yield what a client adds to the problems of the shared section."""
    inherited = {(problem.path[1:], problem.message) for problem in shared}
    yield from (p for p in found if (p.path[3:], p.message) not in inherited)


def _unfit(pruner: str, client: Mapping[str, Any], path: KeyPath) -> Iterator[Problem]:
    """Yield where a client's target and its pruner do not fit."""
    if client.get("keep_layers") is not None and removes_entries(pruner):
        message = f"the pruner {pruner} removes entries, not layers; use one such as `top`"
        yield Problem((*path, "keep_layers"), message, at_key=True)
    if client.get("pattern") is not None and drops_layers(pruner):
        message = f"the pruner {pruner} drops layers; a pattern needs one such as `sparsegpt`"
        yield Problem((*path, "pattern"), message, at_key=True)


def _plain(
    holder: Mapping[str, Any], kind: Kind, model: type[MethodSection], path: KeyPath
) -> Iterator[Problem]:
    section = _section(model, holder.get(str(path[-1])))
    if section is not None:
        yield from section_problems(kind, section, path)


def _section(model: type[AnySection], raw: object) -> AnySection | None:
    """Return a section as far as it is valid; None where its method cannot be told."""
    given = {} if raw is None else raw
    try:
        return model.model_validate(given)
    except ValidationError as error:
        wrong = {entry["loc"][0] for entry in error.errors() if entry["loc"]}
    if not isinstance(given, Mapping) or not wrong or "name" in wrong:
        return None
    return model.model_validate({k: v for k, v in given.items() if k not in wrong})
