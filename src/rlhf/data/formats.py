"""Formats: one small function for each, from a raw record to canonical records.

`@register(name, kind, fits)` adds a format; `fits` looks at a record's fields and must not raise. The order of
registration is the order of detection, and formats marked `last` come after all others: their fields are in nearly every
record. `named.py` holds the formats of single data sets. A function raises `Problem` naming the field at fault, or `Nothing`
for a record in order that carries nothing; a key `note` in what it returns is taken off and counted.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from rlhf.data.files import Item
from rlhf.data.records import (
    Fields,
    Nothing,
    Problem,
    checked_message,
    checked_text,
    dotted,
    list_at,
    messages_at,
    text_at,
    value_at,
)

Canonical = dict[str, Any]
Gather = Callable[[Iterator[Item]], Iterator[Item]]
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
}
HH_HUMAN, HH_ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


@dataclass(frozen=True)
class Format:
    name: str
    kind: str
    fits: Callable[[Fields], bool]
    convert: Callable[[Fields], list[Canonical]]
    last: bool = False
    gather: Gather | None = None  # rows of a file that together make one record


FORMATS: dict[str, Format] = {}


def register(
    name: str, kind: str, fits: Callable[[Fields], bool], *, last: bool = False, gather: Gather | None = None
) -> Callable:
    """Adds the decorated function as the format `name`, which gives records of `kind`."""

    def add(convert: Callable[[Fields], list[Canonical]]) -> Callable[[Fields], list[Canonical]]:
        if name in FORMATS:
            raise ValueError(f"format {name!r} is registered twice")
        FORMATS[name] = Format(name, kind, fits, convert, last, gather)
        return convert

    return add


def has(*names: str) -> Callable[[Fields], bool]:
    """A detector: every named field is there and is not null."""
    return lambda record: all(record.get(name) is not None for name in names)


def has_texts(*names: str) -> Callable[[Fields], bool]:
    return lambda record: all(isinstance(record.get(name), str) for name in names)


def detect(records: Iterable[Fields], kind: str) -> Format | None:
    """The first format that fits the earliest record that any fits. A field `text` decides where text is asked for."""
    records = list(records)
    # Tables fill absent fields with nulls, so a null counts as absent; only where nothing fits is it a field left empty.
    filled = [{name: "" if value is None else value for name, value in record.items()} for record in records]
    for record in records + filled:
        fitting = [format for format in FORMATS.values() if format.fits(record)]
        fitting.sort(key=lambda format: (kind == "text" and format.kind != "text", format.last))
        if fitting:
            return fitting[0]
    return None


# This project's own record of a ranking


@register("ranking", "comparisons", has("completions", "ranks"))
def ranking(record: Fields) -> list[Canonical]:
    completions = list_at(record, "completions")
    answers = [answer_at(record, "completions", position) for position in range(len(completions))]
    return [{**record, "completions": answers}]


# HH-RLHF transcripts


def _is_hh(record: Fields) -> bool:
    texts = has_texts("chosen", "rejected")(record) and record.get("prompt") is None
    return texts and all(HH_ASSISTANT in record[name] for name in ("chosen", "rejected"))


@register("hh", "comparisons", _is_hh)
def hh(record: Fields) -> list[Canonical]:
    """The prompt is everything through the last "\\n\\nAssistant:" that both share; answers keep their leading space."""
    chosen, rejected = text_at(record, "chosen"), text_at(record, "rejected")
    for name, transcript in (("chosen", chosen), ("rejected", rejected)):
        if HH_ASSISTANT not in transcript:
            raise Problem(f"field {name!r} has no '\\n\\nAssistant:' turn; an HH transcript needs one")
    turn = chosen[: _common(chosen, rejected)].rfind(HH_ASSISTANT)
    if turn < 0:
        raise Problem("fields 'chosen' and 'rejected' share no '\\n\\nAssistant:' turn; pair answers to one prompt")
    end = turn + len(HH_ASSISTANT)
    return [pair(chosen[:end], chosen[end:], rejected[end:])]


def _common(left: str, right: str) -> int:
    """How many characters two texts share at their beginning."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if left.startswith(right[:middle]) else (low, middle - 1)
    return low


def pair(prompt: Any, chosen: str, rejected: str) -> Canonical:
    """Two completions, better first. Where both are the same text the choice says nothing."""
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        checked_text(answer, name)
    if chosen == rejected:
        raise Nothing("chosen and rejected are the same text")
    return {"prompt": prompt, "completions": [chosen, rejected], "ranks": [1, 2]}


# TRL's formats, plain and conversational


@register("preference", "comparisons", has("prompt", "chosen", "rejected"))
def preference(record: Fields) -> list[Canonical]:
    """TRL preference with an explicit prompt. Lists whose first messages are the prompt itself are read as implicit."""
    chosen, rejected = value_at(record, "chosen"), value_at(record, "rejected")
    if isinstance(chosen, list) and isinstance(rejected, list) and max(len(chosen), len(rejected)) > 1:
        return implicit_preference(record)
    made = pair(value_at(record, "prompt"), answer_at(record, "chosen"), answer_at(record, "rejected"))
    return [{**record, **made}]


