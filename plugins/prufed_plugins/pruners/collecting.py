"""Calibration: what the matrices of a block receive, and the outputs that go to the next block.

Hidden states are held by the decoder, in memory or in a mapped file, one set of them: a batch's
outputs take the place of its inputs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Generic, Protocol, TypeVar

import torch

from prufed_plugins.entries import is_finite
from prufed_plugins.errors import MethodError
from prufed_plugins.memory import give_back, mapped_above

if TYPE_CHECKING:
    from torch import Tensor, nn

    from prufed_plugins.api import Decoder

States = list[tuple["Tensor", dict[str, Any]]]
"""The hidden states (B, T, H) of every batch, and the arguments of the blocks."""

_POOLED: Final = 2**25
"""Bytes from which on what a forward pass takes is mapped by itself. What is smaller, each batch
asks for anew, and its pages would take a tenth of the time to come."""

_KEPT: Final = 8
"""Batches that use the same freed memory again. Pieces of many sizes never fit quite where others
were, and more is kept with every batch, until it is given back."""

_EXPERT: Final = re.compile(r"\.experts\.\d+(\.|$)")


class Statistic(Protocol):
    """What is kept of the inputs of one matrix, or of several that share their input.

    Attributes:
        tokens: tokens seen so far.
    """

    tokens: int

    def add(self, inputs: Tensor, sequences: int) -> None:
        """Add the inputs (tokens, columns) of one batch of so many sequences."""

    def second_moments(self) -> Tensor:
        """Return the mean of x_v² over tokens, (columns,)."""


S = TypeVar("S", bound=Statistic)


@dataclass(frozen=True)
class Observed(Generic[S]):
    """What calibration showed of one matrix.

    Attributes:
        statistic: of its inputs; one object for all matrices that receive the same.
        energy: mean over tokens of ‖Wx‖²; None where not all outputs were looked at.
    """

    statistic: S
    energy: float | None = None


@torch.no_grad()
def embed(decoder: Decoder, calibration: Sequence[Tensor] | None) -> States:
    """Return what the first block to be pruned receives.

    Raises:
        MethodError: there is no calibration text, or its embedding is not finite.
    """
    if not calibration:
        raise MethodError(
            "this method needs calibration text",
            "pass --calibration FILE, or leave it out to use the embedded text",
        )
    states = decoder.embed(calibration)
    for hidden, _ in states:
        _check_finite(hidden, "the embedded calibration tokens are not finite")
    return states


def put(decoder: Decoder, index: int, states: States, position: int, output: Tensor) -> None:
    """Replace the inputs of a block by its outputs, of one batch.

    Raises:
        MethodError: the outputs are not finite.
    """
    _check_finite(output, f"the outputs of block {index} are not finite")
    hidden, arguments = states[position]
    states[position] = (decoder.hold(output, hidden), arguments)


@torch.no_grad()
@mapped_above(_POOLED)
def advance(decoder: Decoder, index: int, states: States) -> None:
    """Replace the inputs of a block by its outputs, batch by batch."""
    for position, (hidden, arguments) in enumerate(states):
        put(decoder, index, states, position, decoder.run_block(index, hidden, arguments))
        if position % _KEPT == 0:
            give_back()


@torch.no_grad()
def observe(
    decoder: Decoder,
    index: int,
    names: Collection[str],
    new_statistic: Callable[[int, torch.device], S],
    states: States,
    *,
    energies: bool = False,
    advancing: bool = False,
) -> dict[str, Observed[S]]:
    """Run a block over the calibration and return what some of its matrices received.

    Args:
        decoder: the model.
        index: the block.
        names: full names of the matrices to observe; those of other blocks do not matter.
        new_statistic: makes an empty statistic of (columns, device).
        states: the block's inputs.
        energies: look at the outputs too, where there are any: see :class:`InputCollector`.
        advancing: replace them by the block's outputs on the way.

    Returns:
        By full name; experts that no token was routed to are absent.

    Raises:
        MethodError: inputs or outputs are not finite, or a matrix that is no expert got none.
    """
    linears = {name: one for name, one in decoder.linears(index).items() if name in names}
    if not linears:
        if advancing:
            advance(decoder, index, states)
        return {}
    collecting = InputCollector(linears, new_statistic, energies=energies, stops=not advancing)
    with mapped_above(_POOLED), collecting as collector:
        for position, (hidden, arguments) in enumerate(states):
            collector.begin_batch(len(hidden))
            with suppress(_AllSeenError):
                output = decoder.run_block(index, hidden, arguments)
            collector.end_batch()
            if advancing:
                put(decoder, index, states, position, output)
            if position % _KEPT == 0:
                give_back()
    observed = collector.observed()
    for name in linears:
        _check_observed(name, index, observed.get(name))
    return observed


def _check_observed(name: str, index: int, observed: Observed[S] | None) -> None:
    if observed is None:
        if _EXPERT.search(name):
            return
        raise MethodError(
            f"{name} received no calibration input",
            "leave it out with --set exclude=..., or use --method magnitude",
        )
    if not is_finite(observed.statistic.second_moments()):
        raise MethodError(
            f"the inputs of {name} in block {index} are not finite",
            "load the model with --dtype float32, or check its weights",
        )


class InputCollector(Generic[S]):
    """Hooks that feed a statistic with each matrix's inputs; matrices with one input share one.

    Which matrices share is seen when each is first called: q, k and v get the same tensor object.
    A batch's inputs are held until it ends so that no identity is reused within it.

    The last matrix of a block has a fifth of its work in a Llama, and nothing that is collected
    depends on its output: once a batch has shown that every matrix is called once, the next ones
    may stop where the last has its input.
    """

    def __init__(
        self,
        linears: Mapping[str, nn.Module],
        new_statistic: Callable[[int, torch.device], S],
        *,
        energies: bool = False,
        stops: bool,
    ) -> None:
        """Prepare the hooks.

        Args:
            linears: the matrices by full name.
            new_statistic: makes an empty statistic of (columns, device).
            energies: whether the outputs are squared and summed up.
            stops: whether a batch may be cut short by an error, which the caller catches.
        """
        self._linears = linears
        self._new_statistic = new_statistic
        self._energies = energies
        self._stops = stops
        self._first = True
        self._sequences = 0
        self._calls: list[str] = []
        self._leaders: dict[str, str] = {}
        self._batch: dict[int, tuple[str, Tensor]] = {}
        self._handles: list[Any] = []
        self._own: dict[str, S] = {}
        self._outputs = {name: _Outputs() for name in linears}

    def __enter__(self) -> InputCollector[S]:
        for name, module in self._linears.items():
            self._handles.append(module.register_forward_pre_hook(self._hook(name)))
            if self._energies:
                self._handles.append(module.register_forward_hook(self._outputs[name].add))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._batch.clear()

    def observed(self) -> dict[str, Observed[S]]:
        """Return what each matrix showed that received at least one token."""
        found = {name: self._own[leader] for name, leader in self._leaders.items()}
        return {
            name: Observed(statistic, self._outputs[name].mean_of(statistic.tokens))
            for name, statistic in found.items()
            if statistic.tokens
        }

    def begin_batch(self, sequences: int) -> None:
        """Prepare for a batch of so many sequences."""
        self._sequences = sequences

    def end_batch(self) -> None:
        """Forget the inputs of the batch that just ran."""
        if self._first:
            self._first = False
            self._stops &= sorted(self._calls) == sorted(self._linears)
        self._calls.clear()
        self._batch.clear()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            tensor = inputs[0]
            if name not in self._leaders:
                self._leaders[name], _ = self._batch.setdefault(id(tensor), (name, tensor))
            if self._leaders[name] == name:
                flat = tensor.detach().reshape(-1, tensor.shape[-1])
                if name not in self._own:
                    self._own[name] = self._new_statistic(flat.shape[1], flat.device)
                self._own[name].add(flat, self._sequences)
            self._calls.append(name)
            if self._stops and not self._first and len(self._calls) == len(self._linears):
                raise _AllSeenError

        return hook


class _Outputs:
    """‖Wx‖² of one matrix, summed over the tokens whose outputs it has seen."""

    def __init__(self) -> None:
        self._tokens = 0
        self._squares: Tensor | float = 0.0  # not read back from a device on every call

    def add(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Add the outputs (…, rows) of one batch; a forward hook.

        Half precision rounds to a large bias what is looked for beside it: that is not counted.
        """
        bias = getattr(module, "bias", None)
        if bias is not None and output.dtype.itemsize < torch.float32.itemsize:
            return
        product = output if bias is None else output - bias
        norm = torch.linalg.vector_norm(product, dtype=torch.float32)
        self._tokens += output.numel() // output.shape[-1]
        self._squares = self._squares + norm.square()

    def mean_of(self, tokens: int) -> float | None:
        """Return the mean, None where not all of so many tokens were seen."""
        return float(self._squares) / tokens if tokens and self._tokens == tokens else None


class _AllSeenError(Exception):
    """Every matrix has had its input of this batch."""


def _check_finite(hidden: Tensor, message: str) -> None:
    if not is_finite(hidden):
        raise MethodError(message, "load the model with --dtype float32, or check its weights")
