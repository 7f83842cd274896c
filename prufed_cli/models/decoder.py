"""A causal language model seen as a stack of decoder blocks.

The stack is found by structure, so Llama, Mistral, Qwen, Gemma, OPT and GPT-2 style decoders need
no code of their own: a list of equal blocks, as many as the configuration says, whose matrices are
all ordinary linear modules. What a block receives besides the hidden states (masks, position
embeddings, which differ between layer types) is recorded from the model's own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prufed_cli.errors import USAGE, PrufedError
from prufed_cli.models.experts import router_names, unfuse_experts

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

ARGUMENTS = "blocks"
"""Key, in the arguments :meth:`ModelDecoder.embed` returns, of one call per block."""


@dataclass(frozen=True)
class BlockCall:
    """What one block is called with besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class ModelDecoder:
    """A transformers model as :class:`prufed_plugins.api.Decoder`.

    Attributes:
        prefix: module path of the stack, ``model.layers`` for Llama.
        blocks: the decoder blocks in order.
        start: the first block that is still to be pruned.
        dtype: what the weights are stored in.
    """

    def __init__(self, model: PreTrainedModel, prefix: str, dtype: torch.dtype) -> None:
        self._model = model
        self.prefix = prefix
        self.start = 0
        self.dtype = dtype
        self.blocks: Sequence[nn.Module] = list(stack_of(model, prefix))
        self._linears = [linears_of(block, f"{prefix}.{i}") for i, block in enumerate(self.blocks)]
        self._tuples = _return_tuples(model, self.blocks)

    def linears(self, index: int) -> Mapping[str, nn.Module]:
        """Return the prunable matrices of block ``index`` by their full module name."""
        return self._linears[index]

    def shapes(self, index: int) -> Mapping[str, tuple[int, int]]:
        """Return (outputs, inputs) of the matrices of block ``index``."""
        return {name: shape_of(module) for name, module in self._linears[index].items()}

    def embed(self, batches: Sequence[Tensor]) -> list[tuple[Tensor, dict[str, Any]]]:
        """Return what the first block receives for each batch (B, T), and the blocks' arguments.

        The model's own forward runs with blocks that only hand on their input, so that embedding,
        masks and position embeddings are the model's, at the cost of the embedding alone.
        """
        return [self._embed(batch) for batch in batches]

    def _embed(self, batch: Tensor) -> tuple[Tensor, dict[str, Any]]:
        calls: list[BlockCall] = []
        first: list[Tensor] = []

        def record(index: int, *args: Any, **kwargs: Any) -> Any:
            hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
            first[:] = first or [hidden]
            calls.append(BlockCall(rest, kwargs))
            return (hidden,) if self._tuples else hidden

        with replaced_forwards(self.blocks, record):
            run_stack(self._model, batch)
        return first[0], {ARGUMENTS: calls}

    def run_block(self, index: int, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Return the output (B, T, H) of block ``index``."""
        call: BlockCall = arguments[ARGUMENTS][index]
        output: Any = self.blocks[index](hidden, *call.args, **call.kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def hold(self, hidden: Tensor) -> Tensor:
        """Return ``hidden``: all of it fits into memory."""
        return hidden


def open_decoder(model: PreTrainedModel, dtype: torch.dtype | None = None) -> ModelDecoder:
    """Return the decoder blocks of a causal language model, and put the model in evaluation mode.

    Args:
        model: the model, in memory; the experts of a mixture are unfused.
        dtype: what its weights will be stored in; by default what they are in now.

    Raises:
        PrufedError: the architecture is not a plain decoder; names it.
    """
    model.eval()
    unfuse_experts(model)
    return ModelDecoder(model, find_stack(model), dtype or model.dtype)


def find_stack(model: PreTrainedModel) -> str:
    """Return the module path of the stack of decoder blocks.

    Raises:
        PrufedError: the model is no decoder, or its blocks hold matrices that are not linear
            modules (experts that cannot be unfused, state-space layers, quantized weights).
    """
    from torch import nn

    name = type(model).__name__
    config = model.config.get_text_config()
    if config.is_encoder_decoder:
        raise _unsupported(name, "it is an encoder-decoder")
    path: str
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) != config.num_hidden_layers:
            continue
        if len({type(block) for block in module}) == 1 and linears_of(module[0], ""):
            for index, block in enumerate(module):
                _check_matrices(name, f"{path}.{index}", block)
            return path
    raise _unsupported(name, f"no list of {config.num_hidden_layers} equal decoder blocks is in it")


def _check_matrices(architecture: str, path: str, block: nn.Module) -> None:
    known = {id(linear.get_parameter("weight")) for linear in linears_of(block, "").values()}
    routers = router_names(block)
    for name, parameter in block.named_parameters():
        if parameter.dim() >= 2 and id(parameter) not in known and not _below(name, routers):
            raise _unsupported(architecture, f"{path}.{name} is not a linear module's weight")
        if not parameter.is_floating_point():
            raise _unsupported(architecture, f"{path}.{name} is stored as {parameter.dtype}")


def _unsupported(architecture: str, reason: str) -> PrufedError:
    return PrufedError(
        f"cannot prune a {architecture}: {reason}",
        "use a decoder such as Llama, Mistral, Mixtral, Qwen2, Qwen3, Gemma, OPT or GPT-2",
        USAGE,
    )


def linears_of(block: nn.Module, prefix: str) -> dict[str, nn.Module]:
    """Return the linear modules of a block by their full name."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    routers = router_names(block)
    return {
        f"{prefix}.{name}".lstrip("."): module
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not _below(name, routers)
    }


def _below(name: str, modules: set[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def shape_of(module: nn.Module) -> tuple[int, int]:
    """Return (outputs, inputs) of a linear module."""
    from torch import nn

    first, second = module.get_parameter("weight").shape
    return (first, second) if isinstance(module, nn.Linear) else (second, first)


def stack_of(model: PreTrainedModel, prefix: str) -> nn.ModuleList:
    """Return the stack of decoder blocks at a module path."""
    from torch import nn

    stack = model.get_submodule(prefix)
    assert isinstance(stack, nn.ModuleList)
    return stack


def run_stack(model: PreTrainedModel, batch: Tensor) -> None:
    """Run the model below its language-model head, whose logits nobody needs."""
    import torch

    with torch.no_grad():
        model.base_model(input_ids=batch, use_cache=False)


def _return_tuples(model: PreTrainedModel, blocks: Sequence[nn.Module]) -> bool:
    """Return whether the blocks return tuples, by running the model on two tokens."""
    import torch

    seen: list[bool] = []
    handle = blocks[0].register_forward_hook(
        lambda module, args, output: seen.append(isinstance(output, tuple))
    )
    try:
        device = model.get_input_embeddings().weight.device
        run_stack(model, torch.zeros(1, 2, dtype=torch.long, device=device))
    finally:
        handle.remove()
    return seen[0]


@contextmanager
def replaced_forwards(blocks: Sequence[nn.Module], record: Callable[..., Any]) -> Iterator[None]:
    """Let every block call ``record(index, …)`` instead of its forward."""
    from functools import partial

    originals = [vars(block).get("forward") for block in blocks]
    try:
        for index, block in enumerate(blocks):
            block.forward = partial(record, index)
        yield
    finally:
        for block, original in zip(blocks, originals, strict=True):
            if original is None:
                vars(block).pop("forward", None)
            else:
                block.forward = original
