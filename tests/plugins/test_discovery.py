"""Which of several plugins wins a name, and what a damaged installation costs."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, distributions, entry_points
from pathlib import Path

import pytest

from prufed_plugins.api import GROUP
from prufed_plugins.discover import Catalog, discover
from prufed_plugins.errors import MethodError

SOURCE = """
from prufed_plugins.api import Method, hookimpl
from prufed_plugins.params import NoParams

PRUFED_API = (1, 0)

@hookimpl
def prufed_samplers():
    for name in {names}:
        yield Method(name, "prufed_plugins.samplers.all:AllSampler", NoParams, {summary!r})
"""


class Installation:
    """A directory of distributions, each with plugins that announce samplers."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, distribution: str, *, metadata: bool = True, **plugins: list[str]) -> None:
        info = self.path / f"{distribution}-1.0.dist-info"
        info.mkdir()
        if metadata:
            text = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n"
            (info / "METADATA").write_text(text)
        modules = {plugin: f"installed_{distribution}_{plugin}" for plugin in plugins}
        lines = [f"{plugin} = {module}" for plugin, module in modules.items()]
        (info / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines, ""]))
        for plugin, names in plugins.items():
            source = SOURCE.format(names=names, summary=f"{distribution} {plugin}")
            (self.path / f"{modules[plugin]}.py").write_text(source)

    def discover(self, *disabled: str) -> Catalog:
        points = list(entry_points(group=GROUP))
        return discover(reversed(points), frozenset(disabled))


@pytest.fixture
def installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Installation:
    monkeypatch.syspath_prepend(str(tmp_path))
    known = set(sys.modules)
    yield Installation(tmp_path)  # type: ignore[misc]
    for name in set(sys.modules) - known:
        if name.startswith("installed_"):
            del sys.modules[name]


def origin(catalog: Catalog, name: str) -> str:
    return catalog.get("sampler", name).method.summary


def test_a_built_in_wins_and_then_the_first_distribution_by_name(
    installation: Installation,
) -> None:
    installation.add("zeta", main=["uniform", "new"])
    installation.add("alpha", main=["uniform", "new"])
    found = installation.discover()
    assert found.get("sampler", "uniform").builtin
    assert origin(found, "new") == "alpha main"
    assert origin(found, "alpha:uniform") == origin(found, "alpha:new") == "alpha main"
    assert origin(found, "zeta:uniform") == origin(found, "zeta:new") == "zeta main"
    assert [str(failure) for failure in found.failures] == [
        "plugin main of alpha loaded: the sampler uniform is taken by prufed; use alpha:uniform",
        "plugin main of zeta loaded: the sampler uniform is taken by prufed; use zeta:uniform",
        "plugin main of zeta loaded: the sampler new is taken by alpha; use zeta:new",
    ]


def test_a_name_is_never_overwritten(installation: Installation) -> None:
    installation.add("alpha", a=["new"], b=["new"], c=["other", "new"])
    found = installation.discover()
    assert origin(found, "new") == "alpha a"
    assert origin(found, "alpha:new") == "alpha b"
    assert found.failures[-1].plugin == "c"
    assert found.failures[-1].skipped
    with pytest.raises(MethodError):
        found.get("sampler", "other")


def test_damaged_metadata_costs_nothing_else(installation: Installation) -> None:
    installation.add("alpha", metadata=False, main=["new"])
    found = installation.discover()
    entry = found.get("sampler", "new")
    assert (entry.distribution, entry.version) == ("installed_alpha_main", "unknown")
    assert found.get("sampler", "uniform").builtin


def test_an_entry_point_that_names_no_module_costs_only_itself() -> None:
    found = discover([*entry_points(group=GROUP), EntryPoint("odd", "not a module!", GROUP)])
    assert [failure.plugin for failure in found.failures] == ["odd"]
    assert found.get("sampler", "uniform").builtin


def test_a_hint_tells_that_plugins_were_left_out(installation: Installation) -> None:
    installation.add("alpha", main=["new"])
    with pytest.raises(MethodError) as caught:
        installation.discover("alpha").get("sampler", "new")
    assert str(caught.value.hint).endswith("`prufed plugins` says which plugins were left out")


def test_a_broken_built_in_is_a_bug_and_raises(tmp_path: Path) -> None:
    info = tmp_path / "prufed-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: prufed\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\nbuiltin = a_module_not_there\n")
    [broken] = distributions(path=[str(tmp_path)])
    with pytest.raises(ModuleNotFoundError):
        discover(broken.entry_points)
