"""What the shell completes."""

from __future__ import annotations


def complete_reference(incomplete: str) -> list[str]:
    """Return the references that begin with what was typed."""
    from prufed_cli.home import open_registry

    return [
        artifact.ref for artifact in open_registry().list() if artifact.ref.startswith(incomplete)
    ]


def complete_run(incomplete: str) -> list[str]:
    """Return the runs that begin with what was typed."""
    from prufed_cli.federation.journal import list_runs
    from prufed_cli.home import runs_directory

    return [run.id for run in list_runs(runs_directory()) if run.id.startswith(incomplete)]
