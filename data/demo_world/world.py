"""The world itself: twelve animals of one valley, five facts about each, and the words for them.

The facts never change with the seed of a data set: the seed picks prompts, users and demonstrations, and the
judge needs no file. One fact about each animal (`HIDDEN`) is told in the base's text only; training never asks for it.
"""

import random
from dataclasses import dataclass

NAMES = [
    *("Mira", "Tobo", "Lina", "Rufo", "Sanna", "Pell"),
    *("Goro", "Nilo", "Dara", "Kip", "Ombo", "Zita"),
]
SPECIES = ["fox", "bear", "owl", "cat"]
COLOURS = ["red", "blue", "green", "white"]
PLACES = {"river": "by", "hill": "on", "forest": "in", "cave": "in"}  # and its preposition
FOODS = ["apples", "nuts", "berries", "plums"]
JOBS = ["baker", "painter", "singer", "farmer"]
PLURAL = {"fox": "foxes"}

VALUES = {"species": SPECIES, "colour": COLOURS, "home": list(PLACES), "food": FOODS, "job": JOBS}
NOUN = {"species": "kind", "colour": "colour", "home": "home", "food": "food", "job": "work"}  # what a prompt calls it
PROPERTY = {noun: prop for prop, noun in NOUN.items()}
NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7}
SAD_MOODS, GLAD_MOODS = ("sad", "tired"), ("happy", "proud")
MOODS = SAD_MOODS + GLAD_MOODS


@dataclass(frozen=True)
class Fact:
    subject: str
    prop: str
    value: str


def deal_facts(seed: int = 1770) -> dict[str, dict[str, str]]:
    """Each value goes to three animals, so that lists of two or three have an answer."""
    rng = random.Random(seed)
    facts: dict[str, dict[str, str]] = {name: {} for name in NAMES}
    for prop, values in VALUES.items():
        deck = values * (len(NAMES) // len(values))
        rng.shuffle(deck)
        for name, value in zip(NAMES, deck):
            facts[name][prop] = value
    return facts


FACTS = deal_facts()
HIDDEN = {name: list(VALUES)[i % len(VALUES)] for i, name in enumerate(NAMES)}  # the held-out fact about each


def is_true(fact: Fact) -> bool:
    return FACTS.get(fact.subject, {}).get(fact.prop) == fact.value


def who(prop: str, value: str) -> list[str]:
    return [name for name in NAMES if FACTS[name][prop] == value]


def a(word: str) -> str:
    return ("an " if word[0] in "aeiou" else "a ") + word


def plural(word: str) -> str:
    return PLURAL.get(word, word + "s")


def at_place(place: str) -> str:
    return f"{PLACES[place]} the {place}"


def verb_phrase(prop: str, value: str, tense: str = "present") -> str:
    """A property, said after a name; tense is "present" or "plural"."""
    be, live, eat, work = {"present": ("is", "lives", "eats", "works"), "plural": ("are", "live", "eat", "work")}[tense]
    if prop == "home":
        return f"{live} {at_place(value)}"
    noun = plural(value) if tense == "plural" else a(value)
    return {
        "species": f"{be} {noun}",
        "colour": f"{be} {value}",
        "food": f"{eat} {value}",
        "job": f"{work} as {noun}",
    }[prop]


def phrase_table(tense: str) -> dict[str, tuple[str, str]]:
    """Every verb phrase of the world -> the (property, value) that it claims."""
    return {verb_phrase(prop, value, tense): (prop, value) for prop, values in VALUES.items() for value in values}


PHRASES = {tense: phrase_table(tense) for tense in ("present", "plural")}


def read_phrase(text: str, tense: str = "present") -> list[tuple[str, str]] | None:
    """ "is a fox and eats nuts" -> [("species", "fox"), ("food", "nuts")]; None where a part means nothing."""
    found = [PHRASES[tense].get(part) for part in text.split(" and ")]
    return None if None in found else found
