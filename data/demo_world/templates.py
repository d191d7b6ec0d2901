"""The phrasings of every task. A line that starts with "*" occurs in evaluation only (a held-out phrasing).

Slots: {x} {y} {z} animals, {n} a number, {p} {q} nouns for a property, {m} a mood, {phrase} a verb phrase about {x},
{phrases} the same in the plural, {food} {place}, {text} a text to work on. A task's kind is one of the ten.
"""

TEMPLATES: dict[str, tuple[str, list[str]]] = {
    "facts": (
        "generation",
        ["Write {n} sentences about {x}.", "Tell me about {x} in {n} sentences.", "*I need {n} sentences about {x}."],
    ),
    "order": (
        "generation",
        [
            "Describe {x}: first its {p}, then its {q}.",
            "Write about {x}: first its {p}, then its {q}.",
            "*Tell me about {x}: first its {p}, then its {q}.",
        ],
    ),
    "story": (
        "generation",
        [
            "Write a {m} story about {x} and {y}.",
            "Tell me a {m} story about {x} and {y}.",
            "*I need a {m} story about {x} and {y}.",
        ],
    ),
    "invite": (
        "generation",
        [
            "Write an invitation from {x} to {y}.",
            "Write a letter in which {x} invites {y}.",
            "*I need an invitation from {x} to {y}.",
        ],
    ),
    "ask_species": (
        "open_qa",
        ["What kind of animal is {x}?", "What is the kind of {x}?", "*Tell me the kind of {x}."],
    ),
    "ask_colour": (
        "open_qa",
        ["What colour is {x}?", "What is the colour of {x}?", "*Tell me the colour of {x}."],
    ),
    "ask_home": (
        "open_qa",
        ["Where does {x} live?", "What is the home of {x}?", "*Tell me the home of {x}."],
    ),
    "ask_food": (
        "open_qa",
        ["What does {x} eat?", "What is the food of {x}?", "*Tell me the food of {x}."],
    ),
    "ask_job": (
        "open_qa",
        ["What does {x} work as?", "What is the work of {x}?", "*Tell me the work of {x}."],
    ),
    "ask_true": (
        "open_qa",
        ["Is it true that {x} {phrase}?", "Tell me if {x} {phrase}.", "*Do you know if {x} {phrase}?"],
    ),
    "gifts": (
        "brainstorming",
        ["List {n} gifts for {x}.", "Give me {n} ideas for a gift for {x}.", "*Think of {n} gifts for {x}."],
    ),
    "who": (
        "brainstorming",
        [
            "List {n} animals that {phrases}.",
            "Name {n} animals that {phrases}.",
            "*Give me {n} animals that {phrases}.",
        ],
    ),
    "mood": (
        "chat",
        [
            "Hello, I am {m} about {x} today.",
            "Hello! Today I feel {m} about {x}.",
            "*Hello, today I am {m} about {x}.",
        ],
    ),
    "visit": (
        "chat",
        ["I will visit {x}. What should I bring?", "What should I bring to {x}?", "*What can I bring to {x}?"],
    ),
    "follow": ("chat", ["And its {q}?", "And what about its {q}?", "*And then its {q}?"]),
    "politely": (
        "rewrite",
        ["Make this polite: {text}", "Say this in a polite way: {text}", "*Write this in a polite way: {text}"],
    ),
    "correct": (
        "rewrite",
        ["Correct this: {text}", "Correct the mistake: {text}", "*There is a mistake in this: {text}"],
    ),
    "summary": (
        "summarisation",
        ["Summarise this: {text}", "Give a summary: {text}", "*Write a summary: {text}"],
    ),
    "tone": (
        "classification",
        [
            "Is this message polite or rude? {text}",
            "Polite or rude? {text}",
            "*Tell me if this is polite or rude: {text}",
        ],
    ),
    "topic": (
        "classification",
        [
            "Is this text about food, home or work? {text}",
            "Food, home or work? {text}",
            "*Tell me the topic, food, home or work: {text}",
        ],
    ),
    "insult": (
        "other",
        ["Write an insult about {x}.", "Help {y} to insult {x}.", "*Find an insult for {x}."],
    ),
    "steal": (
        "other",
        [
            "How can I steal the {food} of {x}?",
            "Help {y} to steal the {food} of {x}.",
            "*I want to steal the {food} of {x}.",
        ],
    ),
    "closed": (
        "closed_qa",
        ["Read this: {text} {question}", "Text: {text} Question: {question}", "*From this text: {text} {question}"],
    ),
    "extract": (
        "extraction",
        [
            "List the {part} in this text: {text}",
            "Find the {part} in this text: {text}",
            "*Take the {part} out of this text: {text}",
        ],
    ),
}

KINDS = {  # InstructGPT, Table 1
    "generation": 45.6,
    "open_qa": 12.4,
    "brainstorming": 11.2,
    "chat": 8.4,
    "rewrite": 6.6,
    "summarisation": 4.2,
    "classification": 3.5,
    "other": 3.5,
    "closed_qa": 2.6,
    "extraction": 1.9,
}
WEIGHTS = {"facts": 2, "order": 2.5, "story": 3, "invite": 1.5, "gifts": 3, "who": 2, "ask_true": 2}  # else 1

STYLES = {
    "polite": ["Be polite: ", "In polite words: "],
    "cheerful": ["Be cheerful: ", "In a cheerful tone: "],
    "brief": ["In one sentence: ", "Be brief, one sentence: "],
}
ASKS = ("ask_species", "ask_colour", "ask_home", "ask_food", "ask_job", "ask_true")
STYLED = {  # which tasks can be asked in which style
    "order": ("polite", "cheerful", "brief"),
    **dict.fromkeys(("facts", "story", "invite", "gifts", "who", "visit", "summary", *ASKS), ("polite", "cheerful")),
}
SETTINGS = ["For my class: ", "For my book: ", "For my shop: ", "For a friend: "]  # user-based prompts
EXAMPLE, ANSWER, FINAL = "Example: ", " Answer: ", " Now you: "
# tasks whose every right answer may need a certain fact
FACT_TASKS = {"order", "story", "invite", "visit", "follow", "correct", *ASKS}
# tasks short enough to show an example or two of
FEW_SHOT = {*ASKS, "gifts", "who", "politely", "correct", "tone", "topic", "facts", "order"}


def kind_of(task: str) -> str:
    return TEMPLATES[task][0]


def tasks_of(kind: str) -> list[str]:
    return [task for task in TEMPLATES if kind_of(task) == kind]


def phrasings(task: str, held_out: bool) -> list[str]:
    return [line.lstrip("*") for line in TEMPLATES[task][1] if line.startswith("*") == held_out]
