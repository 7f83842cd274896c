"""What a sub-model is known by: the method, its parameters and the content of everything it reads.

Nothing in a recipe hangs on where a file lies or which of two names a method was called by: equal
recipes on equal bases are the same work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from prufed_cli.errors import NOT_FOUND, PrufedError
from prufed_cli.progress import SILENT, Reporter
from prufed_cli.pruning.request import PruneRequest, method_settings

if TYPE_CHECKING:
    import torch
    from pydantic import BaseModel

    from prufed_cli.evaluation.perplexity import TextFile
    from prufed_cli.models.calibration import Calibration

_NONE: Final[Mapping[Path, str]] = {}


def method_recipe(
    request: PruneRequest, reporter: Reporter, known: Mapping[Path, str]
) -> dict[str, Any]:
    """Return the part of the recipe that the method decides; files that it names are read.

    Args:
        request: what was asked for.
        reporter: told what is read.
        known: digests of directories that need not be read.

    Raises:
        PrufedError: a file or directory that a parameter names does not exist.
    """
    from prufed_plugins.discover import catalog

    entry = catalog().get("pruner", request.method)
    params = entry.method.params.model_validate(method_settings(request))
    return {
        "plugin": entry.method.name,
        "plugin_version": f"{entry.distribution} {entry.version}",
        "params": recorded_params(params, reporter, known),
    }


def recorded_params(
    params: BaseModel, reporter: Reporter = SILENT, known: Mapping[Path, str] = _NONE
) -> dict[str, Any]:
    """Return parameters as JSON, each path as the digest of what lies there, if need be by reading.

    Raises:
        PrufedError: nothing lies there.
    """
    from pydantic_core import to_jsonable_python

    recorded: dict[str, Any] = to_jsonable_python(
        {
            name: _by_content(name, value, reporter, known)
            for name, value in params.model_dump().items()
        }
    )
    return recorded


def full_recipe(
    request: PruneRequest,
    method: Mapping[str, Any],
    calibration: Calibration | None,
    text: TextFile | None,
    dtype: torch.dtype,
    nested: Sequence[float | None] | None,
) -> dict[str, Any]:
    """Return the recipe of one sub-model.

    Args:
        request: what was asked for.
        method: :func:`method_recipe` of it.
        calibration: what it is calibrated with.
        text: what it is scored on; the scores are stored with it.
        dtype: what it is computed in.
        nested: the sparsities of all sub-models of the pass, where they lie inside one another.
    """
    recipe: dict[str, Any] = {
        "command": "prune",
        **method,
        "target": {
            "sparsity": request.sparsity,
            "pattern": request.pattern,
            "layers": request.layers,
        },
        "dtype": str(dtype).removeprefix("torch."),
    }
    if nested is not None:
        recipe["nested"] = list(nested)
    if calibration is not None:
        recipe["calibration"] = {
            "digest": calibration.digest,
            "source": calibration.description,
            "samples": request.samples,
            "seed": request.seed,
        }
    if text is not None:
        recipe["perplexity"] = {"file": text.name, "digest": text.digest}
    return recipe


def _by_content(name: str, value: Any, reporter: Reporter, known: Mapping[Path, str]) -> Any:
    """Return a parameter's value with every path in it replaced by a digest."""
    if isinstance(value, Path):
        if value in known:
            return known[value]
        with reporter.task(f"read {name} {value}"):
            return _content(name, value)
    if isinstance(value, Mapping):
        return {key: _by_content(name, one, reporter, known) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_by_content(name, one, reporter, known) for one in value]
    return value


def _content(name: str, path: Path) -> str:
    """Return the digest of a file, or of the files in a directory but for hidden ones.

    A manifest does not count: it says when a directory was published, not what is in it.
    """
    from prufed_registry.digests import MANIFEST, FileEntry, content_digest
    from prufed_registry.durable import hash_file

    if not path.exists():
        raise PrufedError(
            f"{name} {path} does not exist", f"give a path: --set {name}=PATH", NOT_FOUND
        )
    try:
        if path.is_file():
            return f"sha256:{hash_file(path)}"
        files = {file.relative_to(path): file for file in path.rglob("*") if file.is_file()}
        return content_digest(
            {
                inside.as_posix(): FileEntry(hash_file(file), file.stat().st_size)
                for inside, file in files.items()
                if inside.as_posix() != MANIFEST
                and not any(part.startswith(".") for part in inside.parts)
            }
        )
    except OSError as error:
        raise PrufedError(
            f"cannot read {name} {path}: {error.strerror}", f"check it: --set {name}=PATH"
        ) from error
