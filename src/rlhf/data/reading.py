"""From raw records to one table of canonical records, with the counts of what was left out."""

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets.table import InMemoryTable

from rlhf.data.files import Item
from rlhf.data.formats import FORMATS, Format, detect
from rlhf.data.records import (
    OPTIONAL,
    REQUIRED,
    DataError,
    Nothing,
    Problem,
    checked,
    converted,
    convertible,
)

logger = logging.getLogger(__name__)

HEAD = 32  # records that detection looks at
LISTED = 10  # faulty records that are named one by one; all are counted
CHUNK = 10_000  # records turned into Arrow at a time
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
TYPES = {
    "completion": pa.string(),
    "completions": pa.list_(pa.string()),
    "ranks": pa.list_(pa.int32()),
    "ended": pa.list_(pa.bool_()),
    "ratings": pa.list_(pa.float64()),
    "labeler": pa.string(),
    "user": pa.string(),
    "source": pa.string(),
    "use_case": pa.string(),
    "text": pa.string(),
}


Told = Callable[[str, str], None]  # place, what is wrong


class Reading:
    """The records read so far, and the counts of those left out; `told` hears of each faulty one that is skipped."""

    def __init__(self, kind: str, name: str, format: str | None, on_error: str, told: Told | None = None):
        self.kind, self.name, self.format, self.on_error = kind, name, format, on_error
        self.told = told
        self.formats: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()
        self.faults: list[tuple[str, str]] = []  # (place, what is wrong) of the first ones
        self.notes: Counter[str] = Counter()
        self.count = 0
        self.prompt_type: type | None = None
        self.seen: set[int] = set()  # digests
        self.rows: list[dict[str, Any]] = []
        self.tables: list[pa.Table] = []

    def add(self, items: Iterator[Item]) -> None:
        """Keeps one file's records for `dataset`."""
        for _, record in self.records(items):
            self.rows.append(record)
            if len(self.rows) == CHUNK:
                self._flush()

    def records(self, items: Iterator[Item]) -> Iterator[tuple[str, dict[str, Any]]]:
        """(place, canonical record) of one file, as they are read."""
        head = list(islice(items, HEAD))
        format = self._format_of(head)
        items = chain(head, items)
        for place, raw in format.gather(items) if format and format.gather else items:
            made: list[dict[str, Any]] = []
            try:
                made = self._made(raw, format)
            except Problem as problem:
                self._leave_out(place, problem)
            except Nothing as reason:
                self.notes[f"left out: {reason}"] += 1
            for record in made:
                self.count += 1
                yield place, record

    def _format_of(self, head: list[Item]) -> Format | None:
        records = [raw for _, raw in head if not isinstance(raw, Problem)]
        format = FORMATS[self.format] if self.format else detect(records, self.kind)
        if format is None:
            if records:
                place = next(place for place, raw in head if not isinstance(raw, Problem))
                fields = ", ".join(ascii(name)[:40] for name in list(records[0])[:12]) or "none"
                known = ", ".join(FORMATS)
                raise DataError(f"{place}: fits no known format (its fields: {fields}); name one of: {known}")
            return None
        if not convertible(format.kind, self.kind):
            raise DataError(
                f"{head[0][0] if head else self.name}: holds {format.kind} (format {format.name!r}), which cannot be "
                f"read as {self.kind}; ask for {format.kind} or give another file"
            )
        self.formats[format.name] += 0
        return format

    def _made(self, raw: Any, format: Format | None) -> list[dict[str, Any]]:
        """All that one raw record gives, or nothing of it where a part is at fault."""
        if isinstance(raw, Problem):
            raise raw
        assert format is not None  # only a file without a readable record has none
        made = [self._canonical(record, format) for record in format.convert(raw)]
        for _, notes in made:
            self.notes.update(notes)
        self.formats[format.name] += 1
        if isinstance(raw.get("id"), (str, int)) and not self._is_new("id", raw["id"]):
            self.notes["with an id that came before"] += 1
        distinct = self.kind == "prompts" and format.kind != "prompts"
        return [record for record, _ in made if not distinct or self._is_new("prompt", record["prompt"])]

    def _canonical(self, record: dict[str, Any], format: Format) -> tuple[dict[str, Any], list[str]]:
        notes = [record.pop("note")] if format.kind == "comparisons" and "note" in record else []
        record = checked(format.kind, record)
        if format.kind == "comparisons" and len(set(record["ranks"])) == 1:
            notes.append("all tied (no pair to learn from)")
        prompt_type = type(record.get("prompt"))
        if self.prompt_type not in (None, prompt_type):
            raise Problem("field 'prompt' changes between text and messages; load the two apart")
        self.prompt_type = prompt_type
        return converted(record, format.kind, self.kind), notes

    def _is_new(self, name: str, value: Any) -> bool:
        """Whether an id, or a prompt taken from a record of another kind, comes for the first time."""
        digest = hashlib.blake2b(json.dumps([name, value]).encode(), digest_size=8).digest()
        before = len(self.seen)
        self.seen.add(int.from_bytes(digest, "big"))
        return len(self.seen) > before

    def _leave_out(self, place: str, problem: Problem) -> None:
        if self.on_error == "stop":
            raise DataError(f"{place}: {problem} (on_error='skip' leaves such records out)")
        if self.told:
            self.told(place, str(problem))
        if len(self.faults) < LISTED:
            self.faults.append((place, str(problem)))
        self.skipped[re.sub(r"(?<=[\[ ])\d+", "N", str(problem))] += 1

    def _flush(self) -> None:
        if self.rows:
            self.tables.append(_table(self.kind, self.rows, self.name))
            self.rows = []

    def dataset(self) -> datasets.Dataset:
        self._flush()
        self._log()
        if not self.tables:
            raise self.nothing()
        try:
            table = pa.concat_tables(self.tables, promote_options="permissive")
        except pa.ArrowException as error:
            raise DataError(f"{self.name}: a further field changes its type ({error}); make it one type") from None
        table = table.select(_column_order(self.kind, table.column_names))
        info = datasets.DatasetInfo(dataset_name=_shown_name(self.name))
        return datasets.Dataset(InMemoryTable(table), info=info)

    def nothing(self) -> DataError:
        """Why there is no record."""
        if self.skipped:
            return DataError(f"{self.name}: every record was skipped; the first: {': '.join(self.faults[0])}")
        why = "; ".join(self.notes) or "it is empty"
        return DataError(f"{self.name}: has no records ({why}); give a file with {self.kind}")

    def _log(self) -> None:
        read = ", ".join(f"{count} as {name}" for name, count in self.formats.items())
        logger.info("%s: %d %s (%s)", self.name, self.count, self.kind, read or "nothing read")
        if self.skipped:
            reasons = "; ".join(f"{count}: {reason}" for reason, count in self.skipped.most_common(4))
            count = self.skipped.total()
            logger.warning("%s: skipped %d records (%s)", self.name, count, reasons)
            for place, problem in self.faults:
                logger.warning("skipped %s: %s", place, problem)
            if count > len(self.faults):
                logger.warning("… and %d more", count - len(self.faults))
        if self.notes:
            logger.warning("%s: %s", self.name, "; ".join(f"{count} {note}" for note, count in self.notes.items()))


