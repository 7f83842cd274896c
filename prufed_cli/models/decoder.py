"""A causal language model seen as a stack of decoder blocks.

The stack is found by structure, so Llama, Mistral, Qwen, Gemma, OPT and GPT-2 style decoders need
no code of their own: a list of equal blocks, as many as the configuration says, whose matrices are
all ordinary linear modules. What a block receives besides the hidden states (masks, position
embeddings, which differ between layer types) is recorded from the model's own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from prufed_cli.errors import USAGE, PrufedError
from prufed_cli.models.base import first_line
from prufed_cli.models.experts import router_names

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

ARGUMENTS = "blocks"
"""Key, in the arguments that a decoder's ``embed`` returns, of one call per block."""


_DECODERS: Final = (
    "use a decoder such as Llama, Mistral, Mixtral, Qwen2, Qwen3, Gemma, OPT or GPT-2"
)
_LAYERS_GO: Final = "drop whole layers (--method top --layers 2), or "


@dataclass(frozen=True)
class BlockCall:
    """What one block is called with besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def find_stack(model: PreTrainedModel) -> str:
    """Return the module path of the stack of decoder blocks.

    It is looked for in the model's text decoder first, as a vision tower may be as deep.

    Raises:
        PrufedError: the model is no decoder, or has no such stack.
    """
    from torch import nn

    name = type(model).__name__
    config = model.config.get_text_config()
    if config.is_encoder_decoder:
        raise _unsupported(name, "it is an encoder-decoder")
    if any(stored.endswith("ForMaskedLM") for stored in config.architectures or ()):
        raise _unsupported(name, f"it is stored as a {config.architectures[0]}, an encoder")
    decoder = model.get_decoder()
    inside = next((path for path, module in model.named_modules() if module is decoder), "")
    mixed: set[str] = set()
    path: str
    for path, module in (*decoder.named_modules(prefix=inside), *model.named_modules()):
        if not isinstance(module, nn.ModuleList) or len(module) != config.num_hidden_layers:
            continue
        kinds = {type(block).__name__ for block in module}
        if len(kinds) == 1 and linears_of(module[0], ""):
            _check_whole(model, path)
            return path
        mixed = mixed or kinds
    if len(mixed) > 1:
        raise _unsupported(name, f"its blocks are of several kinds: {', '.join(sorted(mixed))}")
    raise _unsupported(name, f"no list of {config.num_hidden_layers} equal decoder blocks is in it")


def _check_whole(model: PreTrainedModel, path: str) -> None:
    """Refuse a stack whose blocks are only a part of the layers, as the attentions of XLM are.

    Raises:
        PrufedError: as said.
    """
    from torch import nn

    stack, owner = stack_of(model, path), path.rpartition(".")[0]
    for name, beside in model.get_submodule(owner).named_children():
        if beside is stack or not isinstance(beside, nn.ModuleList) or len(beside) != len(stack):
            continue
        if linears_of(beside, ""):
            raise _unsupported(
                type(model).__name__, f"one part of its layers is in {path}, another in {name}"
            )


def refuse_converted(model: PreTrainedModel, missing: Sequence[str]) -> None:
    """Refuse parameters that transformers puts together from several stored ones.

    Experts that cannot be unfused are such, whatever is done to them.

    Args:
        model: the model.
        missing: names of parameters that are not stored as they are.

    Raises:
        PrufedError: as said, with the first such parameter.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    made = [
        part
        for rule in get_model_conversion_mapping(model)
        if isinstance(rule, WeightConverter)
        for part in rule.target_patterns
    ]
    for name in missing:
        if any(part in name for part in made):
            raise _unsupported(
                type(model).__name__, f"{name} is stored in another form, which is not read here"
            )


def check_matrices(model: PreTrainedModel, prefix: str) -> None:
    """Refuse blocks whose matrices are not all linear modules.

    Experts that cannot be unfused, convolutions, state-space layers and quantized weights are none.

    Raises:
        PrufedError: as said, with the first such parameter.
    """
    for index, block in enumerate(stack_of(model, prefix)):
        _check_matrices(type(model).__name__, f"{prefix}.{index}", block)


