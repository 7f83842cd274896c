"""One pass over a model: what is to be made, from what, and on which machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from prufed_cli.pruning.request import PruneRequest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from prufed_cli.evaluation.perplexity import Perplexity, TextFile
    from prufed_cli.models.calibration import Calibration
    from prufed_cli.progress import Reporter
    from prufed_plugins.api import Pruner, PruneTarget
    from prufed_registry import Artifact, Parent, Registry

REPORT_FILE: Final = "prufed-report.json"
"""What was pruned, matrix by matrix, beside the weights."""

LARGEST_FILE: Final = 5 * 10**9
"""Bytes of the largest weight file; a model that needs more is written in shards."""


@dataclass(frozen=True)
class Options:
    """How to work; nothing here changes what comes of it but the device and the dtype.

    Attributes:
        device: where blocks compute.
        compute: the dtype they compute in.
        trust_remote_code: whether code that comes with the model may run.
        max_memory: bytes that may be held; None for what is available.
        largest_file: bytes of the largest weight file.
        force: begin anew where an earlier run was cut off that was not forced.
    """

    device: torch.device
    compute: torch.dtype
    trust_remote_code: bool = False
    max_memory: int | None = None
    largest_file: int = LARGEST_FILE
    force: bool = False


@dataclass(frozen=True)
class SubModelSpec:
    """One sub-model to be made.

    Attributes:
        request: what was asked for.
        target: how much to remove.
        recipe: what the registry knows it by.
    """

    request: PruneRequest
    target: PruneTarget
    recipe: Mapping[str, Any]


@dataclass(frozen=True)
class ScoredText:
    """What the base and its sub-models are scored on.

    Attributes:
        file: the text.
        tokens: its ids, (n,).
    """

    file: TextFile
    tokens: Tensor


Score = Callable[[Path], "Perplexity"]
"""Scores the model in a directory."""


@dataclass(frozen=True)
class Job:
    """One pass: one sub-model, or several nested ones.

    Attributes:
        submodels: what is to be made; in one pass where ``nested``, else in a pass each.
        nested: whether the sub-models lie inside one another and share the pass.
        pruner: the method.
        base: what is pruned.
        merged: sub-models of the base that the pruner merges; empty for most methods.
        dtype: what its weights are stored in.
        calibration: token ids to calibrate with, where the method needs any.
        text: what to score base and sub-models on, where that was asked for.
        score: scores a model directory on it; remembers the score of the base.
        registry: where the sub-models go.
        options: how to work.
        reporter: told how far it is.
    """

    submodels: tuple[SubModelSpec, ...]
    nested: bool
    pruner: Pruner
    base: Artifact
    merged: tuple[Artifact, ...]
    dtype: torch.dtype
    calibration: Calibration | None
    text: ScoredText | None
    score: Score | None
    registry: Registry
    options: Options
    reporter: Reporter

    @property
    def method(self) -> str:
        """The method's name."""
        return self.submodels[0].request.method

    @property
    def parents(self) -> list[Parent]:
        """What the sub-models are made from, the base first."""
        from prufed_registry import Parent

        return [Parent(ref=one.ref, digest=one.digest) for one in (self.base, *self.merged)]

    @property
    def fingerprint(self) -> str:
        """Hexadecimal digest of everything the sub-models' bytes depend on."""
        from hashlib import sha256
        from json import dumps

        from prufed_cli.environment import versions

        content = {
            "base": self.base.digest,
            "recipes": [dict(each.recipe) for each in self.submodels],
            "names": [each.request.name for each in self.submodels],
            "nested": self.nested,
            "device": self.options.device.type,
            "compute": str(self.options.compute),
            "batch": [list(batch.shape) for batch in self.calibration.batches]
            if self.calibration
            else [],
            "versions": versions(("prufed", "torch", "transformers")),
        }
        return sha256(dumps(content, sort_keys=True).encode()).hexdigest()[:32]

    @property
    def workplace(self) -> Path:
        """The directory in which unfinished work is kept, one directory per fingerprint."""
        from prufed_cli.home import prunes_directory

        return prunes_directory(self.registry)
