"""The embedded model, its instruction data, its calibration text and its lm-eval tasks.

`python -m prufed_cli.assets.recipe.train` made them all; nothing comes from elsewhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

_ROOT: Final = Path(__file__).parent

CATEGORIES: Final[tuple[str, ...]] = (
    "open_qa",
    "general_qa",
    "classification",
    "closed_qa",
    "brainstorming",
    "information_extraction",
    "summarization",
    "creative_writing",
)
EMBEDDED_TASKS: Final[tuple[str, ...]] = tuple(f"prufed_{category}" for category in CATEGORIES)


def embedded_model() -> Path:
    """The embedded model's directory, in the layout of Hugging Face."""
    return _ROOT / "model"


def embedded_data() -> Path:
    """The instruction rows: JSON lines with instruction, context, response and category."""
    return _ROOT / "data" / "train.jsonl"


def embedded_calibration() -> Path:
    """The calibration text: one document per line."""
    return _ROOT / "data" / "calibration.txt"


def embedded_tasks() -> Path:
    """The directory of the held-out lm-eval tasks, one per category, and their group `prufed`."""
    return _ROOT / "tasks"
