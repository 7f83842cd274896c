"""Questions with one right and three wrong answers, in eight categories like Dolly's.

A probe carries two wordings. The plain question is what the pretraining text asks; the instruction
is what the instruction data and the tasks ask, so a pretrained model knows the matter but
not the wording. Every category mixes levels: 1 is easy, 2 harder, 3 hardest.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from prufed_cli.assets.recipe import lexicon as lex
from prufed_cli.assets.recipe.world import COMMON, PERSONAL, Relation, World, draw_subject


@dataclass(frozen=True)
class Probe:
    """One question.

    Attributes:
        question: the plain wording.
        instruction: the wording of the instruction data and the tasks.
        answer: the right answer, one word.
        wrong: three wrong answers, one word each.
        context: the text the question is about; empty for a question about the world.
        level: 1 (easy) to 3 (hard).
        key: what the question is about; keys, not wordings, are divided into seen and held out.
    """

    question: str
    instruction: str
    answer: str
    wrong: tuple[str, ...]
    context: str = ""
    level: int = 1
    key: str = ""


Draw = Callable[[World, random.Random, float], Probe]


def _wrong(pool: Sequence[str], right: Sequence[str], rng: random.Random) -> tuple[str, ...]:
    return tuple(rng.sample([word for word in dict.fromkeys(pool) if word not in right], 3))


def open_qa(world: World, rng: random.Random, skew: float) -> Probe:
    """A fact about a person, known only from the prose; hardest: one about the person's friend."""
    relation = rng.choice(PERSONAL)
    subject = draw_subject(relation.subjects, rng, skew)
    if relation.name != "friend" and rng.random() < 0.2:
        return _friend_of(world, relation, subject, rng)
    answer = world.value(relation, subject)
    return Probe(
        relation.question.format(s=subject),
        rng.choice(relation.instructions).format(s=subject),
        answer,
        _wrong(relation.values, (answer, subject), rng),
        level=1 + (relation.subjects.index(subject) >= 12),
        key=f"{relation.name}/{subject}",
    )


def _friend_of(world: World, relation: Relation, subject: str, rng: random.Random) -> Probe:
    friend = world.value(PERSONAL[-1], subject)
    answer = world.value(relation, friend)
    return Probe(
        relation.question.format(s=f"the friend of {subject}"),
        rng.choice(relation.instructions).format(s=f"the friend of {subject}"),
        answer,
        _wrong(relation.values, (answer,), rng),
        level=3,
        key=f"friend-{relation.name}/{subject}",
    )


def general_qa(world: World, rng: random.Random, skew: float) -> Probe:
    """What everybody knows: the nature of animals, plants, tools and food, opposites, sums."""
    kind = rng.random()
    if kind < 0.15:
        return _opposite(rng)
    if kind < 0.35:
        return _sum(rng)
    relation = rng.choice(COMMON)
    subject = draw_subject(relation.subjects, rng, skew)
    answer = world.value(relation, subject)
    return Probe(
        relation.question.format(s=subject),
        rng.choice(relation.instructions).format(s=subject),
        answer,
        _wrong(relation.values, (answer,), rng),
        level=1 + (relation.subjects.index(subject) >= 8),
        key=f"{relation.name}/{subject}",
    )


def _opposite(rng: random.Random) -> Probe:
    pair = rng.choice(lex.OPPOSITES)
    word, answer = rng.sample(pair, 2)
    pool = [other for both in lex.OPPOSITES for other in both]
    return Probe(
        f"What is the opposite of {word}?",
        rng.choice(
            (
                f"Say what is not {word} at all.",
                f"Give the word against {word}.",
                f"I wonder what {word} is not.",
            )
        ),
        answer,
        _wrong(pool, pair, rng),
        key=f"opposite/{word}",
    )


def _sum(rng: random.Random) -> Probe:
    first, second = rng.randint(1, 12), rng.randint(1, 8)
    total = first + second
    near = [total + step for step in (-3, -2, -1, 1, 2, 3) if 1 <= total + step <= 20]
    a, b = lex.NUMBERS[first - 1], lex.NUMBERS[second - 1]
    return Probe(
        f"What is {a} plus {b}?",
        rng.choice(
            (
                f"Say how many {a} and {b} make.",
                f"Give the sum of {a} and {b}.",
                f"I wonder what {a} and {b} come to.",
            )
        ),
        lex.NUMBERS[total - 1],
        tuple(lex.NUMBERS[n - 1] for n in rng.sample(near, 3)),
        level=2 + (total > 10),
        key=f"sum/{a}/{b}",
    )


def classification(world: World, rng: random.Random, skew: float) -> Probe:
    """The kind of a word, the feeling in a sentence, or the kind of a sentence's subject."""
    if rng.random() < 0.5:
        return _feeling(rng)
    kind = rng.choice(tuple(lex.KINDS))
    word = draw_subject(lex.KINDS[kind], rng, skew)
    right = [name for name, words in lex.KINDS.items() if word in words]
    return Probe(
        f"What is {word}?",
        rng.choice((f"Sort this word: {word}.", f"Put {word} into its class.")),
        kind,
        _wrong(tuple(lex.KINDS), right, rng),
        level=1 + (lex.KINDS[kind].index(word) >= 8),
        key=f"kind/{word}",
    )


