"""Cleaning as in InstructGPT (Ouyang et al. 2022, appendix A): records in, one at a time, clean splits out.

A step takes a record and returns it (perhaps masked), or the reason why it is removed, as text. `prepare` runs the steps over
a file in one pass and writes the splits; what it keeps in memory is the prompts' text and signatures, never the records.
Steps in their order: length, personal data, near-duplicates, prompts a user, and, once the splits are known, leakage.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import phonenumbers

from rlhf.data import files, named  # noqa: F401  (named registers its formats)
from rlhf.data.duplicates import WORD, PromptIndex, key_of
from rlhf.data.formats import FORMATS, detect
from rlhf.data.load import check_choice
from rlhf.data.personal import masked, personal_data
from rlhf.data.reading import HEAD, LISTED, Reading, Told
from rlhf.data.records import DataError, Problem, prompt_text
from rlhf.data.sources import Name, name_of, sources

Record = dict[str, Any]
Step = Callable[[Record], Record | str]

TRAIN, VALIDATION, TEST = "train", "validation", "test"
WAITING = ".waiting"  # training records, until all prompts of evaluation are known
EXAMPLE = 160  # characters of a removed prompt that a report shows
WORDS = {  # what a step removes, for people
    "length": "over the length limit",
    "personal data": "with personal data",
    "prompts a user": "beyond a user's share",
    "leakage": "that evaluation asks",
}


@dataclass(frozen=True)
class Options:
    """What each step removes; 0 (for personal data "keep", for leakage False) leaves the step out."""

    max_length: int = 1000  # tokens of `tokenizer`; without one, words and marks
    tokenizer: str | None = None
    personal_data: str = "drop"  # or "mask", or "keep"
    phone_region: str = "US"  # country of numbers that are written without +
    prefix: float = 0.5  # share of the longer prompt that a whole shorter one, which begins it, has at least
    minhash: float = 0.9  # Jaccard similarity of word triples
    per_user: int = 200
    validation: float = 0.1
    test: float = 0.1
    leakage: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("prefix", "minhash"):
            if not 0 <= getattr(self, name) <= 1:
                raise DataError(f"{name} is {getattr(self, name)}, and must be from 0 (off) to 1")
        if self.max_length < 0 or self.per_user < 0:
            raise DataError("max_length and per_user must be 0 (off) or more")
        if min(self.validation, self.test) < 0 or self.validation + self.test >= 1:
            raise DataError("the fractions for validation and test must be 0 or more, and together below 1")
        if self.personal_data not in ("drop", "mask", "keep"):
            raise DataError(f"personal_data is {self.personal_data!r}, and must be one of drop, mask, keep")
        if self.phone_region not in phonenumbers.SUPPORTED_REGIONS:
            raise DataError(f"phone_region is {self.phone_region!r}, and must be a country's two letters, like US")


# ---- reading


class Source:
    """The canonical records of a source, read one at a time: `for place, record in Source(name)`.

    name:    as `rlhf.data.load` takes it; a Hub data set is streamed. Standard input and iterators give their records once.
    kind:    None takes that of the first records.
    told:    hears of each faulty record that is skipped: its place, and what is wrong.
    format:  one of FORMATS; None looks at the first records of each file.
    """

    def __init__(
        self,
        name: Name,
        kind: str | None = None,
        on_error: str = "stop",
        told: Told | None = None,
        *,
        format: str | None = None,
        **where: Any,
    ):
        if format is not None:
            check_choice("format", format, tuple(FORMATS))
        self.name, self.on_error, self.told, self.where = name, on_error, told, where
        self.shown = name_of(name)
        self.opened: Iterator[Iterator[files.Item]] = sources(name, stream=True, **where)
        first = next(self.opened)
        head = list(islice(first, HEAD))
        self.opened = chain([chain(head, first)], self.opened)
        raws = [raw for _, raw in head if not isinstance(raw, Problem)]
        found = FORMATS[format] if format else detect(raws, kind or "prompts")
        self.kind = kind or (found.kind if found else "prompts")
        self.reading = Reading(self.kind, self.shown, format, on_error, told)

    @property
    def skipped(self) -> Counter[str]:
        return self.reading.skipped

    @property
    def notes(self) -> Counter[str]:
        return self.reading.notes

    def __iter__(self) -> Iterator[tuple[str, Record]]:
        for items in self.opened:
            yield from self.reading.records(items)
        if not self.reading.count:
            raise self.reading.nothing()


def body(record: Record) -> str:
    """The text that a record asks: its prompt, or of kind text all of it."""
    return prompt_text(record["prompt"] if "prompt" in record else record["text"])


# ---- length


def length_counter(tokenizer: str | None) -> Callable[[str], int]:
    """Counts tokens; without a tokenizer, words and punctuation marks."""
    if tokenizer is None:
        return lambda text: len(WORD.findall(text))
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(tokenizer)
    except Exception as error:  # not there, no network, no tokenizer in it: as many exception types as causes
        raise DataError(f"tokenizer {tokenizer!r} cannot be loaded ({type(error).__name__}: {error})") from error
    return lambda text: len(loaded(text, add_special_tokens=False, verbose=False)["input_ids"])


def over_length(limit: int, count: Callable[[str], int]) -> Step:
    def step(record: Record) -> Record | str:
        text = body(record)
        return record if len(text) <= limit or count(text) <= limit else f"over {limit}"

    return step


# ---- personal data

IDS = ("user", "labeler")


class PersonalData:
    """Drops or masks records by what any of their texts holds. An id that is itself an address becomes a hash of it."""

    def __init__(self, action: str, region: str):
        self.action, self.region = action, region
        self.found: Counter[str] = Counter()
        self.masked = 0

    def __call__(self, record: Record) -> Record | str:
        kinds: Counter[str] = Counter()
        cleaned = {name: self._mapped(value, kinds) for name, value in record.items() if name not in IDS}
        ids = {name: self._id(record[name]) for name in IDS if name in record}
        self.found.update(kinds)
        if kinds and self.action == "drop":
            return " + ".join(sorted(kinds)).lower()
        self.masked += bool(kinds)
        return {**record, **cleaned, **ids}

    def _mapped(self, value: Any, kinds: Counter[str]) -> Any:
        if isinstance(value, str):
            spans = personal_data(value, self.region)
            kinds.update(what for _, _, what in spans)
            return masked(value, spans)
        if isinstance(value, list):
            return [self._mapped(item, kinds) for item in value]
        if isinstance(value, dict):
            return {name: self._mapped(item, kinds) for name, item in value.items()}
        return value

    def _id(self, value: Any) -> Any:
        if isinstance(value, str) and personal_data(value, self.region):
            return "id-" + hashlib.sha256(value.encode()).hexdigest()[:16]
        return value


# ---- near-duplicates


class NearDuplicates:
    """Keeps the first of near-duplicates. One prompt with several answers or rankings is none; the same record twice is."""

    def __init__(self, index: PromptIndex):
        self.index = index
        self.records: set[int] = set()  # digests

    def __call__(self, record: Record) -> Record | str:
        text = body(record)
        reason = self.index.match(text)
        if "completion" in record or "completions" in record:
            digest = int.from_bytes(hashlib.blake2b(as_line(record).encode(), digest_size=8).digest(), "big")
            if reason == "same" and digest not in self.records:
                reason = None
            self.records.add(digest)
        if reason:
            return reason
        self.index.add(text)
        return record


# ---- users and splits


def user_cap(limit: int) -> Step:
    """The first `limit` records of each user; records without a user are nobody's."""
    counts: Counter[str] = Counter()

    def step(record: Record) -> Record | str:
        user = record.get("user")
        counts[user or ""] += 1
        return f"over {limit} by {user}" if user and counts[user] > limit else record

    return step


