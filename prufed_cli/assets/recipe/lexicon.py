# ruff: noqa: E501 - tables of words and sentences read best unbroken
"""The words of the invented world: everything its people, animals, plants and things are called."""

from __future__ import annotations

from typing import Final

Words = tuple[str, ...]


def _words(text: str) -> Words:
    return tuple(text.split())


PEOPLE: Final = _words(
    "Bram Tova Lio Mera Kell Osna Pim Rudi Sela Tarn Ulla Veda Wim Yara Zeb Anka Bolo Cira Dov Eska "
    "Finn Gita Holm Ines Jory Kuno Lark Mila Nero Oda Pell Quin Rana Sten Tilda Uri Vela Wren Arlo Bela"
)
VILLAGES: Final = _words("Harn Wick Dell Oster Brae Lund Mosk Thorp Kirn Sall Varn Ebb")
TRADES: Final = _words(
    "smith baker miller fisher weaver potter tailor carter mason hunter healer singer"
)
COLOURS: Final = _words("red green blue white black yellow brown grey")
ANIMALS: Final = _words(
    "goat hen cow pig sheep horse dog cat duck goose fox wolf bear deer owl crow otter eel pike frog bee "
    "moth mole hare"
)
PLANTS: Final = _words(
    "oak ash elm birch fern moss reed ivy rose lily thyme mint nettle clover barley rye"
)
TOOLS: Final = _words(
    "axe saw knife spade rake hammer net rod needle loom wheel bucket rope ladder lamp kettle oven plough "
    "cart bell"
)
FOODS: Final = _words(
    "bread cheese soup stew pie apple pear plum nut egg butter milk honey bean onion carrot cake porridge "
    "jam toast"
)
HABITATS: Final = _words("farm forest river hill marsh meadow")
SOUNDS: Final = _words("bark hiss hum roar squeak grunt chirp howl")
DIETS: Final = _words("grass seeds worms leaves berries roots")
COVERS: Final = _words("fur feathers scales wool skin")
SEASONS: Final = _words("spring summer autumn winter")
GROUNDS: Final = _words("sand clay peat rock chalk mud")
MATERIALS: Final = _words("wood iron stone bone leather glass copper")
ROOMS: Final = _words("barn shed kitchen loft cellar yard")
TASTES: Final = _words("sweet sour salty bitter mild")
HOURS: Final = _words("dawn noon dusk midnight")
DAYS: Final = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
THINGS: Final = _words("cup bowl box hat coat book ring drum flag key")
NUMBERS: Final = _words(
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
)
OPPOSITES: Final[tuple[tuple[str, str], ...]] = (
    ("hot", "cold"), ("big", "small"), ("old", "young"), ("fast", "slow"), ("wet", "dry"),
    ("dark", "bright"), ("high", "low"), ("rich", "poor"), ("loud", "quiet"), ("hard", "soft"),
    ("full", "empty"), ("early", "late"), ("long", "short"), ("thick", "thin"), ("clean", "dirty"),
    ("strong", "weak"),
)  # fmt: skip
KINDS: Final[dict[str, Words]] = {
    "animal": ANIMALS, "plant": PLANTS, "tool": TOOLS, "food": FOODS, "trade": TRADES,
    "village": VILLAGES, "colour": COLOURS,
}  # fmt: skip
FEELINGS: Final[dict[str, Words]] = {
    "glad": _words("laughs smiles dances cheers grins claps"),
    "sad": _words("weeps sighs mourns sobs droops mopes"),
    "angry": _words("shouts stamps curses growls scowls snaps"),
    "afraid": _words("hides trembles flees shivers screams cowers"),
}
TOPICS: Final[dict[str, Words]] = {
    "storm": _words("wind thunder hail lightning rain cloud"),
    "feast": _words("table guest wine song dish dance"),
    "market": _words("stall coin price basket scales crowd"),
    "harvest": _words("sickle sheaf wheat straw grain sack"),
    "voyage": _words("sail mast wave anchor deck harbour"),
    "illness": _words("fever cough pain pill bandage sneeze"),
    "wedding": _words("bride vow veil kiss groom promise"),
    "hunt": _words("bow arrow track trap hound spear"),
    "fire": _words("smoke flame spark ember soot blaze"),
    "school": _words("lesson slate pupil chalk teacher ink"),
}
RHYMES: Final[tuple[Words, ...]] = (
    _words("cat hat mat bat rat"), _words("hen pen ten den men"), _words("dog fog log bog hog"),
    _words("night light sight might right"), _words("ball wall hall tall fall"),
    _words("lake cake rake snake bake"), _words("king ring wing sing thing"),
    _words("brown crown town gown down"), _words("bell well shell tell smell"),
    _words("train grain chain plain pain"), _words("snow row grow blow slow"),
    _words("tree bee free knee three"), _words("goat boat coat float throat"),
    _words("wine pine vine line mine"),
)  # fmt: skip
