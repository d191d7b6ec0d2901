"""Cleaning as in InstructGPT (Ouyang et al. 2022, appendix A): records in, one at a time, clean splits out.

A step takes a record and returns it (perhaps masked), or the reason why it is removed, as text. `prepare` runs the steps over
a file in one pass and writes the splits; what it keeps in memory is the prompts' text and signatures, never the records.
Steps in their order: length, personal data, near-duplicates, prompts a user, and, once the splits are known, leakage.
"""

import hashlib
import json
import os
import re
import shutil
import unicodedata
import zlib
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import phonenumbers
import stdnum.iban
import stdnum.luhn
import stdnum.us.ssn
from datasketch import MinHash, MinHashLSH

from rlhf.data import files, named  # noqa: F401  (named registers its formats)
from rlhf.data.formats import detect
from rlhf.data.reading import HEAD, Reading
from rlhf.data.records import DataError, Problem, prompt_text

Record = dict[str, Any]
Step = Callable[[Record], Record | str]

TRAIN, VALIDATION, TEST = "train", "validation", "test"
WAITING = ".waiting"  # training records, until all prompts of evaluation are known
LONG_PREFIX, LONG_SHARE = 200, 0.9  # characters that two long prompts share, and how much of the longer they are
SUCCESSORS = 64  # kept prompts looked at that begin with a whole new one
SHINGLE = 3  # words
EXAMPLE = 160  # characters of a removed prompt that a report shows
ROLE_MARK = re.compile(r"\n\W{0,9}\w[\w; ]{0,20}:\s{0,9}\Z")  # a last line like "Assistant:" or "### Response:"
WORDS = {  # what a step removes, for people
    "length": "over the length limit",
    "personal data": "with personal data",
    "prompts a user": "beyond a user's share",
    "leakage": "that evaluation asks",
}
WORD = re.compile(r"\w+|[^\w\s]")


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


@dataclass
class Source:
    """The canonical records of one file, read one at a time: `for place, record in Source(path)`."""

    path: Path
    kind: str | None = None  # None: that of the first records
    on_error: str = "stop"
    skipped: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        if not self.path.is_file():
            raise DataError(f"{self.path}: is no file; give one of {', '.join(files.SUFFIXES)}, or these with .gz")
        head = [raw for _, raw in islice(files.read(self.path), HEAD) if not isinstance(raw, Problem)]
        format = detect(head, self.kind or "prompts")
        self.format = format.name if format else None  # None: the first record read says what is wrong
        self.kind = self.kind or (format.kind if format else "prompts")

    def __iter__(self) -> Iterator[tuple[str, Record]]:
        reading = Reading(str(self.kind), str(self.path), self.format, self.on_error)
        self.skipped, self.notes = reading.skipped, reading.notes
        for place, raw in files.read(self.path):
            reading.add(iter([(place, raw)]))
            yield from ((place, record) for record in reading.rows)
            reading.rows.clear()
        if not reading.count:
            raise DataError(
                f"{self.path}: has no records ({reading.first_skipped or 'it is empty'}); give another file"
            )


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
    return lambda record: record if count(body(record)) <= limit else f"over {limit}"


# ---- personal data

EMAIL = re.compile(r"(?<![\w.+%-])[\w.+%-]+@(?:[\w-]+\.)+[^\W\d_]{2,}")
PHONE = re.compile(r"\d(?:[\s()./-]*\d){6}")  # only what has seven digits is worth phonenumbers' time
CARD_NUMBER = re.compile(r"(?<![\w.-])\d(?:[ -]?\d){12,18}(?![\w-])")
SSN = re.compile(r"(?<![\w-])\d{3}-\d{2}-\d{4}(?![\w-])")
IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")
SIGNED = re.compile(
    r"(?i:\b(?:regards|sincerely|yours truly|best wishes|cheers|thanks))(?:,|\s{0,3}\n)\s{0,5}((?:[A-Z][\w'’-]+ ?){1,3})"
)
IDS = ("user", "labeler")

Span = tuple[int, int, str]


