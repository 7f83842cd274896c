"""Loading one plugin: everything it must be before its methods are offered.

Whatever is wrong raises, and :mod:`prufed_plugins.discover` makes it cost that plugin only.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from importlib.metadata import EntryPoint
from typing import Final

from pluggy import PluginManager, PluginValidationError

from prufed_plugins.api import API_VERSION, GROUP, HOOKS, HookSpecs, Kind, Method

_NAME: Final = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")
_TARGET: Final = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


class PluginContractError(Exception):
    """A plugin breaks its contract; the message is the reason."""


def load(point: EntryPoint) -> list[tuple[Kind, Method]]:
    """Import a plugin and return the methods it announces.

    Raises:
        PluginContractError: the plugin breaks its contract.
        BaseException: anything its own code raises while it is imported or asked.
    """
    with redirect_stdout(sys.stderr):  # a plugin that prints must not spoil --json
        plugin = point.load()
        _check_version(plugin)
        manager = _register(point.name, plugin)
        methods = [(kind, method) for kind in HOOKS for method in _announced(manager, kind)]
    _check_distinct(methods)
    _check_aliases(methods)
    return methods


def _check_version(plugin: object) -> None:
    if not hasattr(plugin, "PRUFED_API"):
        raise PluginContractError(f"it does not state PRUFED_API; add PRUFED_API = {API_VERSION}")
    stated = plugin.PRUFED_API
    if (
        not isinstance(stated, tuple)
        or len(stated) != 2
        or not all(type(number) is int and number >= 0 for number in stated)
    ):
        raise PluginContractError(
            f"PRUFED_API is {_described(stated)}, not (major, minor) like {API_VERSION}"
        )
    ours = ".".join(map(str, API_VERSION))
    if stated[0] != API_VERSION[0] or stated[1] > API_VERSION[1]:
        theirs = ".".join(map(str, stated))
        raise PluginContractError(f"it is made for plugin API {theirs}, this prufed has {ours}")


def _register(name: str, plugin: object) -> PluginManager:
    """Return a manager with this plugin alone: nobody's wrappers reach into another's hooks."""
    manager = PluginManager(GROUP)
    manager.add_hookspecs(HookSpecs)
    try:
        manager.register(plugin, name)
        manager.check_pending()
    except PluginValidationError as error:
        raise PluginContractError(_hook_fault(manager, error)) from error
    if not manager.get_hookcallers(plugin):
        raise PluginContractError(
            "it implements no hook; mark its functions with prufed_plugins.api.hookimpl"
        )
    return manager


def _hook_fault(manager: PluginManager, error: PluginValidationError) -> str:
    for name, caller in vars(manager.hook).items():
        if not name.startswith("_") and not caller.has_spec():
            return f"unknown hook {name}; there is {', '.join(HOOKS.values())}"
    return f"wrong hook signature: {_one_line(error)}"


def _announced(manager: PluginManager, kind: Kind) -> Iterator[Method]:
    hook = HOOKS[kind]
    for implementation in getattr(manager.hook, hook).get_hookimpls():
        if implementation.wrapper or implementation.hookwrapper:
            raise PluginContractError(
                f"wrong hook signature: {hook} is a wrapper; it must yield methods"
            )
        found = implementation.function()
        if not isinstance(found, Iterable):
            raise PluginContractError(f"{hook} gave {_described(found)}, not an iterable of Method")
        for method in found:
            _check_method(hook, method)
            yield method


def _check_method(hook: str, method: object) -> None:
    if not isinstance(method, Method):
        raise PluginContractError(f"{hook} yielded {_described(method)}, not a Method")
    if not isinstance(method.name, str) or not _NAME.fullmatch(method.name):
        raise PluginContractError(
            f"{hook}: the name {_described(method.name)} is not lower-case words and hyphens"
        )
    for problem in _problems(method):
        raise PluginContractError(f"{method.name}: {problem}")


def _problems(method: Method) -> Iterator[str]:
    from pydantic import BaseModel

    if not isinstance(method.target, str) or not _TARGET.fullmatch(method.target):
        yield f"the target {_described(method.target)} is not package.module:Class"
    if not isinstance(method.summary, str) or len(method.summary.splitlines()) != 1:
        yield f"the summary {_described(method.summary)} is not one line of text"
    if not isinstance(method.requires, tuple) or not all(
        isinstance(name, str) for name in method.requires
    ):
        yield f"requires is {_described(method.requires)}, not a tuple of distributions"
    model = method.params
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        yield f"params is {_described(model)}, not a pydantic model"
    elif not model.model_config.get("frozen") or model.model_config.get("extra") != "forbid":
        yield f'params {model.__name__} must have frozen=True and extra="forbid"'


def _check_distinct(methods: list[tuple[Kind, Method]]) -> None:
    seen: set[tuple[Kind, str]] = set()
    for kind, method in methods:
        if (kind, method.name) in seen:
            raise PluginContractError(f"it announces the {kind} {method.name} twice")
        seen.add((kind, method.name))


def _check_aliases(methods: list[tuple[Kind, Method]]) -> None:
    known = {(kind, method.name): method for kind, method in methods}
    for kind, method in methods:
        if method.alias_of is None:
            continue
        meant = known.get((kind, method.alias_of))
        if meant is None or meant.alias_of is not None:
            raise PluginContractError(
                f"{method.name} is an alias of {_described(method.alias_of)}, "
                f"which is no {kind} of its own here"
            )
        if (method.target, method.params) != (meant.target, meant.params):
            raise PluginContractError(
                f"{method.name} is an alias of {meant.name}, but has another target or params"
            )


def reason(error: BaseException) -> str:
    """Return in one line what went wrong with a plugin."""
    if isinstance(error, PluginContractError):
        return str(error)
    return f"{type(error).__name__}: {_one_line(error)}".removesuffix(": ")


def _one_line(error: BaseException) -> str:
    try:
        text = " ".join(str(error).split())
    except Exception:  # an exception of somebody else's that cannot even be printed
        text = "(it cannot say why)"
    return text if len(text) <= 300 else text[:299] + "…"


def _described(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"a {type(value).__name__}"
