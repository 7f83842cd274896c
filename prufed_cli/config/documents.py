"""Check a configuration that is a document in memory: a stored run, or values replaced."""

from __future__ import annotations

from typing import Any

from prufed_cli.config.loading import check
from prufed_cli.config.messages import ConfigError, dotted
from prufed_cli.config.models import FederationConfig
from prufed_cli.config.yaml_source import parse


def validated(document: dict[str, Any]) -> FederationConfig:
    """Return the configuration a document stands for; its paths are absolute already.

    Raises:
        ConfigError: every error, each with its key.
    """
    from pathlib import Path

    import yaml

    # By way of YAML, so that a value set on the command line meets the very rules of the file.
    source = parse(yaml.safe_dump(document, sort_keys=False).encode())
    config, problems = check(source, Path("configuration"))
    if config is None or problems or source.faults:
        lines = [f"{dotted(problem.path)}: {problem.message}" for problem in problems]
        raise ConfigError("\n".join(lines or ["the configuration is not usable"]))
    return config
