"""``prufed demo``: the whole job on the embedded model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from prufed_cli.commands.options import Device, Json, Quiet

if TYPE_CHECKING:
    from prufed_cli.demo import DemoResult


def command(
    device: Device = "auto",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Documents per task. Default: all.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prune the embedded model, federate eight clients, evaluate each stage; a few minutes.

    Nothing is downloaded. The artifacts stay in the registry to be looked at.
    """
    from prufed_cli.demo import demo_config, run_demo
    from prufed_cli.output import emit_json, reporter

    config = demo_config(device, limit)
    result = run_demo(config, reporter=reporter(quiet=quiet or as_json))
    if as_json:
        emit_json(_document(result))
    else:
        _print(result)


def _document(result: DemoResult) -> dict[str, Any]:
    return {
        "run": result.run,
        "reference": result.global_adapter,
        "seconds": result.seconds,
        "overhead": result.overhead,
        "table": [
            {
                "stage": stage,
                "sparsity": tier,
                "mean": cell.mean,
                "stderr": cell.stderr,
                "own_category": cell.own,
            }
            for (stage, tier), cell in result.cells.items()
        ],
    }


def _print(result: DemoResult) -> None:
    from prufed_cli.demo import STAGES, TIERS
    from prufed_cli.output import print_line, table

    table(
        ["sparsity", *(f"{tier:.0%}" for tier in TIERS)],
        [
            [stage, *(f"{cell.mean:.3f} ± {cell.stderr:.3f}" for cell in cells)]
            for stage, cells in (
                (stage, [result.cells[stage, tier] for tier in TIERS]) for stage in STAGES
            )
        ],
        title="mean accuracy over eight four-choice tasks, two clients of each sparsity",
        numeric=(1, 2, 3, 4),
    )
    table(
        ["own category", *(f"{tier:.0%}" for tier in TIERS)],
        [[stage, *(f"{result.cells[stage, tier].own:.3f}" for tier in TIERS)] for stage in STAGES],
        title="accuracy of each client on the one category it was tuned on",
        numeric=(1, 2, 3, 4),
    )
    print_line(
        f"{result.seconds:.0f} s in all; {result.overhead:.1%} of the round was not tuning. "
        "A tiny model in an invented world: the shape is real, the numbers are its own."
    )
    print_line("")
    print_line("try next:")
    print_line(f"  prufed runs show {result.run}")
    print_line(f"  prufed lineage {result.global_adapter}")
    print_line(f"  prufed eval {result.sparse_base} {result.global_adapter}")
