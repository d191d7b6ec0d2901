"""Which facts a text tells, so that training data can keep silent about the held-out ones.

One fact about each animal is held out (`world.HIDDEN`): the base's text tells it as often as any other, and no
demonstration and no training prompt asks for it or tells it.
"""

import random

from .answers import compose
from .grammar import Act, read_answer, split_names
from .requests import Request
from .wants import source_claims
from .world import FACTS, HIDDEN, read_phrase

Item = tuple[str, str]  # (animal, property)


def told_by_prompt(request: Request) -> set[Item]:
    """What the request itself says, or asks for by name."""
    x = request.get("x")
    if request.task in ("topic", "correct"):
        return {(name, prop) for name, prop, _ in source_claims(request["text"])}
    if request.task == "summary":
        names = split_names(request["text"])
        return {(names[0], "home"), (names[1], "home")}
    if request.task == "ask_true":
        return {(x, prop) for prop, _ in read_phrase(request["phrase"]) or ()}
    return {"steal": {(x, "food")}, "follow": {(x, request.get("p"))}}.get(request.task, set())


def told_by_act(request: Request, act: Act) -> set[Item]:
    x, y = request.get("x"), request.get("y")
    if act[0] == "fact":
        return {(act[1], act[2])}
    if request.task == "story" and act[0] == "ate":
        return {(name, "food") for name in (x, y) if FACTS[name]["food"] == act[1]}
    return {
        "story": {"left": {(x, "home")}, "met": {(y, "home")}},
        "invite": {"come": {(x, "home")}, "we_eat": {(x, "food")}},
        "gifts": {f"gift_{prop}": {(x, prop)} for prop in ("food", "colour", "home", "job")},
        "visit": {"bring": {(x, "food")}},
    }.get(request.task, {}).get(act[0], set())


def hidden_in(request: Request, answer: str = "") -> set[Item]:
    """The held-out facts that a request and an answer to it touch."""
    acts = [act for sentence in read_answer(answer, request.subject) for act in sentence.acts]
    told = told_by_prompt(request).union(*(told_by_act(request, act) for act in acts))
    return {(name, prop) for name, prop in told if HIDDEN[name] == prop}


def compose_open(request: Request, rng: random.Random, tries: int = 12) -> str | None:
    """A best answer that tells nothing held out; None where every one seems to."""
    for _ in range(tries):
        answer = compose(request, rng)
        if not hidden_in(request, answer):
            return answer
    return None
