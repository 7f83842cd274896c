"""The published pruning procedure written plainly: what a whole prune of ours is timed against.

The model is loaded whole. Block after block, every matrix gets a Hessian of its own, fed sequence
by sequence in a loop; each is then pruned by :func:`plain_sparsegpt.plain_sparsegpt`, and the block
is run once more for the next one (Frantar & Alistarh, https://arxiv.org/abs/2301.00774, §4).

    python plain_pruning.py MODEL TOKENS OUT SPARSITY DTYPE

prunes the Llama in directory MODEL, calibrated with the token ids (sequences, length) of the
safetensors file TOKENS, and saves it into OUT. The blocks are run in DTYPE.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from plain_sparsegpt import plain_sparsegpt
from safetensors.torch import load_file
from torch import Tensor, nn


class Hessian:
    """2·XXᵀ/n over sequences, rescaled as each one comes."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.matrix = torch.zeros(columns, columns, device=device)
        self.sequences = 0

    def add(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Add the inputs (1, T, columns) of one sequence; a forward hook."""
        x = inputs[0].reshape(-1, inputs[0].shape[-1]).t().float()
        self.matrix *= self.sequences / (self.sequences + 1)
        self.sequences += 1
        x = (2 / self.sequences) ** 0.5 * x
        self.matrix += x @ x.t()


class FirstInputs(nn.Module):
    """Stands for the first block and keeps what it is called with."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.hidden: list[Tensor] = []
        self.arguments: dict[str, Any] = {}

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        """Keep the call and stop the model."""
        self.hidden.append(hidden_states)
        self.arguments = arguments
        raise StopIteration


@torch.no_grad()
def prune(model: Any, tokens: Tensor, sparsity: float) -> None:
    """Prune a Llama in place; ``tokens`` is (sequences, length)."""
    blocks = model.model.layers
    first = FirstInputs(blocks[0])
    blocks[0] = first
    for sequence in tokens:
        try:
            model(input_ids=sequence[None], use_cache=False)
        except StopIteration:
            continue
    blocks[0] = first.block
    states = first.hidden
    for block in blocks:
        linears = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
        hessians = {n: Hessian(m.in_features, m.weight.device) for n, m in linears.items()}
        handles = [
            module.register_forward_hook(hessians[name].add) for name, module in linears.items()
        ]
        run = partial(_run, block, first.arguments)
        for hidden in states:
            run(hidden)
        for handle in handles:
            handle.remove()
        for name, module in linears.items():
            weight, _ = plain_sparsegpt(
                module.weight.float(), hessians[name].matrix, sparsity, exact=False
            )
            module.weight.copy_(weight.to(torch.bfloat16))  # as it is stored
        states = [run(hidden) for hidden in states]


def _run(block: nn.Module, arguments: dict[str, Any], hidden: Tensor) -> Tensor:
    output = block(hidden, **arguments)
    return output[0] if isinstance(output, tuple) else output


def peak_memory() -> int:
    """Return the most memory that this process has held, in KiB; Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def main(model_directory: str, tokens: str, out: str, sparsity: float, dtype: str) -> None:
    """Load, prune, save."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype=getattr(torch, dtype))
    model.eval()
    prune(model, load_file(tokens)["tokens"].long(), sparsity)
    model.to(torch.bfloat16).save_pretrained(out)
    print(peak_memory())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4]), sys.argv[5])