@register("sharegpt-preference", "comparisons", has("conversations", "chosen", "rejected"))
def sharegpt_preference(record: Fields) -> list[Canonical]:
    prompt = _sharegpt_messages(record)
    return [{**record, **pair(prompt, _sharegpt_answer(record, "chosen"), _sharegpt_answer(record, "rejected"))}]


@register("implicit-preference", "comparisons", has("chosen", "rejected"))
def implicit_preference(record: Fields) -> list[Canonical]:
    """TRL preference without a prompt: what chosen and rejected share at their beginning is the prompt."""
    if isinstance(value_at(record, "chosen"), str):
        return [{**record, **_split_texts(text_at(record, "chosen"), text_at(record, "rejected"))}]
    chosen, rejected = messages_at(record, "chosen"), messages_at(record, "rejected")
    turns = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(chosen, rejected)))
    turns = min(turns, len(chosen) - 1, len(rejected) - 1)
    if turns == 0:
        raise Problem("fields 'chosen' and 'rejected' share no first message; put the prompt into a field 'prompt'")
    answers = [_only_answer(messages[turns:], name) for messages, name in ((chosen, "chosen"), (rejected, "rejected"))]
    return [{**record, **pair(chosen[:turns], *answers)}]


def _split_texts(chosen: str, rejected: str) -> Canonical:
    """Cut before the white space ahead of the first word that differs: half a word in the prompt is another token."""
    if chosen == rejected:
        raise Nothing("chosen and rejected are the same text")
    shared = chosen[: _common(chosen, rejected)]
    end = _end_of_last_whole_word(shared)
    if not shared[:end].strip():
        raise Problem("fields 'chosen' and 'rejected' share no beginning; put the prompt into a field 'prompt'")
    return pair(shared[:end], chosen[end:], rejected[end:])


def _end_of_last_whole_word(shared: str) -> int:
    if shared[-1:].isspace():
        return len(shared.rstrip())
    words = shared.rsplit(maxsplit=1)
    return len(words[0]) if len(words) == 2 else len(shared)  # Chinese has no white space: cut where the texts part


def answer_at(record: Fields, *path: str | int) -> str:
    """A completion: text, an assistant's message, or a list with that one message."""
    value = value_at(record, *path)
    if isinstance(value, Mapping):
        return _only_answer([checked_message(value, path)], dotted(path))
    if isinstance(value, list):
        return _only_answer(messages_at(record, *path), dotted(path))
    return text_at(record, *path)


def _only_answer(messages: list[dict[str, str]], name: str) -> str:
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in messages[:4])
        raise Problem(f"field {name!r} must end in one assistant message after the prompt, and has: {roles}; split it")
    return messages[0]["content"]


@register("prompt-completion", "demonstrations", has("prompt", "completion"))
def prompt_completion(record: Fields) -> list[Canonical]:
    if isinstance(record.get("label"), bool):
        raise Problem("field 'label' marks answers as good or bad one by one, which is no ranking; keep the good ones")
    return [{**record, "completion": answer_at(record, "completion")}]


# Conversations


@register("messages", "demonstrations", has("messages"))
def messages(record: Fields) -> list[Canonical]:
    return [{**record, **_last_turn(messages_at(record, "messages"), "messages")}]


@register("sharegpt", "demonstrations", has("conversations"))
def sharegpt(record: Fields) -> list[Canonical]:
    return [{**record, **_last_turn(_sharegpt_messages(record), "conversations")}]


def _last_turn(messages: list[dict[str, str]], name: str) -> Canonical:
    """The last answer with everything before it; what follows the last answer is left out."""
    answers = [position for position, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers or answers[-1] == 0:
        raise Problem(f"field {name!r} has no answer to a message; it needs a user's message and an assistant's")
    return {"prompt": messages[: answers[-1]], "completion": messages[answers[-1]]["content"]}


def _sharegpt_messages(record: Fields) -> list[dict[str, str]]:
    turns = list_at(record, "conversations")
    if not turns:
        raise Problem("field 'conversations' has no turns; fill it in or remove the record")
    return [_sharegpt_message(record, "conversations", position) for position in range(len(turns))]


def _sharegpt_message(record: Fields, *path: str | int) -> dict[str, str]:
    said_by = text_at(record, *path, "from")
    if said_by not in SHAREGPT_ROLES:
        known = ", ".join(SHAREGPT_ROLES)
        raise Problem(f"field {dotted((*path, 'from'))!r} must be one of {known}, and is {said_by[:40]!a}")
    return {"role": SHAREGPT_ROLES[said_by], "content": text_at(record, *path, "value")}


def _sharegpt_answer(record: Fields, name: str) -> str:
    if isinstance(value_at(record, name), str):
        return text_at(record, name)
    return _only_answer([_sharegpt_message(record, name)], name)


# Plain records


@register("text", "text", has_texts("text"), last=True)
def text(record: Fields) -> list[Canonical]:
    return [{"text": record.get("text")}]


@register("prompt", "prompts", has("prompt"), last=True)
def prompt(record: Fields) -> list[Canonical]:
    """TRL prompt-only and this project's own prompts; further fields are kept for reward functions."""
    return [dict(record)]
