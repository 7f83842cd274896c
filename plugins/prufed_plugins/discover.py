"""Finding plugins, and making their methods.

pluggy's own loader lets one broken plugin take the program down. Here each plugin is loaded,
checked and asked for its methods on its own: what goes wrong costs that plugin only, and is kept
as a :class:`Failure` for whoever wants to show it. Nothing is printed.

Importing this module imports neither torch nor pydantic; looking for plugins never imports torch,
unless a stranger's plugin does.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.metadata import EntryPoint, PackageNotFoundError, distribution, entry_points
from typing import Any, Final

from prufed_plugins.api import GROUP, HOOKS, Kind, Method
from prufed_plugins.errors import MethodError
from prufed_plugins.loading import PluginContractError, load, reason
from prufed_plugins.settings import check_settings as check_settings
from prufed_plugins.settings import parse_settings as parse_settings
from prufed_plugins.settings import validate

DISABLE: Final = "PRUFED_DISABLE_PLUGINS"
"""Plugins or distributions not to load, separated by commas; ``*`` is every third party's."""

BUILTIN: Final = "prufed"
"""The distribution whose methods are built in: they are never disabled and win every clash."""


@dataclass(frozen=True)
class Entry:
    """One method that can be used.

    Attributes:
        kind: what it is.
        name: what a user types: the method's name, or ``distribution:name`` where that is taken.
        method: its description.
        distribution: the distribution that brought it.
        version: that distribution's version.
    """

    kind: Kind
    name: str
    method: Method
    distribution: str
    version: str

    @property
    def builtin(self) -> bool:
        """Whether the method came with prufed itself."""
        return self.distribution == BUILTIN


@dataclass(frozen=True)
class Failure:
    """What is wrong with one plugin.

    Attributes:
        plugin: the name of its entry point.
        distribution: the distribution that announced it.
        reason: one line.
        skipped: whether the plugin was left out; False where only a name is taken.
    """

    plugin: str
    distribution: str
    reason: str
    skipped: bool = True

    def __str__(self) -> str:
        """Return the one line that stands on stderr."""
        verdict = "skipped" if self.skipped else "loaded"
        return f"plugin {self.plugin} of {self.distribution} {verdict}: {self.reason}"


