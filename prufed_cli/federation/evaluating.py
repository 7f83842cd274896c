"""Score the global adapter, and the clients if asked, after the rounds that are due."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from prufed_cli.federation.scoring import numbers
from prufed_cli.federation.standing import masks_of, start_of

if TYPE_CHECKING:
    from torch import Tensor

    from prufed_cli.federation.state import Federation
    from prufed_cli.models.adapters import AdapterSpec
    from prufed_registry import Artifact


def evaluate_round(federation: Federation, index: int) -> None:
    """Score and journal what the configuration asks for after round ``index``."""
    config = federation.plan.config
    wanted = config.evaluate
    due = index + 1 == config.rounds or (index + 1) % wanted.every == 0
    if not federation.evaluates or not due or not (wanted.tasks or wanted.perplexity):
        return
    state = federation.state
    adapter = (federation.spec, state.tensors)
    _score(federation, index, "global", federation.full, adapter, state.residual)
    for name in federation.clients if wanted.clients else ():
        client = federation.client_at(index + 1, name)
        tensors = start_of(federation, index + 1, client, masks_of(federation, client))
        own = (client.spec, client.local(tensors))
        residual = client.local(client.residual(state))
        _score(federation, index, client.name, client.base, own, residual)


def _score(
    federation: Federation,
    index: int,
    subject: str,
    base: Artifact,
    adapter: tuple[AdapterSpec, Mapping[str, Tensor]],
    residual: Mapping[str, Tensor],
) -> None:
    if federation.run.find("evaluated", round=index, subject=subject) is not None:
        return
    with federation.reporter.task(f"round {index + 1}: evaluate {subject}"):
        scores = numbers(federation.scoring.score(base, adapter, residual))
    federation.run.record("evaluated", round=index, subject=subject, scores=scores)
    shown = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
    federation.reporter.note(f"round {index + 1}: {subject}: {shown}")
