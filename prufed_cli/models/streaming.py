"""A model larger than memory, seen as a stack of decoder blocks that are read when they are due."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from prufed_cli.models.activations import Activations
from prufed_cli.models.decoder import (
    ARGUMENTS,
    BlockCall,
    check_only_hidden_states,
    first_inputs,
    linears_of,
    replaced_forwards,
    returned,
    run_stack,
    shape_of,
    stack_of,
)
from prufed_cli.models.skeleton import Skeleton, place
from prufed_cli.models.stored import StoredTensor, stored_tensors
from prufed_plugins.products import WideLinears

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor, nn

HEAD_BUDGET: Final = 2**24
"""Entries of the output head that are in memory at once: 64 MiB in float32."""


class StreamedDecoder:
    """A model on disk as :class:`prufed_plugins.api.Decoder`.

    One block is in memory at a time: asking for another one releases it. Embeddings, and what else
    lies outside the stack, are there while :meth:`embed` or :meth:`logits` runs, and of the token
    embeddings only the rows of the tokens that occur.

    Attributes:
        prefix: module path of the stack, ``model.layers`` for Llama.
        blocks: the decoder blocks in order; only the newest one asked for has weights.
        start: the first block that is still to be pruned.
        device: where blocks compute.
        masks: by parameter name, of matrices that were pruned before.
        released: called with the index of a block whose weights are about to go.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        device: torch.device,
        activations: Activations,
    ) -> None:
        model = skeleton.model
        self._skeleton = skeleton
        self._activations = activations
        self._empty = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self._finished: dict[int, Mapping[str, StoredTensor]] = {}
        self._loaded: int | None = None
        self._items: int | None = None
        self.prefix = skeleton.prefix
        self.start = 0
        self.device = device
        self.blocks: Sequence[nn.Module] = list(stack_of(model, skeleton.prefix))
        self.masks: Mapping[str, Tensor] = {}
        self.released: Callable[[int], None] | None = None
        self._names: list[list[str]] = [[] for _ in self.blocks]
        for name in skeleton.stored:
            index = skeleton.block_of(name)
            if index is not None:
                self._names[index].append(name)
        for name, buffer in list(model.named_buffers()):
            place(model, name, buffer.to(device))

    def finish(self, index: int, path: Path) -> None:
        """Take the weights of a block from another file from now on, by their parameters' names."""
        self._finished[index] = stored_tensors(path)

    def hold_in(self, directory: Path | None) -> None:
        """Hold activations in files of a directory from now on; None: in memory."""
        self._activations = Activations(directory)

    def parameters(self, index: int) -> list[str]:
        """Return the names of everything that is stored for block ``index``."""
        return self._names[index]

    def shapes(self, index: int) -> Mapping[str, tuple[int, int]]:
        """Return (outputs, inputs) of the matrices of block ``index``, without loading them."""
        return self._shapes[index]

    @cached_property  # a plan asks for them many times, and a mixture has thousands
    def _shapes(self) -> list[Mapping[str, tuple[int, int]]]:
        named = (linears_of(block, f"{self.prefix}.{i}") for i, block in enumerate(self.blocks))
        return [{name: shape_of(module) for name, module in one.items()} for one in named]

    def linears(self, index: int) -> Mapping[str, nn.Module]:
        """Load block ``index`` and return its prunable matrices by their full module name."""
        self._load(index)
        return linears_of(self.blocks[index], f"{self.prefix}.{index}")

    def stored_dtype(self, name: str) -> torch.dtype:
        """Return what a parameter is stored in."""
        return self._skeleton.stored[name].dtype

    def embed(self, batches: Sequence[Tensor]) -> list[tuple[Tensor, dict[str, Any]]]:
        """Return what block ``start`` receives for each batch (B, T), and the blocks' arguments.

        The model's own forward runs with blocks that only hand on their input, so that embedding,
        masks and position embeddings are the model's. The blocks before ``start``, as they are now,
        are run after that.
        """
        import torch

        model = self._skeleton.model
        with torch.no_grad():
            with self._outside(batches):
                if self._items is None:
                    self._items = self._items_returned(batches[0][:1, :2].to(self.device))
                states: list[tuple[Tensor, dict[str, Any]]] = []
                for batch in batches:
                    ids = batch.to(self.device)
                    hidden, calls = first_inputs(model, self.blocks, ids, items=self._items)
                    calls = _shared(calls, [known[ARGUMENTS] for _, known in states])
                    states.append((self.hold(hidden), {ARGUMENTS: calls}))
            for index in range(self.start):
                for position, (hidden, arguments) in enumerate(states):
                    output = self.run_block(index, hidden, arguments)
                    states[position] = (self.hold(output, hidden), arguments)
        return states

    def run_block(self, index: int, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Return the output (B, T, H) of block ``index``, on the device that computes."""
        self._load(index)
        call: BlockCall = arguments[ARGUMENTS][index]
        try:
            with WideLinears():
                output: Any = self.blocks[index](hidden.to(self.device), *call.args, **call.kwargs)
        finally:  # what observes a block may stop it
            self._activations.rest(hidden)
        result: Tensor = output[0] if isinstance(output, tuple | list) else output
        return result

    def hold(self, hidden: Tensor, instead_of: Tensor | None = None) -> Tensor:
        """Return the same values on the host, in memory or in a mapped file.

        Args:
            hidden: values (B, T, H).
            instead_of: what was held before and is not needed any more; overwritten where it fits.
        """
        return self._activations.hold(hidden, instead_of)

    def logits(
        self, batches: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> Iterator[tuple[int, int, Tensor]]:
        """Yield the logits of each batch for some entries of the vocabulary at a time.

        Args:
            batches: token ids, each (B, T).
            outputs: what the last block gave for each batch, (B, T, H).

        Yields:
            The batch's position, the first entry v, and logits (B, T, V') of entries v to v+V'−1.
        """
        import torch

        model = self._skeleton.model
        head = model.get_output_embeddings()
        name = next(name for name, module in model.named_modules() if module is head)
        parts = {f"{name}.{leaf}" for leaf, _ in head.named_parameters()}
        weight = self._stored(f"{name}.weight")
        rows = max(1, HEAD_BUDGET // max(weight.shape[1], batches[0].numel()))
        with torch.no_grad(), self._outside(batches):
            for first in range(0, weight.shape[0], rows):
                last = min(first + rows, weight.shape[0])
                for part in parts:
                    place(model, part, self._cast(part, self._stored(part).rows(first, last)))
                for position, (batch, output) in enumerate(zip(batches, outputs, strict=True)):
                    with replaced_forwards(self.blocks, self._always(output)), WideLinears():
                        found = model(input_ids=batch.to(self.device), use_cache=False).logits
                    yield position, first, found
            for part in parts:
                place(model, part, self._empty[part])

    def release(self) -> None:
        """Let go of the block that is in memory."""
        index, self._loaded = self._loaded, None
        if index is None:
            return
        if self.released is not None:
            self.released(index)
        self._clear(self._names[index])

    def _load(self, index: int) -> None:
        if self._loaded == index:
            return
        self.release()
        finished = self._finished.get(index)
        for name in self._names[index]:
            stored = self._skeleton.stored[name] if finished is None else finished[name]
            place(self._skeleton.model, name, self._read(name, stored))
        self._loaded = index

    def _clear(self, names: Sequence[str]) -> None:
        for name in names:
            place(self._skeleton.model, name, self._empty[name])

    def _read(self, name: str, stored: StoredTensor) -> Tensor:
        return stored.read(self._empty[name].dtype).to(self.device)

    def _cast(self, name: str, value: Tensor) -> Tensor:
        return value.to(self.device, self._empty[name].dtype)

    def _stored(self, name: str) -> StoredTensor:
        return self._skeleton.stored[self._skeleton.tied.get(name, name)]

    @contextmanager
    def _outside(self, batches: Sequence[Tensor]) -> Iterator[None]:
        """Have what lies outside the stack, but for the output head, in memory."""
        import torch

        model = self._skeleton.model
        self.release()
        names = self._outside_names()
        embedding = model.get_input_embeddings()
        own = next(name for name, module in model.named_modules() if module is embedding)
        rows = torch.unique(torch.cat([batch.flatten() for batch in batches]).cpu())
        padding, embedding.padding_idx = getattr(embedding, "padding_idx", None), None
        used = rows.to(self.device)
        handle = embedding.register_forward_pre_hook(
            lambda module, args: (torch.searchsorted(used, args[0]), *args[1:])
        )
        try:
            for name in names:
                stored = self._stored(name)
                compact = name == f"{own}.weight"
                if compact:
                    place(model, name, self._cast(name, stored.gather(rows.tolist())))
                else:
                    place(model, name, self._read(name, stored))
            yield
        finally:
            handle.remove()
            embedding.padding_idx = padding
            self._clear(names)

    def _outside_names(self) -> list[str]:
        """Return the parameters of the base model that belong to no block."""
        model = self._skeleton.model
        below = "" if model.base_model is model else f"{model.base_model_prefix}."
        return [
            name
            for name in (*self._skeleton.stored, *self._skeleton.tied)
            if name.startswith(below) and self._skeleton.block_of(name) is None
        ]

    def _always(self, output: Tensor) -> Callable[..., Any]:
        """Return a forward that gives the output of the last block, whatever it is called with."""

        def forward(index: int, *args: Any, **kwargs: Any) -> Any:
            hidden = output.to(self.device)
            return returned(hidden, self._items or 0)

        return forward

    def _items_returned(self, batch: Tensor) -> int:
        """Return how many things blocks return, 0 if it is no tuple: of the first one, run."""
        seen: list[Any] = []

        def look(module: nn.Module, args: Any, output: Any) -> None:
            seen.append(output)
            raise _SeenError

        self._load(0)
        handle = self.blocks[0].register_forward_hook(look)
        try:
            run_stack(self._skeleton.model, batch)
        except _SeenError:
            pass
        finally:
            handle.remove()
        (output,) = seen
        check_only_hidden_states(self._skeleton.model, self.blocks, batch, output)
        return len(output) if isinstance(output, tuple | list) else 0


class _SeenError(Exception):
    """The forward has shown what was to be seen."""


def _shared(calls: list[BlockCall], known: Sequence[list[BlockCall]]) -> list[BlockCall]:
    """Return the first of the known calls that are equal, so that their masks are kept once."""
    compared: dict[tuple[int, int], bool] = {}
    for others in {id(others): others for others in known}.values():
        if len(others) == len(calls) and all(
            _equal(one.args, other.args, compared) and _equal(one.kwargs, other.kwargs, compared)
            for one, other in zip(calls, others, strict=True)
        ):
            return others
    return calls


def _equal(one: Any, other: Any, compared: dict[tuple[int, int], bool]) -> bool:
    import torch

    if isinstance(one, torch.Tensor):
        pair = (id(one), id(other))
        if pair not in compared:
            alike = isinstance(other, torch.Tensor) and one.dtype == other.dtype
            compared[pair] = alike and torch.equal(one, other)
        return compared[pair]
    if type(one) is not type(other):
        return False
    if isinstance(one, tuple | list):
        pairs = zip(one, other, strict=False)
        return len(one) == len(other) and all(_equal(a, b, compared) for a, b in pairs)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(
            _equal(value, other[key], compared) for key, value in one.items()
        )
    return one is other or (isinstance(one, int | float | str) and one == other)
