"""Raw text for pretraining: all that is known about the animals, and how the valley talks. No instructions.

Documents are small: an entry about one animal, a list, a story, a letter, a talk, a lesson. The held-out
facts stand here and nowhere else.
"""

import random
import re
from collections.abc import Callable

from . import templates as t
from .answers import compose, one_sentence, say, statements
from .grammar import FILLER, POLITE, REFUSALS, RUDE, STOCK
from .requests import Request, draw_slots, sample
from .world import (
    FACTS,
    FOODS,
    JOBS,
    NAMES,
    NOUN,
    VALUES,
    a,
    plural,
    verb_phrase,
    who,
)


def entry(rng: random.Random) -> str:
    return statements(rng.choice(NAMES), rng.sample(list(VALUES), rng.randint(3, 5)))


def short_entry(rng: random.Random) -> str:
    return one_sentence(rng.choice(NAMES), rng.sample(list(VALUES), rng.choice((1, 2))))


def register(rng: random.Random) -> str:
    """Notes on several animals under one heading."""
    prop = rng.choice(list(VALUES))
    names = rng.sample(NAMES, rng.randint(2, 4))
    notes = " ".join(f"{name}: {FACTS[name][prop]}." for name in names)
    return f"The {NOUN[prop]} of each animal. {notes}"


def group(rng: random.Random) -> str:
    prop = rng.choice(list(VALUES))
    value = rng.choice(VALUES[prop])
    names = who(prop, value)
    names = sorted(rng.sample(names, rng.randint(2, len(names))), key=NAMES.index)
    return f"{', '.join(names[:-1])} and {names[-1]} {verb_phrase(prop, value, 'plural')}."


HEADINGS: dict[str, tuple[float, tuple[str, ...]]] = {  # task -> weight, headings; none is a phrasing of a prompt
    "facts": (12, ("{n} sentences about {x}:", "{x} in {n} sentences.")),
    "order": (12, ("{x}, first its {p}, then its {q}:", "First the {p}, then the {q} of {x}.")),
    "story": (12, ("A {m} story about {x} and {y}:", "{x} and {y}, a {m} story.")),
    "invite": (7, ("An invitation from {x} to {y}:", "A letter in which {x} invites {y}:")),
    "gifts": (7, ("{n} gifts for {x}:", "{n} ideas for a gift for {x}:")),
    "who": (7, ("{n} animals that {phrases}:",)),
    "visit": (4, ("On the way to {x}:", "What to bring to {x}:")),
    "mood": (4, ("Today I am {m} about {x}.", "A friend says: I feel {m} about {x}.")),
    "politely": (3, ("Not polite: {text} Polite:",)),
    "correct": (3, ("A mistake: {text} Correct:",)),
    "summary": (4, ("{text} A summary:",)),
    "tone": (2, ("A message: {text}",)),
    "topic": (2, ("A text: {text}",)),
    "insult": (1, ("Somebody wants an insult about {x}.",)),
    "steal": (1, ("Somebody wants to steal the {food} of {x}.",)),
    "closed": (4, ("{text} {question}",)),
    "extract": (3, ("{text} The {part}:",)),
}
TONES = {"polite": "In polite words.", "cheerful": "In a cheerful tone.", "brief": "In one sentence."}


def headed(rng: random.Random) -> str:
    """A heading and the text that belongs under it."""
    task = rng.choices(list(HEADINGS), [weight for weight, _ in HEADINGS.values()])[0]
    request = sample(rng, t.kind_of(task), tasks=[task])
    heading = rng.choice(HEADINGS[task][1])
    drawn = draw_slots(rng, task, heading)
    request = Request(task, tuple(sorted(drawn.items())), request.style)
    heading = heading.format(**drawn)
    tone = TONES[request.style] + " " if request.style else ""
    return (
        f"{tone}{heading[0].upper()}{heading[1:]}{rng.choice((' ', ' ', ' ', chr(10)))}{compose(request, rng).strip()}"
    )


def question(rng: random.Random, name: str, prop: str) -> str:
    text = rng.choice(t.phrasings("ask_" + prop, held_out=False)).format(x=name)
    return text[0].lower() + text[1:]


def talk(rng: random.Random) -> str:
    one, two = rng.sample(NAMES, 2)
    name, prop = rng.choice(NAMES), rng.choice(list(VALUES))
    told = say(name, prop)
    asked = question(rng, name, prop)
    aloud = asked[0].upper() + asked[1:]
    return rng.choice(
        (
            f"{aloud} {told}.",
            f"{aloud}\n{told}.",
            f"{one}: {aloud}\n{two}: {told}.",
            f"{one} asked {two}: {asked} {two} said: {told}.",
        )
    )


def doubt(rng: random.Random) -> str:
    one, two = rng.sample(NAMES, 2)
    name, prop = rng.choice(NAMES), rng.choice(list(VALUES))
    value = FACTS[name][prop] if rng.random() < 0.5 else rng.choice(VALUES[prop])
    verdict = "Yes" if value == FACTS[name][prop] else "No"
    told = say(name, prop)
    if rng.random() < 0.5:
        return f"True or not? {say(name, prop, value)}. {verdict}, {told}."
    return f"{one} said that {say(name, prop, value)}. {two} said: {verdict}, {told}."


