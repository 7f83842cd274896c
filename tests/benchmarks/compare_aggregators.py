"""Runs one federation under every aggregator and prints what each makes of it, and at what cost.

::

    python tests/benchmarks/compare_aggregators.py --base DIR --data ROWS --text HELD_OUT

Every method gets the same sub-models of 0, 25, 50 and 75 %, the same rows by category, the same
seeds and the same tuner. Printed are, per method: the contracts it keeps, seconds per round, and
the perplexity on HELD_OUT of the base with the global adapter and of the clients' sub-models with
what was written back to them, a mean per tier; first of all, what they were before.

Everything stays in the directory of --out: the registry, the configuration of each run (``prufed
federate --clients OUT/METHOD.yaml`` does it again), and OUT/results.json. A method that is finished
is not run again unless its configuration has changed, and one that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from prufed_plugins.builtin import prufed_aggregators

TIERS = (0.0, 0.25, 0.5, 0.75)
PER_TIER = 2
RANK = 16

OWN: Mapping[str, Mapping[str, Any]] = {
    # its stack is made once, and must fit the global rank
    "flora": {"rounds": 1, "rank": RANK // (PER_TIER * len(TIERS))},
}
"""What a method cannot do as the others do: rounds, and the clients' rank."""


@dataclass(frozen=True)
class Request:
    """What to compare, and where; see :func:`parse`."""

    base: Path
    data: Path
    text: Path
    calibration: Path | None
    server_data: Path | None
    out: Path
    rounds: int
    max_steps: int
    lr: float
    preset: str
    seed: int
    methods: tuple[str, ...]


class CommandError(Exception):
    """A command ended with an error; the message is what it said."""


def parse(arguments: Sequence[str] | None = None) -> Request:
    every = [method.name for method in prufed_aggregators()]
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--base", type=Path, required=True, help="directory of the full model")
    parser.add_argument("--data", type=Path, required=True, help="rows with a category")
    parser.add_argument("--text", type=Path, required=True, help="held-out text")
    parser.add_argument("--calibration", type=Path, help="of the pruner; the embedded text if none")
    parser.add_argument("--server-data", type=Path, help="rows of the server's own, for fltrust")
    parser.add_argument("--out", type=Path, default=Path("comparison"), help="where all of it goes")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--max-steps", type=int, default=4, help="per client and round")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--preset", default="lego", help="where adapters have zeros")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", default=",".join(every), help="separated by commas")
    given = vars(parser.parse_args(arguments))
    methods = tuple(name for name in given.pop("methods").split(",") if name)
    unknown = sorted(set(methods) - set(every))
    if unknown:
        parser.error(f"no aggregator {', '.join(unknown)}; there are {', '.join(every)}")
    paths = {
        key: value.resolve() if isinstance(value, Path) else value for key, value in given.items()
    }
    return Request(**paths, methods=methods)


def configuration(request: Request, method: str) -> dict[str, Any]:
    """Return the clients.yaml of one method."""
    own = OWN.get(method, {})
    tier = {f"t{int(100 * s):02}": s for s in TIERS}
    client = {"adapter": {"r": own["rank"]}} if "rank" in own else {}
    pruner: dict[str, Any] = {"name": "sparsegpt", "samples": 32, "length": 128}
    if request.calibration is not None:
        pruner["calibration"] = str(request.calibration)
    server = {} if request.server_data is None else {"server_data": str(request.server_data)}
    return {
        "name": method,
        "base": str(request.base),
        "rounds": own.get("rounds", request.rounds),
        "seed": request.seed,
        "pruner": pruner,
        "adapter": {
            "r": RANK,
            "alpha": RANK,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
            "preset": request.preset,
        },
        "tuner": {
            "batch_size": 8,
            "max_steps": request.max_steps,
            "lr": request.lr,
            "cutoff": 256,
            "template": "alpaca",
        },
        "aggregator": method,
        "data": {"path": str(request.data), "partition": "by-category"},
        **(server if method == "fltrust" else {}),
        "evaluate": {
            "perplexity": str(request.text),
            "clients": True,
            "every": own.get("rounds", request.rounds),
        },
        "clients": [
            {"name": f"{name}-{index}", "sparsity": sparsity, **client}
            for name, sparsity in tier.items()
            for index in range(PER_TIER)
        ],
    }


# --- running -------------------------------------------------------------------------------------


