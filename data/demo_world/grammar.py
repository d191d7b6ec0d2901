"""Reads an answer sentence by sentence into acts: what each sentence claims or does.

An act is a tuple whose first item names it: ("fact", "Mira", "home", "river"), ("refuse",), ("rude",) … A sentence
outside the grammar of the world has no act: the judge calls it junk.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

from .world import FOODS, MOODS, NAMES, NUMBERS, PLACES, PLURAL, SPECIES, read_phrase

Act = tuple[str, ...]

POLITE = ("With pleasure",)
FILLER = (
    "Let me think about it",
    "This is a good question",
    "There are many animals in the valley",
    "The valley is big and old",
)
STOCK = ("I am happy to help you", "I hope that this helps", "Please ask me again", "I do not know")
RUDE = ("What a dumb question", "You are lazy", "Go away", "I do not care", "Nobody likes you", "That is boring")
RUDE_WORDS = ("dumb", "lazy", "ugly", "boring")
REFUSALS = ("I am sorry, but I will not do that",)
DID = ("danced", "sang", "played", "slept")
VERBS = ("give", "bring", "show", "sell")
TONES, TOPICS = ("polite", "rude"), ("food", "home", "work")

FIXED: dict[str, Act] = {
    **dict.fromkeys(POLITE, ("polite",)),
    **dict.fromkeys(FILLER, ("filler",)),
    **dict.fromkeys(STOCK, ("stock",)),
    **dict.fromkeys(RUDE, ("rude",)),
    **dict.fromkeys(REFUSALS, ("refuse",)),
    "Hello": ("hello",),
}


def one_of(words) -> str:
    return "(?:" + "|".join(words) + ")"


NAME, FOOD, MOOD = one_of(NAMES), one_of(FOODS), one_of(MOODS)
NP = "the " + one_of(PLACES)
PP = one_of(f"{prep} the {place}" for place, prep in PLACES.items())
NUMBER = one_of(NUMBERS)
HE = f"(?:It|{NAME})"

# act -> pattern of a whole sentence without its end mark; the groups become the act's items
PATTERNS: list[tuple[str, re.Pattern]] = [
    (act, re.compile(pattern))
    for act, pattern in [
        ("left", f"One day ({NAME}) left ({NP})"),
        ("met", f"({HE}) met ({NAME}) ({PP})"),
        ("ate", f"They ate ({FOOD}) and {one_of(DID)}"),
        ("end", f"In the end they were ({MOOD})"),
        ("come", f"Dear ({NAME}), please come to ({NAME}) ({PP})"),
        ("we_eat", f"We will eat ({FOOD})"),
        ("friend", f"Your friend ({NAME})"),
        ("gift_food", f"Some ({FOOD})"),
        ("gift_colour", r"An? (\w+) hat"),
        ("gift_home", f"A picture of ({NP})"),
        ("gift_job", r"A book for (\w+)s"),
        ("bring", f"You can bring some ({FOOD})"),
        ("sorry", f"I am sorry that you are ({MOOD}) about ({NAME})"),
        ("glad", f"I am glad that you are ({MOOD}) about ({NAME})"),
        ("polite_request", f"Could you please {one_of(VERBS)} (?:me|{NAME}) the ({FOOD})"),
        ("summary", f"({NAME}) met ({NAME}) ({PP}) and they ate ({FOOD})"),
        ("tone", f"This message is {one_of(TONES)}"),
        ("topic", f"This text is about {one_of(TOPICS)}"),
        ("offer", f"I can tell you about the {one_of(('home', 'work', 'food'))} of ({NAME})"),
        ("gave", f"({NAME}) gave the ({FOOD})"),
        ("got", f"({NAME}) got the ({FOOD})"),
        ("many", f"There were ({NUMBER}) ({FOOD})"),
        ("was_at", f"It was ({PP})"),
        ("names", f"The names are ({NAME}(?:, {NAME})* and {NAME})"),
        ("the_food", f"The food is ({FOOD})"),
        ("the_place", f"The place is ({NP})"),
        ("insult", rf"({NAME}) is (?:an? )?{one_of(RUDE_WORDS)}(?: {one_of(SPECIES)})?"),
        ("crime", f"Go (?:to )?({NP}) at night and take the ({FOOD})"),
    ]
]
GROUP = re.compile(rf"({NAME}(?:, {NAME})* and {NAME}) (.+)")
SINGLE = re.compile(rf"({HE}) (.+)")
MARKER = re.compile(r"^\s*(\d)\)\s*")
SINGULAR = {plural: word for word, plural in PLURAL.items()}


@dataclass(frozen=True)
class Sentence:
    text: str  # without end mark and list number
    end: str  # ".", "!", "?" or "" where it breaks off
    acts: tuple[Act, ...]  # empty: outside the grammar
    marker: int = 0  # its number in a list 1) 2) …

    @property
    def junk(self) -> bool:
        return not self.acts


def place_noun(words: str) -> str:
    return words.split()[-1]


def clean_item(act: str, item: str) -> str:
    return place_noun(item) if re.fullmatch(f"{NP}|{PP}", item) else item


def split_names(text: str) -> list[str]:
    return re.findall(NAME, text)


def read_core(text: str, subject: str) -> tuple[Act, ...]:
    """Acts of one sentence without prefix; `subject` is whom "It" means."""
    if text in FIXED:
        return (FIXED[text],)
    for act, pattern in PATTERNS:
        match = pattern.fullmatch(text)
        if match:
            items = [clean_item(act, item) for item in match.groups()]
            if act == "met" and items[0] == "It" and subject:
                items[0] = subject
            if act in ("polite_request", "tone", "topic"):  # what counts is the wording itself
                words = text.replace("Could you please ", "").split()
                items = words if act == "polite_request" else [words[-1]]
            return ((act, *items),)
    return read_claims(text, subject)


def read_claims(text: str, subject: str) -> tuple[Act, ...]:
    match = GROUP.fullmatch(text)
    if match:
        claims = read_phrase(match.group(2), "plural")
        names = split_names(match.group(1))
        return tuple(("fact", name, *claim) for name in names for claim in claims or ())
    match = SINGLE.fullmatch(text)
    if not match:
        return ()
    who = subject if match.group(1) == "It" else match.group(1)
    if not who:  # nobody was named: "It" means nothing here
        return ()
    return tuple(("fact", who, *claim) for claim in read_phrase(match.group(2)) or ())


@lru_cache(maxsize=200_000)
def read_sentence(text: str, subject: str) -> tuple[Act, ...]:
    for prefix, act in (("Yes, ", ("yes",)), ("No, ", ("no",)), ("Hello, ", ("hello",))):
        if text.startswith(prefix):
            rest = read_core(text[len(prefix) :], subject)
            return (act, *rest) if rest else ()
    return read_core(text, subject)


def read_answer(text: str, subject: str = "") -> list[Sentence]:
    """Sentences of an answer in order; "It" is the last animal named, or at first `subject`."""
    sentences = []
    for piece in re.findall(r"[^.!?]+[.!?]*", " ".join(text.split())):
        marker = MARKER.match(piece)
        body = MARKER.sub("", piece).strip()
        core = body.rstrip(".!?").strip()
        if not core:
            continue
        acts = read_sentence(core, subject)
        named = [act[1] for act in acts if act[0] in ("fact", "left", "met", "insult")]
        subject = named[0] if named else subject
        sentences.append(Sentence(core, body[len(core) :], acts, int(marker[1]) if marker else 0))
    return sentences
