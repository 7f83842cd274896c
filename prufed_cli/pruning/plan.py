"""What a pass will take: memory and time, estimated before it begins."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal

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

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

_COPIES = 5
"""Float32 copies of the matrix at hand: its values, their changes, scores, errors, and a spare."""
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
        block: the largest block in the dtype it computes in.
        statistics: what is gathered of the inputs of one block, and its factorization.
        batch: one batch on its way through a block, or the copies of one matrix.
        activations: the hidden states of the whole calibration text.
        in_file: whether they wait in a file.
        separate: whether blocks compute on a device of their own, and activations wait on the host.
        limit: what may be held, on that device where there is one.
        seconds: how long it will take, estimated.
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

    @property
    def least(self) -> int:
        """The memory needed at least, with the activations in a file."""
        return self.block + self.statistics + self.batch

    @property
    def peak(self) -> int:
        """The memory that will be held, on the device where blocks have one of their own."""
        return self.least + (0 if self.in_file or self.separate else self.activations)

    def lines(self) -> list[str]:
        """Return the plan for a person."""
        where = "in a file" if self.in_file else "in memory"
        return [
            f"{self.parameters:,} parameters in {self.blocks} decoder blocks, "
            f"the largest {decimal(self.block)}",
            f"activations {decimal(self.activations)} {where}, "
            f"statistics {decimal(self.statistics)}, one batch {decimal(self.batch)}",
            f"peak memory about {decimal(self.peak)} of {decimal(self.limit)} "
            + ("free on the device" if self.separate else "allowed"),
            f"time about {_duration(self.seconds)}",
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
            "seconds": self.seconds,
        }


def make_plan(job: Job, skeleton: Skeleton, decoder: StreamedDecoder, begin: int = 0) -> Plan:
    """Estimate a pass by running one batch of the text through the first block, if there is any.

    Args:
        job: the pass.
        skeleton: its model.
        decoder: the same, to be run; block 0 is left in memory.
        begin: how many blocks are finished already.

    Raises:
        PrufedError: one block and what belongs to it do not fit.
    """
    shapes = [decoder.shapes(index) for index in range(len(decoder.blocks))]
    largest = max(math.prod(shape) for shapes_of in shapes for shape in shapes_of.values())
    width = job.options.compute.itemsize
    sizes = [_block_bytes(skeleton, decoder, index, width) for index in range(len(shapes))]
    batches = job.calibration.batches if job.calibration else []
    hidden = skeleton.model.config.get_text_config().hidden_size
    groups: list[list[str]] = []
    batch = largest * 4 * (_COPIES + len(job.made) - 1)
    token = 0.0
    if batches:
        groups, token = look_at_block(decoder, batches[0])
        batch = max(batch, batches[0].numel() * _token_bytes(skeleton, decoder, width))
    if job.text is not None:
        batch = max(batch, scoring_bytes(skeleton, decoder, width))
        if not batches:
            rows = scored_at_once(skeleton, decoder, width)
            first = next(windows(job.text.tokens, model_window(skeleton.model), rows))
            _, token = look_at_block(decoder, first[:, :-1])
    columns = [shapes[0][group[0]][1] for group in groups]
    one = statistic_bytes(job)
    statistics = sum(one(count) for count in columns)
    working = (min(one(count), 4 * count * _WORKING_COLUMNS) for count in columns)
    statistics += max(working, default=0)
    activations = sum(each.numel() for each in batches) * hidden * width
    host = available_memory() if job.options.max_memory is None else job.options.max_memory
    separate = job.options.device.type == "cuda"
    limit = _free_on(job.options.device) if separate else host
    least = max(sizes) + statistics + batch
    if least > limit:
        raise PrufedError(
            f"one decoder block with its statistics and a batch takes about {decimal(least)}, "
            f"more than the {decimal(limit)} there may be",
            f"{_more_room(separate, least)}, or use a shorter --length",
            FAILED,
        )
    return Plan(
        parameters=sum(math.prod(one.shape) for one in skeleton.stored.values()),
        blocks=len(sizes),
        block=max(sizes),
        statistics=statistics,
        batch=batch,
        activations=activations,
        in_file=activations + (0 if separate else least) > host,
        separate=separate,
        limit=limit,
        seconds=_seconds(job, skeleton, decoder, groups, token, begin),
    )


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
    inner = max(max(shape) for shape in decoder.shapes(0).values())
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


def look_at_block(decoder: StreamedDecoder, batch: Tensor) -> tuple[list[list[str]], float]:
    """Return what one batch of token ids (B, T) shows of block 0.

    Returns:
        Which of its matrices receive the same input, and the seconds that a token takes through it.
    """
    import torch

    inputs: dict[str, Tensor] = {}  # held, or a later one could take the identity of one before
    few, all_of_it = decoder.embed([batch[:1], batch])
    linears = decoder.linears(0)

    @torch.no_grad()
    def forward(states: tuple[Tensor, dict[str, Any]]) -> None:
        decoder.run_block(0, *states)

    def look(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            inputs.setdefault(name, args[0])

        return hook

    handles = [module.register_forward_pre_hook(look(name)) for name, module in linears.items()]
    try:
        forward(few)  # holding what all of it puts in would take more memory than the pass
    finally:
        for handle in handles:
            handle.remove()
    groups: dict[object, list[str]] = {}
    for name in linears:
        groups.setdefault(id(inputs[name]) if name in inputs else name, []).append(name)
    inputs.clear()
    seconds = seconds_of(lambda: forward(all_of_it), decoder.device)
    return list(groups.values()), seconds / batch.numel()


def _seconds(
    job: Job,
    skeleton: Skeleton,
    decoder: StreamedDecoder,
    groups: Sequence[Sequence[str]],
    token: float,
    begin: int,
) -> float:
    """Return about how long the pass takes from block ``begin`` on, and to publish what it made.

    Args:
        job: the pass.
        skeleton: its model.
        decoder: the same.
        groups: matrices of a block that receive the same input.
        token: seconds that a token of the text takes through a block.
        begin: how many blocks are finished already.
    """
    rates = measure_rates(job.options.device)
    blocks = len(decoder.blocks)
    batches = job.calibration.batches if job.calibration else []
    tokens = sum(each.numel() for each in batches)
    forward = token * tokens
    stored = sum(math.prod(one.shape) for one in skeleton.stored.values())
    seconds = len(job.made) * publish_seconds(stored, rates)
    if job.text is not None:
        models = len(job.made) + (begin == 0)  # the base is scored before its first block is done
        config = skeleton.model.config.get_text_config()
        through = blocks * token + head_seconds(config.vocab_size, config.hidden_size, rates)
        seconds += models * len(job.text.tokens) * through
    if job.pruner.result == "sliced":
        return seconds + blocks * forward
    first = decoder.shapes(0)
    unseen = sum(math.prod(first[name]) for group in groups[-1:] for name in group)
    looking = 1 - unseen / sum(map(math.prod, first.values()))  # of a forward pass
    surveyed = job.made[0].recipe["params"].get("layer_ratio") == "owl"
    for index in range(blocks):
        if index < begin:  # run again, to see what the first unfinished block receives
            seconds += forward
            continue
        passes = looking + (index + 1 < blocks)  # and once more, with what was pruned
        if job.nested:
            passes = 1 if index + 1 < blocks else looking
        work = BlockWork(
            shapes=list(decoder.shapes(index).values()),
            inputs=[first[group[0]][1] for group in groups],
            tokens=tokens,
            forward=forward,
            passes=passes if tokens else 0,
            hessians=statistic_bytes(job)(1000) >= _HESSIAN_BYTES,
            targets=len(job.made),
        )
        seconds += block_seconds(work, rates) + (forward if surveyed else 0.0)
    return seconds


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
