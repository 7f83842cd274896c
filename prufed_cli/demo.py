"""The whole job on the embedded model: prune, federate eight clients, evaluate at each stage.

The table has the shape of Table 2 of the LEGO paper (2410.18287): one column per sparsity, one row
per stage. The numbers are those of a tiny model in an invented world; they show what each step
does, and say nothing about large models.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from prufed_cli.progress import SILENT, Reporter

if TYPE_CHECKING:
    from prufed_cli.config import FederationConfig
    from prufed_cli.evaluation import Metric, Scores
    from prufed_cli.federation.state import Federation
    from prufed_registry import Artifact, Registry

TIERS: Final = (0.0, 0.25, 0.5, 0.75)
RATES: Final = {0.0: 3e-3, 0.25: 3e-3, 0.5: 5e-3, 0.75: 1e-2}
"""Learning rate by sparsity: a sparse sub-model has more to learn through fewer entries."""
STAGES: Final = ("pruned", "fine-tuned", "globally updated")
CATEGORIES: Final = (
    "brainstorming",
    "classification",
    "closed_qa",
    "creative_writing",
    "general_qa",
    "information_extraction",
    "open_qa",
    "summarization",
)


@dataclass(frozen=True)
class Cell:
    """Mean accuracy over the eight tasks.

    Attributes:
        mean: in [0, 1].
        stderr: its standard error.
        own: mean accuracy of the tier's clients on their own categories.
    """

    mean: float
    stderr: float
    own: float


@dataclass(frozen=True)
class DemoResult:
    """What the demo found.

    Attributes:
        cells: by stage and sparsity.
        run: the run's id.
        global_adapter: reference of the merged adapter.
        sparse_base: reference of the sparsest sub-model.
        seconds: wall time.
        overhead: share of the round's time that was not tuning.
    """

    cells: Mapping[tuple[str, float], Cell]
    run: str
    global_adapter: str
    sparse_base: str
    seconds: float
    overhead: float


def demo_config(device: str = "auto", limit: int | None = None) -> FederationConfig:
    """Return the demo's federation: two clients of every sparsity, one category each."""
    from prufed_cli.assets import EMBEDDED_TASKS, embedded_data, embedded_tasks
    from prufed_cli.config.documents import validated

    clients = [
        {"name": category.replace("_", "-"), "sparsity": tier, "tuner": {"lr": RATES[tier]}}
        for category, tier in zip(CATEGORIES, itertools.cycle(TIERS), strict=False)
    ]
    evaluate: dict[str, Any] = {
        "tasks": list(EMBEDDED_TASKS),
        "include_path": str(embedded_tasks()),
    }
    if limit is not None:
        evaluate["limit"] = limit
    return validated(
        {
            "name": "demo",
            "base": "prufed-tiny",
            "rounds": 1,
            "device": device,
            "sampler": {"name": "all"},
            "pruner": {"name": "sparsegpt", "samples": 128, "length": 128},
            "adapter": {"r": 8, "alpha": 16, "target_modules": ["all-linear"]},
            "tuner": {
                "name": "lora",
                "epochs": 2,
                "batch_size": 16,
                "micro_batch_size": 16,
                "cutoff": 128,
                "train_on": "response",
            },
            "aggregator": {"name": "heteagg"},
            "data": {"path": str(embedded_data()), "partition": {"name": "by-category"}},
            "evaluate": evaluate,
            "clients": clients,
        }
    )