def prufed(request: Request, *arguments: str, may_fail: bool = False) -> dict[str, Any]:
    """Run a command and return its JSON document.

    Raises:
        CommandError: it ended with an error.
    """
    done = subprocess.run(
        [sys.executable, "-m", "prufed_cli", *arguments, "--json"],
        env=os.environ | {"PRUFED_HOME": str(request.out / "home")},
        capture_output=True,
        text=True,
    )
    if done.returncode and not may_fail:
        said = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        raise CommandError(said[0] if said else done.stderr.strip() or f"exit {done.returncode}")
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def compare(request: Request) -> dict[str, Any]:
    """Run what is missing and return everything that is known."""
    request.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"before": {}, "methods": {}}
    for place, method in enumerate(request.methods, 1):
        print(f"[{place}/{len(request.methods)}] {method}", file=sys.stderr, flush=True)
        try:
            results["methods"][method] = run(request, method)
        except CommandError as failure:
            results["methods"][method] = {"failed": str(failure)}
    ran = [found for found in results["methods"].values() if "run" in found]
    if ran:
        results["before"] = before(request, ran[0])
    for method, count in contracts(request).items():
        results["methods"][method]["contracts"] = count
    (request.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    return results


def run(request: Request, method: str) -> dict[str, Any]:
    """Return one method's figures: of the run there is, or of a new one."""
    file = request.out / f"{method}.yaml"
    text = yaml.safe_dump(configuration(request, method), sort_keys=False)
    same = file.exists() and file.read_text() == text
    file.write_text(text)
    runs = [
        each
        for each in prufed(request, "runs", "list")["runs"]
        if same and each["run"].rpartition("-")[0] == method
    ]
    if not runs:
        name = prufed(request, "federate", "--clients", str(file))["run"]
    else:
        name = runs[-1]["run"]
        if not runs[-1]["finished"]:
            prufed(request, "federate", "--resume", name)
    return figures(prufed(request, "runs", "show", name))


def figures(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a finished run took, and how well its models do."""
    events = run["events"]
    rounds = [event for event in events if event["event"] == "merged"]
    tuning = sum(event["seconds"] for event in events if event["event"] == "client")
    merging = sum(event["seconds"] for event in rounds)
    scores = {e["subject"]: e["scores"]["perplexity"] for e in events if e["event"] == "evaluated"}
    started = next(event for event in events if event["event"] == "started")
    return {
        "run": run["run"],
        "rounds": len(rounds),
        "seconds_per_round": (tuning + merging) / len(rounds),
        "merge_seconds_per_round": merging / len(rounds),
        "excluded": sum(len(event["excluded"]) for event in rounds),
        "perplexity": scores.pop("global"),
        "tiers": by_tier(scores),
        "models": {"global": started["base"]}
        | {name: facts["ref"] for name, facts in started["clients"].items()},
    }


def before(request: Request, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the perplexity of the base and of the sub-models, without any adapter."""
    models = found["models"]
    references = list(dict.fromkeys(models.values()))
    report = prufed(request, "eval", *references, "--perplexity", str(request.text))
    known = {row["reference"]: row["perplexity"]["value"] for row in report["references"]}
    scores = {name: known[reference] for name, reference in models.items()}
    return {"perplexity": scores.pop("global"), "tiers": by_tier(scores)}


def by_tier(scores: Mapping[str, float]) -> dict[str, float]:
    """Return the mean over the clients of each tier; a client is named for its own."""
    tiers: dict[str, list[float]] = {}
    for client, value in scores.items():
        tiers.setdefault(client.partition("-")[0], []).append(value)
    return {tier: fmean(values) for tier, values in sorted(tiers.items())}


def contracts(request: Request) -> dict[str, str]:
    """Return how many contracts each method keeps, and how many it breaks without saying so."""
    report = prufed(request, "plugins", "check", *request.methods, may_fail=True)
    counts = {}
    for method in report["methods"]:
        if method["kind"] == "aggregator":
            verdicts = [check["verdict"] for check in method["checks"]]
            failed = f", {verdicts.count('failed')} FAILED" if "failed" in verdicts else ""
            counts[method["name"]] = f"{verdicts.count('passed')} of {len(verdicts)}{failed}"
    return counts


# --- printing ------------------------------------------------------------------------------------


def markdown(results: Mapping[str, Any]) -> str:
    """Return the table."""
    tiers = [f"t{int(100 * sparsity):02}" for sparsity in TIERS]
    head = ["method", "contracts kept", "rounds", "s/round", "of it merging", "global"]
    rows = [[*head, *(f"clients at {tier[1:]} %" for tier in tiers)]]
    rows.append(["---"] * len(rows[0]))
    named = {"before": results["before"], **results["methods"]}
    for name, found in named.items():
        if "failed" in found:
            rows.append([name, found.get("contracts", ""), found["failed"]])
        elif found:
            numbers = [found["perplexity"], *(found["tiers"][tier] for tier in tiers)]
            rows.append(
                [
                    name,
                    found.get("contracts", ""),
                    str(found.get("rounds", "")),
                    f"{found['seconds_per_round']:.2f}" if "rounds" in found else "",
                    f"{found['merge_seconds_per_round']:.2f}" if "rounds" in found else "",
                    *(f"{number:.2f}" for number in numbers),
                ]
            )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    request = parse()
    results = compare(request)
    print(markdown(results))
    print(f"\n{request.out / 'results.json'}")


if __name__ == "__main__":
    main()