def personal_data(text: str, region: str = "US") -> list[Span]:
    """(start, end, what) of e-mail addresses, phone, card and social security numbers, IBANs, and names signed beside these.

    A name is found only under a closing ("Regards, Ann Lee") in a text that has one of the others: templates of letters end
    so, too. Names elsewhere, streets and dates of birth are not found.
    """
    found = [(m.start(), m.end(), "EMAIL") for m in EMAIL.finditer(text)]
    for pattern, valid, what in (
        (IBAN, stdnum.iban.is_valid, "IBAN"),
        (CARD_NUMBER, stdnum.luhn.is_valid, "CARD"),
        (SSN, stdnum.us.ssn.is_valid, "SSN"),
    ):
        found += [(m.start(), m.end(), what) for m in pattern.finditer(text) if valid(re.sub("[ -]", "", m[0]))]
    if PHONE.search(text):
        numbers = phonenumbers.PhoneNumberMatcher(text, region, leniency=phonenumbers.Leniency.VALID)
        found += [(number.start, number.end, "PHONE") for number in numbers]
    if found:
        found += [(m.start(1), m.start(1) + len(m[1].rstrip()), "NAME") for m in SIGNED.finditer(text)]
    return _apart(found)


def _apart(spans: list[Span]) -> list[Span]:
    """In their order, and of two that overlap the one found first: a card's digits may look like a phone number."""
    kept: list[Span] = []
    for start, end, what in spans:
        if all(end <= other[0] or start >= other[1] for other in kept):
            kept.append((start, end, what))
    return sorted(kept)


def masked(text: str, spans: list[Span]) -> str:
    for start, end, what in reversed(spans):
        text = f"{text[:start]}[{what}]{text[end:]}"
    return text


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


def normalised(text: str) -> str:
    """Words and marks in small letters with one space between, without a last line that only says whose turn it is."""
    text = unicodedata.normalize("NFKC", ROLE_MARK.sub("", text))
    return " ".join(WORD.findall(text.casefold()))


class PromptIndex:
    """The prompts kept so far, and why another one is a near-duplicate: "same", "prefix", "minhash", or None.

    prefix:  one prompt begins with the whole of the other, which is at least this share of it; or both are long (200
             characters) and nine tenths of the longer are the same beginning. Prompts made from templates have long
             beginnings in common and are different questions, so a common beginning alone does not count.
    minhash: Jaccard similarity of the sets of word triples, from candidates of MinHash LSH, computed exactly.
    """

    def __init__(self, prefix: float, minhash: float):
        self.prefix, self.minhash = prefix, minhash
        self.ordered: list[str] = []
        self.wholes: set[bytes] = set()
        self.shingles: list[np.ndarray] = []
        # A little below, since LSH misses some that lie just above its own threshold.
        self.lsh = MinHashLSH(threshold=0.9 * minhash, num_perm=128) if minhash else None
        self.hashes = MinHash(num_perm=128, seed=1, hashfunc=int)

    def add(self, text: str) -> None:
        text = normalised(text)
        digest = _digests(text)[-1][1]
        if digest in self.wholes:
            return
        self.wholes.add(digest)
        insort(self.ordered, text)
        if self.lsh is not None:
            shingles = _shingles(text)
            self.lsh.insert(len(self.shingles), self._signature(shingles))
            self.shingles.append(shingles)

    def match(self, text: str) -> str | None:
        text = normalised(text)
        digests = _digests(text)
        if digests[-1][1] in self.wholes:
            return "same"
        if self.prefix and (self._begins_or_begun(text, digests) or self._long_beginning(text)):
            return "prefix"
        return "minhash" if self.lsh is not None and self._similar(text) else None

    def _begins_or_begun(self, text: str, digests: list[tuple[int, bytes]]) -> bool:
        if any(end >= self.prefix * len(text) and digest in self.wholes for end, digest in digests):
            return True
        first = bisect_left(self.ordered, text + " ")
        for longer in self.ordered[first : first + SUCCESSORS]:
            if not longer.startswith(text + " "):
                return False
            if len(text) >= self.prefix * len(longer):
                return True
        return False

    def _long_beginning(self, text: str) -> bool:
        """Of all kept ones, those beside it in sorted order share the longest beginning."""
        place = bisect_left(self.ordered, text)
        for other in self.ordered[max(0, place - 1) : place + 1]:
            common = _common(text, other)
            if common >= LONG_PREFIX and common >= LONG_SHARE * max(len(text), len(other)):
                return True
        return False

    def _similar(self, text: str) -> bool:
        assert self.lsh is not None
        shingles = _shingles(text)
        for key in self.lsh.query(self._signature(shingles)):
            common = len(np.intersect1d(shingles, self.shingles[key], assume_unique=True))
            if common >= self.minhash * (len(shingles) + len(self.shingles[key]) - common):
                return True
        return False

    def _signature(self, shingles: np.ndarray) -> MinHash:
        signature = self.hashes.copy()  # shares the permutations, which are slow to draw
        signature.update_batch(shingles.tolist())
        return signature


