"""What a sub-model's stored report says, as tables.

The report lies beside the weights and may come from a stranger, so it is validated before it is
read. Seconds differ from run to run; they stand in the manifest's metrics and not in the report.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from prufed_cli.errors import INTEGRITY, NOT_FOUND, PrufedError
from prufed_cli.models.layer_names import layer_number

if TYPE_CHECKING:
    from prufed_registry import Artifact

FULL_TABLE: Final = 40
"""More matrices than this are shown block by block, unless every row is asked for."""

BAR: Final = 24
"""Characters of the longest bar."""

MASKED_NOTE: Final = (
    "The zeros are stored like any other value: the files are as large as the base's, and dense\n"
    "kernels are no faster on them."
)

_LEFT: Final = "kept"
"""Begins the note of a matrix that was left as it was."""

SCORE_LABELS: Final[Mapping[str, str]] = {
    "contribution": "1 - cosine",
    "angular": "angle / pi of the run from here",
    "magnitude-layers": "mean |weight|",
}
"""What the scores of a built-in method are."""


class MatrixEntry(BaseModel):
    """One matrix in a stored report; a method may add numbers of its own."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str
    sparsity: float
    error: float | None = None
    dead_channels: float | None = None
    damping: float | None = None
    damping_retries: float | None = None
    partial_group: float | None = None
    excluded: float | None = None
    unrouted: float | None = None
    uncovered: float | None = None
    clients: float | None = None
    unanimous: float | None = None


class PerplexityEntry(BaseModel):
    """Perplexity on one text, of the base and of the sub-model; None where it is not finite."""

    model_config = ConfigDict(frozen=True, extra="allow")

    file: str
    tokens: int
    base: float | None
    pruned: float | None