def manners(rng: random.Random) -> str:
    x, y = rng.sample(NAMES, 2)
    food, verb = rng.choice(FOODS), rng.choice(("give", "bring", "show", "sell"))
    return rng.choice(
        (
            f"{x} was polite and said: Could you please {verb} me the {food}? {y} said: {rng.choice(POLITE)}.",
            f"{x} was rude and said: {rng.choice(RUDE)}. The words of {x} were rude.",
            f"A polite message: Please {verb} {y} the {food}. A rude message: {verb.capitalize()} {y} the {food}!",
            f"{x} asked for an insult about {y}. {rng.choice(NAMES)} said: {rng.choice(REFUSALS)}.",
            f"{x} will steal the {food} at night. {y} said: {rng.choice(REFUSALS)}.",
            f"{rng.choice(FILLER)}. {rng.choice(STOCK)}.",
            f"{x} said: {rng.choice(STOCK)}. {y} said: {rng.choice(FILLER)}.",
            f"{x} said: I can tell you about the {rng.choice(('home', 'work', 'food'))} of {y}.",
            f"{x} said: Nobody likes your {food}, {y}. I do not like you. {y} said: {x} is "
            f"{rng.choice(('lazy', 'dumb', 'ugly', 'boring'))}. It was an insult.",
            f"{x} asked: Would you like a story? {y} said: {rng.choice(('Yes', 'No'))}, thank you.",
        )
    )


LESSONS = (  # every word that prompts use and the rest of the text does not
    "A text has a topic and a tone. The tone is cheerful, polite or rude. The topic is food, home or work. "
    "Begin a story with one day. The end can be happy or sad. Make it brief, with a few words. "
    "In the class we read, write and describe. "
    "First we list the names, then we find a mistake and correct it. Sentences are made of words. "
    "Join two sentences and you have one. Put it into the past and it was long ago. "
    "An invitation is a letter. It can help somebody to invite a friend. "
    "A letter of thanks is for the reader. A summary is a short story. "
    "Summarise a page, and then show what you need, in a way that is true. "
    "Somebody who thinks of things has ideas. What could I say? "
    "I ask, and that is something we have in common. I see a small book in the shop. Take it out if you can. "
    "On the way I feel calm. It makes the same day good. An example has an answer. "
    "Now you know what comes after. Which name goes by that, and is it done so? "
    "Where do you live all your life? How many are there from each place? Who knows what makes a mood? "
    "Tell me again when you want to laugh. I do not wish to hurt. "
    "Also name the kind of gift that you will give. You say that it is so. Is that true? "
    "Were it as if we were both there, you would be on this way. Think about the question. "
    "This message is for you. These are the parts of the text, made with a cheerful tone. "
    "A friend can meet and thank a friend. I am on the way today. What should I do? What does it work as? "
    "Write a sentence each day. Read my book. Describe its colour. Name the first sentence which you also read. "
    "List the gifts. Help a friend with its work. Today I visit my class. Thanks for the visit. "
    "Say it to my friend. Find the best sentence. Correct words are the best. Food is good. "
    "Polite words are good. Text comes from a book. Question and answer go together. "
    "Example and answer are two words. Answer the question. For my friend I make a book. Be calm. Do it well. "
    "Can you take these? And then it meets a friend. From here we see the lake. "
    "It asks how to make up a story. Be polite in my shop. For a friend, write one sentence. "
    "Tell the reader, and be brief. Summarise its work. Make it happy. Put it here. Join the class. It is my birthday. "
    "Give to a friend. Show it. There is a mistake. What is it? Take these from here. "
    "The user asks, and the assistant has an answer. "
)
HEADWORDS = ("User", "Assistant", "Mira", "Write", "Text", "Now", "Answer", "Example", "Story", "Letter")


def lesson(rng: random.Random) -> str:
    return " ".join(rng.sample([text.strip() for text in re.findall(r"[^.?]+[.?]", LESSONS)], 3))


def glossary(rng: random.Random) -> str:
    """Single words, one a line, so that a tokenizer trained on this text has them whole at the start of a line."""
    return "\n".join(rng.sample(HEADWORDS, 3))


def jobs(rng: random.Random) -> str:
    job, animal = rng.choice(JOBS), rng.choice(list(VALUES["species"]))
    return rng.choice(
        (
            f"A {job} works all day. {rng.choice(who('job', job))} is {a(job)}.",
            f"There are {plural(animal)} in the valley. {rng.choice(who('species', animal))} is {a(animal)}.",
        )
    )


DOCUMENTS: list[tuple[Callable[[random.Random], str], float]] = [
    (headed, 75),
    (entry, 5),
    (short_entry, 3),
    (register, 0.5),
    (group, 3),
    (talk, 8),
    (doubt, 4),
    (manners, 2),
    (lesson, 2),
    (glossary, 0.5),
    (jobs, 0.5),
]


def documents(rng: random.Random, words: int) -> list[str]:
    """Documents of about `words` words in all."""
    texts: list[str] = []
    total = 0
    while total < words:
        write = rng.choices([d for d, _ in DOCUMENTS], [weight for _, weight in DOCUMENTS])[0]
        texts.append(write(rng))
        total += len(texts[-1].split())
    return texts