def _check_matrices(architecture: str, path: str, block: nn.Module) -> None:
    known = {id(linear.get_parameter("weight")) for linear in linears_of(block, "").values()}
    routers = router_names(block)
    # experts before what routes to them, which is never pruned
    for name, parameter in sorted(block.named_parameters(), key=lambda one: -one[1].dim()):
        if parameter.dim() >= 2 and id(parameter) not in known and not _below(name, routers):
            raise _unsupported(architecture, f"{path}.{name} {_other(block, name)}", _LAYERS_GO)
        if not parameter.is_floating_point():
            raise _unsupported(architecture, f"{path}.{name} is stored as {parameter.dtype}")


def _other(block: nn.Module, name: str) -> str:
    """Return what a parameter of a block is that is no linear module's weight."""
    from torch import nn

    owner = block.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, nn.modules.conv._ConvNd):
        return "belongs to a convolution"
    if "experts" in name:
        return "holds the matrices of all experts in one"
    return "is not a linear module's weight"


def _unsupported(architecture: str, reason: str, instead: str = "") -> PrufedError:
    return PrufedError(f"cannot prune a {architecture}: {reason}", f"{instead}{_DECODERS}", USAGE)


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
    """Run the model below its language-model head, whose logits nobody needs.

    Raises:
        PrufedError: it has no positions for so many tokens, or looks up tokens of its own.
    """
    import torch

    try:
        with torch.no_grad():
            model.base_model(input_ids=batch, use_cache=False)
    except (IndexError, RuntimeError) as error:
        if "out of" not in str(error) or "memory" in str(error):
            raise
        raise PrufedError(  # RoBERTa's first positions are for padding, CPM-Ant adds a prompt
            f"{type(model).__name__} cannot embed sequences of {batch.shape[1]} tokens, "
            f"whatever its configuration says: {first_line(error)}",
            "use a shorter --length, or a method that runs no text, such as magnitude",
        ) from error


def first_inputs(
    model: PreTrainedModel, blocks: Sequence[nn.Module], batch: Tensor, *, items: int
) -> tuple[Tensor, list[BlockCall]]:
    """Return what the first block receives for a batch (B, T), and what each is called with.

    The model's own forward runs with blocks that only hand on their input, so that embedding,
    masks and position embeddings are the model's, at the cost of the embedding alone.

    Args:
        model: the model.
        blocks: its decoder blocks.
        batch: token ids.
        items: how many things its blocks return in a tuple; 0 where it is the output alone.

    Raises:
        PrufedError: the blocks are not called once each, or as :func:`run_stack`.
    """
    calls: list[BlockCall] = []
    first: list[Tensor] = []

    def record(index: int, *args: Any, **kwargs: Any) -> Any:
        hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        first[:] = first or [hidden]
        calls.append(BlockCall(rest, kwargs))
        return returned(hidden, items)

    with replaced_forwards(blocks, record):
        run_stack(model, batch)
    if len(calls) != len(blocks):
        raise _unsupported(
            type(model).__name__, f"its {len(blocks)} blocks are called {len(calls)} times"
        )
    return first[0], calls


def check_only_hidden_states(
    model: PreTrainedModel, blocks: Sequence[nn.Module], batch: Tensor, output: Any
) -> None:
    """Refuse blocks that are called with more of what the one before returned (ZAYA, HY 4).

    Run block by block they would be given nothing in its place.

    Args:
        model: the model.
        blocks: its decoder blocks.
        batch: token ids, which may be few.
        output: what the first block returned.

    Raises:
        PrufedError: as said.
    """
    items = len(output) if isinstance(output, tuple | list) else 0
    marks = [None if each is None else object() for each in output[1:]] if items else []

    def look(index: int, *args: Any, **kwargs: Any) -> Any:
        handed_on = (one for one in (*args, *kwargs.values()) if one is not None)
        if any(one is mark for one in handed_on for mark in marks):
            raise _unsupported(
                type(model).__name__, f"block {index} needs more of the one before than its output"
            )
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *marks) if items else hidden

    with replaced_forwards(blocks, look), suppress(TypeError, AttributeError, ValueError):
        run_stack(model, batch)  # what the model itself makes of the marks does not matter


def returned(hidden: Tensor, items: int) -> Any:
    """Return an output as blocks do that return so many things in a tuple, or the output alone."""
    return (hidden, *[None] * (items - 1)) if items else hidden


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