class PruneReport(BaseModel):
    """A stored report.

    Attributes:
        result: what kind of sub-model it is.
        matrices: of a masked one, in block order.
        kept_layers: of a sliced one, counted in its direct base.
        layers_before: of a sliced one, how many layers its direct base has.
        scores: of a sliced one, one per layer; of a run of K dropped layers, one per layer that
            a run can start at.
        perplexity: where it was measured.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    result: Literal["masked", "sliced"]
    matrices: tuple[MatrixEntry, ...] = ()
    kept_layers: tuple[int, ...] = ()
    layers_before: int = Field(default=0, ge=0)
    scores: tuple[float, ...] | None = Field(default=None, min_length=1)
    perplexity: PerplexityEntry | None = None

    @model_validator(mode="after")
    def _check_layers(self) -> PruneReport:
        if list(self.kept_layers) != sorted({layer for layer in self.kept_layers if layer >= 0}):
            raise ValueError("kept_layers are not ascending layers")
        return self


@dataclass(frozen=True)
class ReportRow:
    """One matrix, or the matrices of one block together.

    Attributes:
        label: the matrix's name, or ``block 3 (7 matrices)``.
        shape: (rows, columns) as stored; None where it is not known, or of a block.
        sparsity: share of the entries that are gone.
        error: squared error of the output relative to its energy; a block's is the mean.
        dead_channels: inputs that were zero on every calibration token.
        damping: a block's is the largest.
        seconds: spent on it.
        note: what else there is to say; of a block, how many matrices were left as they are.
    """

    label: str
    shape: tuple[int, ...] | None
    sparsity: float
    error: float | None
    dead_channels: float | None
    damping: float | None
    seconds: float | None
    note: str


@dataclass(frozen=True)
class LayerRow:
    """One layer of the base of a sliced sub-model.

    Attributes:
        layer: its number in the direct base.
        kept: whether it is in the sub-model.
        score: None where it has none.
    """

    layer: int
    kept: bool
    score: float | None


def stored_report(artifact: Artifact) -> dict[str, Any]:
    """Return the report stored with an artifact as it is; empty where there is none.

    Raises:
        PrufedError: it is no JSON object.
    """
    from prufed_cli.pruning import REPORT_FILE

    path = artifact.path / REPORT_FILE
    if not path.is_file():
        return {}
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        stored = None
    if not isinstance(stored, dict):
        raise PrufedError(
            f"the report of {artifact.ref} is no JSON object",
            "prune the base again with --force",
            INTEGRITY,
        )
    return stored


def parse_report(stored: Mapping[str, Any], reference: str) -> PruneReport:
    """Validate the report stored with an artifact.

    Raises:
        PrufedError: there is none, or it does not hold together.
    """
    if not stored:
        raise PrufedError(
            f"{reference} has no pruning report",
            "`prufed prune` makes sub-models that have one",
            NOT_FOUND,
        )
    try:
        return PruneReport.model_validate(dict(stored))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "report"
        raise PrufedError(
            f"the report of {reference} cannot be read: {where}: {first['msg'].lower()}",
            "prune the base again with --force",
            INTEGRITY,
        ) from error


def matrix_rows(
    report: PruneReport,
    shapes: Mapping[str, tuple[int, ...]],
    seconds: Mapping[str, float],
) -> list[ReportRow]:
    """Return one row per matrix, in the report's order.

    Args:
        report: of a masked sub-model.
        shapes: of the stored tensors by name.
        seconds: by matrix name, as far as they are known.
    """
    return [
        ReportRow(
            label=matrix.name,
            shape=shapes.get(matrix.name),
            sparsity=matrix.sparsity,
            error=matrix.error,
            dead_channels=matrix.dead_channels,
            damping=matrix.damping,
            seconds=seconds.get(matrix.name),
            note=_note(matrix),
        )
        for matrix in report.matrices
    ]


def _note(matrix: MatrixEntry) -> str:
    if matrix.unrouted:
        return f"{_LEFT}: no calibration token was routed to it"
    if matrix.uncovered:
        return f"{_LEFT}: no client pruned it"
    if matrix.excluded:
        return f"{_LEFT}: excluded"
    said = []
    if matrix.clients is not None and matrix.unanimous is not None:
        said.append(f"{matrix.clients:.0f} clients, unanimous on {matrix.unanimous:.0%}")
    if matrix.damping_retries:
        to = "" if matrix.damping is None else f" to {matrix.damping:g}"
        said.append(f"damping raised{to}")
    if matrix.partial_group:
        said.append(f"the last group has {matrix.partial_group:.0f} columns")
    return "; ".join(said)


def block_rows(rows: Sequence[ReportRow]) -> list[ReportRow]:
    """Return one row per decoder block: what its matrices come to together."""
    return [_together(block, members) for block, members in _by_block(rows)]


def with_subtotals(rows: Sequence[ReportRow]) -> list[ReportRow]:
    """Return every matrix, and after the last one of each block the block's own row."""
    return [
        row for block, members in _by_block(rows) for row in (*members, _together(block, members))
    ]


def _by_block(rows: Sequence[ReportRow]) -> list[tuple[int | None, list[ReportRow]]]:
    blocks: dict[int | None, list[ReportRow]] = {}
    for row in rows:
        blocks.setdefault(layer_number(row.label), []).append(row)
    return list(blocks.items())


def _together(block: int | None, rows: Sequence[ReportRow]) -> ReportRow:
    kept = sum(row.note.startswith(_LEFT) for row in rows)
    return ReportRow(
        label=f"block {block} ({len(rows)} matrices)",
        shape=None,
        sparsity=_mean_sparsity(rows),
        error=_mean(row.error for row in rows),
        dead_channels=_total(row.dead_channels for row in rows),
        damping=max(_known(row.damping for row in rows), default=None),
        seconds=_total(row.seconds for row in rows),
        note=f"{kept} kept as they are" if kept else "",
    )


def _mean_sparsity(rows: Sequence[ReportRow]) -> float:
    """Return the share of all entries that are gone; of all matrices alike without shapes."""
    sizes = [1 if row.shape is None else _entries(row.shape) for row in rows]
    if any(row.shape is None for row in rows):
        sizes = [1] * len(rows)
    gone = sum(row.sparsity * size for row, size in zip(rows, sizes, strict=True))
    return gone / max(sum(sizes), 1)


def _entries(shape: tuple[int, ...]) -> int:
    entries = 1
    for size in shape:
        entries *= size
    return entries


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _mean(values: Iterable[float | None]) -> float | None:
    known = _known(values)
    return sum(known) / len(known) if known else None


