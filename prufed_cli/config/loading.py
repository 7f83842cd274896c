"""From a clients.yaml file to a checked configuration, or to everything that is wrong with it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from prufed_cli.config.consistency import contradictions
from prufed_cli.config.files import resolve_paths
from prufed_cli.config.messages import ConfigError, Problem, explain, render
from prufed_cli.config.methods import method_problems
from prufed_cli.config.models import FederationConfig
from prufed_cli.config.yaml_source import KeyPath, Source, parse
from prufed_cli.errors import NOT_FOUND
from prufed_registry.names import is_name


def load(path: Path) -> FederationConfig:
    """Return the configuration in a file.

    Paths in it are relative to the file's directory; the result has absolute ones. Data files must
    exist, methods must be installed and accept their settings.

    Raises:
        ConfigError: the message lists every error with line, column and source; exit code 3 where
            there is no such file, else 2.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        message = f"no configuration file {str(path)!r}"
        raise ConfigError(message, f"`prufed init {path}` writes one", NOT_FOUND) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot read {str(path)!r}: {reason}", "name a clients.yaml") from error
    source = parse(data)
    config, problems = check(source, path)
    if config is None or problems or source.faults:
        raise ConfigError(render(str(path), source, problems))
    return config


def check(source: Source, path: Path) -> tuple[FederationConfig | None, list[Problem]]:
    """Return the configuration, None where it is unusable, and all that is wrong beyond YAML."""
    if source.value is None and source.faults:
        return None, []
    if not isinstance(source.value, dict):
        return None, [Problem((), "the top level must be a mapping with the key `clients`")]
    document = source.value
    document.setdefault("name", default_name(path))
    problems = list(resolve_paths(document, path.absolute().parent))
    problems += contradictions(document)
    problems += method_problems(document)
    try:
        return FederationConfig.model_validate(document), problems
    except ValidationError as error:
        return None, problems + _model_problems(error)


def default_name(path: Path) -> str:
    """Return a valid name made from a file's: ``My Clients.yaml`` gives ``my-clients``."""
    slug = re.sub(r"[^a-z0-9._-]+", "-", path.stem.lower()).strip("._-")[:46].rstrip("._-")
    if is_name(slug):
        return slug
    return f"federation-{slug}" if slug else "federation"


def _model_problems(error: ValidationError) -> list[Problem]:
    # The rule at the very top repeats the contradictions, for configurations made in Python.
    entries = [entry for entry in error.errors() if entry["loc"]]
    # A list whose items are wrong is also reported as too short: the items say it better.
    inside = {entry["loc"][:depth] for entry in entries for depth in range(len(entry["loc"]))}
    return [_problem(entry) for entry in entries if entry["loc"] not in inside]


def _problem(error: Mapping[str, Any]) -> Problem:
    location: KeyPath = tuple(error["loc"])
    unknown = error["type"] == "extra_forbidden"
    known = _known_keys(location[:-1]) if unknown else ()
    return Problem(location, explain(error, known), at_key=unknown)


def _known_keys(path: KeyPath) -> list[str]:
    """Return the keys allowed in the mapping at ``path``, by the JSON schema."""
    schema = _schema()
    definitions = schema["$defs"]
    node: Mapping[str, Any] = schema
    for part in path:
        node = node.get("items", {}) if isinstance(part, int) else node["properties"][part]
        node = next(_alternatives(node, definitions), {})
    return list(node.get("properties", ()))


@cache
def _schema() -> dict[str, Any]:
    return FederationConfig.model_json_schema()


def _alternatives(
    node: Mapping[str, Any], definitions: Mapping[str, Any]
) -> Iterator[Mapping[str, Any]]:
    """Yield what a schema node stands for: itself, what it refers to, or its mapping variants."""
    if "$ref" in node:
        node = definitions[node["$ref"].rpartition("/")[2]]
    for option in node.get("anyOf", (node,)):
        if option is node:
            yield node
        else:
            yield from _alternatives(option, definitions)
