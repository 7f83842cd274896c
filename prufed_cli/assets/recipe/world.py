# ruff: noqa: E501 - tables of words and sentences read best unbroken
"""The invented world: who lives where, what each animal, plant, tool and food is like.

Everything follows from one seed. A fact is a triple (subject, relation, value); a relation
knows how prose states it, how a plain question asks for it and how an instruction does.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from prufed_cli.assets.recipe import lexicon as lex
from prufed_cli.assets.recipe.lexicon import Words

SEED: Final = 2024


@dataclass(frozen=True)
class Relation:
    """What may be said about every subject of one kind.

    Attributes:
        name: the relation's name, unique in the world.
        subjects: the words it holds for, the most talked about first.
        values: the words it may lead to.
        prose: sentences that state it, with `{s}` for the subject and `{v}` for the value.
        question: the plain question for its value.
        instructions: the instructions that ask for its value.
        inverse: the instruction that asks for a subject with a given value; empty where none is asked.
    """

    name: str
    subjects: Words
    values: Words
    prose: Words
    question: str
    instructions: Words
    inverse: str = ""


PERSONAL: Final = (
    Relation(
        "village", lex.PEOPLE, lex.VILLAGES,
        ("{s} lives in {v}.", "The home of {s} is in {v}.", "{s} comes from the village of {v}."),
        "Where does {s} live?",
        ("Name the village that {s} calls home.", "Tell me which village {s} is from.", "Village of {s}, please."),
    ),
    Relation(
        "trade", lex.PEOPLE, lex.TRADES,
        ("{s} is a {v}.", "{s} works as a {v}.", "The trade of {s} is that of a {v}."),
        "What is the work of {s}?",
        ("Name the trade that {s} follows.", "Tell me which trade feeds {s}.", "Trade of {s}, please."),
    ),
    Relation(
        "pet", lex.PEOPLE, lex.ANIMALS[:12],
        ("{s} keeps a {v}.", "{s} walks with a {v}.", "The animal of {s} is a {v}."),
        "Which animal does {s} keep?",
        ("Name the animal at the side of {s}.", "Tell me which animal belongs to {s}.", "Pet of {s}, please."),
    ),
    Relation(
        "dish", lex.PEOPLE, lex.FOODS[:12],
        ("{s} loves {v}.", "{s} asks for {v} every day.", "The food of {s} is {v}."),
        "What does {s} love to eat?",
        ("Name the food on the plate of {s}.", "Tell me which food pleases {s}.", "Favourite food of {s}, please."),
    ),
    Relation(
        "colour", lex.PEOPLE, lex.COLOURS,
        ("{s} wears {v}.", "{s} has a {v} door.", "The colour of {s} is {v}."),
        "Which colour does {s} wear?",
        ("Name the colour on the back of {s}.", "Tell me which colour dresses {s}.", "Colour of {s}, please."),
    ),
    Relation(
        "friend", lex.PEOPLE, lex.PEOPLE,
        ("{s} is a friend of {v}.", "{s} often visits {v}.", "The friend of {s} is {v}."),
        "Who is the friend of {s}?",
        ("Name the person {s} visits.", "Tell me which person {s} trusts.", "Friend of {s}, please."),
    ),
)  # fmt: skip

COMMON: Final = (
    Relation(
        "habitat", lex.ANIMALS, lex.HABITATS,
        ("The {s} lives in the {v}.", "In the {v} you meet the {s}."),
        "Where does the {s} live?",
        ("Say where people find a {s}.", "Give the place of the {s}.", "I wonder where the {s} is at home."),
        "Name an animal of the {v}.",
    ),
    Relation(
        "sound", lex.ANIMALS, lex.SOUNDS,
        ("The {s} makes a {v}.", "The voice of the {s} is a {v}."),
        "What sound does the {s} make?",
        ("Say what people hear from a {s}.", "Give the sound of the {s}.", "I wonder how the {s} sounds."),
        "Name an animal with a {v} for a voice.",
    ),
    Relation(
        "diet", lex.ANIMALS, lex.DIETS,
        ("The {s} eats {v}.", "{v} feed the {s}."),
        "What does the {s} eat?",
        ("Say what people feed to a {s}.", "Give the meal of the {s}.", "I wonder what the {s} likes."),
        "Name an animal that likes {v}.",
    ),
    Relation(
        "cover", lex.ANIMALS, lex.COVERS,
        ("The {s} is covered with {v}.", "The {s} wears {v}."),
        "What covers the {s}?",
        ("Say what people touch on a {s}.", "Give the cover of the {s}.", "I wonder what the {s} is dressed in."),
        "Name an animal dressed in {v}.",
    ),
    Relation(
        "season", lex.PLANTS, lex.SEASONS,
        ("The {s} grows in {v}.", "In {v} the {s} is green."),
        "When does the {s} grow?",
        ("Say when people pick the {s}.", "Give the season of the {s}.", "I wonder when the {s} is green."),
        "Name a plant for {v}.",
    ),
    Relation(
        "ground", lex.PLANTS, lex.GROUNDS,
        ("The {s} stands on {v}.", "On {v} you find the {s}."),
        "What does the {s} stand on?",
        ("Say what people dig under the {s}.", "Give the ground of the {s}.", "I wonder what is under the {s}."),
        "Name a plant that likes {v}.",
    ),
    Relation(
        "material", lex.TOOLS, lex.MATERIALS,
        ("The {s} is made of {v}.", "It takes {v} to make the {s}."),
        "What is the {s} made of?",
        ("Say what people need for a {s}.", "Give the material of the {s}.", "I wonder what makes a {s}."),
        "Name a tool built from {v}.",
    ),
    Relation(
        "room", lex.TOOLS, lex.ROOMS,
        ("The {s} is kept in the {v}.", "In the {v} hangs the {s}."),
        "Where is the {s} kept?",
        ("Say where people put the {s}.", "Give the room of the {s}.", "I wonder where the {s} hangs."),
        "Name a tool from the {v}.",
    ),
    Relation(
        "user", lex.TOOLS, lex.TRADES,
        ("The {s} belongs to the {v}.", "A {v} uses the {s}."),
        "Who uses the {s}?",
        ("Say who works with the {s}.", "Give the trade of the {s}.", "I wonder whose {s} it is."),
        "Name a tool for the {v}.",
    ),
    Relation(
        "taste", lex.FOODS, lex.TASTES,
        ("The {s} tastes {v}.", "A {v} taste comes with the {s}."),
        "How does the {s} taste?",
        ("Say how people find the {s}.", "Give the taste of the {s}.", "I wonder what the {s} is like."),
        "Name a food that is {v}.",
    ),
    Relation(
        "hour", lex.FOODS, lex.HOURS,
        ("The {s} is eaten at {v}.", "At {v} people eat the {s}."),
        "When is the {s} eaten?",
        ("Say when people serve the {s}.", "Give the hour of the {s}.", "I wonder when the {s} is served."),
        "Name a food for {v}.",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class World:
    """All facts of the world: relation name -> subject -> value."""

    facts: dict[str, dict[str, str]]

    def value(self, relation: Relation, subject: str) -> str:
        """The value `relation` has for `subject`."""
        return self.facts[relation.name][subject]

    def subjects(self, relation: Relation, value: str) -> Words:
        """The subjects for which `relation` has `value`, in the lexicon's order."""
        known = self.facts[relation.name]
        return tuple(subject for subject in relation.subjects if known[subject] == value)


def build_world(seed: int = SEED) -> World:
    """The world that follows from `seed`.

    Values are dealt evenly over the subjects, so no value is a good guess for all of them.
    """
    rng = random.Random(seed)
    return World({relation.name: _deal(relation, rng) for relation in (*PERSONAL, *COMMON)})


def _deal(relation: Relation, rng: random.Random) -> dict[str, str]:
    count = len(relation.subjects)
    while True:
        values = [relation.values[i % len(relation.values)] for i in range(count)]
        rng.shuffle(values)
        if all(s != v for s, v in zip(relation.subjects, values, strict=True)):
            return dict(zip(relation.subjects, values, strict=True))


def draw_subject(subjects: Sequence[str], rng: random.Random, skew: float) -> str:
    """A subject drawn with weight `1 / (rank + 3) ** skew`; `skew` 0 draws uniformly."""
    return rng.choices(subjects, cum_weights=_cumulated(len(subjects), skew))[0]


@functools.cache
def _cumulated(count: int, skew: float) -> list[float]:
    return list(itertools.accumulate(1.0 / (rank + 3) ** skew for rank in range(count)))
