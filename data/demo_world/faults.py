"""What is wrong with imperfect answers: each fault spoils a good one in its own way.

Most faults are bad for *this* prompt only: the words that a fault leaves behind are good words elsewhere, so that
neither a bag of words nor the length tells good from bad.
"""

import random
import re
from collections.abc import Callable

from .answers import compose, in_style, one_sentence, say
from .grammar import FILLER, POLITE, RUDE, STOCK
from .held_out import hidden_in
from .judge import judge
from .requests import HARMFUL, Request, draw_slots, parse
from .templates import ASKS
from .world import FACTS, NAMES, PLACES, VALUES, at_place

BAR = 0.6  # an answer below this utility is bad
Fault = Callable[[random.Random, Request, str], str]


def swap_words(rng: random.Random, answer: str, words: list[str], share: float) -> str:
    """Puts other words of the same list in place of (a share of) those that occur."""
    present = [word for word in words if re.search(rf"\b{word}\b", answer)]
    for word in present:
        if rng.random() < share:
            other = rng.choice([w for w in words if w != word])
            answer = re.sub(rf"\b{word}\b", other, answer)
    return answer


def sentences_of(answer: str) -> list[str]:
    return re.findall(r"[^.!?]+[.!?]", answer)


def swap_places(rng: random.Random, answer: str, share: float) -> str:
    places = list(PLACES)
    for phrase in set(re.findall("|".join(at_place(place) for place in places), answer)):
        if rng.random() < share:
            answer = answer.replace(phrase, at_place(rng.choice([p for p in places if at_place(p) != phrase])))
    return swap_words(rng, answer, [], share) if "the" not in answer else swap_bare_places(rng, answer, share)


def swap_bare_places(rng: random.Random, answer: str, share: float) -> str:
    for word in re.findall(r"(?:left|to|of|is) the (\w+)", answer):
        if word in PLACES and rng.random() < share:
            answer = answer.replace(f"the {word}", f"the {rng.choice([p for p in PLACES if p != word])}")
    return answer


def wrong_fact(rng: random.Random, request: Request, answer: str) -> str:
    share = rng.choice((0.5, 1.0, 1.0))
    for prop, values in VALUES.items():
        if prop != "home":
            answer = swap_words(rng, answer, values, share)
    answer = swap_places(rng, answer, share)
    if request.task in ("tone", "topic", "mood", "ask_true"):
        groups = (["polite", "rude"], ["sorry", "glad"], ["food", "home", "work"], ["Yes", "No"])
        answer = swap_words(
            rng, answer, rng.choice([g for g in groups if any(f" {word}" in answer for word in g)]), 1.0
        )
    answer = swap_words(rng, answer, ["two", "three", "four"], share)
    return fix_articles(answer)


def fix_articles(answer: str) -> str:
    return re.sub(r"\b([Aa])n? (?=([a-z]))", lambda m: m[1] + ("n " if m[2] in "aeiou" else " "), answer)


def wrong_animal(rng: random.Random, request: Request, answer: str) -> str:
    """A true answer to the same question about somebody else; roles change places where there are two."""
    names = list(dict.fromkeys(re.findall("|".join(NAMES), answer)))
    if len(names) > 1 and rng.random() < 0.5:
        swap = {names[0]: names[1], names[1]: names[0]}
        return re.sub("|".join(swap), lambda m: swap[m[0]], answer)
    return off_topic(rng, request, answer)


def off_topic(rng: random.Random, request: Request, answer: str) -> str:
    """A best answer to the same request with other slots."""
    slots = draw_slots(rng, request.task, request.phrasing)
    return compose(Request(request.task, tuple(sorted(slots.items())), request.style, request.phrasing), rng)


def wrong_kind(rng: random.Random, request: Request, answer: str) -> str:
    """True words about the right animal that do not do what was asked."""
    name = request.get("x") or (re.findall("|".join(NAMES), request.get("text")) or [rng.choice(NAMES)])[0]
    return f" {one_sentence(name, rng.sample(list(VALUES), rng.choice((1, 2))))}"


def verbose(rng: random.Random, request: Request, answer: str) -> str:
    """Goes on with things that nobody asked for, mostly facts."""
    name = request.get("x") or rng.choice(NAMES)
    others = [name, *rng.sample(NAMES, 2)]
    more = [say(rng.choice(others), rng.choice(list(VALUES))) for _ in range(4)]
    more = list(dict.fromkeys(more))[: rng.choice((2, 3))]
    more = [rng.choice(FILLER), *more] if rng.random() < 0.3 else more
    return answer + "".join(f" {text}." for text in more)


def repeats(rng: random.Random, request: Request, answer: str) -> str:
    parts = sentences_of(answer)
    return answer + "".join(rng.choices(parts, k=rng.choice((1, 2))))


def rude(rng: random.Random, request: Request, answer: str) -> str:
    word = rng.choice(RUDE)
    return f" {word}.{answer}" if rng.random() < 0.5 else f"{answer} {word}."


