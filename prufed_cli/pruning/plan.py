"""What a pass will take: memory and time, estimated before it begins."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal

from prufed_cli.disk import check_room
from prufed_cli.errors import FAILED, PrufedError
from prufed_cli.evaluation.perplexity import model_window, windows
from prufed_cli.models.skeleton import Skeleton
from prufed_cli.models.streaming import HEAD_BUDGET, StreamedDecoder
from prufed_cli.pruning.estimate import (
    BlockWork,
    block_seconds,
    head_seconds,
    measure_rates,
    publish_seconds,
    seconds_of,
)
from prufed_cli.pruning.job import Job
from prufed_cli.pruning.memory import available_memory
from prufed_plugins.pruners.layers import LayerPruner

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

_COPIES = 5
"""Float32 copies of the matrix at hand: its values, their changes, scores, errors, and a spare. A
survey takes fewer."""
_SMALL_BATCH = 32 * 10**6
"""Bytes that a batch may take on its way through a block however small the block is."""
_HEAD_COPIES = 3
"""Float32 copies of a piece of the output head, or of the logits that it gives."""
_HESSIAN_BYTES = 10**6
"""A statistic of 1000 columns that is this large is a square matrix."""
_WORKING_COLUMNS = 2048
"""Rows of a statistic, at most, that are held once more while it is worked with."""


@dataclass(frozen=True)
class Plan:
    """What a pass will take. All sizes are bytes.

    Attributes:
        parameters: how many the model has.
        blocks: how many decoder blocks.
        block: the largest block in the dtype it computes in; 0 where none is read.
        statistics: what is gathered of the inputs of one block, and its factorization.
        batch: one batch on its way through a block, or the copies of one matrix.
        activations: the hidden states of the whole calibration text.
        in_file: whether they wait in a file.
        separate: whether blocks compute on a device of their own, and activations wait on the host.
        limit: what may be held, on that device where there is one.
        seconds: how long it will take, estimated.
        finished: how many blocks are finished already.
        kept: what the other blocks take on disk until the sub-models are published.
        model: what one finished sub-model takes there; of layers that are dropped the largest are
            left out.
        published: how many sub-models there will be.
    """

    parameters: int
    blocks: int
    block: int
    statistics: int
    batch: int
    activations: int
    in_file: bool
    separate: bool
    limit: int
    seconds: float
    finished: int
    kept: int
    model: int
    published: int

    @property
    def least(self) -> int:
        """The memory needed at least, with the activations in a file."""
        return self.block + self.statistics + self.batch

    @property
    def peak(self) -> int:
        """The memory that will be held, on the device where blocks have one of their own."""
        return self.least + (0 if self.in_file or self.separate else self.activations)

    @property
    def models(self) -> int:
        """What all finished sub-models take on disk."""
        return self.published * self.model

    def lines(self) -> list[str]:
        """Return the plan for a person."""
        where = "in a file" if self.in_file else "in memory"
        largest = f"the largest {decimal(self.block)}" if self.block else "none of them is read"
        resumed = f"resuming after block {self.finished} of {self.blocks}"
        return [
            f"{self.parameters:,} parameters in {self.blocks} decoder blocks, {largest}",
            f"activations {decimal(self.activations)} {where}, "
            f"statistics {decimal(self.statistics)}, one batch {decimal(self.batch)}",
            f"peak memory about {decimal(self.peak)} of {decimal(self.limit)} "
            + ("free on the device" if self.separate else "allowed"),
            f"disk about {decimal(self.kept + self.models)}"
            + (f", {decimal(self.kept)} of it until the end" if self.kept else ""),
            f"time about {_duration(self.seconds)}",
            *([resumed] if self.finished else []),
        ]

    def document(self) -> dict[str, Any]:
        """Return the plan for a program."""
        return {
            "parameters": self.parameters,
            "blocks": self.blocks,
            "block_bytes": self.block,
            "statistics_bytes": self.statistics,
            "batch_bytes": self.batch,
            "activation_bytes": self.activations,
            "activations_in_file": self.in_file,
            "peak_bytes": self.peak,
            "limit_bytes": self.limit,
            "kept_bytes": self.kept,
            "artifact_bytes": self.models,
            "seconds": self.seconds,
            "finished_blocks": self.finished,
        }


@dataclass(frozen=True)
class Layout:
    """Blocks whose matrices have the same names and shapes, as the dense ones of a mixture have.

    Attributes:
        blocks: their indices.
        shapes: (outputs, inputs) of the matrices of the first of them.
        groups: which of those receive the same input; none where no text was run.
        token: seconds that a token takes through such a block; 0 where no text was run.
    """

    blocks: Sequence[int]
    shapes: Mapping[str, tuple[int, int]]
    groups: Sequence[Sequence[str]] = ()
    token: float = 0.0

    @property
    def inputs(self) -> list[int]:
        """The columns of every distinct input."""
        return [self.shapes[group[0]][1] for group in self.groups]


def make_plan(job: Job, skeleton: Skeleton, decoder: StreamedDecoder, begin: int = 0) -> Plan:
    """Estimate a pass by running text through the first block of every layout, if there is any.

    Args:
        job: the pass.
        skeleton: its model.
        decoder: the same, to be run; a block is left in memory.
        begin: how many blocks are finished already.

    Raises:
        PrufedError: one block and what belongs to it do not fit.
    """
    layouts = layouts_of(decoder)
    largest = max(math.prod(shape) for layout in layouts for shape in layout.shapes.values())
    width = job.options.compute.itemsize
    batches = job.calibration.batches if job.calibration else []
    hidden = skeleton.model.config.get_text_config().hidden_size
    block = batch = 0
    if _reads_blocks(job):
        indices = range(len(decoder.blocks))
        block = max(_block_bytes(skeleton, decoder, index, width) for index in indices)
        batch = largest * 4 * (_COPIES + len(job.submodels) - 1)
    if batches:
        layouts = look_at_layouts(decoder, batches[0], layouts)
        batch = max(batch, batches[0].numel() * _token_bytes(skeleton, decoder, width))
    if job.text is not None:
        batch = max(batch, scoring_bytes(skeleton, decoder, width))
        if not batches:
            rows = scored_at_once(skeleton, decoder, width)
            first = next(windows(job.text.tokens, model_window(skeleton.model), rows))
            timed = look_at_layouts(decoder, first[:, :-1], layouts)
            layouts = [replace(layout, groups=()) for layout in timed]  # no pruner looks at inputs
    one = statistic_bytes(job)
    statistics = max(_gathered(layout, one) for layout in layouts)
    activations = sum(each.numel() for each in batches) * hidden * width
    host = available_memory() if job.options.max_memory is None else job.options.max_memory
    separate = job.options.device.type == "cuda"
    limit = _free_on(job.options.device) if separate else host
    least = block + statistics + batch
    if least > limit:
        raise PrufedError(
            f"one decoder block with its statistics and a batch takes about {decimal(least)}, "
            f"more than the {decimal(limit)} there may be",
            f"{_more_room(separate, least)}, or use a shorter --length",
            FAILED,
        )
    kept, model = _written(job, skeleton, decoder, begin)
    return Plan(
        parameters=sum(math.prod(one.shape) for one in skeleton.stored.values()),
        blocks=len(decoder.blocks),
        block=block,
        statistics=statistics,
        batch=batch,
        activations=activations,
        in_file=activations + (0 if separate else least) > host,
        separate=separate,
        limit=limit,
        seconds=_seconds(job, skeleton, layouts, begin),
        finished=begin,
        kept=kept,
        model=model,
        published=len(job.submodels),
    )


def check_disks(job: Job, plan: Plan) -> None:
    """Refuse a pass whose files do not fit on the disks of its work and of the registry.

    Raises:
        PrufedError: as said, with the size.
    """
    held = plan.activations if plan.in_file else 0
    check_room("the finished blocks and activations need", {job.workplace: plan.kept + held})
    check_room("the prune needs", {job.workplace: plan.kept, job.registry.root: plan.models})


def _written(job: Job, skeleton: Skeleton, decoder: StreamedDecoder, begin: int) -> tuple[int, int]:
    """Return the bytes of the blocks from ``begin`` on, with masks, and of one sub-model."""
    stored = skeleton.stored
    whole = sum({skeleton.saved_name(name): one.size for name, one in stored.items()}.values())
    indices = range(len(decoder.blocks))
    blocks = [sum(stored[name].size for name in decoder.parameters(index)) for index in indices]
    if job.pruner.result == "sliced":
        dropped = 0  # where the method cannot say, as a plug-in's
        if isinstance(job.pruner, LayerPruner):
            dropped = job.pruner.count(len(blocks), job.submodels[0].target)
        return 0, whole - sum(sorted(blocks)[len(blocks) - dropped :])
    masks = [
        sum(math.ceil(math.prod(shape) / 8) for shape in decoder.shapes(index).values())
        for index in indices
    ]
    return len(job.submodels) * (sum(blocks[begin:]) + sum(masks[begin:])), whole + sum(masks)


def _reads_blocks(job: Job) -> bool:
    """Return whether the weights of any block are read, to be run, scored or pruned."""
    return (
        job.calibration is not None
        or job.text is not None
        or job.pruner.result == "masked"
        or getattr(job.pruner, "needs_matrices", True)
    )


def _gathered(layout: Layout, one: Callable[[int], int]) -> int:
    """Return the bytes of all statistics of a block, and of what works with the largest of them.

    Args:
        layout: of the block.
        one: bytes of the statistic of an input with so many columns.
    """
    working = (min(one(columns), 4 * columns * _WORKING_COLUMNS) for columns in layout.inputs)
    return sum(map(one, layout.inputs)) + max(working, default=0)


def in_batches(job: Job, skeleton: Skeleton, decoder: StreamedDecoder) -> Job:
    """Return the job with calibration batches whose way through a block takes half a block.

    A small block may take 32 MB, so that small models are not run sequence by sequence. The sizes
    hang on the model alone: another memory limit must not give other roundings.
    """
    import torch

    if job.calibration is None:
        return job
    tokens = batch_tokens(skeleton, decoder, job.options.compute.itemsize)
    sequences = torch.cat(job.calibration.batches)
    rows = max(1, min(tokens // sequences.shape[1], len(job.calibration.batches[0])))
    batches = list(torch.split(sequences, rows))
    return replace(job, calibration=replace(job.calibration, batches=batches))


def batch_tokens(skeleton: Skeleton, decoder: StreamedDecoder, width: int) -> int:
    """Return how many tokens take half a block, or 32 MB, on their way through a block.

    Args:
        skeleton: the model.
        decoder: the same.
        width: bytes of a number of the dtype that is computed in.
    """
    half = _block_bytes(skeleton, decoder, 0, width) // 2
    return max(half, _SMALL_BATCH) // _token_bytes(skeleton, decoder, width)


def scoring_bytes(skeleton: Skeleton, decoder: StreamedDecoder, width: int) -> int:
    """Return what a batch takes that is scored: in a block, or at a piece of the output head."""
    config = skeleton.model.config.get_text_config()
    tokens = scored_at_once(skeleton, decoder, width) * model_window(skeleton.model)
    head = min(HEAD_BUDGET, int(config.vocab_size) * max(int(config.hidden_size), tokens))
    return max(tokens * _token_bytes(skeleton, decoder, width), _HEAD_COPIES * 4 * head)


def scored_at_once(skeleton: Skeleton, decoder: StreamedDecoder, width: int) -> int:
    """Return how many windows of a text are scored at once: as many as a batch has tokens for."""
    return max(1, batch_tokens(skeleton, decoder, width) // model_window(skeleton.model))


def _token_bytes(skeleton: Skeleton, decoder: StreamedDecoder, width: int) -> int:
    """Return what a token takes on its way through a block whose inputs are looked at."""
    hidden = skeleton.model.config.get_text_config().hidden_size
    blocks = map(decoder.shapes, range(len(decoder.blocks)))
    inner = max(max(shape) for shapes in blocks for shape in shapes.values())
    return int((6 * inner + 8 * hidden) * width)


def statistic_bytes(job: Job) -> Callable[[int], int]:
    """Return how many bytes a pruner gathers of an input with some number of columns.

    A pruner may say so itself, by a method ``statistic_bytes``; one that does not is taken to keep
    a Hessian.
    """
    own: Callable[[int], int] | None = getattr(job.pruner, "statistic_bytes", None)
    if own is not None:
        return own
    if job.pruner.result == "sliced" or not job.pruner.needs_calibration:
        return lambda columns: 0
    return lambda columns: 4 * columns * columns


def warn_of_few_tokens(job: Job, decoder: StreamedDecoder) -> None:
    """Warn where a Hessian of fewer tokens than columns cannot have full rank."""
    if job.calibration is None or statistic_bytes(job)(1000) < _HESSIAN_BYTES:
        return
    columns, name = max((shape[1], name) for name, shape in decoder.shapes(0).items())
    length = job.calibration.batches[0].shape[1]
    tokens = sum(batch.numel() for batch in job.calibration.batches)
    if tokens < columns:
        job.reporter.warn(
            f"{tokens} calibration tokens are fewer than the {columns} columns of {name}; "
            f"use --samples {math.ceil(columns / length)} or more, and as much text"
        )


def layouts_of(decoder: StreamedDecoder) -> list[Layout]:
    """Return the layouts of a model's blocks in the order of their first blocks; loads none."""
    found: dict[object, Layout] = {}
    for index in range(len(decoder.blocks)):
        shapes = decoder.shapes(index)
        own = f"{decoder.prefix}.{index}."
        key = tuple((name.removeprefix(own), shape) for name, shape in shapes.items())
        known = found.get(key, Layout((), shapes))
        found[key] = replace(known, blocks=(*known.blocks, index))
    return list(found.values())


