"""The weights of a model directory, found without reading them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from prufed_cli.errors import INTEGRITY, USAGE, PrufedError
from prufed_registry.weights import QUANTIZED_ENDINGS, SPARSE_ENDINGS

if TYPE_CHECKING:
    from prufed_cli.models.stored import StoredTensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_PLAIN: Final = frozenset({"F16", "BF16", "F32", "F64"})
"""How the entries of a matrix are stored where they are numbers one by one."""


def find_tensors(directory: Path, ref: str) -> dict[str, StoredTensor]:
    """Return every tensor of a checkpoint, in one file or in shards, by its name there.

    Args:
        directory: a model directory.
        ref: what to call it.

    Raises:
        PrufedError: there are no weights, the index is damaged, or a shard or tensor it names is
            missing.
    """
    from prufed_cli.models.stored import stored_tensors

    if (directory / WEIGHTS).is_file():
        return stored_tensors(directory / WEIGHTS)
    if not (directory / INDEX).is_file():
        raise PrufedError(
            f"{ref} has no {WEIGHTS}", f"`prufed verify {ref}` checks its files", INTEGRITY
        )
    placed = _weight_map(directory / INDEX, ref)
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(placed.values())):
        if not (directory / file).is_file():
            raise _damaged(ref, f"its index names {file}, which is missing")
        tensors |= stored_tensors(directory / file)
    for name, file in sorted(placed.items()):
        if name not in tensors:
            raise _damaged(ref, f"its index says that {file} has {name}, but it has not")
    return tensors


def refuse_quantized(directory: Path, ref: str) -> None:
    """Refuse a model whose configuration says that its weights are quantized.

    Raises:
        PrufedError: as said, with the method.
    """
    stated = quantization_of(directory)
    if not stated:
        return
    method = str(stated.get("quant_method") or "unknown")
    stored_plainly = method == "compressed-tensors" and not stated.get("config_groups")
    if stored_plainly and stated.get("format") in (None, "dense"):
        return
    raise _not_plain(ref, f"it is quantized ({method})")


def quantization_of(directory: Path) -> dict[str, Any]:
    """Return what a model's configuration says of quantization; nothing where it cannot be read."""
    try:
        config: Any = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        text = config.get("text_config")
        inner = text.get("quantization_config") if isinstance(text, dict) else None
        stated = config.get("quantization_config") or inner
    except (OSError, ValueError, AttributeError):
        return {}  # whoever opens the model says what is wrong with its configuration
    return stated if isinstance(stated, dict) else {}


def refuse_packed_matrices(tensors: Mapping[str, StoredTensor], ref: str) -> None:
    """Refuse a checkpoint whose matrices are not stored entry by entry as floating-point numbers.

    Raises:
        PrufedError: as said, with the first such tensor.
    """
    for name, tensor in sorted(tensors.items()):
        if name.endswith(SPARSE_ENDINGS + QUANTIZED_ENDINGS):
            raise _not_plain(ref, f"it holds {name}, part of a quantized or sparse format")
        if name.endswith(".weight") and len(tensor.shape) > 1 and tensor.code not in _PLAIN:
            raise _not_plain(ref, f"{name} is stored as {tensor.code}")


def _not_plain(ref: str, reason: str) -> PrufedError:
    return PrufedError(
        f"{ref} cannot be a base: {reason}",
        "use the model it was made from, in float32, bfloat16 or float16",
        USAGE,
    )


def _weight_map(path: Path, ref: str) -> Mapping[str, str]:
    try:
        placed: Any = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(ref, f"{path.name} cannot be read ({error})") from error
    if not isinstance(placed, dict) or not placed:
        raise _damaged(ref, f"{path.name} maps no weights to files")
    for file in placed.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise _damaged(ref, f"{path.name} names {file!r}, which is no file beside it")
    return placed


def _damaged(ref: str, reason: str) -> PrufedError:
    return PrufedError(
        f"the checkpoint of {ref} is incomplete: {reason}", "fetch the model again", INTEGRITY
    )
