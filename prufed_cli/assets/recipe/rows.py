"""The instruction rows and the held-out task items, and the Alpaca prompt around them."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from typing import Any, Final

from prufed_cli.assets.recipe.probes import CATEGORIES, Draw, Probe
from prufed_cli.assets.recipe.world import World

ROWS: Final[dict[str, int]] = {  # in the proportions of Dolly-15k
    "open_qa": 748, "general_qa": 438, "classification": 427, "closed_qa": 355,
    "brainstorming": 353, "information_extraction": 301, "summarization": 237,
    "creative_writing": 142,
}  # fmt: skip
ITEMS: Final = 200
SENTENCES: Final = ("The answer is {answer}.", "It is {answer}.", "I would say {answer}.")


def held_out(probe: Probe) -> bool:
    """Whether the probe's key belongs to the tasks (one in three) rather than to the rows."""
    return zlib.crc32(probe.key.encode()) % 3 == 0


def rows(world: World, seed: int) -> Iterator[dict[str, str]]:
    """The instruction rows, category after category; three in four answer with one word."""
    for name, draw in CATEGORIES.items():
        rng = random.Random(f"rows/{name}/{seed}")
        for probe in _distinct(world, draw, rng, ROWS[name], from_tasks=False):
            sentence = rng.choice(SENTENCES) if rng.random() < 0.25 else "{answer}"
            yield {
                "instruction": probe.instruction,
                "context": probe.context,
                "response": sentence.format(answer=probe.answer),
                "category": name,
            }


def items(world: World, name: str, draw: Draw, seed: int) -> Iterator[dict[str, Any]]:
    """The held-out items of one category."""
    rng = random.Random(f"items/{name}/{seed}")
    for probe in _distinct(world, draw, rng, ITEMS, from_tasks=True):
        choices = [probe.answer, *probe.wrong]
        rng.shuffle(choices)
        yield {
            "instruction": probe.instruction,
            "context": probe.context,
            "choices": choices,
            "answer": choices.index(probe.answer),
            "level": probe.level,
        }


def _distinct(
    world: World, draw: Draw, rng: random.Random, count: int, *, from_tasks: bool
) -> Iterator[Probe]:
    """Probes on one side of the division, no two with the same instruction, context and answer."""
    seen: set[tuple[str, str, str]] = set()
    while len(seen) < count:
        probe = draw(world, rng, 0.0)
        wording = (probe.instruction, probe.context, probe.answer)
        if held_out(probe) == from_tasks and wording not in seen:
            seen.add(wording)
            yield probe


WITHOUT_CONTEXT: Final = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n### Instruction:"
)
WITH_CONTEXT: Final = (
    "Below is an instruction that describes a task, "
    "paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n### Instruction:"
)
INPUT: Final = "\n\n### Input:"
RESPONSE: Final = "\n\n### Response:"


def alpaca(instruction: str, context: str) -> str:
    """The Alpaca prompt up to and including the line before the response."""
    if context:
        return f"{WITH_CONTEXT}\n{instruction}{INPUT}\n{context}{RESPONSE}\n"
    return f"{WITHOUT_CONTEXT}\n{instruction}{RESPONSE}\n"
