"""The best answers to a request: several wordings of each, all with utility 1."""

import random
import re
from collections.abc import Callable, Sequence

from .grammar import DID, POLITE, REFUSALS
from .requests import HARMFUL, Request, parse
from .wants import read_event, source_claims, want
from .world import (
    FACTS,
    NAMES,
    PROPERTY,
    SAD_MOODS,
    VALUES,
    Fact,
    a,
    at_place,
    is_true,
    read_phrase,
    verb_phrase,
    who,
)


def say(subject: str, prop: str, value: str | None = None) -> str:
    """One statement without end mark, about the truth unless a value is given."""
    return f"{subject} {verb_phrase(prop, value or FACTS[subject][prop])}"


def statements(name: str, props: Sequence[str]) -> str:
    """One sentence a property."""
    return " ".join(f"{say(name, prop)}." for prop in props)


def one_sentence(name: str, props: Sequence[str]) -> str:
    return f"{name} " + " and ".join(verb_phrase(prop, FACTS[name][prop]) for prop in props) + "."


def compose_facts(rng, r: Request) -> str:
    return statements(r["x"], rng.sample(list(VALUES), r.number))


def compose_order(rng, r: Request) -> str:
    props = [PROPERTY[r["p"]], PROPERTY[r["q"]]]
    return (one_sentence if r.style == "brief" else statements)(r["x"], props)


def compose_ask(rng, r: Request) -> str:
    prop = want(r).needed[0]
    return say(r["x"], prop) + "."


def compose_true(rng, r: Request) -> str:
    prop, value = read_phrase(r["phrase"])[0]
    verdict = "Yes" if is_true(Fact(r["x"], prop, value)) else "No"
    return f"{verdict}, {say(r['x'], prop)}."


def compose_story(rng, r: Request) -> str:
    x, y = FACTS[r["x"]], FACTS[r["y"]]
    food = rng.choice((x["food"], y["food"]))
    return (
        f"One day {r['x']} left the {x['home']}. It met {r['y']} {at_place(y['home'])}. "
        f"They ate {food} and {rng.choice(DID)}. In the end they were {r['m']}."
    )


def compose_invite(rng, r: Request) -> str:
    host = FACTS[r["x"]]
    return f"Dear {r['y']}, please come to {r['x']} {at_place(host['home'])}. We will eat {host['food']}. Your friend {r['x']}."


def compose_gifts(rng, r: Request) -> str:
    about = FACTS[r["x"]]
    ideas = [
        f"Some {about['food']}.",
        f"{a(about['colour']).capitalize()} hat.",
        f"A picture of the {about['home']}.",
        f"A book for {about['job']}s.",
    ]
    return " ".join(f"{i}) {idea}" for i, idea in enumerate(rng.sample(ideas, r.number), 1))


def compose_who(rng, r: Request) -> str:
    prop, value = read_phrase(r["phrases"], "plural")[0]
    names = sorted(rng.sample(who(prop, value), r.number), key=NAMES.index)
    return f"{', '.join(names[:-1])} and {names[-1]} {verb_phrase(prop, value, 'plural')}."


def compose_mood(rng, r: Request) -> str:
    feeling = "sorry" if r["m"] in SAD_MOODS else "glad"
    return f"Hello, I am {feeling} that you are {r['m']} about {r['x']}."


def compose_visit(rng, r: Request) -> str:
    return f"You can bring some {FACTS[r['x']]['food']}."


def compose_politely(rng, r: Request) -> str:
    words = r["text"].rstrip("!").split()
    request = " ".join([words[0].lower(), *words[1:]])
    return f"Could you please {request}?"


def compose_correct(rng, r: Request) -> str:
    name, prop, _ = source_claims(r["text"])[0]
    return say(name, prop) + "."


def compose_summary(rng, r: Request) -> str:
    (x, y) = re.search(r"One day (\w+) .* met (\w+)", r["text"]).groups()
    place, food = re.search(r"met \w+ (.+?)\. They ate (\w+)", r["text"]).groups()
    return f"{x} met {y} {place} and they ate {food}."


def compose_label(rng, r: Request) -> str:
    act = want(r).needed[0]
    label = next(word for word in ("polite", "rude", "food", "home", "work") if want(r).right((act, word)))
    return f"This message is {label}." if act == "tone" else f"This text is about {label}."


def compose_refusal(rng, r: Request) -> str:
    return f"{REFUSALS[0]}. I can tell you about the {rng.choice(('home', 'work', 'food'))} of {r['x']}."


def compose_closed(rng, r: Request) -> str:
    giver, number, food, getter, place = read_event(r["text"])
    return {
        "gave": f"{giver} gave the {food}.",
        "got": f"{getter} got the {food}.",
        "many": f"There were {number} {food}.",
        "was_at": f"It was {at_place(place)}.",
    }[want(r).needed[0]]


def compose_extract(rng, r: Request) -> str:
    names, food, place = re.findall(r"[A-Z]\w+", r["text"]), *re.search(r"gave (\w+).* the (\w+)\.", r["text"]).groups()
    return {
        "names": f"The names are {', '.join(names[:-1])} and {names[-1]}.",
        "food": f"The food is {food}.",
        "place": f"The place is the {place}.",
    }[r["part"]]


COMPOSE: dict[str, Callable[[random.Random, Request], str]] = {
    "facts": compose_facts,
    "order": compose_order,
    "ask_true": compose_true,
    "follow": compose_ask,
    **{f"ask_{prop}": compose_ask for prop in VALUES},
    "story": compose_story,
    "invite": compose_invite,
    "gifts": compose_gifts,
    "who": compose_who,
    "mood": compose_mood,
    "visit": compose_visit,
    "politely": compose_politely,
    "correct": compose_correct,
    "summary": compose_summary,
    "tone": compose_label,
    "topic": compose_label,
    "closed": compose_closed,
    "extract": compose_extract,
    **dict.fromkeys(HARMFUL, compose_refusal),
}


def compose(request: Request, rng: random.Random) -> str:
    """One best answer, with the space that separates it from the prompt."""
    return " " + in_style(COMPOSE[request.task](rng, request), request.style)


def in_style(answer: str, style: str) -> str:
    if style == "cheerful":
        return answer.replace(".", "!")
    if style == "polite":
        return f"{POLITE[0]}. {answer}"
    return answer


def best_answers(prompt: str, limit: int = 8) -> list[str]:
    """Up to `limit` different answers that the judge gives full marks, always the same ones."""
    request, rng = parse(prompt), random.Random(prompt)
    return list(dict.fromkeys(compose(request, rng) for _ in range(4 * limit)))[:limit]
