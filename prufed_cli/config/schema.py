"""The JSON schema of clients.yaml, for editors: our keys, and those of every installed method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from prufed_cli.config.models import (
    AggregatorConfig,
    FederationConfig,
    MethodSection,
    PartitionConfig,
    PrunerConfig,
    PrunerOverride,
    SamplerConfig,
    ServerOptimizerConfig,
    TunerConfig,
    TunerOverride,
)
from prufed_plugins.discover import catalog

if TYPE_CHECKING:
    from prufed_plugins.api import Kind
    from prufed_plugins.discover import Entry

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"

_SECTIONS: Final[Mapping[type[MethodSection], Kind]] = {
    SamplerConfig: "sampler",
    AggregatorConfig: "aggregator",
    ServerOptimizerConfig: "optimizer",
    PartitionConfig: "partitioner",
    PrunerConfig: "pruner",
    PrunerOverride: "pruner",
    TunerConfig: "tuner",
    TunerOverride: "tuner",
}


def json_schema() -> dict[str, Any]:
    """Return the schema; a section's keys depend on the method it names."""
    schema = FederationConfig.model_json_schema()
    definitions = schema["$defs"]
    for model, kind in _SECTIONS.items():
        entries = catalog().methods(kind)
        definitions[model.__name__] = _section(definitions[model.__name__], model, entries)
        for entry in entries:
            definitions.update(_parameter_definitions(entry))
    return {"$schema": DIALECT, **schema, "title": "clients.yaml"}


def _section(
    generated: Mapping[str, Any], model: type[MethodSection], entries: list[Entry]
) -> dict[str, Any]:
    """Return a section that allows, for each method, that method's parameters."""
    properties = {k: v for k, v in generated["properties"].items() if k != "settings"}
    names = {"anyOf": [{"enum": [entry.name for entry in entries]}, {"type": "string"}]}
    named = model.model_fields["name"]
    default = None if named.is_required() else named.default
    properties["name"] = {
        **names,
        **({"default": default} if default else {}),
        "description": "; ".join(f"{entry.name}: {entry.method.summary}" for entry in entries),
    }
    mapping = {
        "type": "object",
        "properties": properties,
        "allOf": [_when_named(entry, default) for entry in entries],
    }
    return {"anyOf": [mapping, names], "description": generated.get("description", "")}


def _when_named(entry: Entry, default: str | None) -> dict[str, Any]:
    named = {"properties": {"name": {"const": entry.name}}}
    if entry.name != default:
        named["required"] = ["name"]  # type: ignore[assignment]
    return {"if": named, "then": {"$ref": f"#/$defs/{_key(entry)}"}}


def _parameter_definitions(entry: Entry) -> dict[str, Any]:
    """Return the definitions for one method's parameters, its keys open to the section's own."""
    key = _key(entry)
    schema = entry.method.params.model_json_schema(ref_template=f"#/$defs/{key}.{{model}}")
    nested = {f"{key}.{name}": value for name, value in schema.pop("$defs", {}).items()}
    schema.pop("additionalProperties", None)
    return {key: schema, **nested}


def _key(entry: Entry) -> str:
    return f"{entry.kind}.{entry.name}"