def _feeling(rng: random.Random) -> Probe:
    """A person's feeling, told by what the person does, among others who feel otherwise."""
    level = rng.randint(1, 2)
    people = rng.sample(lex.PEOPLE, level)
    feelings = rng.sample(tuple(lex.FEELINGS), level)
    doings = [
        f"{who} {rng.choice(lex.FEELINGS[how])}." for who, how in zip(people, feelings, strict=True)
    ]
    asked = rng.randrange(level)
    context = " ".join(doings)
    return Probe(
        f"How does {people[asked]} feel?",
        rng.choice(
            (f"Sort the mood of {people[asked]}.", f"Put {people[asked]} into a class of mood.")
        ),
        feelings[asked],
        _wrong(tuple(lex.FEELINGS), (feelings[asked],), rng),
        context,
        level,
        f"feeling/{context}",
    )


def closed_qa(world: World, rng: random.Random, skew: float) -> Probe:
    """A question about a few sentences; harder: two kinds of sentence; hardest: more of a kind."""
    level = rng.randint(1, 3)
    asks_colour = rng.random() < 0.5
    told = tell(rng, level + (level == 3) * rng.randint(0, 1))
    kinds = [asks_colour] * len(told) if level != 2 else rng.sample((True, False), 2)
    asked = rng.choice([i for i, kind in enumerate(kinds) if kind == asks_colour])
    context = " ".join(
        said.colour_text if kind else said.room_text for said, kind in zip(told, kinds, strict=True)
    )
    said = told[asked]
    if asks_colour:
        question = f"What colour is the {said.thing} of {said.who}?"
        wordings = (
            f"Read the text. The {said.thing} of {said.who} is",
            f"From the text, the colour {said.who} has is",
        )
        answer, near, pool = said.colour, [other.colour for other in told], lex.COLOURS
    else:
        question = f"Where is the {said.thing}?"
        wordings = (
            f"Read the text. The {said.thing} lies in the",
            f"From the text, the room of {said.who} is the",
        )
        answer, near, pool = said.room, [other.room for other in told], lex.ROOMS
    wrong = _near(near if level == 3 else (answer,), pool, answer, rng)
    return Probe(question, rng.choice(wordings), answer, wrong, context, level, f"closed/{context}")


@dataclass(frozen=True)
class Said:
    """Somebody's thing, its colour and the room it was left in."""

    who: str
    thing: str
    colour: str
    room: str

    @property
    def colour_text(self) -> str:
        """The sentence that tells the colour."""
        return f"{self.who} has a {self.colour} {self.thing}."

    @property
    def room_text(self) -> str:
        """The sentence that tells the room."""
        return f"{self.who} left the {self.thing} in the {self.room}."


def tell(rng: random.Random, count: int) -> list[Said]:
    """What is said of `count` people, no word twice."""
    pools = (lex.PEOPLE, lex.THINGS, lex.COLOURS, lex.ROOMS)
    return [
        Said(*words) for words in zip(*(rng.sample(pool, count) for pool in pools), strict=True)
    ]


def _near(
    told: Sequence[str], pool: Sequence[str], answer: str, rng: random.Random
) -> tuple[str, ...]:
    """Wrong answers, those that stand in the text first."""
    near = [word for word in told if word != answer]
    far = [word for word in pool if word not in told]
    return tuple((near + rng.sample(far, min(3, len(far))))[:3])


def brainstorming(world: World, rng: random.Random, skew: float) -> Probe:
    """An idea that fits a wish: facts of the world asked from their value, or a topic's things."""
    if rng.random() < 0.4:
        return _idea(rng)
    relation = rng.choice([relation for relation in COMMON if relation.inverse])
    answer = draw_subject(relation.subjects, rng, skew)
    value = world.value(relation, answer)
    return Probe(
        relation.inverse.format(v=value),
        rng.choice(("Any idea? ", "Think of one. ", "Help me out. "))
        + relation.inverse.format(v=value),
        answer,
        _wrong(relation.subjects, world.subjects(relation, value), rng),
        level=2 + (relation.subjects.index(answer) >= 8),
        key=f"inverse-{relation.name}/{answer}",
    )


def _idea(rng: random.Random) -> Probe:
    topic = rng.choice(tuple(lex.TOPICS))
    answer = rng.choice(lex.TOPICS[topic])
    pool = [cue for other, cues in lex.TOPICS.items() if other != topic for cue in cues]
    return Probe(
        f"What comes with a {topic}?",
        rng.choice(
            (
                f"Any idea for a {topic}?",
                f"Think of one thing for a {topic}.",
                f"Help me out with a {topic}.",
            )
        ),
        answer,
        _wrong(pool, lex.TOPICS[topic], rng),
        key=f"idea/{topic}/{answer}",
    )