# Tables


def _table(kind: str, rows: list[dict[str, Any]], name: str) -> pa.Table:
    columns: dict[str, pa.Array] = {}
    names = dict.fromkeys(key for row in rows for key in row)
    for column in names:
        values = [row.get(column) for row in rows]
        try:
            columns[column] = pa.array(values, type=_type(kind, column, values[0]))
            column.encode("utf-8")
        except (pa.ArrowException, OverflowError, TypeError, ValueError, RecursionError) as error:
            why = f"has values that make no column ({error}); give it one type or remove it"
            raise DataError(f"{name}: field {column[:40]!a} {why}") from None
    return pa.table(columns)


def _type(kind: str, column: str, first: Any) -> pa.DataType | None:
    """The Arrow type of a column; further columns of prompts have whatever type their values have."""
    if column == "prompt":
        return pa.string() if isinstance(first, str) else MESSAGES
    return TYPES[column] if column in (*REQUIRED[kind], *OPTIONAL[kind]) else None


def _column_order(kind: str, names: list[str]) -> list[str]:
    fixed = [name for name in (*REQUIRED[kind], *OPTIONAL[kind]) if name in names]
    return fixed + [name for name in names if name not in fixed]


def _shown_name(name: str) -> str:
    """What a manifest shows: a name as it was given, without the folders of one person's machine."""
    return Path(name).name if Path(name).is_absolute() else name
