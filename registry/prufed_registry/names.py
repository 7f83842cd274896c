"""The words of a reference: names, versions, aliases, digests, and the paths inside an artifact."""

from __future__ import annotations

import re
from dataclasses import dataclass

from prufed_registry.errors import InvalidRequest

KINDS = ("base", "pruned", "client-adapter", "global-adapter", "merged")
ADAPTER_KINDS = ("client-adapter", "global-adapter")

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,94}[a-z0-9]")
_VERSION_LIKE = re.compile(r"v[0-9]+")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_DIGEST_PREFIX = re.compile(r"sha256:[0-9a-f]{6,64}")
# Control characters would break the digest's lines; lone surrogates are names that are not UTF-8.
_UNSAFE = re.compile("[\x00-\x1f\x7f\\\\\ud800-\udfff]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_NAME_HINT = (
    "use 2 to 96 of a-z, 0-9, '.', '_' and '-', with a letter or a digit at both ends; "
    "'latest' and v1, v2, ... are reserved"
)


@dataclass(frozen=True, slots=True)
class Reference:
    """What ``name@selector`` asks for; at most one of the selectors is set, none means latest."""

    name: str
    version: int | None = None
    alias: str | None = None
    digest_prefix: str | None = None


def parse_reference(text: str) -> Reference:
    """Split ``name``, ``name@latest``, ``name@v3``, ``name@alias`` or ``name@sha256:ab12cd``.

    Raises:
        InvalidRequest: the name or what follows the ``@`` is malformed.
    """
    name, at, selector = text.partition("@")
    check_name(name)
    if not at or selector == "latest":
        return Reference(name)
    if (version := parse_version(selector)) is not None:
        return Reference(name, version=version)
    if selector.startswith("sha256:"):
        if not _DIGEST_PREFIX.fullmatch(selector):
            raise InvalidRequest(
                f"{selector!r} in {text!r} is not a digest",
                "give at least 6 hexadecimal digits, as in name@sha256:ab12cd",
            )
        return Reference(name, digest_prefix=selector)
    if _VERSION_LIKE.fullmatch(selector) or not _NAME.fullmatch(selector):
        raise InvalidRequest(
            f"{selector!r} in {text!r} is not a version or an alias",
            "use name, name@v3, name@alias or name@sha256:ab12cd",
        )
    return Reference(name, alias=selector)


def parse_version(text: str) -> int | None:
    """Return 3 for ``v3``, or None where `text` is not a version."""
    # Not a regular expression: a listing asks this of every directory.
    digits = text[1:]
    if text[:1] != "v" or not (digits.isdecimal() and digits.isascii() and len(digits) < 10):
        return None
    return int(digits) if digits[0] != "0" else None


def is_name(text: str) -> bool:
    """Say whether `text` may be the name of an artifact or an alias."""
    return bool(_NAME.fullmatch(text)) and text != "latest" and not _VERSION_LIKE.fullmatch(text)


def check_name(name: str) -> None:
    """Raise InvalidRequest unless `name` may name an artifact."""
    if not is_name(name):
        raise InvalidRequest(f"{name!r} is not a name for an artifact", _NAME_HINT)


def check_alias(alias: str) -> None:
    """Raise InvalidRequest unless `alias` may name a version."""
    if not is_name(alias):
        raise InvalidRequest(f"{alias!r} is not a name for an alias", _NAME_HINT)


def check_kind(kind: str) -> None:
    """Raise InvalidRequest unless `kind` is one of `KINDS`."""
    if kind not in KINDS:
        raise InvalidRequest(
            f"{kind!r} is not a kind of artifact", f"use one of {', '.join(KINDS)}"
        )


def is_digest(text: str) -> bool:
    """Say whether `text` is a whole digest: ``sha256:`` and 64 hexadecimal digits."""
    return bool(_DIGEST.fullmatch(text))


def check_digest(digest: str) -> None:
    """Raise InvalidRequest unless `digest` is whole."""
    if not is_digest(digest):
        raise InvalidRequest(
            f"{digest!r} is not a digest", "give sha256: and 64 hexadecimal digits"
        )


def is_safe_path(path: str) -> bool:
    """Say whether `path` is a plain relative path that stays inside its directory."""
    if not path or path.startswith("/") or _UNSAFE.search(path):
        return False
    return not any(part in ("", ".", "..") for part in path.split("/"))


def slug(text: str) -> str:
    """Return the name nearest to `text`: lower case, other characters turned into ``-``.

    Raises:
        InvalidRequest: nothing that could be a name is left.
    """
    name = re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("._-")[:96].rstrip("._-")
    check_name(name)
    return name


def readable(text: str) -> str:
    """Return a file's name as text that can be stored: what is not UTF-8 in it is replaced."""
    return _SURROGATE.sub("\ufffd", text)
