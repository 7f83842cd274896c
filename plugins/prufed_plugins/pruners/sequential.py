"""The sequential calibration that element-wise pruners share.

Block after block: collect a statistic of every matrix's inputs, prune the matrices, write them into
the block, run it again, and hand its outputs, which now show what pruning did to them, to the next
block (2301.00774, §4; 2306.11695, §3). A method is a statistic and a rule that turns one matrix
and its statistic into a new matrix and its mask.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch
from torch import nn

from prufed_plugins.api import PrunedMatrix
from prufed_plugins.errors import MethodError
from prufed_plugins.pruners.selection import check_pattern, check_target

if TYPE_CHECKING:
    from torch import Tensor

    from prufed_plugins.api import Decoder, Progress, PruneTarget


class Statistic(Protocol):
    """What is kept of the inputs of one matrix, or of several that share their input."""

    def add(self, inputs: Tensor) -> None:
        """Add the inputs (tokens, columns) of one batch."""

    def second_moments(self) -> Tensor:
        """Return the mean of x_v² over tokens, (columns,)."""


S = TypeVar("S", bound=Statistic)


@dataclass(frozen=True)
class Choice:
    """What a method decided for one matrix.

    Attributes:
        pruned: bool (rows, columns), True where the entry goes.
        weight: new float32 values (rows, columns); None where the kept entries stay as they are.
        report: numbers for the report.
    """

    pruned: Tensor
    weight: Tensor | None = None
    report: Mapping[str, float] = field(default_factory=dict)


Capture = list[tuple["Tensor", dict[str, Any]]]


class CalibratedPruner(Generic[S]):
    """Prunes with a statistic of each matrix's inputs.

    Attributes:
        new_statistic: makes an empty statistic of (columns, device).
        choose: decides on one matrix, (float32 weight (rows, columns), statistic, target).
    """

    def __init__(
        self,
        new_statistic: Callable[[int, torch.device], S],
        choose: Callable[[Tensor, S, PruneTarget], Choice],
    ) -> None:
        self._new_statistic = new_statistic
        self._choose = choose

    def prune(
        self,
        decoder: Decoder,
        calibration: Sequence[Tensor] | None,
        target: PruneTarget,
        progress: Progress,
    ) -> Iterator[PrunedMatrix]:
        """Yield the pruned matrices in block order; see :meth:`prufed_plugins.api.Pruner.prune`.

        Raises:
            MethodError: no calibration, a target that cannot be met, activations that are not
                finite, or a matrix the calibration never reached.
        """
        check_matrices(decoder, target)
        if not calibration:
            raise MethodError(
                "this method needs calibration text",
                "pass --calibration FILE, or leave it out to use the embedded text",
            )
        states = _embed(decoder, calibration)
        total = len(decoder.blocks)
        for index in range(decoder.start, total):
            statistics = self._collect(decoder, index, states)
            for name, module in decoder.linears(index).items():
                yield self._prune_matrix(name, module, statistics[name], target, decoder.dtype)
            del statistics
            if index + 1 < total:
                _advance(decoder, index, states)
            progress("block", index + 1, total)

    def _collect(self, decoder: Decoder, index: int, states: Capture) -> dict[str, S]:
        collector = InputCollector(decoder.linears(index), self._new_statistic)
        with collector, torch.no_grad():
            for hidden, arguments in states:
                decoder.run_block(index, hidden, arguments)
                collector.end_batch()
        statistics = collector.statistics
        for name in decoder.linears(index):
            if name not in statistics:
                raise MethodError(
                    f"{name} received no calibration input",
                    "calibrate with more text, or use --method magnitude",
                )
            if not bool(torch.isfinite(statistics[name].second_moments()).all()):
                raise MethodError(
                    f"the inputs of {name} in block {index} are not finite",
                    "load the model with --dtype float32, or check its weights",
                )
        return statistics

    def _prune_matrix(
        self,
        name: str,
        module: nn.Module,
        statistic: S,
        target: PruneTarget,
        dtype: torch.dtype,
    ) -> PrunedMatrix:
        started = time.perf_counter()
        matrix = float_matrix(name, module)
        try:
            with torch.no_grad():
                choice = self._choose(matrix, statistic, target)
        except MethodError as error:
            raise MethodError(f"{name}: {error.message}", error.hint) from error
        return write(name, module, choice, dtype, time.perf_counter() - started)


class InputCollector(Generic[S]):
    """Hooks that feed a statistic with each matrix's inputs; matrices with one input share one.

    Which matrices share is seen on the first batch: q, k and v are called with the same tensor
    object. The batch's inputs are held until it ends so that no identity is reused within it.
    """

    def __init__(
        self, linears: Mapping[str, nn.Module], new_statistic: Callable[[int, torch.device], S]
    ) -> None:
        self._linears = linears
        self._new_statistic = new_statistic
        self._leaders: dict[str, str] = {}
        self._batch: dict[int, tuple[str, Tensor]] = {}
        self._first = True
        self._handles: list[Any] = []
        self._own: dict[str, S] = {}

    def __enter__(self) -> InputCollector[S]:
        for name, module in self._linears.items():
            self._handles.append(module.register_forward_pre_hook(self._hook(name)))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._batch.clear()

    @property
    def statistics(self) -> dict[str, S]:
        """The statistic of each matrix that was reached; shared ones are one object."""
        return {name: self._own[leader] for name, leader in self._leaders.items()}

    def end_batch(self) -> None:
        """Forget the inputs of the batch that just ran."""
        self._batch.clear()
        self._first = False

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            tensor = inputs[0]
            if self._first or name not in self._leaders:
                leader, _ = self._batch.setdefault(id(tensor), (name, tensor))
                self._leaders.setdefault(name, leader)
            if self._leaders[name] == name:
                flat = tensor.detach().reshape(-1, tensor.shape[-1])
                if name not in self._own:
                    self._own[name] = self._new_statistic(flat.shape[1], flat.device)
                self._own[name].add(flat)

        return hook


def check_matrices(decoder: Decoder, target: PruneTarget) -> None:
    """Refuse, before anything is touched, a target that some matrix cannot meet.

    Raises:
        MethodError: the target is out of range, or its pattern does not divide a matrix.
    """
    check_target(target)
    if target.pattern is None:
        return
    for index in range(len(decoder.blocks)):
        for name, (_, columns) in decoder.shapes(index).items():
            check_pattern(name, columns, target.pattern)


def as_matrix(module: nn.Module) -> Tensor:
    """Return a linear module's weight as (outputs, inputs), a view.

    GPT-2's ``Conv1D`` keeps its weight as (inputs, outputs).
    """
    weight: Tensor = module.get_parameter("weight").detach()
    return weight if isinstance(module, nn.Linear) else weight.t()


def float_matrix(name: str, module: nn.Module) -> Tensor:
    """Return a linear module's weight as float32 (outputs, inputs).

    Raises:
        MethodError: it holds NaN or infinity.
    """
    matrix = as_matrix(module).float()
    if not bool(torch.isfinite(matrix).all()):
        raise MethodError(
            f"{name}.weight holds NaN or infinity", "load the base again; its checkpoint is damaged"
        )
    return matrix


def write(
    name: str, module: nn.Module, choice: Choice, dtype: torch.dtype, seconds: float
) -> PrunedMatrix:
    """Write a choice into a module and return it in the parameter's own layout and dtype.

    Args:
        name: full name of the module.
        module: the linear module; its weight is changed in place.
        choice: what to prune and what the kept entries become.
        dtype: what the weight will be stored in; it is rounded to it.
        seconds: time spent on the matrix, for the report.

    Raises:
        MethodError: an updated weight is too large for the module's dtype.
    """
    matrix = as_matrix(module)
    if choice.weight is not None:
        matrix.copy_(choice.weight.to(dtype))
    matrix.masked_fill_(choice.pruned, 0.0)
    if not bool(torch.isfinite(matrix).all()):
        raise MethodError(
            f"an updated weight of {name} is too large for {dtype}",
            "store the base in float32 or bfloat16",
        )
    kept = ~choice.pruned
    report = {
        "sparsity": float(choice.pruned.sum()) / choice.pruned.numel(),
        **choice.report,
        "seconds": seconds,
    }
    transposed = not isinstance(module, nn.Linear)
    return PrunedMatrix(
        name=f"{name}.weight",
        weight=module.get_parameter("weight").detach(),
        mask=kept.t().contiguous() if transposed else kept,
        report=report,
    )


@torch.no_grad()
def _embed(decoder: Decoder, calibration: Sequence[Tensor]) -> Capture:
    states = decoder.embed(calibration)
    for hidden, _ in states:
        _check_finite(hidden, "the embedded calibration tokens are not finite")
    return states


@torch.no_grad()
def _advance(decoder: Decoder, index: int, states: Capture) -> None:
    """Replace the inputs of a block by its outputs, batch by batch."""
    for position, (hidden, arguments) in enumerate(states):
        output = decoder.run_block(index, hidden, arguments)
        _check_finite(output, f"the outputs of block {index} are not finite")
        states[position] = (decoder.hold(output), arguments)


def _check_finite(hidden: Tensor, message: str) -> None:
    if not bool(torch.isfinite(hidden).all()):
        raise MethodError(message, "load the model with --dtype float32, or check its weights")
