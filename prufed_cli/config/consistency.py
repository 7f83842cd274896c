"""Rules that concern more than one key of clients.yaml.

They look at the plain document, not at the validated model, so that they are reported together with
whatever else is wrong; values of a wrong type are left to the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prufed_cli.config.messages import Problem
from prufed_cli.config.models import ROOT, TARGETS


def contradictions(document: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield what does not fit together in ``document``."""
    clients = document.get("clients")
    if not isinstance(clients, list | tuple):
        return
    yield from _same_names(clients)
    if document.get("server_data") is not None:
        yield from _server_name(clients)
    shared = document.get("data") is not None
    for index, client in enumerate(clients):
        if isinstance(client, Mapping):
            yield from _client(index, client, shared=shared)
    needed = document.get("min_clients", 1)
    if isinstance(needed, int) and clients and needed > len(clients):
        yield Problem(("min_clients",), f"{needed} are needed but there are {len(clients)} clients")


def _same_names(clients: list[Any] | tuple[Any, ...]) -> Iterator[Problem]:
    first: dict[str, int] = {}
    for index, client in enumerate(clients):
        name = client.get("name") if isinstance(client, Mapping) else None
        if not isinstance(name, str):
            continue
        if name in first:
            message = f"{name!r} is also the name of clients.{first[name]}"
            yield Problem(("clients", index, "name"), message)
        first.setdefault(name, index)


def _server_name(clients: list[Any] | tuple[Any, ...]) -> Iterator[Problem]:
    for index, client in enumerate(clients):
        if isinstance(client, Mapping) and client.get("name") == ROOT:
            message = f"{ROOT!r} is what the server's own adapter is called; choose another name"
            yield Problem(("clients", index, "name"), message)


def _client(index: int, client: Mapping[str, Any], *, shared: bool) -> Iterator[Problem]:
    path = ("clients", index)
    given = [key for key in client if key in TARGETS and client[key] is not None]
    if len(given) > 1:
        message = f"give one of {', '.join(TARGETS)}, not both {given[0]} and {given[1]}"
        yield Problem((*path, given[1]), message, at_key=True)
    if client.get("base") is not None and client.get("pruner") is not None:
        message = "a client with a base of its own is not pruned; remove `pruner` or `base`"
        yield Problem((*path, "pruner"), message, at_key=True)
    if not shared and client.get("data") is None:
        yield Problem(path, "no data: give it `data`, or the federation a shared `data.path`")
