"""The training loop that tuners share: batches, accumulation, clipping, decay, and exact masks.

Each optimizer step adds up the *summed* loss of its micro-batches and divides the gradient once by
the number of loss tokens, so that accumulation equals one big batch, and so that fp16 gradients are
not pushed below what fp16 can hold by an early division.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prufed_plugins.api import AdaptedModel, Factors, TrainingData, TuneResult, TuneStep
from prufed_plugins.errors import MethodError
from prufed_plugins.names import split_factor
from prufed_plugins.params import LoraParams

IGNORE = -100
"""The label of a token without loss."""

Penalty = Callable[[Mapping[str, nn.Parameter]], None]
"""Adds to the gradients of the trained parameters, by local name, before they are clipped."""

_WINDOW = 16
"""Batches that are sorted by length together: enough to save padding, few enough to stay mixed."""


def train(
    model: AdaptedModel,
    data: TrainingData,
    settings: LoraParams,
    *,
    seed: int,
    on_step: Callable[[TuneStep], None],
    pad_token_id: int,
    factors: Factors = "AB",
    penalty: Penalty | None = None,
) -> TuneResult:
    """Train the adapter with AdamW and return its tensors.

    The same seed gives the same bytes on a CPU. Masked-out entries are zero in value, gradient and
    moments at every step. The global random state and the train mode of every module are the same
    afterwards as before.

    Args:
        model: the base with its adapter attached.
        data: the client's rows; rows without a token to learn from are passed over.
        settings: how long and how fast; the learning rate decays linearly to 0 over the call.
        seed: of the order of the rows and of dropout.
        on_step: told about each optimizer step.
        pad_token_id: any id the model knows; padding is masked and carries no loss.
        factors: which are trained; the others stay as they are, bit for bit.
        penalty: adds the gradient of what the loss of the text is accompanied by.

    Raises:
        MethodError: no row has a token to learn from, or the loss or a gradient is not finite.
    """
    rows = learnable_rows(data)
    steps = settings.epochs * math.ceil(len(rows) / settings.batch_size)
    total = steps if settings.max_steps is None else min(steps, settings.max_steps)
    trained = {name: p for name, p in model.parameters.items() if split_factor(name)[1] in factors}
    parameters = list(trained.values())
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    losses: list[float] = []
    tokens = 0
    with _seeded(parameters[0].device, seed), _training(model.module), _only(model, trained):
        for step, batch in enumerate(_batches(data, rows, settings, seed, total), start=1):
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * _decay(step - 1, total, settings.warmup_steps)
            losses.append(_accumulate(model, data, batch, settings, pad_token_id, step))
            if penalty is not None:
                penalty(trained)
            _mask_gradients(model)
            _clip(parameters, settings.max_grad_norm, step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            model.project()
            tokens += sum(len(data.input_ids[row]) for row in batch)
            on_step(TuneStep(step=step, total=total, loss=losses[-1], tokens=tokens))
    return TuneResult(tensors=model.state(), losses=losses, tokens=tokens)


# --- order of the rows ---------------------------------------------------------------------------


def learnable_rows(data: TrainingData) -> list[int]:
    """Return the numbers of the rows that have a token to learn from.

    Raises:
        MethodError: there are none.
    """
    rows = [row for row in range(len(data)) if any(t != IGNORE for t in data.labels[row][1:])]
    if not rows:
        raise MethodError(
            f"none of {len(data)} rows has a token to learn from",
            "give longer rows, raise the cutoff, or train on all tokens",
        )
    return rows


def length_batches(
    lengths: Sequence[int], batch_size: int, generator: torch.Generator
) -> list[list[int]]:
    """Return one epoch of batches of positions, in random order, of like lengths within a batch.

    Rows are shuffled, sorted by length within windows of several batches, cut into batches, and the
    batches are shuffled.
    """
    order = torch.randperm(len(lengths), generator=generator).tolist()
    window = batch_size * _WINDOW
    batches = []
    for start in range(0, len(order), window):
        rows = sorted(order[start : start + window], key=lambda position: lengths[position])
        batches += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def _batches(
    data: TrainingData, rows: Sequence[int], settings: LoraParams, seed: int, total: int
) -> Iterator[list[int]]:
    """Yield ``total`` batches of row numbers."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [len(data.input_ids[row]) for row in rows]
    step = 0
    while step < total:
        for batch in length_batches(lengths, settings.batch_size, generator)[: total - step]:
            yield [rows[position] for position in batch]
            step += 1


