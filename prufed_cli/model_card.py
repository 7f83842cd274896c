"""Model cards: a README.md whose first block is YAML that the Hub reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

LICENCE_KEYS: Final = ("license", "license_name", "license_link")


def read_card(directory: Path) -> tuple[dict[str, Any], str]:
    """Return (metadata, body) of the card in a directory; both empty where there is none."""
    path = directory / "README.md"
    if not path.is_file():
        return {}, ""
    text = path.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---\n"):
        return {}, text
    header, separator, body = text[4:].partition("\n---\n")
    if not separator:
        return {}, text
    import yaml

    try:
        metadata = yaml.safe_load(header)
    except yaml.YAMLError:
        metadata = None
    return (metadata if isinstance(metadata, dict) else {}), body


def render_card(metadata: Mapping[str, Any], body: str) -> str:
    """Return the text of a card."""
    import yaml

    header = yaml.safe_dump(dict(metadata), sort_keys=True, allow_unicode=True)
    return f"---\n{header}---\n\n{body.strip()}\n"


def licence(directory: Path) -> dict[str, Any]:
    """Return what the card in a directory says about the licence, for what is derived from it."""
    metadata, _ = read_card(directory)
    return {key: metadata[key] for key in LICENCE_KEYS if key in metadata}
