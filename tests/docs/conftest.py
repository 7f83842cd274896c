"""Lets the tests beside this file import the two modules they share."""

from __future__ import annotations

import sys
from pathlib import Path

# With importlib's mode, pytest puts no test directory on the path.
sys.path.insert(0, str(Path(__file__).parent))