def _common(a: str, b: str) -> int:
    """Characters at the beginning that two texts share."""
    return next((place for place, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _digests(text: str) -> list[tuple[int, bytes]]:
    """(end, digest) of each beginning of a normalised text that ends with a word."""
    digest, end, found = hashlib.blake2b(digest_size=8), -1, []
    for word in text.split(" "):
        digest.update(word.encode() + b" ")
        end += len(word) + 1
        found.append((end, digest.copy().digest()))
    return found


def _shingles(text: str) -> np.ndarray:
    words = text.split(" ")
    starts = range(max(1, len(words) - SHINGLE + 1))
    sums = {zlib.crc32(" ".join(words[start : start + SHINGLE]).encode()) for start in starts}
    return np.array(sorted(sums), dtype=np.uint32)


class NearDuplicates:
    """Keeps the first of near-duplicates. One prompt with several answers or rankings is none; the same record twice is."""

    def __init__(self, index: PromptIndex):
        self.index = index
        self.records: set[bytes] = set()

    def __call__(self, record: Record) -> Record | str:
        digest = hashlib.blake2b(as_line(record).encode(), digest_size=8).digest()
        reason = self.index.match(body(record))
        if reason == "same" and digest not in self.records and ("completion" in record or "completions" in record):
            reason = None
        if reason:
            return reason
        self.index.add(body(record))
        self.records.add(digest)
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
    splits: dict[str, dict[str, Any]] = field(default_factory=dict)
    examples: dict[str, dict[str, str]] = field(default_factory=dict)  # the first record that a step removed

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
    path: Path,
    out: Path,
    options: Options,
    *,
    kind: str | None = None,
    evaluation: tuple[Path, ...] = (),
    on_error: str = "stop",
    removal: Removal | None = None,
) -> Report:
    """Writes train.jsonl, validation.jsonl, test.jsonl, README.md and manifest.json into the new folder `out`, or nothing.

    evaluation: files whose prompts must not be in the training split either.
    removal:    told of every record that is removed.
    A line is JSON with sorted keys and without nulls, so that a file's sha256 is its `rlhf.data.fingerprint`.
    """
    source = _source(path, kind, on_error)
    seen = _prompts_of(evaluation, options, on_error)
    with staged(out) as folder:
        report = _clean(source, folder, options, seen, removal or (lambda *_: None))
        report.skipped = source.skipped.total()
        for split in (TRAIN, VALIDATION, TEST):
            if (folder / f"{split}.jsonl").exists():
                report.splits[split] = _described(folder / f"{split}.jsonl")
        if TRAIN not in report.splits:
            raise DataError(f"{path}: nothing is left for training of {report.read} records; turn steps off")
        _write_card(folder, path, str(source.kind), options, report)
        _write_manifest(folder, path, str(source.kind), options, evaluation, report)
    return report


def _source(path: Path, kind: str | None, on_error: str) -> Source:
    source = Source(path, kind, on_error)
    if source.kind == "text":
        raise DataError(f"{path}: holds text, and cleaning is for prompts, demonstrations and comparisons")
    return source


def _prompts_of(evaluation: Sequence[Path], options: Options, on_error: str) -> PromptIndex:
    """What must not be trained on."""
    seen = PromptIndex(options.prefix, options.minhash)
    for file in evaluation if options.leakage else ():
        for _, record in Source(file, "prompts", on_error):
            seen.add(body(record))
    return seen


def clean_files(
    paths: Sequence[Path],
    out: Path,
    options: Options | None = None,
    *,
    evaluation: Sequence[Path] = (),
    on_error: str = "stop",
) -> dict[str, Report]:
    """The same steps without splits: each file's clean records in their order, under its own name (as .jsonl) in `out`.

    evaluation: files whose prompts must not be in any of them (one index for all).
    Returns a report a file, by its name without suffix; `summary` says them in one line. A file that is there is replaced.
    """
    options = replace(options or Options(), validation=0.0, test=0.0)
    names = [path.name.removesuffix(".gz").rsplit(".", 1)[0] for path in paths]
    if len(set(names)) < len(names) or any((out / f"{n}.jsonl").resolve() == p.resolve() for n, p in zip(names, paths)):
        raise DataError(f"{out}: the clean files would overwrite each other or the raw ones; give another folder")
    seen = _prompts_of(evaluation, options, on_error)
    reports = {}
    with staged(out / "clean", keep=False) as folder:
        for name, path in zip(names, paths):
            source = _source(path, None, on_error)
            report = _clean(source, folder, options, seen, lambda *_: None)
            report.skipped = source.skipped.total()
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


def _clean(source: Source, folder: Path, options: Options, seen: PromptIndex, removal: Removal) -> Report:
    report, steps = Report(), steps_of(options)
    report.removed = {name: Counter() for name in (*steps, *(["leakage"] if options.leakage else []))}
    with _Lines(folder) as lines:
        for place, record in source:
            report.read += 1
            kept = _through(steps, place, record, report, removal)
            if kept is None:
                continue
            split = split_of(kept, options)
            if split == TRAIN and options.leakage:
                lines.write(WAITING, json.dumps([place, kept], default=str))
                continue
            lines.write(split, as_line(kept))
            seen.add(body(kept))
    _drop_leaks(folder, seen, report, removal)
    personal = steps.get("personal data")
    if isinstance(personal, PersonalData):
        report.found, report.masked = personal.found, personal.masked
    return report


def _drop_leaks(folder: Path, seen: PromptIndex, report: Report, removal: Removal) -> None:
    """Writes the training records that waited, less those whose prompt evaluation has."""
    waiting = folder / f"{WAITING}.jsonl"
    if not waiting.exists():
        return
    with _Lines(folder) as lines:
        for line in _lines_of(waiting):
            place, record = json.loads(line)
            reason = seen.match(body(record))
            if reason:
                report.remove("leakage", reason, place, record)
                removal(place, "leakage", reason, record)
            else:
                lines.write(TRAIN, as_line(record))
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


def as_line(record: Record) -> str:
    filled = {name: value for name, value in record.items() if value is not None}
    return json.dumps(filled, ensure_ascii=False, sort_keys=True, separators=(",", ":"), default=str)


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


def _write_manifest(
    folder: Path, path: Path, kind: str, options: Options, evaluation: tuple[Path, ...], report: Report
) -> None:
    from rlhf import __version__

    manifest = {
        "rlhf": __version__,
        "kind": kind,
        "source": {"name": path.name, "sha256": sha256_of(path)},
        "evaluation": [{"name": file.name, "sha256": sha256_of(file)} for file in evaluation],
        "options": asdict(options),
        "read": report.read,
        "skipped": report.skipped,
        "removed": {name: reasons.total() for name, reasons in report.removed.items()},
        "masked": report.masked,
        "splits": report.splits,
        "card": {"file": "README.md", "sha256": sha256_of(folder / "README.md")},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


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

Not written here is where the records come from and under which licence: add it before you publish them.
"""


def _write_card(folder: Path, path: Path, kind: str, options: Options, report: Report) -> None:
    splits = report.splits.items()
    text = CARD.format(
        data_files="\n".join(f"  - split: {split}\n    path: {found['file']}" for split, found in splits),
        kind=kind,
        name=path.name.split(".")[0],
        total=sum(found["records"] for _, found in splits),
        read=report.read,
        splits="\n".join(f"| {split} | {found['records']} | {found['users']} |" for split, found in splits),
        seed=options.seed,
        removed="\n".join(f"| {name} | {count} | {why} |" for name, count, why in removed_lines(report)),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
