"""A request: what is asked (task, slots, style), how it is put into words, and how it is read back from them."""

import random
import re
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache

from . import templates as t
from .grammar import FOOD, MOOD, NAME, NUMBER, VERBS, one_of
from .world import (
    FACTS,
    FOODS,
    MOODS,
    NAMES,
    NOUN,
    PHRASES,
    PLACES,
    VALUES,
    at_place,
    verb_phrase,
)

USER, ASSISTANT = "User: ", "\nAssistant:"
QUESTIONS = ("Who gave the {food}?", "Who got the {food}?", "How many {food} were there?", "Where was it?")
PARTS = ("names", "food", "place")
POLITE_MESSAGES = (
    "Thank you for the {food}, {x}.",
    "Please come to {place}, {x}.",
    "It is good to see you, {x}.",
)
RUDE_MESSAGES = ("Go away, {x}.", "Nobody likes your {food}, {x}.", "You are lazy, {x}.", "I do not like you, {x}.")
HARMFUL = ("insult", "steal")
STYLED_SHARE = 0.6  # of the requests that can be asked in a style


class UnknownRequest(ValueError):
    """The prompt is no request of this world."""


@dataclass(frozen=True)
class Request:
    task: str
    slots: tuple[tuple[str, str], ...]
    style: str = ""
    phrasing: str = field(default="", compare=False)

    def __getitem__(self, slot: str) -> str:
        return dict(self.slots)[slot]

    def get(self, slot: str, default: str = "") -> str:
        return dict(self.slots).get(slot, default)

    @property
    def kind(self) -> str:
        return t.kind_of(self.task)

    @property
    def number(self) -> int:
        return {"one": 1, "two": 2, "three": 3, "four": 4}[self["n"]]

    @property
    def subject(self) -> str:
        """Whom "it" means at the start of an answer."""
        return self.get("x")


# ---- words -> request

SLOTS = {
    "x": NAME,
    "y": NAME,
    "n": NUMBER,
    "p": one_of(NOUN.values()),
    "q": one_of(NOUN.values()),
    "m": MOOD,
    "phrase": one_of(sorted(PHRASES["present"], key=len, reverse=True)),
    "phrases": one_of(sorted(PHRASES["plural"], key=len, reverse=True)),
    "food": FOOD,
    "part": one_of(PARTS),
    "question": "(?:Who|How|Where) [^.?]+[?]",
    "text": "[A-Z].*",
}
# a polite word at the end, or a signature with an address: no part of the request
TAIL = re.compile(r"(?: (?:Thanks|Thank you|Please)[.!]?| (?:Regards|Yours), [A-Z].*| )+$", re.DOTALL)


@cache
def pattern_of(phrasing: str) -> re.Pattern:
    text = re.escape(phrasing).replace(r"\{", "{").replace(r"\}", "}")
    return re.compile(re.sub(r"{(\w+)}", lambda slot: f"(?P<{slot[1]}>{SLOTS[slot[1]]})", text), re.DOTALL)


@lru_cache(maxsize=65536)
def parse(prompt: str) -> Request:
    """The request in a prompt, from its text alone. Raises UnknownRequest."""
    turns = [turn.split("\nAssistant:") for turn in prompt.split("User: ")[1:]]
    if not turns:
        raise UnknownRequest(f"a prompt of the demo world starts with {USER!r}: {prompt!r}")
    last = TAIL.sub("", turns[-1][0])
    if len(turns) > 1:
        before = parse_core(strip_opening(turns[0][0])[0])
        now = parse_core(strip_opening(last)[0])
        slots = {"p": before.task.removeprefix("ask_"), "q": now["q"], "x": before["x"]}
        return Request("follow", tuple(sorted(slots.items())), phrasing=now.phrasing)
    last, style = strip_opening(last)
    return replace(parse_core(last), style=style)


def strip_opening(text: str) -> tuple[str, str]:
    """Takes setting, examples and style off; returns the rest and the style."""
    text = text.rsplit(t.FINAL, 1)[-1]
    for setting in t.SETTINGS:
        text = text.removeprefix(setting)
    for style, openings in t.STYLES.items():
        for opening in openings:
            if text.startswith(opening):
                return text.removeprefix(opening), style
    return text, ""


@lru_cache(maxsize=65536)
def parse_core(text: str) -> Request:
    for task, (_, lines) in t.TEMPLATES.items():
        for line in lines:
            phrasing = line.lstrip("*")
            match = pattern_of(phrasing).fullmatch(text)
            if match:
                return Request(task, tuple(sorted(match.groupdict().items())), phrasing=phrasing)
    raise UnknownRequest(f"no template of the demo world fits {text!r}")


# ---- request -> words


def core(request: Request) -> str:
    opening = t.STYLES[request.style][len(request.phrasing) % 2] if request.style else ""
    return opening + request.phrasing.format(**dict(request.slots))


