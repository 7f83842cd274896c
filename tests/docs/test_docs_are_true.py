"""docs/ is complete, its links lead somewhere, and its generated pages are those of today."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import runpy
from pathlib import Path

import pytest
from docs_reading import DOCS, ROOT, anchors, blocks, links, name_of, pages

import prufed_cli
from prufed_cli import errors
from prufed_cli.main import VERBS
from prufed_plugins.api import HOOKS
from prufed_plugins.discover import catalog

SOURCES = [
    path
    for floor in ("prufed_cli", "plugins/prufed_plugins", "registry/prufed_registry")
    for path in sorted((ROOT / floor).rglob("*.py"))
]
GENERATOR = Path(__file__).parent / "generate.py"
READS = {"os.getenv", "os.environ.get", "os.environ.pop", "os.environ.setdefault"}
ERROR_MODULES = (
    "prufed_cli.errors",
    "prufed_cli.config.messages",
    "prufed_plugins.errors",
    "prufed_plugins.loading",
    "prufed_registry.errors",
)


def documented() -> str:
    return "\n".join(page.read_text(encoding="utf-8") for page in pages())


def test_generated_pages_are_those_of_today() -> None:
    generator = runpy.run_path(str(GENERATOR))
    for path, text in generator["documents"]().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is stale: run `make docs`"


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_relative_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), f"{name_of(page)} links to {link}"
        assert not anchor or anchor in anchors(target), f"{name_of(page)} links to {link}"


def test_the_index_leads_to_every_page() -> None:
    index = DOCS / "index.md"
    linked = {(DOCS / link).resolve() for link in links(index)}
    assert {page for page in pages() if page != index} <= linked


def test_every_hook_is_described() -> None:
    text = documented()
    assert [hook for hook in HOOKS.values() if f"`{hook}`" not in text] == []


def test_every_exit_code_is_described() -> None:
    table = (DOCS / "reference" / "errors.md").read_text(encoding="utf-8")
    codes = {name: code for name, code in vars(errors).items() if name.isupper()}
    codes.pop("TYPE_CHECKING", None)
    assert len(codes) == 7
    assert [n for n, code in codes.items() if f"| {code} | `{n}` |" not in table] == []


def test_every_environment_variable_is_described() -> None:
    table = (DOCS / "reference" / "errors.md").read_text(encoding="utf-8")
    read = {name for path in SOURCES for name in environment_variables(path)}
    assert {"PRUFED_HOME", "PRUFED_BASE", "PRUFED_DISABLE_PLUGINS"} <= read
    assert {name for name in read if f"| `{name}` |" not in table} == set()


def environment_variables(path: Path) -> set[str]:
    """Return the names by which a module uses ``os.environ``, constants of the module included."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    constants = {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Constant)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    keys: list[ast.expr] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args:
            if ast.unparse(node.func) in READS:
                keys.append(node.args[0])
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
            keys.append(node.slice)
        elif isinstance(node, ast.Compare) and ast.unparse(node.comparators[0]) == "os.environ":
            keys.append(node.left)
    found = set()
    for key in keys:
        name = key.value if isinstance(key, ast.Constant) else constants.get(ast.unparse(key))
        assert isinstance(name, str), f"{path}: which variable is {ast.unparse(key)}?"
        found.add(name)
    return found


def test_every_public_error_is_described() -> None:
    text = documented()
    classes = {
        name
        for module in ERROR_MODULES
        for name, value in vars(importlib.import_module(module)).items()
        if inspect.isclass(value) and issubclass(value, Exception) and value.__module__ == module
    }
    assert {"PrufedError", "MethodError", "RegistryError"} <= classes
    assert [name for name in sorted(classes) if not re.search(rf"\b{name}`", text)] == []


def test_every_command_has_an_example() -> None:
    shown = "\n".join(
        block.text
        for page in pages()
        for block in blocks(page)
        if block.language in {"bash", "console"}
    )
    verbs = [verb for group in VERBS.values() for verb in group]
    assert [verb for verb in verbs if not re.search(rf"\bprufed {verb}\b", shown)] == []


def test_examples_that_are_only_read_have_options_that_exist() -> None:
    generator = runpy.run_path(str(GENERATOR))
    commands = {
        path: command
        for group in VERBS.values()
        for verb in group
        for path, command in generator["commands_of"](verb)
    }
    lines = [
        (block.place, line.removeprefix("$ "))
        for page in pages()
        for block in blocks(page)
        if block.language == "console"
        for line in block.text.splitlines()
        if line.startswith("$ prufed ")
    ]
    assert lines
    for place, line in lines:
        words = line.split()
        path = " ".join(words[:3]) if " ".join(words[:3]) in commands else " ".join(words[:2])
        known = {name for option in commands[path].params for name in option.opts}
        used = {word for word in words if word.startswith("--")}
        assert used <= known, f"{place}: {line}"


def test_every_built_in_method_is_listed() -> None:
    page = (DOCS / "reference" / "methods.md").read_text(encoding="utf-8")
    names = {entry.name for entry in catalog().entries.values() if entry.builtin}
    assert {name for name in names if f"### {name}\n" not in page} == set()


def test_every_function_of_the_python_api_is_described() -> None:
    page = (DOCS / "tasks" / "python.md").read_text(encoding="utf-8")
    assert [name for name in prufed_cli.__all__ if not re.search(rf"\b{name}\b", page)] == []


def test_the_python_api_hides_no_module() -> None:
    modules = {path.stem for path in (ROOT / "prufed_cli").iterdir()}
    assert not modules & set(prufed_cli.__all__)
    for name in prufed_cli.__all__:
        assert getattr(prufed_cli, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        prufed_cli.nothing  # noqa: B018
