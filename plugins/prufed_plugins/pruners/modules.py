"""Which matrices to prune: the include and exclude patterns of the element-wise pruners."""

from __future__ import annotations

import re
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final

from prufed_plugins.errors import MethodError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from prufed_plugins.api import Decoder

SHOWN: Final = 8


def selected(
    decoder: Decoder,
    include: str | None,
    exclude: str | None,
    layers: Collection[int] | None = None,
) -> frozenset[str]:
    """Return the full names of the matrices to prune.

    Args:
        decoder: the model; its weights are not loaded.
        include: shell patterns separated by commas, each matched against the name within the block
            (``mlp.down_proj``) and the full name; None means every matrix.
        exclude: the same; None means none.
        layers: the decoder layers whose matrices are pruned; None means all.

    Raises:
        MethodError: a pattern matches nothing, there is no such layer, or nothing is left to prune.
    """
    total = len(decoder.blocks)
    if absent := sorted(set(layers or ()) - set(range(total))):
        raise MethodError(
            f"there is no layer {absent[0]} to include", f"the model's layers are 0 to {total - 1}"
        )
    local = {
        name: name.removeprefix(f"{decoder.prefix}.{index}.")
        for index in range(len(decoder.blocks))
        for name in decoder.shapes(index)
    }
    chosen = frozenset(local) if include is None else _matching(local, include, "include")
    if exclude is not None:
        chosen -= _matching(local, exclude, "exclude")
    if layers is not None:
        chosen &= {name for index in layers for name in decoder.shapes(index)}
    if not chosen:
        raise MethodError(
            "include and exclude leave no matrix to prune", "exclude less, or include more"
        )
    return chosen


def _matching(local: Mapping[str, str], patterns: str, what: str) -> frozenset[str]:
    found: set[str] = set()
    for pattern in (part.strip() for part in patterns.split(",")):
        matched = {
            name
            for name, short in local.items()
            if fnmatchcase(short, pattern) or fnmatchcase(name, pattern)
        }
        if not matched:
            raise MethodError(
                f"the {what} pattern {pattern!r} matches no matrix",
                f"names within a block are {', '.join(_near(pattern, local.values()))}",
            )
        found |= matched
    return frozenset(found)


def _near(pattern: str, names: Iterable[str]) -> list[str]:
    """Return the names most like a pattern, the experts of a block as one name."""
    known = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
    by_ending = {name.rsplit(".", 1)[-1]: name for name in known}
    wanted = pattern.strip("*.")
    near = get_close_matches(wanted, known, SHOWN)
    near += [by_ending[one] for one in get_close_matches(wanted.rsplit(".", 1)[-1], by_ending)]
    return list(dict.fromkeys(near)) or known[:SHOWN]
