"""The run: sample, tune, merge, write back, evaluate; every step journalled after it is true.

A step that the journal already has is not done again, and a step that was published but not yet
journalled when the process died is found in the registry by its fingerprint. All randomness derives
from (run seed, round, client, purpose), so a resumed run ends with the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from prufed_cli.errors import PrufedError
from prufed_cli.federation.evaluating import evaluate_round
from prufed_cli.federation.merging import merge_round
from prufed_cli.federation.own_adapters import compare_clients
from prufed_cli.federation.plan import sample_rounds
from prufed_cli.federation.rehearsal import rehearse
from prufed_cli.federation.server_state import load_state
from prufed_cli.federation.tuning import tune_clients
from prufed_cli.federation.writing_back import write_back_all

if TYPE_CHECKING:
    from prufed_cli.federation.state import Federation
    from prufed_registry import Artifact


def run_rounds(federation: Federation) -> Artifact:
    """Run every round that is not done, write back, and return the last global adapter.

    Raises:
        PrufedError: the methods do not go together, or too few clients came through a round.
        MethodError: the aggregator cannot merge the clients of a round.
    """
    sampled = _prepared(federation)
    run = federation.run
    with federation.reporter.task("rounds", total=len(sampled)) as task:
        for index, names in enumerate(sampled):
            merged = run.find("merged", round=index)
            if merged is not None:
                federation.adopt(merged)
            else:
                _round(federation, index, names)
            evaluate_round(federation, index)
            task.advance()
    newest = federation.newest
    if newest is None:
        raise PrufedError("no round was merged")
    write_back_all(federation)
    if not run.finished:
        run.record("finished", ref=newest.ref, digest=newest.digest)
    return newest


def _prepared(federation: Federation) -> tuple[tuple[str, ...], ...]:
    """Refuse what cannot work, and return the names of every round's clients."""
    infos = [client.info for client in federation.clients.values()]
    sampled = sample_rounds(federation.plan.config, infos)
    rehearse(sampled, federation.clients, federation.aggregator, federation.state)
    merged = federation.run.find("merged")
    if federation.optimizer is not None and merged is not None:
        load_state(federation.run.directory, merged["optimizer"], federation.optimizer)
    compare_clients(federation)
    return sampled


def _round(federation: Federation, index: int, names: Sequence[str]) -> None:
    """Tune the round's clients and merge what came of it."""
    run = federation.run
    if run.find("round", round=index) is None:
        run.record("round", round=index, clients=list(names))
    done = tune_clients(federation, index, names)
    root = None if federation.root is None else done.pop(federation.root.name, None)
    if federation.root is not None and root is None:
        raise PrufedError(
            f"round {index + 1} has no update of the server's own to hold clients against",
            f"see `prufed runs show {run.id}` for what went wrong",
        )
    needed = federation.plan.config.min_clients
    if len(done) < needed:
        raise PrufedError(
            f"round {index + 1} has {len(done) or 'no'} adapter{'s' * (len(done) != 1)} of "
            f"{len(names)} clients, and {needed} {'is' if needed == 1 else 'are'} needed",
            f"`prufed runs show {run.id}` says what went wrong with each",
        )
    merge_round(federation, index, done, root)