def run_demo(
    config: FederationConfig | None = None,
    *,
    registry: Registry | None = None,
    reporter: Reporter = SILENT,
) -> DemoResult:
    """Prune, federate and evaluate the embedded model.

    Args:
        config: the federation, a variation of :func:`demo_config`; that by default.
        registry: where artifacts go; this machine's by default.
        reporter: is told how far it is.
    """
    from prufed_cli.federation.federate import prepare, start
    from prufed_cli.federation.plan import make_plan
    from prufed_cli.home import open_registry, runs_directory

    started = time.monotonic()
    registry = registry or open_registry()
    plan = make_plan(config or demo_config(), registry)
    run = start(plan, runs_directory())
    with run.locked(), reporter.task("demo", total=4) as task:
        task.update("demo: prune to 0, 25, 50 and 75 %")
        federation = prepare(run, plan, registry, reporter)
        task.advance()
        task.update("demo: evaluate the pruned models")
        stages = {"pruned": _score_bases(federation)}
        task.advance()
        task.update("demo: tune eight clients and merge")
        began = time.monotonic()
        merged = _without_evaluation(federation)
        took = time.monotonic() - began
        task.advance()
        task.update("demo: evaluate after tuning and after aggregation")
        stages["fine-tuned"] = _score_clients(federation, "client")
        stages["globally updated"] = _score_clients(federation, "written_back")
    tuning = sum(event["seconds"] for event in run.select("client"))
    return DemoResult(
        cells={
            (stage, tier): _cell(federation, scores, tier)
            for stage, scores in stages.items()
            for tier in TIERS
        },
        run=run.id,
        global_adapter=merged.ref,
        sparse_base=_base_of_tier(federation, TIERS[-1]).ref,
        seconds=time.monotonic() - started,
        overhead=max(0.0, 1 - tuning / took),
    )


def _without_evaluation(federation: Federation) -> Artifact:
    """Run the rounds; the demo evaluates at its own points, not after each round."""
    from prufed_cli.federation.rounds import run_rounds

    federation.evaluates = False
    return run_rounds(federation)


def _score_bases(federation: Federation) -> dict[str, Scores]:
    """Return every client's scores before tuning; clients of one sub-model share them."""
    known: dict[str, Scores] = {}
    bases = {client.base.digest: client.base for client in federation.clients.values()}
    with federation.reporter.task("evaluate sub-models", total=len(bases)) as task:
        for digest, base in bases.items():
            known[digest] = federation.scoring.score(base)
            task.advance()
    return {name: known[client.base.digest] for name, client in federation.clients.items()}


def _score_clients(federation: Federation, event: str) -> dict[str, Scores]:
    """Return every client's scores with the adapter of an event; equal adapters are scored once.

    Clients of one sub-model are given the same entries of the global adapter.
    """
    from prufed_cli.federation.artifacts import read_tensors
    from prufed_cli.models.adapter_files import WEIGHTS_FILE

    known: dict[tuple[str, str], Scores] = {}
    scores = {}
    with federation.reporter.task("evaluate adapters", total=len(federation.clients)) as task:
        for name, client in federation.clients.items():
            found = federation.run.find(event, client=name)
            if found is not None:
                artifact = federation.registry.resolve(found["ref"])
                key = (client.base.digest, artifact.manifest.files[WEIGHTS_FILE].sha256)
                if key not in known:
                    adapter = (client.spec, read_tensors(artifact))
                    known[key] = federation.scoring.score(client.base, adapter)
                scores[name] = known[key]
            task.advance()
    return scores


def _cell(federation: Federation, scores: Mapping[str, Scores], tier: float) -> Cell:
    """Return a tier's mean over tasks; its clients' answers are averaged document by document."""
    members = [
        name
        for name, client in federation.clients.items()
        if client.plan.submodel.sparsity == tier and name in scores
    ]
    tasks = list(scores[members[0]].tasks)
    metrics = [_average([scores[name].answers()[task] for name in members]) for task in tasks]
    own = [_own(scores[name], federation.clients[name].plan.categories) for name in members]
    return Cell(
        mean=math.fsum(metric.value for metric in metrics) / len(metrics),
        stderr=math.hypot(*(metric.stderr or 0.0 for metric in metrics)) / len(metrics),
        own=math.fsum(own) / len(own),
    )


def _average(answers: Sequence[Sequence[float]]) -> Metric:
    from prufed_cli.evaluation.scores import mean_metric

    return mean_metric([math.fsum(column) / len(column) for column in zip(*answers, strict=True)])


def _own(scores: Scores, categories: Mapping[str, int]) -> float:
    category = max(categories, key=lambda name: categories[name])
    return scores.tasks[f"prufed_{category}"].metrics["acc"].value


def _base_of_tier(federation: Federation, tier: float) -> Artifact:
    return next(
        client.base
        for client in federation.clients.values()
        if client.plan.submodel.sparsity == tier
    )
