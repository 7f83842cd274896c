"""Which weight files are taken: safetensors that are whole, and never a pickle."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from prufed_registry.errors import Damaged, InvalidRequest

PICKLED_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"})

SPARSE_ENDINGS = (".bitmask", ".compressed", ".weight.indices", ".weight.crow_indices")
"""Endings of what sparse formats store in place of a matrix; transformers reads none of them."""

QUANTIZED_ENDINGS = (".qweight", ".weight_packed", ".absmax", ".W_q")
"""Endings of what quantized formats store in place of a matrix; transformers reads them where
config.json says how."""


def check_no_pickle(path: str) -> None:
    """Raise InvalidRequest where a file's name is that of pickled weights."""
    if PurePosixPath(path).suffix.lower() in PICKLED_SUFFIXES:
        raise InvalidRequest(
            f"{path!r} is a pickled checkpoint, which can run any code when it is opened",
            "convert it to safetensors, or delete it if the safetensors stand beside it",
        )


def check_safetensors(file: Path, path: str) -> None:
    """Raise Damaged unless a ``.safetensors`` file's header fits its bytes; others pass.

    Args:
        file: where it is.
        path: what to call it.
    """
    if problem := safetensors_problem(file):
        raise Damaged(f"{path!r} is not a whole safetensors file: {problem}", "fetch it again")


def check_readable(file: Path, *, quantized: bool) -> None:
    """Raise InvalidRequest where transformers would find no matrices and draw random ones.

    Args:
        file: a safetensors file; one that is not whole passes.
        quantized: whether config.json says how its weights are quantized.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as opened:
            names = list(opened.keys())
    except SafetensorError:
        return
    unread = SPARSE_ENDINGS if quantized else SPARSE_ENDINGS + QUANTIZED_ENDINGS
    if found := next((name for name in sorted(names) if name.endswith(unread)), None):
        form = "a sparse" if found.endswith(SPARSE_ENDINGS) else "a quantized"
        raise InvalidRequest(
            f"{file} holds {found}, part of {form} format, which transformers would pass over and "
            "replace with random weights",
            "take what it was made from, or what save_pretrained writes of it",
        )


def safetensors_problem(file: Path) -> str | None:
    """Return what is wrong with a ``.safetensors`` file's header, or None."""
    if file.suffix.lower() != ".safetensors":
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np"):
            return None
    except SafetensorError as error:
        return str(error).lower()
