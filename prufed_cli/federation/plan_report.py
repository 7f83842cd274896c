"""What a person, or a program, is told of a plan: every choice the run will go by."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from prufed_plugins.discover import catalog
from prufed_plugins.settings import validate
from prufed_plugins.weighting import Weighting, weighting_of

if TYPE_CHECKING:
    from pydantic import BaseModel

    from prufed_cli.config.models import MethodSection
    from prufed_cli.federation.plan import ClientPlan, Plan
    from prufed_plugins.api import Kind

CORRELATED: Final = 0.5
"""|ρ| between density and rows above which what is rare in the model comes from other data."""

_FEWEST: Final = 3
"""Clients below which a correlation says nothing: of two it is always 1."""


def describe(plan: Plan) -> dict[str, Any]:
    """Return the plan as a JSON document."""
    config = plan.config
    shares = weight_shares(plan)
    return {
        "name": config.name,
        "base": plan.base,
        "layers": plan.layers,
        "rounds": config.rounds,
        "seed": config.seed,
        "sampler": {"name": config.sampler.name, **_parameters("sampler", config.sampler)},
        "sampled": [list(names) for names in plan.sampled],
        "aggregator": {
            "name": config.aggregator.name,
            **_parameters("aggregator", config.aggregator),
        },
        "weights": {
            "rule": weighting(plan).words,
            "beta": weighting(plan).beta,
            "tier_weight": config.tier_weight,
            "correlation": _short(correlation(plan)),
        },
        "server_optimizer": (
            {
                "name": config.server_optimizer.name,
                **_parameters("optimizer", config.server_optimizer),
            }
            if config.server_optimizer
            else None
        ),
        "screen": config.screen.model_dump(mode="json"),
        "write_back": config.write_back.model_dump(mode="json"),
        "min_clients": config.min_clients,
        "evaluate": config.evaluate.model_dump(mode="json"),
        "warnings": list(warnings(plan)),
        "digest": plan.digest,
        "server": _client(plan.server, None) if plan.server else None,
        "clients": [
            _client(client, None if shares is None else shares[client.name])
            for client in plan.clients
        ],
    }


def _client(client: ClientPlan, share: float | None) -> dict[str, Any]:
    own = client.tuner.model_dump(mode="json")
    return {
        "name": client.name,
        "submodel": client.submodel.label,
        "density": _short(client.submodel.density),
        "rows": len(client.rows),
        "categories": dict(client.categories),
        "data_digest": client.data_digest,
        "rank": client.adapter.r,
        "preset": client.adapter.preset,
        "tuner": {**own, **_parameters("tuner", client.tuner)},
        "weight": _short(client.weight),
        "weight_share": _short(share),
    }


# --- weights -------------------------------------------------------------------------------------


def weighting(plan: Plan) -> Weighting:
    """Return how the plan's aggregator weighs the clients."""
    return weighting_of(_params("aggregator", plan.config.aggregator))


def weight_shares(plan: Plan) -> dict[str, float] | None:
    """Return each client's share of the weight where all train; None where it is not known yet."""
    if plan.config.tier_weight == "update-norm":
        return None
    shares = weighting(plan).shares(
        [client.weight for client in plan.clients], [len(client.rows) for client in plan.clients]
    )
    if shares is None:
        return None
    return dict(zip((client.name for client in plan.clients), shares, strict=True))


def correlation(plan: Plan) -> float | None:
    """Return ρ of the clients' densities and rows; None where one is the same for all."""
    pairs = [
        (client.submodel.density, float(len(client.rows)))
        for client in plan.clients
        if client.submodel.density is not None
    ]
    if len(pairs) < _FEWEST:
        return None
    densities, rows = (_centred(column) for column in zip(*pairs, strict=True))
    size = math.hypot(*densities) * math.hypot(*rows)
    if not size:
        return None
    return math.fsum(one * other for one, other in zip(densities, rows, strict=True)) / size


def _centred(values: Sequence[float]) -> list[float]:
    mean = math.fsum(values) / len(values)
    return [value - mean for value in values]


def warnings(plan: Plan) -> Iterator[str]:
    """Yield what may go another way than its author thinks."""
    found = correlation(plan)
    if found is not None and abs(found) > CORRELATED:
        who = "sparse" if found < 0 else "dense"
        yield (
            f"the {who} clients have the most rows (ρ = {found:.2f} between density and rows): an "
            "entry that only some tiers have is learned from other data than one that all have; "
            "spread the rows evenly, or compare aggregator.beta 0 and 1"
        )
    if plan.config.server_optimizer is not None and _shortens(plan):
        yield (
            "heteagg lets the global adapter join the mean, which shortens the step before "
            "the server optimizer takes it; aggregator.include_global=false leaves it alone"
        )
    weighed = plan.config.tier_weight == "update-norm" or any(
        client.weight != plan.clients[0].weight for client in plan.clients
    )
    if weighed and not weighting(plan).extra:
        yield (
            f"{plan.config.aggregator.name} does not weigh: weight and tier_weight change nothing "
            "in it"
        )


def _shortens(plan: Plan) -> bool:
    """Return whether the aggregator takes a shorter step than to the mean, in some round."""
    if plan.config.aggregator.name != "heteagg":
        return False
    joins = _parameters("aggregator", plan.config.aggregator)["include_global"]
    return bool(joins) and (joins != "auto" or any(len(names) == 1 for names in plan.sampled))


