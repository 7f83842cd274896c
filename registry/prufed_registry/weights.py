"""Which weight files are taken: safetensors that are whole, and never a pickle."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from prufed_registry.errors import Damaged, InvalidRequest

PICKLED_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"})


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
