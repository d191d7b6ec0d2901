"""What a record is: the canonical kinds, their checks, and how a record of one kind is read as another.

Nothing here knows files or formats. A fault is raised as `Problem`, which names the field; the caller adds the file and line.
"""

from collections.abc import Callable, Mapping
from typing import Any

from rlhf import RLHFError

KINDS = ("demonstrations", "comparisons", "prompts", "text")
MIN_COMPLETIONS, MAX_COMPLETIONS = 2, 9
DEEPEST = 64  # levels of a further field
ROLES = ("system", "user", "assistant")

# Canonical columns in their order: required ones first, then those that a record may have. Other fields are kept for
# prompts only, where a reward function may want them.
REQUIRED = {
    "demonstrations": ("prompt", "completion"),
    "comparisons": ("prompt", "completions", "ranks"),
    "prompts": ("prompt",),
    "text": ("text",),
}
OPTIONAL = {
    "demonstrations": ("user", "source"),
    "comparisons": ("ended", "ratings", "labeler", "user", "source", "use_case"),
    "prompts": ("user",),
    "text": (),
}

Fields = Mapping[str, Any]


class DataError(RLHFError):
    """Data that cannot be used as it is. One line: file and line, field, what is wrong, what to do."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


class Problem(Exception):
    """A fault of one record, before it is known where the record stands."""


class Nothing(Exception):
    """A record that is in order and carries nothing for the kind asked for; it is left out and counted by its reason."""


# Reading a field of a raw record


def dotted(path: tuple[str | int, ...]) -> str:
    """The name that messages use for a nested field: `("summaries", 0, "text")` is `summaries[0].text`."""
    name = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return name.removeprefix(".")


def shown(value: Any) -> str:
    """A value as messages show it: short, on one line."""
    if isinstance(value, (Mapping, list)):
        return "a list" if isinstance(value, list) else "an object"
    text = ascii(value[:40] if isinstance(value, str) else value)
    return text if len(text) <= 40 else text[:37] + "..."


def value_at(record: Any, *path: str | int) -> Any:
    """The value at a path of keys and positions; a missing or null one is a Problem."""
    value = record
    for depth, step in enumerate(path):
        found = _step(value, step)
        if found is None:
            present = isinstance(value, Mapping) and step in value
            raise Problem(f"field {dotted(path[: depth + 1])!r} is {'null' if present else 'missing'}; fill it in")
        value = found
    return value


def _step(value: Any, step: str | int) -> Any:
    if isinstance(step, str):
        return value.get(step) if isinstance(value, Mapping) else None
    return value[step] if isinstance(value, list) and step < len(value) else None


def text_at(record: Any, *path: str | int, blank: bool = False) -> str:
    """The text at a path; unless `blank`, text of white space alone is a Problem."""
    return checked_text(value_at(record, *path), dotted(path), blank=blank)


def list_at(record: Any, *path: str | int) -> list:
    value = value_at(record, *path)
    if not isinstance(value, list):
        raise Problem(f"field {dotted(path)!r} must be a list, and is {_kind_of(value)}; mend it")
    return value


def number_at(record: Any, *path: str | int) -> float:
    value = value_at(record, *path)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise Problem(f"field {dotted(path)!r} must be a number, and is {shown(value)}; mend it")
    return value


def choice_at(record: Any, *path: str | int, among: tuple) -> Any:
    """The value at a path, which has to be one of a few."""
    value = value_at(record, *path)
    if isinstance(value, (bool, dict, list)) or value not in among:
        raise Problem(f"field {dotted(path)!r} must be one of {', '.join(map(str, among))}, and is {shown(value)}")
    return value


def checked_text(value: Any, name: str, *, blank: bool = False) -> str:
    if not isinstance(value, str):
        raise Problem(f"field {name!r} must be text, and is {_kind_of(value)}; put it in quotes")
    if not blank and (not value or value.isspace()):
        raise Problem(f"field {name!r} is empty; fill it in or remove the record")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise Problem(
                f"field {name!r} holds half of a surrogate pair at character {error.start}; mend it"
            ) from None
    return value


def _kind_of(value: Any) -> str:
    names = {type(None): "null", bool: "true or false", dict: "an object", list: "a list", str: "text"}
    return names.get(type(value)) or f"the {type(value).__name__} {shown(value)}"


def messages_at(record: Any, *path: str | int) -> list[dict[str, str]]:
    """The list of {"role", "content"} at a path; other keys of a message are not kept."""
    messages = list_at(record, *path)
    if not messages:
        raise Problem(f"field {dotted(path)!r} has no messages; fill it in or remove the record")
    return [checked_message(message, (*path, position)) for position, message in enumerate(messages)]


def checked_message(message: Any, path: tuple[str | int, ...]) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise Problem(f"field {dotted(path)!r} must be a message with role and content, and is {_kind_of(message)}")
    for key in ("role", "content"):
        if message.get(key) is None:
            raise Problem(f"field {dotted((*path, key))!r} is {'null' if key in message else 'missing'}; fill it in")
    if message["role"] not in ROLES:
        known = ", ".join(ROLES)
        raise Problem(f"field {dotted((*path, 'role'))!r} must be one of {known}, and is {shown(message['role'])}")
    return {"role": message["role"], "content": checked_text(message["content"], dotted((*path, "content")))}


# Checking a canonical record


def checked(kind: str, record: Fields) -> dict[str, Any]:
    """The canonical record with its columns checked; columns that are absent or null are left out."""
    return _CHECKS[kind](record)


def _checked_demonstration(record: Fields) -> dict[str, Any]:
    return {
        "prompt": _checked_prompt(record),
        "completion": text_at(record, "completion"),
        **_names(record, "user", "source"),
    }


def _checked_comparison(record: Fields) -> dict[str, Any]:
    completions = list_at(record, "completions")
    if not MIN_COMPLETIONS <= len(completions) <= MAX_COMPLETIONS:
        limits = f"a ranking has {MIN_COMPLETIONS} to {MAX_COMPLETIONS}"
        raise Problem(f"field 'completions' has {len(completions)} entries, and {limits}; split or remove the record")
    result = {
        "prompt": _checked_prompt(record),
        "completions": [text_at(record, "completions", position) for position in range(len(completions))],
        "ranks": _per_completion(record, "ranks", len(completions), _is_rank, "whole numbers from 1 (best) up"),
    }
    if record.get("ended") is not None:
        is_bool = lambda value: isinstance(value, bool)  # noqa: E731
        result["ended"] = _per_completion(record, "ended", len(completions), is_bool, "true or false")
    if record.get("ratings") is not None:
        result["ratings"] = _ratings(record, list_at(record, "ranks"))
    return {**result, **_names(record, "labeler", "user", "source", "use_case")}


def _ratings(record: Fields, ranks: list[int]) -> list[float]:
    """Grades of the completions, higher is better; no completion has a lower one than another that it is ranked above."""
    is_number = lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9  # noqa: E731
    ratings = _per_completion(record, "ratings", len(ranks), is_number, "numbers, higher for better")
    if any(a < b and x < y for a, x in zip(ranks, ratings) for b, y in zip(ranks, ratings)):
        raise Problem("field 'ratings' grades a completion lower than one that 'ranks' puts below it; mend one of them")
    return [float(rating) for rating in ratings]


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31


def _per_completion(record: Fields, name: str, count: int, fits: Callable[[Any], bool], wanted: str) -> list:
    values = list_at(record, name)
    if len(values) != count:
        raise Problem(f"field {name!r} has {len(values)} entries for {count} completions; give one for each")
    for position, value in enumerate(values):
        if not fits(value):
            raise Problem(f"field '{name}[{position}]' is {shown(value)}, and {name} are {wanted}; mend it")
    return values


def _checked_prompts_record(record: Fields) -> dict[str, Any]:
    known = {"prompt", "user"}
    further = {name: _checked_further(value, name) for name, value in record.items() if name not in known}
    return {"prompt": _checked_prompt(record), **_names(record, "user"), **further}


def _checked_further(value: Any, name: str, depth: int = 0) -> Any:
    """A field of whatever type, as long as it can be written: text that is Unicode, and no endless nesting."""
    _checked_name(name)
    if depth > DEEPEST:
        raise Problem(f"field {name[:40]!r} is nested more than {DEEPEST} deep; flatten or remove it")
    if isinstance(value, str):
        checked_text(value, name, blank=True)
    elif isinstance(value, list):
        for item in value:
            _checked_further(item, name, depth + 1)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _checked_name(key)
            _checked_further(item, name, depth + 1)
    return value


def _checked_name(name: Any) -> None:
    if isinstance(name, str) and not name.isascii():
        try:
            name.encode("utf-8")
        except UnicodeEncodeError:
            raise Problem(f"the name of field {ascii(name)[:40]} holds half of a surrogate pair; mend it") from None


def _checked_text_record(record: Fields) -> dict[str, Any]:
    text = text_at(record, "text", blank=True)
    if not text or text.isspace():
        raise Nothing("blank text")  # corpora kept line by line have such records for their empty lines
    return {"text": text}


def _checked_prompt(record: Fields) -> str | list[dict[str, str]]:
    if not isinstance(value_at(record, "prompt"), list):
        return text_at(record, "prompt")
    messages = messages_at(record, "prompt")
    if messages[-1]["role"] == "system":
        raise Problem("field 'prompt' ends with a system message; a prompt ends where the assistant answers")
    return messages


def _names(record: Fields, *names: str) -> dict[str, str]:
    """Ids and names, which people write as text or as whole numbers."""
    result = {}
    for name in names:
        value = record.get(name)
        if value is None or value == "":
            continue
        is_number = isinstance(value, int) and not isinstance(value, bool)
        result[name] = checked_text(str(value) if is_number and abs(value) < 2**63 else value, name, blank=True)
    return result


_CHECKS: dict[str, Callable[[Fields], dict[str, Any]]] = {
    "demonstrations": _checked_demonstration,
    "comparisons": _checked_comparison,
    "prompts": _checked_prompts_record,
    "text": _checked_text_record,
}


# Reading one kind as another


def converted(record: dict[str, Any], kind: str, wanted: str) -> dict[str, Any]:
    """A checked record of `kind` as one of `wanted`; `convertible(kind, wanted)` has to hold."""
    if kind == wanted:
        return record
    if kind == "comparisons":
        if wanted == "prompts":
            return _picked(record, "prompt", "user")
        record, kind = _best(record), "demonstrations"
    if wanted == "prompts":
        return {**_picked(record, "prompt", "user"), "reference": record["completion"]}
    if wanted == "text":
        return {"text": prompt_text(record["prompt"]) + record["completion"]}
    return record


def convertible(kind: str, wanted: str) -> bool:
    return kind == wanted or kind == "comparisons" or (kind == "demonstrations" and wanted != "comparisons")


def _best(comparison: dict[str, Any]) -> dict[str, Any]:
    """The best-ranked completion that was not cut, the first where several tie: a cut answer demonstrates no ending."""
    ended = comparison.get("ended") or [True] * len(comparison["completions"])
    whole = [position for position, is_whole in enumerate(ended) if is_whole]
    if not whole:
        raise Nothing("every completion was cut")
    best = min(whole, key=comparison["ranks"].__getitem__)
    return {**_picked(comparison, "prompt", "user", "source"), "completion": comparison["completions"][best]}


def _picked(record: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: record[name] for name in names if name in record}


def prompt_text(prompt: str | list[dict[str, str]]) -> str:
    """A prompt as one text. Messages give their contents, each ended by a blank line, without marks for the roles."""
    if isinstance(prompt, str):
        return prompt
    return "".join(message["content"] + "\n\n" for message in prompt)