# --- for people ----------------------------------------------------------------------------------


def heading(plan: Plan) -> list[str]:
    """Return one line per choice that concerns the whole run."""
    config = plan.config
    layers = f" ({plan.layers} layers)" if plan.layers else ""
    optimizer = config.server_optimizer
    step = "none, the merged adapter is the next global one"
    if optimizer is not None:
        step = f"{optimizer.name}{_listed(_parameters('optimizer', optimizer))}"
    return [
        f"base        {plan.base}{layers}",
        f"rounds      {config.rounds}, each of {_clients(config.min_clients)}, seed {config.seed}",
        f"sampler     {config.sampler.name}{_listed(_parameters('sampler', config.sampler))}",
        f"tuner       {config.tuner.name}{_listed(_parameters('tuner', config.tuner))}",
        *_aggregation(plan),
        f"server step {step}",
        *_server(plan),
        f"screening   masks as given, finite, outliers {_outliers(plan)}, {_clip(plan)}",
        f"write-back  mix({config.write_back.share:g}): {_mix(config.write_back.share)}",
        f"evaluate    {', '.join(config.evaluate.tasks) or 'no tasks'}",
    ]


def _server(plan: Plan) -> list[str]:
    if plan.server is not None:
        return [f"server data {len(plan.server.rows)} rows, on which the server trains too"]
    unused = plan.config.server_data is not None
    return [f"server data not used by {plan.config.aggregator.name}"] if unused else []


def _aggregation(plan: Plan) -> list[str]:
    config = plan.config
    parameters = _parameters("aggregator", config.aggregator)
    lines = [f"aggregator  {config.aggregator.name}{_listed(parameters)}"]
    if parameters.get("include_global") == "auto":
        alone = sum(len(names) == 1 for names in plan.sampled)
        lines.append(f"            the global adapter joins in {alone} of {config.rounds} rounds")
    tiers = {
        "none": "no tier weights",
        "inverse-density": "times 1 / density by tier",
        "update-norm": "times the norm of each update's product",
    }
    lines.append(f"weights     {weighting(plan).words}; {tiers[config.tier_weight]}")
    numbers = sorted({len(names) for names in plan.sampled})
    if numbers != [len(plan.clients)] and weighting(plan).beta is not None:
        few = " or ".join(map(str, numbers))
        lines.append(f"            shares are of all clients, of whom {few} train in a round")
    return lines


def client_columns() -> list[str]:
    """Return the headings of :func:`client_rows`."""
    return [
        *("client", "sub-model", "rows", "categories", "rank", "preset", "tuner"),
        *("weight", "share"),
    ]


def client_rows(plan: Plan) -> list[list[str]]:
    """Return a row per client; the share is that of the whole weight where all train."""
    shares = weight_shares(plan)
    return [
        [
            client.name,
            client.submodel.label,
            str(len(client.rows)),
            top(client.categories),
            str(client.adapter.r),
            client.adapter.preset,
            _own_tuner(client, plan),
            f"{client.weight:.3g}",
            "" if shares is None else f"{shares[client.name]:.1%}",
        ]
        for client in plan.clients
    ]


def top(categories: Mapping[str, int], shown: int = 3) -> str:
    """Return the largest categories with their rows, and how many more there are."""
    largest = sorted(categories.items(), key=lambda item: -item[1])
    names = [f"{name} {count}" for name, count in largest[:shown]]
    rest = len(largest) - shown
    return ", ".join(names) + (f" and {rest} more" if rest > 0 else "")


def _clients(number: int) -> str:
    return f"{number} client{'s' * (number > 1)} or more"


def _own_tuner(client: ClientPlan, plan: Plan) -> str:
    """Return the client's tuner and what it sets otherwise than the shared one."""
    shared = _parameters("tuner", plan.config.tuner)
    own = _parameters("tuner", client.tuner)
    if client.tuner.name == plan.config.tuner.name:
        own = {key: value for key, value in own.items() if shared.get(key) != value}
    return f"{client.tuner.name}{_listed(own)}"


def _outliers(plan: Plan) -> str:
    limit = plan.config.screen.outlier
    return f"above {limit:g} times the others' median" if limit else "pass"


def _clip(plan: Plan) -> str:
    clip = plan.config.screen.clip
    return "no clipping" if clip is None else f"clipped to {_shown(clip)}"


def _mix(share: float) -> str:
    if not share:
        return "clients take the global adapter whole"
    return f"clients keep {share:.0%} of their own adapter"


# --- methods -------------------------------------------------------------------------------------


def _params(kind: Kind, section: MethodSection) -> BaseModel:
    entry = catalog().get(kind, section.name)
    return validate(f"{kind} {section.name}", entry.method.params, section.settings)


def _parameters(kind: Kind, section: MethodSection) -> dict[str, Any]:
    """Return every parameter of a section's method, the defaults included."""
    return _params(kind, section).model_dump(mode="json", by_alias=True)


def _listed(parameters: Mapping[str, Any]) -> str:
    said = ", ".join(f"{key}={_shown(value)}" for key, value in parameters.items())
    return f" ({said})" if said else ""


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _short(value: float | None) -> float | None:
    """Return a number with the digits that mean something."""
    return None if value is None else float(f"{value:.6g}")
