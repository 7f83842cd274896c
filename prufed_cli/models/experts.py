"""A mixture of experts with every expert's matrices as linear modules of their own.

transformers keeps the experts of a block fused, all gates and ups in one three-dimensional
parameter and all downs in another, although checkpoints store them one by one. A pruner wants to
see each matrix with the inputs that were routed to it. Unfused, the modules have the names of the
checkpoint, so what is pruned, masked and saved is called as it is on disk, and
``save_pretrained`` writes a directory that ``from_pretrained`` opens fused again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

SUPPORTED: Final = frozenset(
    {
        "deepseek_v2",
        "deepseek_v3",
        "dots1",
        "flex_olmo",
        "glm4_moe",
        "hunyuan_v1_moe",
        "mixtral",
        "olmoe",
        "qwen2_moe",
        "qwen3_moe",
    }
)
"""Model types whose experts are known, by test, to compute the same unfused."""

_STORED: Final = re.compile(
    r"(?P<owner>.+)\.(?P<experts>\w+)\.(?P<index>\d+)\.(?P<leaf>\w+)\.weight"
)
_FUSED: Final = {"gate_up_proj", "down_proj"}


class Expert(nn.Module):
    """One expert, y = W_down (φ(W_gate x) · W_up x).

    Args:
        names: what the checkpoint calls gate, up and down.
        gate_up: both matrices one above the other, (2·I, H).
        down: (H, I).
        activation: φ.
    """

    def __init__(
        self,
        names: tuple[str, str, str],
        gate_up: Tensor,
        down: Tensor,
        activation: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        self._names = names
        self._activation = activation
        for name, weight in zip(names, (*gate_up.chunk(2), down), strict=True):
            self.add_module(name, _linear(weight))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the expert's output for the tokens routed to it, (tokens, H)."""
        gate, up, down = (self.get_submodule(name) for name in self._names)
        output: Tensor = down(self._activation(gate(hidden)) * up(hidden))
        return output


class Experts(nn.ModuleList):
    """The experts of one block; an expert that no token is routed to is not called."""

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum of the chosen experts' outputs.

        Args:
            hidden: (tokens, H).
            chosen: int64 (tokens, k), the experts of each token.
            weights: (tokens, k), theirs.
        """
        total = torch.zeros_like(hidden)
        for index, expert in enumerate(self):
            tokens, places = torch.where(chosen == index)
            if len(tokens):
                output = expert(hidden[tokens]) * weights[tokens, places, None]
                total.index_add_(0, tokens, output.to(total.dtype))
        return total


def unfuse_experts(model: PreTrainedModel) -> None:
    """Replace every fused experts module of a supported mixture, in place; others stay.

    Works on an empty skeleton (meta tensors) as well. Where checkpoints call the module around the
    experts otherwise (Mixtral's ``block_sparse_moe`` is ``mlp`` in transformers), it is registered
    under the checkpoint's name; the layer's own attribute goes on working.

    Args:
        model: a causal language model; its memory grows by one block's experts meanwhile.
    """
    if model.config.get_text_config().model_type not in SUPPORTED:
        return
    for path, fused in list(_fused_modules(model)):
        names = _stored_names(model, path, int(fused.num_experts))
        if names is not None:
            _replace(model, path, names, _unfused(fused, names))


def router_names(block: nn.Module) -> set[str]:
    """Return the paths inside a block of the modules that route: they are never pruned.

    These are the gates beside the experts, also the one that weighs a shared expert.
    """
    found = set()
    for path, module in block.named_modules():
        if isinstance(module, Experts):
            owner = path.rpartition(".")[0]
            for name, _ in block.get_submodule(owner).named_children():
                if name.endswith(("gate", "router")):
                    found.add(f"{owner}.{name}".lstrip("."))
    return found


@dataclass(frozen=True)
class _StoredNames:
    """What a checkpoint calls one experts module.

    Attributes:
        owner: path of the module around the experts.
        leaves: gate, up and down.
    """

    owner: str
    leaves: tuple[str, str, str]


def _fused_modules(model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    for path, module in model.named_modules():
        held = {name for name, _ in module.named_parameters(recurse=False)}
        if held == _FUSED and module.get_parameter("down_proj").dim() == 3:
            yield path, module


def _stored_names(model: PreTrainedModel, path: str, experts: int) -> _StoredNames | None:
    """Return the checkpoint's names, as ``save_pretrained`` would make them; None if it fuses too.

    Numbered tensors of one entry per matrix are saved in thought, so that the numbers tell which
    name is whose.
    """
    from transformers.core_model_loading import revert_weight_conversion

    gate_up = torch.arange(2 * experts).reshape(experts, 2, 1)
    down = torch.arange(2 * experts, 3 * experts).reshape(experts, 1, 1)
    stored = revert_weight_conversion(
        model, {f"{path}.gate_up_proj": gate_up, f"{path}.down_proj": down}
    )
    if len(stored) != 3 * experts:
        return None
    by_number = {int(tensor): name for name, tensor in stored.items()}
    matches = [_STORED.fullmatch(by_number[number]) for number in (0, 1, 2 * experts)]
    gate, up, bottom = (cast("re.Match[str]", match) for match in matches)
    return _StoredNames(gate["owner"], (gate["leaf"], up["leaf"], bottom["leaf"]))


def _unfused(fused: Any, names: _StoredNames) -> Experts:
    return Experts(
        Expert(names.leaves, gate_up, down, fused.act_fn)
        for gate_up, down in zip(fused.gate_up_proj, fused.down_proj, strict=True)
    )


def _replace(model: PreTrainedModel, path: str, names: _StoredNames, experts: Experts) -> None:
    model.set_submodule(path, experts)
    owner = path.rpartition(".")[0]
    if owner == names.owner:
        return
    layer_path, _, used = owner.rpartition(".")
    layer = model.get_submodule(layer_path)
    mixture = layer.get_submodule(used)
    delattr(layer, used)
    layer.add_module(names.owner.rpartition(".")[2], mixture)
    # Past nn.Module, which would register it a second time: the layer's forward finds it still.
    object.__setattr__(layer, used, mixture)


def _linear(weight: Tensor) -> nn.Linear:
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    return linear
