"""Is everything here that prufed needs, and what to do about what is not."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from prufed_cli.disk import free_at
from prufed_cli.environment import versions
from prufed_cli.home import home, open_registry, runs_directory

Status = Literal["ok", "warning", "error"]

LOW_DISK: Final = 5 * 10**9
HUB_TIMEOUT: Final = 5.0
_SHOWN: Final = (
    "prufed",
    "torch",
    "transformers",
    "peft",
    "safetensors",
    "huggingface-hub",
    "lm-eval",
    "datasets",
    "typer",
    "pydantic",
)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        topic: what.
        status: ``ok``, ``warning`` or ``error``.
        found: what was found.
        advice: what to do about it; empty where nothing is to be done.
    """

    topic: str
    status: Status
    found: str
    advice: str = ""


def examine(*, network: bool = True) -> list[Finding]:
    """Look at versions, devices, registry, runs, plugins, disk and the Hub.

    Args:
        network: whether to try to reach the Hub.
    """
    checks: list[Callable[[], list[Finding]]] = [
        _versions,
        _devices,
        _registry,
        _runs,
        _plugins,
        _disk,
    ]
    if network:
        checks.append(_hub)
    return [finding for check in checks for finding in check()]


def _versions() -> list[Finding]:
    found = versions(_SHOWN)
    python = Finding("python", "ok", f"{platform.python_version()} on {platform.platform()}")
    listed = ", ".join(f"{name} {version}" for name, version in found.items())
    missing = [name for name in _SHOWN if name not in found]
    if missing:
        return [
            python,
            Finding(
                "packages",
                "error",
                f"missing: {', '.join(missing)}",
                "pip install --upgrade prufed",
            ),
        ]
    return [python, Finding("packages", "ok", listed)]


def _devices() -> list[Finding]:
    import torch

    threads = f"cpu with {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        names = [
            f"cuda:{index} {torch.cuda.get_device_name(index)} "
            f"({torch.cuda.get_device_properties(index).total_memory / 1e9:.0f} GB)"
            for index in range(torch.cuda.device_count())
        ]
        return [Finding("devices", "ok", ", ".join([*names, threads]))]
    if torch.backends.mps.is_available():
        return [Finding("devices", "ok", f"{threads}; mps where a command says --device mps")]
    if torch.version.cuda and shutil.which("nvidia-smi"):
        return [
            Finding(
                "devices",
                "warning",
                f"{threads}; torch is built for CUDA {torch.version.cuda} but sees no device",
                "check the driver with nvidia-smi, and CUDA_VISIBLE_DEVICES",
            )
        ]
    return [Finding("devices", "ok", f"{threads}; no CUDA device")]


def _registry() -> list[Finding]:
    from prufed_registry.errors import RegistryError

    try:
        registry = open_registry()
        artifacts = registry.list()
        garbage = registry.gc(dry_run=True)
    except RegistryError as error:
        return [Finding("registry", "error", error.message, error.hint or "")]
    damaged = [artifact.ref for artifact in artifacts if artifact.kind == "damaged"]
    place = f"{len(artifacts)} artifacts in {registry.root}"
    if damaged:
        return [
            Finding(
                "registry",
                "error",
                f"{place}; unreadable: {', '.join(damaged[:3])}",
                "`prufed verify` says what is wrong, `prufed rm` removes",
            )
        ]
    if garbage.size > 10**9:
        return [
            Finding(
                "registry",
                "warning",
                f"{place}; {garbage.size / 1e9:.1f} GB that nothing uses",
                "`prufed gc` frees it",
            )
        ]
    return [Finding("registry", "ok", place)]


def _runs() -> list[Finding]:
    from prufed_cli.errors import PrufedError
    from prufed_cli.federation.journal import list_runs

    try:
        runs = list_runs(runs_directory())
    except PrufedError as error:
        return [Finding("runs", "error", error.message, error.hint or "")]
    unfinished = [run.id for run in runs if not run.finished]
    if unfinished:
        return [
            Finding(
                "runs",
                "warning",
                f"{len(runs)} runs, unfinished: {', '.join(unfinished[-3:])}",
                f"`prufed federate --resume {unfinished[-1]}` goes on",
            )
        ]
    return [Finding("runs", "ok", f"{len(runs)} runs")]


def _plugins() -> list[Finding]:
    from prufed_plugins.discover import catalog

    found = catalog()
    if found.failures:
        return [
            Finding(
                "plugins",
                "warning",
                str(failure),
                f"pip install --upgrade {failure.distribution}, or set "
                f"PRUFED_DISABLE_PLUGINS={failure.plugin}",
            )
            for failure in found.failures
        ]
    return [Finding("plugins", "ok", f"{len(found.entries)} methods")]


def _disk() -> list[Finding]:
    place, free = free_at(home())
    if not os.access(place, os.W_OK):
        return [Finding("disk", "error", f"{place} is not writable", "point PRUFED_HOME elsewhere")]
    found = f"{free / 1e9:.1f} GB free at {place}"
    if free < LOW_DISK:
        return [Finding("disk", "warning", found, "`prufed gc`, or point PRUFED_HOME elsewhere")]
    return [Finding("disk", "ok", found)]


def _hub() -> list[Finding]:
    from urllib.parse import urlsplit

    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    host = urlsplit(constants.ENDPOINT).netloc
    signed_in = "signed in" if get_token() else "not signed in"
    if constants.HF_HUB_OFFLINE:
        return [Finding("hub", "warning", "HF_HUB_OFFLINE is set", "unset it to push and pull")]
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT)
    except Exception as error:  # the client of the Hub library decides what this may be
        return [
            Finding(
                "hub",
                "warning",
                f"{host} cannot be reached ({type(error).__name__})",
                "push and pull need it; everything else works without",
            )
        ]
    advice = "" if get_token() else "`hf auth login`, or set HF_TOKEN, to push"
    return [Finding("hub", "ok", f"{host} answers, {signed_in}", advice)]
