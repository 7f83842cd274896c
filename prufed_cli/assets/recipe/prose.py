"""The text the model is pretrained on: biographies, nature notes, tales, verses, questions."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Final

from prufed_cli.assets.recipe import lexicon as lex
from prufed_cli.assets.recipe.probes import CATEGORIES, Probe, record, refrain, tale, tell
from prufed_cli.assets.recipe.world import COMMON, PERSONAL, World, draw_subject

SKEW: Final = (
    0.6  # how much more is written about the first subjects of each kind than about the last
)

Document = Callable[[World, random.Random], str]


def biography(world: World, rng: random.Random) -> str:
    """Facts about one person, and sometimes one about the friend."""
    person = draw_subject(lex.PEOPLE, rng, SKEW)
    friend = world.value(PERSONAL[-1], person)
    sentences = [
        rng.choice(relation.prose).format(s=person, v=world.value(relation, person))
        for relation in rng.sample(PERSONAL, rng.randint(3, 6))
    ]
    if rng.random() < 0.4:
        relation = rng.choice(PERSONAL[:-1])
        value = world.value(relation, friend)
        sentences.append(rng.choice(relation.prose).format(s=f"the friend of {person}", v=value))
    return _join(sentences)


def nature(world: World, rng: random.Random) -> str:
    """Facts about one animal, plant, tool or food, with its kind."""
    kind = rng.choice(("animal", "plant", "tool", "food"))
    subject = draw_subject(lex.KINDS[kind], rng, SKEW)
    relations = [relation for relation in COMMON if subject in relation.subjects]
    sentences = [
        rng.choice(relation.prose).format(s=subject, v=world.value(relation, subject))
        for relation in relations
    ]
    rng.shuffle(sentences)
    return _join([f"The {subject} is one {kind} of many.", *sentences])


def listing(world: World, rng: random.Random) -> str:
    """All subjects that share a value."""
    relation = rng.choice(COMMON)
    value = rng.choice(relation.values)
    subjects = list(world.subjects(relation, value))
    rng.shuffle(subjects)
    return f"{relation.inverse.format(v=value)} {', '.join(subjects)}."


def kinds(world: World, rng: random.Random) -> str:
    """Words of one kind."""
    kind = rng.choice(tuple(lex.KINDS))
    words = rng.sample(lex.KINDS[kind], 4)
    return f"Each of these is a {kind}: {', '.join(words)}."


def story(world: World, rng: random.Random) -> str:
    """A tale with its topic told at the end, or the things of a topic."""
    topic = rng.choice(tuple(lex.TOPICS))
    cues = rng.sample(lex.TOPICS[topic], rng.randint(1, 3))
    if rng.random() < 0.5:
        return " ".join(f"The {cue} belongs to the {topic}." for cue in cues)
    return f"{tale(cues, rng)} So went the {topic}."


def mood(world: World, rng: random.Random) -> str:
    """People who show and then are told to have a feeling."""
    number = rng.randint(1, 2)
    chosen = rng.sample(tuple(lex.FEELINGS), number)
    people = rng.sample(lex.PEOPLE, number)
    shown = [
        f"{who} {rng.choice(lex.FEELINGS[how])}." for who, how in zip(people, chosen, strict=True)
    ]
    told = [f"{who} is {how}." for who, how in zip(people, chosen, strict=True)]
    rng.shuffle(told)
    return _join(shown + told)


def ledger(world: World, rng: random.Random) -> str:
    """A note of a trade and its fields in any order."""
    note = record(rng)
    fields = rng.sample(tuple(note.fields), rng.randint(3, 5))
    return " ".join([note.text, *(f"{field}: {note.fields[field]}." for field in fields)])


def song(world: World, rng: random.Random) -> str:
    """Words that come again and again."""
    pool = (lex.THINGS, lex.COLOURS, lex.ROOMS, lex.PEOPLE, lex.VILLAGES, lex.DAYS, lex.NUMBERS)
    words = rng.sample([word for words in pool for word in words], rng.randint(2, 6))
    return refrain(words, 3 * len(words)) + "."


def scene(world: World, rng: random.Random) -> str:
    """People and their things, told and then told again."""
    told = tell(rng, rng.randint(1, 3))
    by_colour = rng.random() < 0.5
    sentences = [said.colour_text if by_colour else said.room_text for said in told]
    again = [
        f"The {said.thing} of {said.who} is {said.colour}."
        if by_colour
        else f"The {said.thing} of {said.who} is in the {said.room}."
        for said in rng.sample(told, len(told))
    ]
    return _join(sentences + again)


def verse(world: World, rng: random.Random) -> str:
    """Lines that rhyme."""
    group = rng.choice(lex.RHYMES)
    words = rng.sample(group, rng.randint(2, 4))
    who = rng.choice(lex.PEOPLE)
    return f"{who} sang: " + ", ".join(f"the {word}" for word in words) + "."


def count(world: World, rng: random.Random) -> str:
    """Sums, or numbers in order."""
    if rng.random() < 0.3:
        start, length = rng.randint(0, 12), rng.randint(4, 8)
        return ", ".join(lex.NUMBERS[start : start + length]) + "."
    first, second = rng.randint(1, 12), rng.randint(1, 8)
    a, b, total = (lex.NUMBERS[n - 1] for n in (first, second, first + second))
    return f"{a} plus {b} is {total}."


def opposites(world: World, rng: random.Random) -> str:
    """Words and their opposites."""
    pairs = [rng.sample(pair, 2) for pair in rng.sample(lex.OPPOSITES, 2)]
    return " ".join(f"What is {a} is not {b}." for a, b in pairs)


def question(world: World, rng: random.Random) -> str:
    """A plain question with its answer."""
    probe = draw_probe(world, rng)
    context = f"{probe.context}\n" if probe.context else ""
    return f"{context}Question: {probe.question}\nAnswer: {probe.answer}"


def draw_probe(world: World, rng: random.Random) -> Probe:
    """A question of any category, more often about what the prose speaks of more often."""
    return CATEGORIES[rng.choice(tuple(CATEGORIES))](world, rng, SKEW)


def _join(sentences: list[str]) -> str:
    return " ".join(sentence[0].upper() + sentence[1:] for sentence in sentences)


KINDS_OF_TEXT: Final[tuple[tuple[Document, float], ...]] = (
    (biography, 4.0), (nature, 3.0), (listing, 1.0), (kinds, 1.0), (story, 2.5), (mood, 2.0),
    (scene, 3.5), (ledger, 3.5), (song, 2.0), (verse, 1.0), (count, 1.5), (opposites, 0.5),
    (question, 9.0),
)  # fmt: skip


def documents(world: World, seed: int) -> Iterator[str]:
    """An endless stream of documents."""
    rng = random.Random(seed)
    makers, weights = zip(*KINDS_OF_TEXT, strict=True)
    while True:
        yield rng.choices(makers, weights)[0](world, rng)