def look_at_layouts(
    decoder: StreamedDecoder, batch: Tensor, layouts: Sequence[Layout]
) -> list[Layout]:
    """Return the layouts with what one batch of token ids (B, T) shows of the first blocks.

    Each of these blocks is loaded once and runs one sequence, as the model embeds it. The whole
    batch goes through a block of the commonest layout alone, on which the time hangs most.
    """
    few, all_of_it = decoder.embed([batch[:1], batch])
    commonest = max(layouts, key=lambda layout: len(layout.blocks))
    seen = []
    for layout in layouts:
        groups, seconds = _look_at_block(decoder, layout.blocks[0], few)
        token = seconds / batch[:1].numel()
        if layout is commonest:
            token = _forward_seconds(decoder, layout.blocks[0], all_of_it) / batch.numel()
        seen.append(replace(layout, groups=groups, token=token))
    return seen


def _look_at_block(
    decoder: StreamedDecoder, index: int, states: tuple[Tensor, dict[str, Any]]
) -> tuple[list[list[str]], float]:
    """Run a few sequences through a block, once or for some hundredths of a second.

    Few, as holding what a whole batch puts into the matrices would take more than the pass.

    Returns:
        Which of its matrices receive the same input, and the seconds that the run takes.
    """
    inputs: dict[str, Tensor] = {}  # held, or a later one could take the identity of one before
    linears = decoder.linears(index)

    def look(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            inputs.setdefault(name, args[0])

        return hook

    handles = [module.register_forward_pre_hook(look(name)) for name, module in linears.items()]
    try:
        seconds = _forward_seconds(decoder, index, states)
    finally:
        for handle in handles:
            handle.remove()
    groups: dict[object, list[str]] = {}
    for name in linears:
        groups.setdefault(id(inputs[name]) if name in inputs else name, []).append(name)
    return list(groups.values()), seconds


def _forward_seconds(
    decoder: StreamedDecoder, index: int, states: tuple[Tensor, dict[str, Any]]
) -> float:
    import torch

    @torch.no_grad()
    def forward() -> None:
        decoder.run_block(index, *states)

    return seconds_of(forward, decoder.device)


def _seconds(job: Job, skeleton: Skeleton, layouts: Sequence[Layout], begin: int) -> float:
    """Return about how long the pass takes from block ``begin`` on, and to publish what it made.

    Args:
        job: the pass.
        skeleton: its model.
        layouts: of its blocks, looked at.
        begin: how many blocks are finished already.
    """
    rates = measure_rates(job.options.device)
    batches = job.calibration.batches if job.calibration else []
    tokens = sum(each.numel() for each in batches)
    through = sum(len(layout.blocks) * layout.token for layout in layouts)  # all blocks, one token
    stored = sum(math.prod(one.shape) * one.dtype.itemsize for one in skeleton.stored.values())
    seconds = len(job.submodels) * publish_seconds(stored, rates)
    if job.text is not None:
        # the base is scored before its first block is done
        models = len(job.submodels) + (begin == 0)
        config = skeleton.model.config.get_text_config()
        head = head_seconds(config.vocab_size, config.hidden_size, rates)
        seconds += models * len(job.text.tokens) * (through + head)
    if job.pruner.result == "sliced":
        return seconds + through * tokens
    surveyed = job.submodels[0].recipe["params"].get("layer_ratio") == "owl"
    last = max(layout.blocks[-1] for layout in layouts)
    for layout in layouts:
        forward = layout.token * tokens
        work = BlockWork(
            shapes=list(layout.shapes.values()),
            width=job.dtype.itemsize,
            inputs=layout.inputs,
            tokens=tokens,
            forward=forward,
            passes=0,
            hessians=statistic_bytes(job)(1000) >= _HESSIAN_BYTES,
            targets=len(job.submodels),
            merged=len(job.merged),
        )
        for index in layout.blocks:
            if index < begin:  # run again, to see what the first unfinished block receives
                seconds += forward
                continue
            passes = _passes(job, layout, ends=index == last) if tokens else 0
            seconds += block_seconds(replace(work, passes=passes), rates)
            seconds += forward if surveyed else 0.0
    return seconds


def _passes(job: Job, layout: Layout, *, ends: bool) -> float:
    """Return how often calibration text goes through a block, which may be the model's last."""
    unseen = sum(math.prod(layout.shapes[name]) for group in layout.groups[-1:] for name in group)
    entries = sum(map(math.prod, layout.shapes.values()))
    looking = 1 - unseen / entries if entries else 1  # of a forward pass
    if job.nested:
        return looking if ends else 1
    return looking + (not ends)  # and once more, with what was pruned


def _free_on(device: torch.device) -> int:
    import torch

    return int(torch.cuda.mem_get_info(device)[0])


def _more_room(separate: bool, least: int) -> str:
    if separate:
        return "use --device cpu or --dtype bfloat16"
    return f"allow --max-memory {math.ceil(least / 10**6)}MB"


def _block_bytes(skeleton: Skeleton, decoder: StreamedDecoder, index: int, width: int) -> int:
    names = decoder.parameters(index)
    entries = sum(math.prod(skeleton.stored[name].shape) for name in names)
    return entries * width


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
