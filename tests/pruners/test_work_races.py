"""Prunes of different sub-models under one home do not get into each other's way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TIMES = 300

SCRIPT = """
import json, sys
from pathlib import Path
from prufed_cli.pruning.work import sweep, take_work

workplace, mine, times = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
for each in range(times):
    sweep(workplace)
    with take_work(workplace, f"{mine}{each:031}", print) as work:
        for _ in range(3):
            work.write(work.path / "survey.json", {})
"""


def test_two_processes_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "home" / "prunes")]
    running = [
        subprocess.Popen([*command, name, str(TIMES)], stderr=subprocess.PIPE, text=True)
        for name in "ab"
    ]
    for process in running:
        _, said = process.communicate()
        assert process.returncode == 0, said
    assert not (tmp_path / "home" / "prunes").exists()