def split_of(record: Record, options: Options) -> str:
    """By sha256 of seed and user (or prompt, where there is no user) alone, so that a user stays when data grow.

    Drawn apart from `rlhf.data.split_by_key`, which a stage may call on the training split.
    """
    key = f"user\0{record['user']}" if record.get("user") else f"prompt\0{body(record).strip()}"
    digest = hashlib.sha256(f"prepare\0{options.seed}\0{key}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    if place < options.test:
        return TEST
    return VALIDATION if place < options.test + options.validation else TRAIN


# ---- all of it


@dataclass
class Report:
    """What went in, what each step removed and why, and what came out."""

    read: int = 0
    removed: dict[str, Counter[str]] = field(default_factory=dict)
    found: Counter[str] = field(default_factory=Counter)  # pieces of personal data
    masked: int = 0
    skipped: int = 0
    faults: list[tuple[str, str]] = field(default_factory=list)  # (place, what is wrong) of the first skipped ones
    notes: Counter[str] = field(default_factory=Counter)  # what was left out or strange, and in how many records
    splits: dict[str, dict[str, Any]] = field(default_factory=dict)
    examples: dict[str, dict[str, str]] = field(default_factory=dict)  # the first record that a step removed

    def hear(self, source: Source) -> None:
        """Adds what reading a source has left out; after it has been read."""
        self.skipped += source.skipped.total()
        self.faults = (self.faults + source.reading.faults)[:LISTED]
        self.notes.update(source.notes)

    def remove(self, step: str, reason: str, place: str, record: Record) -> None:
        self.removed[step][reason] += 1
        if step not in self.examples:
            text = shown_text(record, step)
            self.examples[step] = {"place": place, "reason": reason, "text": text}

    @property
    def steps(self) -> list[dict[str, Any]]:
        """For each step in its order: step, kept, removed (records), reasons, and an example or None.

        The example's text is shortened, and what the personal data step removed is masked in it.
        """
        kept, rows = self.read, []
        for step, reasons in self.removed.items():
            kept -= reasons.total()
            row = {"step": step, "kept": kept, "removed": reasons.total(), "reasons": dict(reasons)}
            rows.append({**row, "example": self.examples.get(step)})
        return rows


def shown_text(record: Record, step: str) -> str:
    """A record's prompt on one line, short enough to print; without personal data where they are why it was removed."""
    text = body(record)
    if step == "personal data":
        text = masked(text, personal_data(text))
    text = " ".join(text.split())
    return text if len(text) <= EXAMPLE else f"{text[: EXAMPLE // 2 - 2]} … {text[1 - EXAMPLE // 2 :]}"


def steps_of(options: Options) -> dict[str, Step]:
    """The steps that are on, in their order; leakage comes after, when evaluation prompts are known."""
    steps: dict[str, Step] = {}
    if options.max_length:
        steps["length"] = over_length(options.max_length, length_counter(options.tokenizer))
    if options.personal_data != "keep":
        steps["personal data"] = PersonalData(options.personal_data, options.phone_region)
    if options.prefix or options.minhash:
        steps["near-duplicates"] = NearDuplicates(PromptIndex(options.prefix, options.minhash))
    if options.per_user:
        steps["prompts a user"] = user_cap(options.per_user)
    return steps


Removal = Callable[[str, str, str, Record], None]  # place, step, reason, record


def prepare(
    name: Name,
    out: Path,
    options: Options,
    *,
    kind: str | None = None,
    evaluation: Sequence[Path] = (),
    on_error: str = "stop",
    format: str | None = None,
    removal: Removal | None = None,
    **where: Any,
) -> Report:
    """Writes train.jsonl, validation.jsonl, test.jsonl, README.md and manifest.json into the new folder `out`, or nothing.

    name, format, where: as `rlhf.data.load` takes them; read once, as they come.
    evaluation: files whose prompts must not be in the training split either.
    removal:    told of every record that is removed, and of faulty ones that are skipped (step "fault", without the record).
    Faulty records of evaluation files are skipped, counted and told of as the others.
    A line is JSON with sorted keys and without nulls, so that a file's sha256 is its `rlhf.data.fingerprint`.
    """
    tell = removal or (lambda *_: None)
    told: Told = lambda place, problem: tell(place, "fault", problem, {})  # noqa: E731
    source = _source(name, kind, on_error, told, format=format, **where)
    seen, asked = _prompts_of(evaluation, options, on_error, told)
    with staged(out) as folder:
        report = _clean(source, folder, options, seen, tell)
        for heard in (source, *asked):
            report.hear(heard)
        for split in (TRAIN, VALIDATION, TEST):
            if (folder / f"{split}.jsonl").exists():
                report.splits[split] = _described(folder / f"{split}.jsonl")
        if TRAIN not in report.splits:
            raise DataError(f"{source.shown}: nothing is left for training of {report.read} records; turn steps off")
        _write_card(folder, source, options, report)
        _write_manifest(folder, source, options, evaluation, report)
    return report


def _source(name: Name, kind: str | None, on_error: str, told: Told | None = None, **where: Any) -> Source:
    source = Source(name, kind, on_error, told, **where)
    if source.kind == "text":
        raise DataError(f"{source.shown}: holds text, and cleaning is for prompts, demonstrations and comparisons")
    return source


def _prompts_of(
    evaluation: Sequence[Path], options: Options, on_error: str = "stop", told: Told | None = None
) -> tuple[PromptIndex, list[Source]]:
    """What must not be trained on, and the sources it was read from."""
    seen = PromptIndex(options.prefix, options.minhash)
    asked = [Source(file, "prompts", on_error, told) for file in evaluation if options.leakage]
    for source in asked:
        for _, record in source:
            seen.add(body(record))
    return seen, asked


def clean_files(
    paths: Sequence[Path],
    out: Path,
    options: Options | None = None,
    *,
    evaluation: Sequence[Path] = (),
) -> dict[str, Report]:
    """The same steps without splits: each file's clean records in their order, under its own name (as .jsonl) in `out`.

    A faulty record stops it.
    evaluation: files whose prompts must not be in any of them (one index for all).
    Returns a report a file, by its name without suffix; `summary` says them in one line. A file that is there is replaced.
    """
    options = replace(options or Options(), validation=0.0, test=0.0)
    names = [path.name.removesuffix(".gz").rsplit(".", 1)[0] for path in paths]
    if len(set(names)) < len(names) or any((out / f"{n}.jsonl").resolve() == p.resolve() for n, p in zip(names, paths)):
        raise DataError(f"{out}: the clean files would overwrite each other or the raw ones; give another folder")
    seen, _ = _prompts_of(evaluation, options)
    reports = {}
    with staged(out / "clean", keep=False) as folder:
        for name, path in zip(names, paths):
            source = _source(path, None, "stop")
            report = _clean(source, folder, options, seen, lambda *_: None)
            report.hear(source)
            if not (folder / f"{TRAIN}.jsonl").exists():
                raise DataError(f"{path}: nothing is left of {report.read} records; turn steps off")
            (folder / f"{TRAIN}.jsonl").replace(folder / f"{name}.jsonl")
            reports[name] = report
        for name in names:
            (folder / f"{name}.jsonl").replace(out / f"{name}.jsonl")
    return reports


def summary(reports: Mapping[str, Report]) -> str:
    """One line: "removed 402 of 8,361 records: 119 personal data, 283 near-duplicates"."""
    total: Counter[str] = Counter()
    for report in reports.values():
        total.update({step: reasons.total() for step, reasons in report.removed.items()})
    parts = ", ".join(f"{count:,} {WORDS.get(step, step)}" for step, count in total.items() if count)
    read = sum(report.read for report in reports.values())
    return f"removed {total.total():,} of {read:,} records" + (f": {parts}" if parts else "")


def _clean(source: Source, folder: Path, options: Options, elsewhere: PromptIndex, removal: Removal) -> Report:
    """elsewhere: prompts of evaluation files.

    Of validation and test only the very prompts are looked for in training: near-duplicates have gone from the file as a whole.
    """
    report, steps = Report(), steps_of(options)
    report.removed = {name: Counter() for name in (*steps, *(["leakage"] if options.leakage else []))}
    held_out: set[int] = set()  # digests
    with _Lines(folder) as lines:
        for place, record in source:
            report.read += 1
            kept = _through(steps, place, record, report, removal)
            if kept is None:
                continue
            split = split_of(kept, options)
            if split != TRAIN or not options.leakage:
                lines.write(split, as_line(kept))
                held_out.add(key_of(body(kept)).digest)
            elif reason := elsewhere.match(body(kept)):
                report.remove("leakage", reason, place, kept)
                removal(place, "leakage", reason, kept)
            else:
                lines.write(WAITING, f"{key_of(body(kept)).digest}\t{json.dumps(place)}\t{as_line(kept)}")
    _drop_leaks(folder, held_out, report, removal)
    personal = steps.get("personal data")
    if isinstance(personal, PersonalData):
        report.found, report.masked = personal.found, personal.masked
    return report


def _drop_leaks(folder: Path, held_out: set[int], report: Report, removal: Removal) -> None:
    """Writes the training records that waited, less those whose prompt validation or test has."""
    waiting = folder / f"{WAITING}.jsonl"
    if not waiting.exists():
        return
    with _Lines(folder) as lines:
        for waited in _lines_of(waiting):
            digest, place, line = waited.rstrip("\n").split("\t", 2)
            if int(digest) in held_out:
                record = json.loads(line)
                report.remove("leakage", "same", json.loads(place), record)
                removal(json.loads(place), "leakage", "same", record)
            else:
                lines.write(TRAIN, line)
    waiting.unlink()


def _through(steps: dict[str, Step], place: str, record: Record, report: Report, removal: Removal) -> Record | None:
    for name, step in steps.items():
        result = step(record)
        if isinstance(result, str):
            report.remove(name, result, place, record)
            removal(place, name, result, record)
            return None
        record = result
    return record


# ---- files


class _Lines:
    """Files that come into being with their first line."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.open: dict[str, Any] = {}
        self.stack = ExitStack()

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def write(self, name: str, line: str) -> None:
        if name not in self.open:
            path = self.folder / f"{name}.jsonl"
            self.open[name] = self.stack.enter_context(path.open("w", encoding="utf-8", newline="\n"))
        self.open[name].write(line + "\n")


def _lines_of(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8", newline="\n") as stream:
        yield from stream


ENCODER = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":"), default=str)


def as_line(record: Record) -> str:
    return ENCODER.encode({name: value for name, value in record.items() if value is not None})


@contextmanager
def staged(out: Path, keep: bool = True) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` when all went well, and goes when it did not (or is not to be kept)."""
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: is there already; give a new folder, or remove it")
    folder = out.resolve().with_name(f".{out.resolve().name}.partial-{os.getpid()}")
    try:
        out.resolve().parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
        yield folder
        if not keep:
            return
        for file in folder.iterdir():  # on the disk before the name is, so that a crash leaves nothing half there
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
        folder.replace(out.resolve())
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror or error}); check the disk") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _described(path: Path) -> dict[str, Any]:
    records, users = 0, set()
    for line in _lines_of(path):
        records += 1
        users.add(json.loads(line).get("user"))
    return {"file": path.name, "records": records, "users": len(users - {None}), "sha256": sha256_of(path)}


