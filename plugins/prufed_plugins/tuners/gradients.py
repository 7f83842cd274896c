"""The gradient of an attached adapter on one client's data, and how much it varies."""

from __future__ import annotations

import math
from itertools import islice

import torch
from torch import Tensor

from prufed_plugins.api import AdaptedModel, TrainingData
from prufed_plugins.errors import MethodError
from prufed_plugins.tuners.training import collate, learnable_rows, length_batches, summed_loss


def mean_gradient(
    model: AdaptedModel,
    data: TrainingData,
    *,
    batch_size: int,
    batches: int | None,
    seed: int,
    pad_token_id: int,
) -> tuple[dict[str, Tensor], float]:
    """Return the mean of mini-batches' gradients by local name, and their variance σ².

    With ∇_k the gradient of the mean loss per token of mini-batch k, without dropout, these are
    ∇ = 1/K Σ ∇_k and σ² = 1/K Σ ‖∇_k - ∇‖². Nothing is trained, and the model stays as it is.

    Args:
        model: the base with its adapter attached, in evaluation mode.
        data: the client's rows.
        batch_size: rows of a mini-batch.
        batches: K; every row is looked at if None.
        seed: of which rows share a mini-batch.
        pad_token_id: any id the model knows.

    Returns:
        Tensors in float32 on the CPU, zero where masked out.

    Raises:
        MethodError: the rows make fewer than two mini-batches, or a gradient is not finite.
    """
    rows = learnable_rows(data)
    lengths = [len(data.input_ids[row]) for row in rows]
    order = length_batches(lengths, batch_size, torch.Generator().manual_seed(seed))
    if len(order) < 2:
        raise MethodError(
            f"{len(rows)} rows are one mini-batch of {batch_size}, which does not vary",
            "lower aggregator.batch_size, or give the client more rows",
        )
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in _parameters(model)}
    squares, count = 0.0, 0
    for positions in islice(order, batches):
        for name, gradient in _gradient(model, data, [rows[p] for p in positions], pad_token_id):
            total[name] += gradient
            squares += float(gradient.double().square().sum())
        count += 1
    mean = {name: (tensor / count).float().cpu() for name, tensor in total.items()}
    spread = squares / count - sum(float((t / count).square().sum()) for t in total.values())
    if not math.isfinite(spread):
        raise MethodError("a gradient is not finite", "use dtype bfloat16 or float32")
    return mean, max(0.0, spread)


def _parameters(model: AdaptedModel) -> list[tuple[str, Tensor]]:
    return list(model.parameters.items())


def _gradient(
    model: AdaptedModel, data: TrainingData, rows: list[int], pad_token_id: int
) -> list[tuple[str, Tensor]]:
    """Return the gradient of the mean loss per token of some rows, zero where masked out."""
    names, parameters = zip(*_parameters(model), strict=True)
    ids, attention, labels = (t.to(parameters[0].device) for t in collate(data, rows, pad_token_id))
    loss, tokens = summed_loss(model.module, ids, attention, labels)
    # an expert that no token is routed to takes no part in the loss
    found = torch.autograd.grad(
        loss / tokens, parameters, allow_unused=True, materialize_grads=True
    )
    return [
        (
            name,
            gradient if (mask := model.masks.get(name)) is None else gradient.masked_fill(~mask, 0),
        )
        for name, gradient in zip(names, found, strict=True)
    ]
