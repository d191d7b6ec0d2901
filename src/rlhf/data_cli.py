"""The commands `rlhf data inspect` and `rlhf data prepare`: their arguments, what they count, and what they print."""

from __future__ import annotations

import argparse
import json
import os
import random
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from rlhf.data_page import Section, page

MOST_VALUES = 20  # a field with more different values is no label
MOST_FIELDS = 20  # further fields that are looked at
SHORTEST = 20  # bytes that a language is guessed from: seven Chinese characters, three English words


def add_data(commands: Any) -> None:
    group = commands.add_parser("data", help="look at a data file, and clean it into splits")
    parsers = group.add_subparsers(dest="data_command", metavar="COMMAND", required=True)

    def add(name: str, help: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = parsers.add_parser(name, help=help, description=help)
        parser.set_defaults(run=f"rlhf.data_cli:{name}")
        parser.add_argument(
            "file", metavar="FILE", help="a file, a folder, a Hub data set, or - for JSON lines from a pipe"
        )
        kinds = ["prompts", "demonstrations", "comparisons"] + ["text"] * (name == "inspect")
        parser.add_argument("--kind", choices=kinds, help="read it as this kind (default: as its records are)")
        parser.add_argument("--format", metavar="NAME", help="of docs/data.md (default: detected by the fields)")
        parser.add_argument("--on-error", choices=["stop", "skip"], default="stop", help="default: %(default)s")
        parser.add_argument(
            "--split", default="train", metavar="NAME", help="of a folder or Hub data set (default: train)"
        )
        parser.add_argument("--config-name", metavar="NAME", help="of a Hub data set")
        parser.add_argument("--revision", metavar="REVISION", help="of a Hub data set")
        parser.add_argument("--tokenizer", metavar="MODEL", help="count its tokens (default: words and marks)")
        parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
        return parser

    parser = add("inspect", "counts, lengths, languages, duplicates, rankings, labels and a sample of a file")
    parser.add_argument("--sample", type=int, default=3, metavar="N", help="records to show (default: %(default)s)")
    parser.add_argument("--html", type=Path, metavar="PATH", help="write it as one page with plots, too")
    _add_steps(add("prepare", "clean a file and write its splits, with a data card and a manifest of hashes"))


def _add_steps(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    add("--max-length", type=int, default=1000, metavar="N", help="longest prompt; 0: any (default: %(default)s)")
    add("--personal-data", choices=["drop", "mask", "keep"], default="drop", help="default: %(default)s")
    add("--phone-region", default="US", metavar="CC", help="of numbers without + (default: %(default)s)")
    share = "share of a prompt that a whole other one, which begins it, has at least; 0: off (default: %(default)s)"
    add("--prefix", type=float, default=0.5, metavar="X", help=share)
    add(
        "--minhash",
        type=float,
        default=0.9,
        metavar="X",
        help="similarity of duplicates; 0: off (default: %(default)s)",
    )
    add("--per-user", type=int, default=200, metavar="N", help="prompts of a user; 0: any (default: %(default)s)")
    add("--validation", type=float, default=0.1, metavar="X", help="share of the users (default: %(default)s)")
    add("--test", type=float, default=0.1, metavar="X", help="share of the users (default: %(default)s)")
    add("--no-leakage", action="store_true", help="leave training prompts that evaluation has, too")
    add("--evaluation", type=Path, nargs="+", default=[], metavar="FILE", help="prompts that must not be trained on")
    add("--removed", type=Path, metavar="PATH", help="write what is removed, where it stood and why, as JSON lines")


# ---- prepare


def prepare(args: argparse.Namespace) -> None:
    from rlhf.data import clean

    given = vars(args)
    chosen = {name: given[name] for name in clean.Options.__dataclass_fields__ if name in given}
    options = clean.Options(**chosen, leakage=not args.no_leakage)
    with _written(args.removed) if args.removed else nullcontext() as log:

        def note(place: str, step: str, reason: str, record: dict[str, Any]) -> None:
            if log:
                log.write(clean.as_line({"place": place, "step": step, "reason": reason, "record": record}) + "\n")

        report = clean.prepare(
            args.file,
            args.out,
            options,
            kind=args.kind,
            evaluation=tuple(args.evaluation),
            on_error=args.on_error,
            removal=note,
            **_where(args),
        )
    steps = Section("removed", ("step", "records", "why"), clean.removed_lines(report))
    rows = [(name, found["records"], found["users"], found["sha256"][:12]) for name, found in report.splits.items()]
    splits = Section(str(args.out), ("split", "records", "users", "sha256"), rows)
    skipped = f", {report.skipped} skipped as faulty" if report.skipped else ""
    head = Section(f"{args.file}: {report.read} records read{skipped}", (), [])
    noted = [Section("noted", ("what", "records"), report.notes.most_common())] if report.notes else []
    _print([head, *_faults(report.faults, report.skipped, "--removed lists all"), *noted, steps, splits])


def _faults(faults: list[tuple[str, str]], count: int, hint: str = "") -> list[Section]:
    """The skipped records, where there are any: the first by their places."""
    rows: list[tuple[Any, ...]] = list(faults)
    if count > len(faults):
        rows.append(("…", f"and {count - len(faults)} more" + (f"; {hint}" if hint else "")))
    return [Section("skipped as faulty", ("place", "what is wrong"), rows)] if count else []


def _where(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in ("split", "config_name", "revision", "format")}


@contextmanager
def _written(path: Path) -> Iterator[IO[str]]:
    """A file that is there, whole, when all went well."""
    from rlhf.data import DataError

    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with open(partial, "w", encoding="utf-8") as stream:
            yield stream
        partial.replace(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error}); check the folder") from error
    finally:
        partial.unlink(missing_ok=True)


# ---- inspect


@dataclass
class Rankings:
    """K, ties, and whether place or length already say which completion is better."""

    sizes: Counter[int] = field(default_factory=Counter)
    best: Counter[int] = field(default_factory=Counter)  # 1-based places that share the first rank
    ties: Counter[int] = field(default_factory=Counter)  # tied pairs of a record
    pairs: int = 0
    tied: int = 0
    all_tied: int = 0
    first_better: int = 0
    longer_better: int = 0
    length_differs: int = 0

    def add(self, completions: list[str], ranks: list[int]) -> None:
        size = len(ranks)
        pairs = [(i, j) for i in range(size) for j in range(i + 1, size)]
        tied = sum(ranks[i] == ranks[j] for i, j in pairs)
        self.sizes[size] += 1
        self.ties[tied] += 1
        self.best.update(place for place, rank in enumerate(ranks, start=1) if rank == min(ranks))
        self.pairs += len(pairs)
        self.tied += tied
        self.all_tied += tied == len(pairs)
        for i, j in pairs:
            if ranks[i] != ranks[j]:
                better, worse = (i, j) if ranks[i] < ranks[j] else (j, i)
                self.first_better += better == i
                self.length_differs += len(completions[i]) != len(completions[j])
                self.longer_better += len(completions[better]) > len(completions[worse])

    def sections(self) -> list[Section]:
        ordered = self.pairs - self.tied
        balance = [
            ("pairs", self.pairs, ""),
            ("tied", self.tied, _percent(self.tied, self.pairs)),
            ("records in which all tie", self.all_tied, _percent(self.all_tied, self.sizes.total())),
            ("earlier one better", self.first_better, _percent(self.first_better, ordered)),
            ("longer one better", self.longer_better, _percent(self.longer_better, self.length_differs)),
        ]
        return [
            _counted("K: completions of a prompt", "K", self.sizes, by_value=True),
            _counted("ties: tied pairs of a record", "tied pairs", self.ties, by_value=True),
            Section("label balance", ("", "count", "share"), balance),
            _counted("place of the best completion", "place", self.best, by_value=True),
        ]


def inspect(args: argparse.Namespace) -> None:
    from rlhf.data import clean

    source = clean.Source(args.file, args.kind, args.on_error, **_where(args))
    sections, sample = _statistics(source, clean.length_counter(args.tokenizer), args)
    if args.html:
        with _written(args.html) as stream:
            stream.write(page(f"{Path(args.file).name}: {source.kind}", sections, sample, source.kind))
    lines = Section(
        "sample", ("record",), [(json.dumps(record, ensure_ascii=False, default=str),) for record in sample]
    )
    _print([Section(f"{args.file}: {source.kind}", (), []), *sections, lines])
    if args.html:
        print(f"wrote {args.html}")


def _statistics(source: Any, count: Any, args: argparse.Namespace) -> tuple[list[Section], list[Any]]:
    """The tables and the sample, from one pass; kept are numbers, prompts' text for the duplicates, and the sample."""
    from rlhf.data import clean

    lengths: dict[str, array[int]] = {}
    users, languages, personal, duplicates = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    labelers: Counter[str] = Counter()
    labels: dict[str, Counter[str]] = {}
    index, rankings, sample = clean.PromptIndex(0.5, 0.9), Rankings(), Reservoir(args.sample, args.seed)
    for _, record in source:
        prompt = clean.body(record)
        answers: list[str] = []  # by its kind: fields of these names that came with a prompt are as they are
        if source.kind == "comparisons":
            answers = record["completions"]
        elif source.kind == "demonstrations":
            answers = [record["completion"]]
        for name, texts in (("text" if "text" in record else "prompt", [prompt]), ("completion", answers)):
            if texts:
                lengths.setdefault(name, array("Q")).extend(map(count, texts))
        users[record.get("user") or ""] += 1
        languages[language(prompt)] += 1
        personal.update({what for text in (prompt, *answers) for _, _, what in clean.personal_data(text)})
        reason = index.match(prompt)
        duplicates[reason or "first of its kind"] += 1
        if reason is None:
            index.add(prompt)
        if source.kind == "comparisons":
            rankings.add(record["completions"], record["ranks"])
            labelers[record.get("labeler") or ""] += 1
        _count_labels(labels, record)
        sample.add(record)
    unit = f"tokens of {args.tokenizer}" if args.tokenizer else "words and marks"
    sections = [
        _counts(source, users, labelers),
        *_faults(source.reading.faults, source.skipped.total()),
        *_lengths(lengths, unit),
        _counted("languages", "language", languages),
        _counted("duplicates: what a prompt is to those before it", "prompt", duplicates),
        _counted("personal data: records that hold it", "what", personal, of=users.total()),
        *(rankings.sections() if rankings.pairs else []),
        *(_counted(f"labels: {name}", name, values) for name, values in labels.items() if len(values) <= MOST_VALUES),
    ]
    return sections, sample.kept


def language(text: str) -> str:
    """A language's code, as py3langid guesses it from the first 1,000 characters."""
    import py3langid

    text = text.strip()[:1000]
    return str(py3langid.classify(text)[0]) if len(text.encode()) >= SHORTEST else "too short to tell"


def _count_labels(labels: dict[str, Counter[str]], record: dict[str, Any]) -> None:
    """Short values of further fields; counting stops where there are too many to be labels."""
    for name, value in record.items():
        if name in ("prompt", "completion", "user", "text") or not isinstance(value, (str, int, bool)):
            continue
        if name not in labels and len(labels) == MOST_FIELDS:
            continue
        values = labels.setdefault(name, Counter())
        if len(values) <= MOST_VALUES:
            values[str(value)[:60]] += 1


class Reservoir:
    """A sample of a stream in which each record is as likely (algorithm R)."""

    def __init__(self, size: int, seed: int):
        self.size, self.seen = size, 0
        self.kept: list[Any] = []
        self.rng = random.Random(seed)

    def add(self, record: Any) -> None:
        self.seen += 1
        if len(self.kept) < self.size:
            self.kept.append(record)
        elif (place := self.rng.randrange(self.seen)) < self.size:
            self.kept[place] = record


def _counts(source: Any, users: Counter[str], labelers: Counter[str]) -> Section:
    named = Counter({user: count for user, count in users.items() if user})
    rows: list[tuple[Any, ...]] = [("records", users.total())]
    rows += [(f"read as {name}", count) for name, count in source.reading.formats.items()]
    rows += [("users", len(named))]
    rows += [("records without a user", users[""])] if users[""] else []
    rows += [("most by one user", max(named.values()))] if named else []
    rows += [("users with more than 200", sum(count > 200 for count in named.values()))] if named else []
    if labelers.total() > labelers[""]:
        rows += [("labelers", len(labelers.keys() - {""})), ("rankings without a labeler", labelers[""])]
    rows += [(f"skipped: {reason}", count) for reason, count in source.skipped.most_common()]
    rows += [(note, count) for note, count in source.notes.most_common()]
    return Section("counts", ("", "count"), rows)


def _lengths(lengths: dict[str, array[int]], unit: str) -> Iterator[Section]:
    for name, numbers in lengths.items():
        ordered = sorted(numbers)
        at = [ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0, 0.5, 0.9, 0.99, 1)]
        row = (len(ordered), *at, round(sum(ordered) / len(ordered), 1))
        columns = ("texts", "shortest", "median", "90 %", "99 %", "longest", "mean")
        yield Section(f"lengths: {name}, {unit}", columns, [row], numbers)


def _counted(title: str, name: str, counts: Counter[Any], *, by_value: bool = False, of: int | None = None) -> Section:
    ordered = sorted(counts.items(), key=lambda item: item[0] if by_value else (-item[1], item[0]))
    total = counts.total() if of is None else of
    rows = [(value, count, _percent(count, total)) for value, count in ordered]
    return Section(title, (name, "count", "share"), rows, Counter(dict(ordered)))


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else ""


# ---- showing


def _print(sections: list[Section]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    for section in sections:
        console.print(Text(section.title, style="bold"), soft_wrap=True)
        if section.rows:
            table = Table(box=box.SIMPLE, show_header=any(section.columns))
            for position, column in enumerate(section.columns):
                is_number = all(isinstance(row[position], (int, float)) for row in section.rows)
                table.add_column(column, justify="right" if is_number else "left", overflow="fold")
            for row in section.rows:
                table.add_row(*(Text(str(cell)) for cell in row))
            console.print(table)
        elif section.columns:
            console.print("  none\n")
