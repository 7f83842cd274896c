"""Perplexity of a model larger than memory: block by block, and the output head in pieces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prufed_cli.evaluation.perplexity import (
    Perplexity,
    TextFile,
    check_token_ids,
    model_window,
    windows,
)
from prufed_cli.models.activations import Activations
from prufed_cli.models.skeleton import open_skeleton
from prufed_cli.models.streaming import StreamedDecoder
from prufed_cli.progress import SILENT, Reporter
from prufed_cli.pruning.job import Options, ScoredText
from prufed_cli.pruning.memory import available_memory
from prufed_cli.pruning.plan import scored_at_once, scoring_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from prufed_registry import Artifact


def streamed_perplexity(
    directory: Path,
    base: Artifact,
    text: ScoredText,
    options: Options,
    spill: Path,
    *,
    reporter: Reporter = SILENT,
) -> Perplexity:
    """Score a text as :func:`prufed_cli.evaluation.perplexity.measure_perplexity` does.

    A likelihood that is not finite is no error here: it would cost a finished prune.

    Args:
        directory: the model, the base itself or what was made of it.
        base: what is pruned, to be named in errors.
        text: what to score.
        options: device, dtype to compute in and memory.
        spill: where activations wait that do not fit.
        reporter: told how far it is.

    Raises:
        PrufedError: the model has no embedding for a token, or no positions for a window.
    """
    import torch

    trust = options.trust_remote_code
    skeleton = open_skeleton(directory, base.ref, options.compute, trust_remote_code=trust)
    model = skeleton.model
    tokens = text.tokens
    check_token_ids(model, int(tokens.max()))
    length, width = model_window(model), options.compute.itemsize
    decoder = StreamedDecoder(skeleton, options.device, Activations())
    batches = list(windows(tokens, length, scored_at_once(skeleton, decoder, width)))
    held = len(tokens) * model.config.get_text_config().hidden_size * width
    budget = available_memory() if options.max_memory is None else options.max_memory
    if held + scoring_bytes(skeleton, decoder, width) > budget:
        decoder.hold_in(spill)
    with reporter.task(f"perplexity on {text.file.name}", total=len(decoder.blocks)) as task:
        inputs = [batch[:, :-1] for batch in batches]
        states = decoder.embed(inputs)
        with torch.no_grad():
            for index in range(len(decoder.blocks)):
                for position, (hidden, arguments) in enumerate(states):
                    output = decoder.run_block(index, hidden, arguments)
                    states[position] = (decoder.hold(output, hidden), arguments)
                task.advance()
        outputs = [hidden for hidden, _ in states]
        nats = _negative_log_likelihood(decoder, inputs, outputs, [b[:, 1:] for b in batches])
    return Perplexity.of_likelihood(nats, len(tokens) - 1, text.file, length)


def perplexity_report(text: TextFile, base: Perplexity, pruned: Perplexity) -> dict[str, Any]:
    """Return what the report of a sub-model says about a text."""
    return {
        "perplexity": {
            "file": text.name,
            "tokens": base.tokens,
            "base": _finite(base.value),
            "pruned": _finite(pruned.value),
        }
    }


def _finite(value: float) -> float | None:
    """Return six significant digits, which do not hang on the order of additions; None for ∞."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _negative_log_likelihood(
    decoder: StreamedDecoder,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    targets: Sequence[Tensor],
) -> float:
    """Return the summed −log p of the targets, in nats; the softmax is gathered piece by piece."""
    import torch

    norms = [torch.full(t.shape, -math.inf, dtype=torch.float64) for t in targets]  # log Σ exp
    chosen = [torch.zeros(t.shape, dtype=torch.float64) for t in targets]
    for position, first, logits in decoder.logits(inputs, outputs):
        logits = logits.float()
        norms[position] = torch.logaddexp(norms[position], logits.logsumexp(-1).cpu().double())
        local = targets[position].to(logits.device) - first  # (b, l)
        here = (local >= 0) & (local < logits.shape[-1])
        found = logits.gather(-1, local.clamp(0, logits.shape[-1] - 1)[..., None])[..., 0]
        chosen[position] += torch.where(here, found, 0.0).cpu().double()
    losses = (norm - value for norm, value in zip(norms, chosen, strict=True))
    return sum(float(loss.sum()) for loss in losses)