@dataclass(frozen=True)
class Record:
    """A note of a trade and what stands in it, field by field."""

    text: str
    fields: dict[str, str]
    active: bool


def record(rng: random.Random) -> Record:
    """Somebody sold, or got, something somewhere on some day."""
    seller, buyer = rng.sample(lex.PEOPLE, 2)
    day, village = rng.choice(lex.DAYS), rng.choice(lex.VILLAGES)
    number, thing = rng.choice(lex.NUMBERS[1:12]), rng.choice(lex.THINGS)
    active = rng.random() < 0.6
    deal = (
        f"sold {number} {thing}s to {buyer}" if active else f"got {number} {thing}s from {seller}"
    )
    fields = {"seller": seller, "buyer": buyer, "day": day, "village": village, "number": number}
    text = f"On {day} in {village}, {seller if active else buyer} {deal}."
    return Record(text, fields, active)


FIELDS: Final = {
    "seller": lex.PEOPLE, "buyer": lex.PEOPLE, "day": lex.DAYS, "village": lex.VILLAGES,
    "number": lex.NUMBERS[1:12],
}  # fmt: skip


def information_extraction(world: World, rng: random.Random, skew: float) -> Probe:
    """A field of a note; harder: one of two people; hardest: the note is turned round."""
    note = record(rng)
    field = rng.choice(tuple(FIELDS))
    answer = note.fields[field]
    person = field in ("seller", "buyer")
    other = tuple(note.fields[who] for who in ("seller", "buyer") if person and who != field)
    return Probe(
        f"{field}?",
        rng.choice((f"Extract the {field}.", f"Pull the {field} out of the note.")),
        answer,
        (*other, *_wrong(FIELDS[field], (answer, *other), rng))[:3],
        note.text,
        1 if not person else 2 if note.active else 3,
        f"record/{note.text}",
    )


def summarization(world: World, rng: random.Random, skew: float) -> Probe:
    """The topic of a text, told by the things it mentions; hardest: another topic strays in."""
    level = rng.randint(1, 3)
    topic, stray = rng.sample(tuple(lex.TOPICS), 2)
    cues = rng.sample(lex.TOPICS[topic], (3, 2, 2)[level - 1])
    cues += rng.sample(lex.TOPICS[stray], (0, 0, 1)[level - 1])
    if level == 2:
        cues = cues[:1]
    rng.shuffle(cues)
    context = tale(cues, rng)
    wrong = _wrong(tuple(lex.TOPICS), (topic, stray), rng)
    return Probe(
        "What is the tale about?",
        rng.choice(("Sum up the text in a word.", "Give the short version in one word.")),
        topic,
        (stray, *wrong[:2]),
        context,
        level,
        f"tale/{context}",
    )


def tale(cues: Sequence[str], rng: random.Random) -> str:
    """Sentences that mention each of `cues` once and say nothing else about a topic."""
    forms = (
        "{p} saw the {c}.",
        "There was {c} all day.",
        "{p} spoke of the {c}.",
        "The {c} came to {v}.",
    )
    return " ".join(
        rng.choice(forms).format(p=rng.choice(lex.PEOPLE), c=cue, v=rng.choice(lex.VILLAGES))
        for cue in cues
    )


def creative_writing(world: World, rng: random.Random, skew: float) -> Probe:
    """The word that ends a verse: it rhymes, or it keeps the pattern of a refrain."""
    if rng.random() < 0.3:
        return _refrain(rng)
    group = rng.choice(lex.RHYMES)
    first, answer = rng.sample(group, 2)
    pool = [word for other in lex.RHYMES if other is not group for word in other]
    who = draw_subject(lex.PEOPLE, rng, skew)
    return Probe(
        f"What rhymes with {first}?",
        rng.choice((f"Finish the verse: {who} sang of the {first} and then of the",
                    f"Write a rhyme for {first}.")),
        answer,
        _wrong(pool, group, rng),
        level=2,
        key=f"rhyme/{first}/{answer}",
    )  # fmt: skip


def refrain(words: Sequence[str], length: int) -> str:
    """`words` over and over, `length` words in all."""
    return " ".join(words[i % len(words)] for i in range(length))


def _refrain(rng: random.Random) -> Probe:
    period = rng.choice((2, 3))
    length = rng.randint(period * 2, period * 3)
    words = rng.sample(lex.THINGS + lex.COLOURS, period)
    line = refrain(words, length)
    answer = words[length % period]
    pool = [*(word for word in words if word != answer), *rng.sample(lex.ANIMALS, 3)]
    return Probe(
        f"{line} what next?",
        rng.choice((f"Finish the song: {line}", f"Write the next word: {line}")),
        answer,
        tuple(pool[:3]),
        level=period - 1,
        key=f"refrain/{line}",
    )


CATEGORIES: Final[dict[str, Draw]] = {
    "open_qa": open_qa,
    "general_qa": general_qa,
    "classification": classification,
    "closed_qa": closed_qa,
    "brainstorming": brainstorming,
    "information_extraction": information_extraction,
    "summarization": summarization,
    "creative_writing": creative_writing,
}
