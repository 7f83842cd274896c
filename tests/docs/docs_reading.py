"""Reads the pages of docs/: their fenced blocks, their links, their headings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
DOCS: Final = ROOT / "docs"
README: Final = ROOT / "README.md"

_FENCE = re.compile(r"^```([a-z]*) ?(.*)$")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        language: what stands right behind the fence.
        file: the file that the block is, where the fence names one.
        text: what is inside.
        place: ``page:line``, for messages.
    """

    language: str
    file: str
    text: str
    place: str


def pages() -> list[Path]:
    return sorted(DOCS.rglob("*.md"))


def name_of(page: Path) -> str:
    return page.relative_to(DOCS if page.is_relative_to(DOCS) else ROOT).as_posix()


def blocks(page: Path) -> Iterator[Block]:
    opened: tuple[str, str, int] | None = None
    inside: list[str] = []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        fence = _FENCE.match(line)
        if opened is None and fence:
            opened, inside = (fence[1], fence[2].strip(), number), []
        elif opened is not None and line == "```":
            language, file, start = opened
            text = "\n".join(inside) + "\n"
            yield Block(language, file, text, f"{name_of(page)}:{start}")
            opened = None
        else:
            inside.append(line)
    assert opened is None, f"{page}: a fence is not closed"


def links(page: Path) -> list[str]:
    """Return the targets of the links outside of fences."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return _LINK.findall(re.sub(r"`[^`\n]*`", "", prose))


def anchors(page: Path) -> set[str]:
    """Return the anchors GitHub gives to the headings of a page."""
    found = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.M)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in found)
    return {heading.strip().replace(" ", "-") for heading in plain}