def removed_lines(report: Report) -> list[tuple[str, int, str]]:
    """(step, records removed, why) for people; reasons that name users are only counted."""
    rows = []
    for name, reasons in report.removed.items():
        why = f"{len(reasons)} users" if name == "prompts a user" and reasons else ""
        why = why or ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        if name == "personal data" and report.masked:
            why = f"{report.masked} records masked: " + ", ".join(
                f"{n} {k.lower()}" for k, n in report.found.most_common()
            )
        rows.append((name, reasons.total(), why))
    return rows


def noted_lines(report: Report) -> list[tuple[str, int]]:
    """(what, records) of what was no record to keep, or a strange one."""
    faults = [("skipped as faulty", report.skipped)] if report.skipped else []
    return faults + report.notes.most_common()


def _write_manifest(folder: Path, source: Source, options: Options, evaluation: Sequence[Path], report: Report) -> None:
    from rlhf import __version__

    manifest = {
        "rlhf": __version__,
        "kind": source.kind,
        "source": _named(source.name, source.where),
        "formats": dict(source.reading.formats),  # records of each
        "evaluation": [_named(file, {}) for file in evaluation],
        "options": asdict(options),
        "read": report.read,
        "skipped": report.skipped,
        "notes": dict(report.notes),
        "removed": {name: reasons.total() for name, reasons in report.removed.items()},
        "masked": report.masked,
        "splits": report.splits,
        "card": {"file": "README.md", "sha256": sha256_of(folder / "README.md")},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _named(name: Name, where: dict[str, Any]) -> dict[str, Any]:
    """What a manifest says of a source: its name, and the sha256 of local files."""
    given = {option: value for option, value in where.items() if value is not None}
    path = Path(name_of(name))
    if path.is_file():
        return {"name": path.name, "sha256": sha256_of(path)}
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file())
        return {"name": path.resolve().name, **given, "files": {f.name: sha256_of(f) for f in found}}
    return {"name": name_of(name), **(given if path.name != "standard input" else {})}


CARD = """\
---
configs:
- config_name: default
  data_files:
{data_files}
tags: [rlhf, {kind}]
---

# {name}

{total} {kind}, cleaned from {read} by `rlhf data prepare`.

| split | records | users |
|---|---|---|
{splits}

Splits are by user id (by prompt, where there is none) from its hash with seed {seed}: a user never changes split when data
grow. `manifest.json` has every option and the sha256 of every file.

## What was removed

| step | records | why |
|---|---|---|
{removed}
{notes}
Not written here is where the records come from and under which licence: add it before you publish them.
"""


def _write_card(folder: Path, source: Source, options: Options, report: Report) -> None:
    splits = report.splits.items()
    text = CARD.format(
        data_files="\n".join(f"  - split: {split}\n    path: {found['file']}" for split, found in splits),
        kind=source.kind,
        name=Path(source.shown).name.split(".")[0],
        total=sum(found["records"] for _, found in splits),
        read=report.read,
        splits="\n".join(f"| {split} | {found['records']} | {found['users']} |" for split, found in splits),
        seed=options.seed,
        removed="\n".join(f"| {name} | {count} | {why} |" for name, count, why in removed_lines(report)),
        notes="".join(f"\n{note}: {count}\n" for note, count in noted_lines(report)),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
