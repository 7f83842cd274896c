"""What the model is pretrained on: prose, with questions in the Alpaca template among it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Final

from prufed_cli.assets.recipe.prose import documents, draw_probe, song
from prufed_cli.assets.recipe.rows import alpaca, rows
from prufed_cli.assets.recipe.world import World

OPENING: Final = 16000  # documents at the start that are mostly refrains
TEMPLATED: Final = 0.10  # share of documents that are a plain question in the Alpaca template
REHEARSED: Final = 0.02  # share of documents that are an instruction of the instruction data


def pretraining_text(world: World, seed: int, opening: int = OPENING) -> Iterator[str]:
    """Documents of prose, with some questions in the Alpaca template among them.

    The first `opening` ones are mostly refrains: copying is what the model must learn before it can
    learn to look anything up, and it learns it many times sooner from text that is dense in it.
    """
    rng = random.Random(f"mixture/{seed}")
    rehearsal = list(rows(world, seed))
    for number, document in enumerate(documents(world, seed)):
        draw = rng.random()
        if number < opening and draw < 0.85:
            yield song(world, rng)
        elif draw < REHEARSED:
            row = rng.choice(rehearsal)
            yield alpaca(row["instruction"], row["context"]) + row["response"]
        elif draw < REHEARSED + TEMPLATED:
            probe = draw_probe(world, rng)
            yield alpaca(probe.question, probe.context) + probe.answer
        else:
            yield document