def _total(values: Iterable[float | None]) -> float | None:
    known = _known(values)
    return sum(known) if known else None


def row_table(rows: Sequence[ReportRow]) -> tuple[list[str], list[list[str]]]:
    """Return (columns, cells); a column that no row has anything for is left out."""
    columns: list[tuple[str, list[str]]] = [
        ("matrix", [row.label for row in rows]),
        ("shape", ["x".join(map(str, row.shape)) if row.shape else "" for row in rows]),
        ("sparsity", [f"{row.sparsity:.4%}" for row in rows]),
        ("error", [_number(row.error, ".3g") for row in rows]),
        ("dead channels", [_number(row.dead_channels, ".0f") for row in rows]),
        ("damping", [_number(row.damping, "g") for row in rows]),
        ("seconds", [_number(row.seconds, ".2f") for row in rows]),
        ("", [row.note for row in rows]),
    ]
    present = [(name, cells) for name, cells in columns if any(cells)]
    return [name for name, _ in present], [
        list(cells) for cells in zip(*(cells for _, cells in present), strict=True)
    ]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def layer_rows(report: PruneReport) -> list[LayerRow]:
    """Return one row per layer of the direct base of a sliced sub-model."""
    scores = report.scores or ()
    kept = set(report.kept_layers)
    return [
        LayerRow(layer, layer in kept, scores[layer] if layer < len(scores) else None)
        for layer in range(_depth(report))
    ]


def _depth(report: PruneReport) -> int:
    """Return how many layers the direct base had."""
    last = max(report.kept_layers, default=-1)
    return max(report.layers_before, len(report.scores or ()), last + 1)


def layer_table(
    rows: Sequence[LayerRow], label: str, block: str
) -> tuple[list[str], list[list[str]]]:
    """Return (columns, cells), with a bar per score.

    Args:
        rows: the layers.
        label: what the scores are.
        block: the character that bars are made of.
    """
    if all(row.score is None for row in rows):
        return ["layer", ""], [[str(row.layer), _verdict(row)] for row in rows]
    known = _known(row.score for row in rows)
    low, high = min(0.0, *known), max(0.0, *known)
    scale = BAR / (high - low) if high > low else 0.0
    return ["layer", "", label, ""], [
        [
            str(row.layer),
            _verdict(row),
            _number(row.score, ".6g"),
            "" if row.score is None else block * round((row.score - low) * scale),
        ]
        for row in rows
    ]


def _verdict(row: LayerRow) -> str:
    return "kept" if row.kept else "dropped"


def score_label(artifact: Artifact) -> str:
    """Return what the scores of a sliced sub-model are, from the recipe that made it."""
    recipe = artifact.manifest.recipe
    method = recipe.get("plugin")
    if method == "parameter":
        params = recipe.get("params")
        return f"{params.get('score') if isinstance(params, dict) else ''} of the weights"
    return SCORE_LABELS.get(str(method), "score")


def perplexity_line(entry: PerplexityEntry) -> str:
    """Return the perplexity before and after as a sentence."""
    before, after = (
        "not finite" if value is None else f"{value:.4f}" for value in (entry.base, entry.pruned)
    )
    return f"perplexity on {entry.file} ({entry.tokens} tokens): {before} before, {after} after"


def stored_shapes(artifact: Artifact) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of an artifact's weights, from the files' headers."""
    from safetensors import SafetensorError, safe_open

    from prufed_plugins.api import MASKS_FILE

    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(artifact.path.glob("*.safetensors")):
        if path.name == MASKS_FILE:
            continue
        try:
            with safe_open(path, framework="np") as file:
                for name in file.keys():  # noqa: SIM118 (a file is no mapping)
                    shapes[name] = tuple(file.get_slice(name).get_shape())
        except (OSError, SafetensorError):
            continue  # `prufed verify` is there to say so; the report can be read without
    return shapes


def matrix_seconds(artifact: Artifact) -> dict[str, float]:
    """Return the seconds spent on every matrix, as far as the manifest has them."""
    stored = artifact.manifest.metrics.get("matrix_seconds")
    if not isinstance(stored, dict):
        return {}
    return {name: float(value) for name, value in stored.items() if isinstance(value, int | float)}
