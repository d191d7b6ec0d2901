"""Any source to the canonical record kinds: `load`, `split_by_key`, `fingerprint`."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import datasets

from rlhf.data import named  # noqa: F401  (registers its formats)
from rlhf.data.formats import FORMATS
from rlhf.data.reading import Reading
from rlhf.data.records import KINDS, REQUIRED, DataError, prompt_text
from rlhf.data.sources import Name, name_of, sources


def load(
    kind: str,
    name: Name,
    *,
    data_dir: str | None = None,
    config_name: str | None = None,
    split: str = "train",
    format: str | None = None,
    on_error: str = "stop",
    revision: str | None = None,
) -> datasets.Dataset:
    """The canonical records of `kind` from a local file, a local folder, a Hub data set, "-" (standard input), or records.

    data_dir:    a folder inside `name`, local or on the Hub.
    config_name, revision: of a Hub data set.
    split:       of a Hub data set, of a saved DatasetDict, or of a folder whose files are named for splits.
    format:      one of FORMATS; None looks at the first records of each file.
    on_error:    "stop" at the first faulty record, or "skip" them and log how many and why.
    Raises DataError, whose one line names the file, the line, the field and what to do.
    """
    check_choice("kind", kind, KINDS)
    check_choice("on_error", on_error, ("stop", "skip"))
    if format is not None:
        check_choice("format", format, tuple(FORMATS))
    reading = Reading(kind, name_of(name), format, on_error)
    for items in sources(name, data_dir=data_dir, config_name=config_name, split=split, revision=revision):
        reading.add(items)
    return reading.dataset()


def check_choice(option: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise DataError(f"{option} is {value!r}, and must be one of {', '.join(choices)}")


# Splits and fingerprints


def split_by_key(
    dataset: datasets.Dataset, eval_fraction: float, *, seed: int = 0
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """(train, eval): each record's side follows from its user, or where it has none from its prompt's text.

    A record is for evaluation where sha256(seed, key) read as a number in [0, 1) is below `eval_fraction`. So a key keeps
    its side when data grow, a larger fraction only adds to the evaluation side, and one prompt falls on the same side in
    demonstrations, comparisons and prompts. Sides of a small data set may be far from the fraction, or empty.
    """
    if isinstance(eval_fraction, bool) or not 0 <= eval_fraction < 1:
        raise DataError(f"eval_fraction is {eval_fraction!r}, and must be at least 0 and below 1")
    sides: tuple[list[int], list[int]] = ([], [])
    for position, key in enumerate(_keys(dataset)):
        digest = hashlib.sha256(f"{seed}\0{key}".encode()).digest()
        sides[int.from_bytes(digest[:8], "big") < eval_fraction * 2**64].append(position)
    return dataset.select(sides[0]), dataset.select(sides[1])


def _keys(dataset: datasets.Dataset) -> Iterator[str]:
    wanted = [name for name in ("user", "prompt", "text") if name in dataset.column_names]
    for record in dataset.select_columns(wanted):
        user = record.get("user")
        if user:
            yield f"user\0{user}"
        else:
            yield f"prompt\0{prompt_text(record.get('prompt', record.get('text'))).strip()}"


def fingerprint(dataset: datasets.Dataset) -> dict[str, Any]:
    """What a manifest says of a data set: {"name", "kind", "records", "sha256"}.

    The sha256 is over the records in their order, each as JSON with sorted keys and without null fields, one a line.
    """
    digest = hashlib.sha256()
    for record in dataset:
        filled = {name: value for name, value in record.items() if value is not None}
        line = json.dumps(filled, ensure_ascii=False, sort_keys=True, separators=(",", ":"), default=str)
        digest.update(line.encode() + b"\n")
    return {
        "name": dataset.info.dataset_name or "in memory",
        "kind": _kind_of(dataset.column_names),
        "records": len(dataset),
        "sha256": digest.hexdigest(),
    }


def _kind_of(columns: list[str]) -> str:
    for kind in ("comparisons", "demonstrations", "prompts"):
        if all(name in columns for name in REQUIRED[kind]):
            return kind
    return "text"
