"""``python -m prufed_cli``: the same as ``prufed``."""

from __future__ import annotations

import sys

from prufed_cli.main import process

if __name__ == "__main__":
    sys.exit(process())
