"""YAML with the position of every key and value, read without constructing any object.

The values are those of YAML 1.2's core schema: ``2:4`` and ``no`` are text, not 124 and false, and
``3e-4`` is a number. Duplicate keys, unknown tags, deep nesting and aliases that expand without
bound are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

KeyPath = tuple[str | int, ...]
"""Where a value stands: keys and list indices from the top."""

MAX_DEPTH: Final = 40
MAX_REPEATED: Final = 50_000
"""How many values aliases may repeat; what stands in the file itself is bounded by its size."""

MAX_BYTES: Final = 8 * 2**20

_TAG: Final = "tag:yaml.org,2002:"
# What YAML takes for the end of a line, so that our line numbers are the parser's.
_LINE_BREAK: Final = re.compile("\r\n|[\n\r\x85\u2028\u2029]")


@dataclass(frozen=True, order=True)
class Position:
    """A place in the file; both numbers count from 1."""

    line: int
    column: int


START: Final = Position(1, 1)


@dataclass(frozen=True)
class Fault:
    """One thing wrong with the text itself."""

    position: Position
    message: str
    path: KeyPath = ()


@dataclass(frozen=True)
class Source:
    """A YAML text, what it says, and where it says it.

    Attributes:
        lines: the text by lines, without line ends.
        value: plain dictionaries, lists and scalars.
        values: where each value begins.
        keys: where the key of each value begins; list items have none.
        faults: what is wrong with the text; ``value`` is partial where there are any.
    """

    lines: tuple[str, ...]
    value: Any = None
    values: Mapping[KeyPath, Position] = field(default_factory=dict)
    keys: Mapping[KeyPath, Position] = field(default_factory=dict)
    faults: tuple[Fault, ...] = ()

    def locate(self, path: KeyPath, *, key: bool = False) -> Position:
        """Return where ``path`` stands, or the nearest thing around it that exists."""
        if key and path in self.keys:
            return self.keys[path]
        while path and path not in self.values:
            path = path[:-1]
        return self.values.get(path, START)


def parse(data: bytes) -> Source:
    """Return what ``data`` says; never raises, what is wrong stands in ``faults``."""
    if len(data) > MAX_BYTES:
        return Source((), faults=(Fault(START, f"larger than {MAX_BYTES >> 20} MiB"),))
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return _not_utf8(data, error)
    lines = tuple(_LINE_BREAK.split(text))
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        return Source(lines, faults=(_syntax_fault(error),))
    except yaml.reader.ReaderError as error:
        position = _position_of_index(text, error.position)
        message = f"the character U+{error.character:04X} is not allowed"
        return Source(lines, faults=(Fault(position, message),))
    if node is None:
        return Source(lines, faults=(Fault(START, "the file is empty"),))
    return _walk(lines, node)


def _walk(lines: tuple[str, ...], node: Node) -> Source:
    walker = _Walker()
    try:
        value = walker.read(node, ())
    except _TooMuchError as error:
        walker.faults.append(error.fault)
        value = None
    return Source(lines, value, walker.values, walker.keys, tuple(walker.faults))


def _not_utf8(data: bytes, error: UnicodeDecodeError) -> Source:
    before = data[: error.start].decode("utf-8-sig", errors="replace")
    lines = tuple(_LINE_BREAK.split(data.decode("utf-8-sig", errors="replace")))
    position = _position_of_index(before, len(before))
    return Source(lines, faults=(Fault(position, "the file is not UTF-8 text"),))


def _position_of_index(text: str, index: int) -> Position:
    before = _LINE_BREAK.split(text[:index])
    return Position(len(before), len(before[-1]) + 1)


def _syntax_fault(error: yaml.MarkedYAMLError) -> Fault:
    mark = error.problem_mark or error.context_mark
    position = Position(mark.line + 1, mark.column + 1) if mark else START
    parts = [part for part in (error.context, error.problem) if part]
    return Fault(position, "not valid YAML: " + ", ".join(parts))


def _start(node: Node) -> Position:
    return Position(node.start_mark.line + 1, node.start_mark.column + 1)


class _Loader(yaml.SafeLoader):
    """The parser of SafeLoader with YAML 1.2's scalars and a bound on nesting."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own protocol
    depth = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        """Compose one node, refusing to go deeper than :data:`MAX_DEPTH`."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.composer.ComposerError(
                None,
                None,
                f"nested more than {MAX_DEPTH} levels deep",
                self.peek_event().start_mark,  # type: ignore[no-untyped-call]
            )
        try:
            node: Node | None = super().compose_node(parent, index)
        finally:
            self.depth -= 1
        return node


for _name, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+|0o[0-7]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", "<<", ["<"]),
):
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(rf"^(?:{_pattern})$"), _first)


def _integer(text: str) -> int:
    return int(text, 0)


def _real(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


_SCALARS: Final[Mapping[str, Callable[[str], Any]]] = {
    _TAG + "str": str,
    _TAG + "null": lambda _: None,
    _TAG + "bool": lambda text: {"true": True, "false": False}[text.lower()],
    _TAG + "int": _integer,
    _TAG + "float": _real,
    _TAG + "merge": str,
}


class _TooMuchError(Exception):
    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.message)
        self.fault = fault


class _Walker:
    """Turns nodes into values, noting where each stands."""

    def __init__(self) -> None:
        self.values: dict[KeyPath, Position] = {}
        self.keys: dict[KeyPath, Position] = {}
        self.faults: list[Fault] = []
        self._open: set[int] = set()
        self._seen: set[int] = set()
        self._repeated = 0

    def read(self, node: Node, path: KeyPath) -> Any:
        """Return the value of ``node``."""
        self._repeated += id(node) in self._seen
        self._seen.add(id(node))
        if self._repeated > MAX_REPEATED:
            raise _TooMuchError(Fault(_start(node), "aliases expand to too many values", path))
        if id(node) in self._open:
            raise _TooMuchError(Fault(_start(node), "an alias refers to itself", path))
        self.values[path] = _start(node)
        self._open.add(id(node))
        try:
            return self._read(node, path)
        finally:
            self._open.remove(id(node))

    def _read(self, node: Node, path: KeyPath) -> Any:
        if isinstance(node, MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, path)
        if isinstance(node, SequenceNode) and node.tag == _TAG + "seq":
            return [self.read(item, (*path, index)) for index, item in enumerate(node.value)]
        if isinstance(node, ScalarNode) and node.tag in _SCALARS:
            return self._scalar(node, path)
        self._fault(node, f"unknown tag {node.tag.replace(_TAG, '!!')}", path)
        return None

    def _scalar(self, node: ScalarNode, path: KeyPath) -> Any:
        try:
            return _SCALARS[node.tag](node.value)
        except (ValueError, KeyError):
            self._fault(node, f"not a valid {node.tag.replace(_TAG, '!!')}", path)
            return None

    def _mapping(self, node: MappingNode, path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        merged: list[Node] = []
        for key_node, value_node in node.value:
            if key_node.tag == _TAG + "merge":
                merged.append(value_node)
                continue
            key = self._key(key_node, path)
            if key is None:
                continue
            if key in result:
                first = self.keys[(*path, key)].line
                self._fault(key_node, f"duplicate key, first on line {first}", (*path, key))
                continue
            self.keys[(*path, key)] = _start(key_node)
            result[key] = self.read(value_node, (*path, key))
        for value_node in merged:
            self._merge(value_node, path, result)
        return result

    def _merge(self, node: Node, path: KeyPath, result: dict[str, Any]) -> None:
        """Add what ``<<: *anchor`` brings; keys that stand in the mapping itself win."""
        nodes = node.value if isinstance(node, SequenceNode) else [node]
        for each in nodes:
            if not isinstance(each, MappingNode) or id(each) in self._open:
                self._fault(each, "`<<` takes another mapping", path)
                continue
            for key_node, value_node in each.value:
                key = self._key(key_node, path)
                if key is not None and key not in result:
                    self.keys[(*path, key)] = _start(key_node)
                    result[key] = self.read(value_node, (*path, key))

    def _key(self, node: Node, path: KeyPath) -> str | None:
        if isinstance(node, ScalarNode) and node.tag == _TAG + "str":
            return str(node.value)
        shown = repr(node.value) if isinstance(node, ScalarNode) else "this"
        self._fault(node, f"a key must be text, {shown} is not; put it in quotes", path)
        return None

    def _fault(self, node: Node, message: str, path: KeyPath) -> None:
        self.faults.append(Fault(_start(node), message, path))