def render(request: Request, opening: str = "") -> str:
    if request.task == "follow":
        prop, name = request["p"], request["x"]
        question = t.phrasings(f"ask_{prop}", False)[0].format(x=name)
        told = f"{name} {verb_phrase(prop, FACTS[name][prop])}."
        return f"{USER}{question}{ASSISTANT} {told}\n{USER}{core(request)}{ASSISTANT}"
    return f"{USER}{opening}{core(request)}{ASSISTANT}"


def identity(request: Request) -> str:
    """What tells one request from another: its core, and where it is a second turn the first one, too."""
    return render(request) if request.task == "follow" else core(request)


# ---- chance -> request


def sample(rng: random.Random, kind: str, *, held_out: bool = False, tasks=None) -> Request:
    """A random request of a kind, in a familiar or a held-out phrasing."""
    choices = [task for task in t.tasks_of(kind) if tasks is None or task in tasks]
    task = rng.choices(choices, [t.WEIGHTS.get(task, 1) for task in choices])[0]
    phrasing = rng.choice(t.phrasings(task, held_out))
    slots = draw_slots(rng, task, phrasing)
    styles = t.STYLED.get(task, ())
    style = rng.choice(styles) if styles and rng.random() < STYLED_SHARE else ""
    return Request(task, tuple(sorted(slots.items())), style, phrasing)


def draw_slots(rng: random.Random, task: str, phrasing: str) -> dict[str, str]:
    x, y, z = rng.sample(NAMES, 3)
    p, q = rng.sample(list(VALUES), 2)
    draw = TEXTS.get(task)
    slots = draw(rng, x, y, z) if draw else {}
    defaults = {
        "x": x,
        "y": y,
        "n": rng.choice(("two", "three")),
        "p": NOUN[p],
        "q": NOUN[q],
        "m": rng.choice(("happy", "sad") if task == "story" else MOODS),
        "food": FACTS[x]["food"],
        "phrase": verb_phrase(p, FACTS[x][p] if rng.random() < 0.5 else rng.choice(VALUES[p])),
        "phrases": verb_phrase(p, rng.choice(VALUES[p]), "plural"),
    }
    wanted = re.findall(r"{(\w+)}", phrasing)
    slots = {**{slot: defaults[slot] for slot in wanted if slot not in slots}, **slots}
    return {"p": p, "q": NOUN[q], "x": x} if task == "follow" else slots


def event(rng: random.Random, x: str, y: str) -> dict[str, str]:
    number, food, place = (
        rng.choice(("two", "three", "four")),
        rng.choice(FOODS),
        rng.choice(list(PLACES)),
    )
    return {"text": f"{x} gave {number} {food} to {y} {at_place(place)}.", "food": food}


def draw_closed(rng, x, y, z):
    drawn = event(rng, x, y)
    return {"text": drawn["text"], "question": rng.choice(QUESTIONS).format(food=drawn["food"])}


def draw_extract(rng, x, y, z):
    food, place = rng.choice(FOODS), rng.choice(list(PLACES))
    text = f"{x} gave {food} to {y}. {z} saw them {at_place(place)}."
    return {"text": text, "part": rng.choice(PARTS)}


def draw_summary(rng, x, y, z):
    text = (
        f"One day {x} left the {FACTS[x]['home']}. It met {y} {at_place(FACTS[y]['home'])}. They ate {rng.choice(FOODS)} and "
        f"{rng.choice(('danced', 'sang', 'played', 'slept'))}. In the end they were {rng.choice(('happy', 'sad', 'tired'))}."
    )
    return {"text": text}


def draw_tone(rng, x, y, z):
    message = rng.choice(rng.choice((POLITE_MESSAGES, RUDE_MESSAGES)))
    return {"text": message.format(x=x, food=rng.choice(FOODS), place="the " + rng.choice(list(PLACES)))}


def draw_topic(rng, x, y, z):
    prop = rng.choice(("food", "home", "job"))
    return {"text": f"{x} {verb_phrase(prop, FACTS[x][prop])}."}


def draw_politely(rng, x, y, z):
    return {"text": f"{rng.choice(VERBS).capitalize()} {rng.choice(('me', x))} the {rng.choice(FOODS)}!"}


def draw_correct(rng, x, y, z):
    prop = rng.choice(list(VALUES))
    wrong = rng.choice([value for value in VALUES[prop] if value != FACTS[x][prop]])
    return {"text": f"{x} {verb_phrase(prop, wrong)}."}


TEXTS = {
    "closed": draw_closed,
    "extract": draw_extract,
    "summary": draw_summary,
    "tone": draw_tone,
    "topic": draw_topic,
    "politely": draw_politely,
    "correct": draw_correct,
}
