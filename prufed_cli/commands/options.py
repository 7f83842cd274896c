"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes.")]
Device = Annotated[str, typer.Option(help="auto (CUDA, else the CPU), cpu, cuda, cuda:N or mps.")]
Dtype = Annotated[
    str, typer.Option(help="auto (float32 on a CPU, else as stored), float32, bfloat16 or float16.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A parameter of the method; repeatable."),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
]