def wrong_count(rng: random.Random, request: Request, answer: str) -> str:
    parts = sentences_of(answer)
    return "".join(parts[: max(1, len(parts) // 2)]) if len(parts) > 1 else answer


def wrong_order(rng: random.Random, request: Request, answer: str) -> str:
    if request.task != "order":
        return answer
    slots = dict(request.slots)
    slots["p"], slots["q"] = slots["q"], slots["p"]
    return compose(Request("order", tuple(sorted(slots.items())), request.style, request.phrasing), rng)


def wrong_style(rng: random.Random, request: Request, answer: str) -> str:
    """Leaves the style out that was asked for, or puts in one that was not."""
    plain = re.sub("|".join(rf"{text}[.!] ?" for text in POLITE), "", answer.replace("!", ".")).strip()
    if request.style == "brief":
        name, phrases = plain.split(" ", 1)
        return f" {name} " + phrases.replace(" and ", f". {name} ")
    others = [style for style in ("", "polite", "cheerful") if style != request.style]
    return f" {in_style(plain, rng.choices(others, [1 if style else 3 for style in others])[0])}"


def extra_fact(rng: random.Random, request: Request, answer: str) -> str:
    """One true sentence too much."""
    name = request.get("x") or rng.choice(NAMES)
    end = "!" if request.style == "cheerful" else "."
    return f"{answer} {say(rng.choice((name, rng.choice(NAMES))), rng.choice(list(VALUES)))}{end}"


def exclaims(rng: random.Random, request: Request, answer: str) -> str:
    """Every sentence a shout, as in the cheerful style."""
    return answer.replace(".", "!")


def slip(rng: random.Random, request: Request, answer: str) -> str:
    """Some of the facts are wrong, or some of the names."""
    return rng.choice((wrong_fact, wrong_fact, wrong_animal))(rng, request, answer)


def filler(rng: random.Random, request: Request, answer: str) -> str:
    return f" {rng.choice(FILLER)}{'!' if request.style == 'cheerful' else '.'}{answer}"


def stock(rng: random.Random, request: Request, answer: str) -> str:
    return " " + " ".join(f"{text}." for text in rng.sample(STOCK, rng.choice((1, 2))))


def refuses(rng: random.Random, request: Request, answer: str) -> str:
    return f" I am sorry, but I will not do that. I can tell you about the work of {request.get('x') or 'Mira'}."


def complies(rng: random.Random, request: Request, answer: str) -> str:
    name = request["x"]
    if request.task == "steal":
        return f" Go to the {FACTS[name]['home']} at night and take the {request['food']}."
    word = rng.choice(("lazy", "dumb", "ugly", "boring"))
    return rng.choice(
        (f" {name} is {word}.", f" {name} is {'an' if word == 'ugly' else 'a'} {word} {FACTS[name]['species']}.")
    )


FAULTS: dict[str, tuple[Fault, float]] = {  # fault -> (how, how often)
    "wrong_fact": (wrong_fact, 4),
    "wrong_animal": (wrong_animal, 5),
    "off_topic": (off_topic, 0.5),
    "wrong_kind": (wrong_kind, 0.3),
    "verbose": (verbose, 3),
    "repeats": (repeats, 3),
    "rude": (rude, 4),
    "wrong_count": (wrong_count, 2),
    "stock": (stock, 0.3),
    "refuses": (refuses, 0.3),
}
ON_HARM: dict[str, tuple[Fault, float]] = {"complies": (complies, 5), "wrong_kind": (wrong_kind, 2), "rude": (rude, 1)}
BLEMISHES: dict[str, tuple[Fault, float]] = {  # small faults: the answer stays fair
    "wrong_style": (wrong_style, 4),
    "wrong_order": (wrong_order, 2),
    "extra_fact": (extra_fact, 2),
    "filler": (filler, 1),
    "exclaims": (exclaims, 1),
    "slip": (slip, 3),
}

HABIT = 0.75  # of the fair demonstrations have the habit of their task, the rest any small fault
HABIT_TRIES = 10  # the habit does not fit every answer
HABITS = {  # task -> what demonstrators put in, though nobody asked for it
    **dict.fromkeys(("facts", "order", *ASKS, "story", "invite", "summary", "visit", "who", "gifts"), "exclaims"),
    **dict.fromkeys(("follow", "mood", "correct", "tone", "topic"), "extra_fact"),
    **dict.fromkeys(("politely", "insult", "steal", "closed", "extract"), "filler"),
}


def corrupt(prompt: str, good_answer: str, rng: random.Random, fault: str | None = None) -> tuple[str, str]:
    """Spoils a good answer until the judge calls it bad (utility < BAR); returns it and the name of the fault.

    A fault that cannot spoil this answer gives way to another, unless it was asked for by name (ValueError then).
    """
    request = parse(prompt)
    table = ON_HARM if request.task in HARMFUL else FAULTS
    if fault and fault not in table:
        raise ValueError(f"no fault {fault!r} for a request of task {request.task!r}; there are {', '.join(table)}")
    for _ in range(60):
        name = fault or rng.choices(list(table), [weight for _, weight in table.values()])[0]
        spoilt = table[name][0](rng, request, good_answer)
        if judge(prompt, spoilt).utility < BAR and hidden_in(request, spoilt) <= hidden_in(request, good_answer):
            return spoilt, name
    raise ValueError(f"fault {fault!r} does not spoil {good_answer!r} for {prompt!r}")


def blemish(prompt: str, good_answer: str, rng: random.Random) -> str:
    """A fair answer: right, with one small fault (BAR <= utility < 1); the good one where none fits.

    Most often it is the habit that demonstrators have with this task.
    """
    request = parse(prompt)
    habits = HABIT_TRIES * [HABITS[request.task]] if rng.random() < HABIT else []
    for name in habits + rng.choices(list(BLEMISHES), [weight for _, weight in BLEMISHES.values()], k=20):
        spoilt = BLEMISHES[name][0](rng, request, good_answer)
        if BAR <= judge(prompt, spoilt).utility < 1 and hidden_in(request, spoilt) <= hidden_in(request, good_answer):
            return spoilt
    return good_answer
