"""``prufed schema``: print the JSON schema of clients.yaml."""

from __future__ import annotations


def command() -> None:
    """Print the JSON schema of clients.yaml, for editors and other programs."""
    import json

    from prufed_cli.config.schema import json_schema
    from prufed_cli.output import print_line

    print_line(json.dumps(json_schema(), indent=2))
