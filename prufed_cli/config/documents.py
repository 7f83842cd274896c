"""Check a configuration that is a document in memory: a stored run, or values replaced."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from prufed_cli.config.loading import check
from prufed_cli.config.messages import ConfigError, describe
from prufed_cli.config.models import FederationConfig
from prufed_cli.config.yaml_source import Source


def validated(document: Mapping[str, Any]) -> FederationConfig:
    """Return the configuration a document stands for, held to the rules of a file.

    Paths that are not absolute are relative to the working directory.

    Raises:
        ConfigError: every error, each with its key.
    """
    source = Source((), value=deepcopy(dict(document)))
    config, problems = check(source, Path("configuration"))
    if config is None or problems:
        raise ConfigError("\n".join(dict.fromkeys(describe(problem) for problem in problems)))
    return config