class Catalog:
    """The methods that were found, and what went wrong.

    Attributes:
        entries: every method by kind and name; of each kind the built-ins come first.
        failures: what is wrong with each broken plugin.
        disabled: ``(plugin, distribution)`` of those not loaded because the user said so.
    """

    def __init__(
        self,
        entries: Mapping[tuple[Kind, str], Entry],
        failures: tuple[Failure, ...] = (),
        disabled: tuple[tuple[str, str], ...] = (),
    ) -> None:
        self.entries = dict(entries)
        self.failures = failures
        self.disabled = disabled

    def methods(self, kind: Kind) -> list[Entry]:
        """Return the methods of a kind: the built-ins first, in the order they are announced."""
        return [entry for entry in self.entries.values() if entry.kind == kind]

    def named(self, name: str) -> list[Entry]:
        """Return the methods a name may mean: ``name``, ``kind:name`` or ``distribution:name``."""
        kind, _, rest = name.partition(":")
        kinds = [known for known in HOOKS if known == kind and rest] or list(HOOKS)
        sought = rest if kind in HOOKS and rest else name
        found = (self._find(known, sought) for known in kinds)
        return [entry for entry in found if entry is not None]

    def get(self, kind: Kind, name: str) -> Entry:
        """Return one method. Underscores stand for hyphens.

        Raises:
            MethodError: there is none of that name; the hint has near names.
        """
        found = self._find(kind, name)
        if found is None:
            raise MethodError(f"no {kind} is called {name!r}", self._near(kind, name))
        return found

    def canonical(self, kind: Kind, name: str) -> str:
        """Return the one name of a method that may have several, by any spelling of any of them.

        Raises:
            MethodError: as :meth:`get`.
        """
        entry = self.get(kind, name)
        if entry.method.alias_of is None:
            return entry.name
        return next(
            other.name
            for other in self.methods(kind)
            if (other.distribution, other.method.name)
            == (entry.distribution, entry.method.alias_of)
        )

    def _find(self, kind: Kind, name: str) -> Entry | None:
        spelled = name.replace("_", "-")
        if (kind, spelled) in self.entries:
            return self.entries[kind, spelled]
        source, colon, rest = spelled.rpartition(":")
        if not colon:
            return None
        for entry in self.entries.values():
            if (entry.kind, entry.method.name) == (kind, rest) and _plain(
                entry.distribution
            ) == _plain(source):
                return entry
        return None

    def _near(self, kind: Kind, name: str) -> str:
        from difflib import get_close_matches

        known = [entry.name for entry in self.methods(kind)]
        near = get_close_matches(name.replace("_", "-"), known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there is {', '.join(known)}"
        if self.disabled or any(failure.skipped for failure in self.failures):
            hint += "; `prufed plugins` says which plugins were left out"
        return hint


def catalog() -> Catalog:
    """Return the methods of this installation; found once per process and value of the variable."""
    return _installed(os.environ.get(DISABLE, ""))


@lru_cache(maxsize=4)
def _installed(disable: str) -> Catalog:
    names = frozenset(_plain(name) for name in disable.split(",") if name.strip())
    return discover(entry_points(group=GROUP), names)


def discover(points: Iterable[EntryPoint], disabled: frozenset[str] = frozenset()) -> Catalog:
    """Load each plugin on its own and collect its methods.

    A built-in that is broken is a bug of ours and raises; anybody else's becomes a failure.

    Args:
        points: the entry points, in any order: the built-ins come first, then the distributions by
            name, so that a clash always ends the same way.
        disabled: plain names of entry points or distributions to leave alone; ``*`` is all.
    """
    entries: dict[tuple[Kind, str], Entry] = {}
    failures: list[Failure] = []
    left_alone: list[tuple[str, str]] = []
    for point in sorted(points, key=_precedence):
        source, version = _origin(point)
        if source == BUILTIN:
            _add(entries, load(point), source, version)
        elif disabled & {"*", _plain(point.name), _plain(source)}:
            left_alone.append((point.name, source))
        else:
            try:
                clashes = _add(entries, load(point), source, version)
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # sys.exit at import and panics of extension modules too
                failures.append(Failure(point.name, source, reason(error)))
            else:
                failures += [Failure(point.name, source, said, skipped=False) for said in clashes]
    by_kind = {key: entries[key] for kind in HOOKS for key in entries if key[0] == kind}
    return Catalog(by_kind, tuple(failures), tuple(left_alone))


def build(kind: Kind, name: str, settings: Mapping[str, Any] | None = None) -> Any:
    """Return a method ready to run.

    Raises:
        MethodError: no such method, a setting is not accepted, a distribution it needs is missing,
            or its implementation cannot be imported.
    """
    entry = catalog().get(kind, name)
    return construct(entry, settings or {})


def canonical(kind: Kind, name: str) -> str:
    """Return the name under which a method's work is known, whatever it was called by.

    Raises:
        MethodError: no such method.
    """
    return catalog().canonical(kind, name)


def construct(entry: Entry, settings: Mapping[str, Any]) -> Any:
    """Return the method of an entry, constructed with validated settings.

    Raises:
        MethodError: as :func:`build`.
    """
    label = f"{entry.kind} {entry.name}"
    params = validate(label, entry.method.params, settings)
    missing = missing_requirements(entry)
    if missing:
        needs = ", ".join(missing)
        raise MethodError(
            f"{label} needs {needs}, not installed", f"pip install {' '.join(missing)}"
        )
    return _import_target(label, entry)(params)


def missing_requirements(entry: Entry) -> list[str]:
    """Return the distributions that a method needs and that are not installed."""
    return [name for name in entry.method.requires if not _is_installed(name)]


def _import_target(label: str, entry: Entry) -> Any:
    module, _, attribute = entry.method.target.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except Exception as error:  # importing a stranger's module may raise anything
        raise MethodError(
            f"{label} cannot be imported from {entry.method.target}: {reason(error)}",
            f"reinstall it: pip install --force-reinstall {entry.distribution}",
        ) from error


def _is_installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def _precedence(point: EntryPoint) -> tuple[bool, str, str]:
    source, _ = _origin(point)
    return source != BUILTIN, source, point.name


def _origin(point: EntryPoint) -> tuple[str, str]:
    """Return the distribution and its version, though its metadata be damaged."""
    try:
        name, version = point.dist.name, point.dist.version  # type: ignore[union-attr]
    except Exception:  # what damaged metadata raises depends on the version of Python
        name, version = None, None
    return name or point.value, version or "unknown"


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def _add(
    entries: dict[tuple[Kind, str], Entry],
    methods: list[tuple[Kind, Method]],
    source: str,
    version: str,
) -> list[str]:
    """Enter a plugin's methods, those whose name is taken as ``distribution:name``; say which."""
    clashes = []
    added: dict[tuple[Kind, str], Entry] = {}
    for kind, method in methods:
        name = method.name
        if (kind, name) in entries:
            owner = entries[kind, name].distribution
            name = f"{source}:{method.name}"
            clashes.append(f"the {kind} {method.name} is taken by {owner}; use {name}")
        if (kind, name) in entries:
            raise PluginContractError(f"the {kind} {name} is taken too; no name is left for it")
        added[kind, name] = Entry(kind, name, method, source, version)
    entries.update(added)
    return clashes