def _decay(step: int, total: int, warmup: int) -> float:
    """Return the learning rate's factor at ``step`` (0 first): up over the warm-up, then to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return (total - step) / max(1, total - warmup)


# --- one step ------------------------------------------------------------------------------------


def _accumulate(
    model: AdaptedModel,
    data: TrainingData,
    batch: Sequence[int],
    settings: LoraParams,
    pad_token_id: int,
    step: int,
) -> float:
    """Leave the batch's mean gradient per loss token in ``.grad``; return the mean loss."""
    device = next(iter(model.parameters.values())).device
    summed, count = 0.0, 0
    for start in range(0, len(batch), settings.micro_batch_size):
        micro = batch[start : start + settings.micro_batch_size]
        ids, attention, labels = (t.to(device) for t in collate(data, micro, pad_token_id))
        loss, found = summed_loss(model.module, ids, attention, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        summed += float(loss.detach())
        count += found
    mean = summed / count
    if not math.isfinite(mean):
        raise MethodError(
            f"the loss is {mean} at step {step}", "lower the learning rate, or use dtype bfloat16"
        )
    for parameter in model.parameters.values():
        if parameter.grad is not None:
            parameter.grad.div_(count)
    return mean


def collate(
    data: TrainingData, rows: Sequence[int], pad_token_id: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (token ids, attention mask, labels), each (B, T), padded on the right."""
    width = max(len(data.input_ids[row]) for row in rows)
    ids = torch.full((len(rows), width), pad_token_id)
    labels = torch.full((len(rows), width), IGNORE)
    attention = torch.zeros((len(rows), width), dtype=torch.long)
    for position, row in enumerate(rows):
        length = len(data.input_ids[row])
        ids[position, :length] = torch.tensor(data.input_ids[row])
        labels[position, :length] = torch.tensor(data.labels[row])
        attention[position, :length] = 1
    return ids, attention, labels


def summed_loss(
    module: nn.Module, ids: Tensor, attention: Tensor, labels: Tensor
) -> tuple[Tensor, int]:
    """Return the summed cross-entropy of predicting each next token, in fp32, and their number."""
    logits = module(input_ids=ids, attention_mask=attention, use_cache=False).logits  # (B, T, V)
    targets = labels[:, 1:]
    learned = targets != IGNORE
    chosen = logits[:, :-1][learned].float()  # (tokens with loss, V)
    return F.cross_entropy(chosen, targets[learned], reduction="sum"), int(learned.sum())


def add_gradient(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Add to a parameter's gradient, which it may not have yet."""
    if parameter.grad is None:
        parameter.grad = gradient.to(parameter.dtype)
    else:
        parameter.grad.add_(gradient)


def _mask_gradients(model: AdaptedModel) -> None:
    """Zero the gradients of masked-out entries, so that their moments never leave zero."""
    for name, mask in model.masks.items():
        gradient = model.parameters[name].grad
        if gradient is not None:
            gradient.masked_fill_(~mask, 0)


def _clip(parameters: Sequence[nn.Parameter], limit: float, step: int) -> None:
    norm = float(nn.utils.clip_grad_norm_(parameters, limit))
    if not math.isfinite(norm):
        raise MethodError(
            f"the gradient's norm is {norm} at step {step}",
            "lower the learning rate, or use dtype bfloat16",
        )


# --- surroundings --------------------------------------------------------------------------------


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Seed torch's generators, which dropout draws from, and put them back afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@contextmanager
def _only(model: AdaptedModel, trained: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Let only ``trained`` take gradients: the others' would be thrown away."""
    required = {name: parameter.requires_grad for name, parameter in model.parameters.items()}
    for name, parameter in model.parameters.items():
        parameter.requires_grad_(name in trained)
    try:
        yield
    finally:
        for name, parameter in model.parameters.items():
            parameter.requires_grad_(required[name])


@contextmanager
def _training(module: nn.Module) -> Iterator[None]:
    """Set train mode, and put back each module's own mode and drop all gradients afterwards."""
    modes: Mapping[nn.Module, bool] = {part: part.training for part in module.modules()}
    module.train()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
        module.zero_grad(set_to_none=True)
