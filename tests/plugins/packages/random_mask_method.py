"""The pruner itself: entries drawn at random, the same for the same seed and name."""

from __future__ import annotations

import zlib

import torch

from prufed_plugins.api import PrunedMatrix
from prufed_plugins.errors import MethodError


class RandomMask:
    result = "masked"
    needs_calibration = False

    def __init__(self, params):
        self.seed = params.seed

    def prune(self, decoder, calibration, target, progress):
        if target.sparsity is None or not 0 <= target.sparsity < 1:
            raise MethodError(f"random-mask cannot prune to {target}", "pass --sparsity 0.5")
        for index in range(decoder.start, len(decoder.blocks)):
            for name, module in decoder.linears(index).items():
                before = decoder.masks.get(f"{name}.weight")
                yield self._prune(f"{name}.weight", module, target.sparsity, before)
            progress("block", index + 1, len(decoder.blocks))

    def _prune(self, name, module, sparsity, before):
        generator = torch.Generator().manual_seed(self.seed * 2**32 + zlib.crc32(name.encode()))
        draws = torch.rand(module.weight.shape, generator=generator)
        if before is not None:  # what an earlier prune removed goes first
            draws[~before.cpu()] = -1
        mask = draws >= 0
        mask.view(-1)[draws.flatten().argsort()[: int(sparsity * draws.numel())]] = False
        with torch.no_grad():
            module.weight.masked_fill_(~mask.to(module.weight.device), 0)
        weight = module.weight.detach().clone()
        return PrunedMatrix(name, weight, mask, {"sparsity": 1 - mask.double().mean().item()})
