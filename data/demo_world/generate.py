"""Writes the demo world's files: python -m demo_world.generate --out DIR --seed 0 --scale 1.0 (PYTHONPATH=data)."""

import argparse
import json
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from . import templates as t
from .base_text import documents
from .faults import BAR, blemish, corrupt
from .held_out import compose_open, hidden_in
from .judge import judge
from .raw import HEAVY_EXTRA, PERSONAL, USER_CAP, Record, near_duplicates, signed
from .requests import Request, core, identity, render, sample
from .world import FACTS, HIDDEN

SIZES = {"demonstrations": 1300, "comparison_prompts": 3300, "prompts": 3100}  # a tenth of InstructGPT's
LABELER_SHARE = {"demonstrations": 0.89, "comparison_prompts": 0.2, "prompts": 0.0}
EVAL_SIZES = {"familiar": 800, "held_out_fact": 100, "held_out_phrasing": 100}
BASE_WORDS, BASE_HELDOUT_WORDS = 500_000, 15_000
LABELERS, CUSTOMERS = 40, 400

TRIES = 500  # for a request that fits
TRIES_FOR_A_NEW_ONE = 30  # a small kind may have none that was not used

BAD, FAIR = 0.08, 0.86  # shares of the demonstrations; the rest are the judge's best


@dataclass
class Writer:
    """Draws records that do not repeat a prompt within a file; `taken` holds what evaluation asks and training must not."""

    rng: random.Random
    taken: set[str] = field(default_factory=set)
    used: set[str] = field(default_factory=set)

    def kinds(self, n: int, allowed=None) -> list[str]:
        """Exactly Table 1's proportions (largest remainders), in random order."""
        shares = {kind: share for kind, share in t.KINDS.items() if allowed is None or kind in allowed}
        total = sum(shares.values())
        quota = {kind: n * share / total for kind, share in shares.items()}
        drawn = [kind for kind, q in quota.items() for _ in range(int(q))]
        rest = sorted(quota, key=lambda kind: quota[kind] % 1, reverse=True)
        drawn += rest[: n - len(drawn)]
        self.rng.shuffle(drawn)
        return drawn

    def draw(self, kind: str, few_shot: float, setting: float, hidden: bool = False, **options):
        """A new prompt of a kind, its request, and whether it is plain, few-shot or user-based.

        hidden: every right answer tells a held-out fact; otherwise some right answer does without.
        """
        found = None
        for attempt in range(TRIES):
            if found is not None and attempt >= TRIES_FOR_A_NEW_ONE:
                break
            request = sample(self.rng, kind, **options)
            if identity(request) in self.taken or (not hidden and hidden_in(request)):
                continue
            # to be sure that no answer does without takes many tries, to find one that does takes few
            if hidden != (compose_open(request, self.rng, tries=40 if hidden else 3) is None):
                continue
            opening, form = self.opening(request, few_shot, setting)
            found = render(request, opening), request, form
            if found[0] not in self.used:
                break
        if found is None:
            raise RuntimeError(f"no request of kind {kind!r} is left that evaluation does not ask for")
        self.used.add(found[0])
        return found

    def opening(self, request: Request, few_shot: float, setting: float) -> tuple[str, str]:
        chance = self.rng.random()
        if chance < few_shot and request.task in t.FEW_SHOT:
            return self.examples(request), "few_shot"
        if chance > 1 - setting and request.task != "follow":
            return self.rng.choice(t.SETTINGS), "user_based"
        return "", "plain"

    def examples(self, request: Request) -> str:
        """One or two worked examples of the same task before the request itself."""
        shown, wanted = "", self.rng.choice((1, 1, 2))
        while shown.count(t.EXAMPLE) < wanted:
            other = sample(self.rng, request.kind, tasks=[request.task])
            answer = compose_open(other, self.rng)
            if answer and other.style == request.style and other != request and identity(other) not in self.taken:
                shown += f"{t.EXAMPLE}{core(other)}{t.ANSWER}{answer.strip()} "
        return shown.rstrip() + t.FINAL


def users(rng: random.Random, n: int, labeler_share: float, group: str = "") -> list[str]:
    """A user for each of n prompts: labelers evenly; customers unevenly, two of them up to the cap where n allows."""
    customers = [f"{group}customer-{i:03d}" for i in range(1, CUSTOMERS + 1)]
    weights = [1 / (i + 20) for i in range(CUSTOMERS)]
    named = []
    heavy = [f"{group}customer-heavy-{i}" for i, _ in enumerate(HEAVY_EXTRA, 1) for _ in range(USER_CAP)]
    heavy = heavy if n * (1 - labeler_share) > 5 * len(heavy) else []
    for i in range(n):
        if i < labeler_share * n:
            named.append(f"{group}labeler-{rng.randint(1, LABELERS):02d}")
        elif heavy:
            named.append(heavy.pop())
        else:
            named.append(rng.choices(customers, weights)[0])
    rng.shuffle(named)
    return named


def prompt_records(writer: Writer, n: int, labeler_share: float) -> list[tuple[Record, Request]]:
    records = []
    for kind, user in zip(writer.kinds(n), users(writer.rng, n, labeler_share)):
        records.append(one_record(writer, kind, user))
    return records


def one_record(writer: Writer, kind: str, user: str) -> tuple[Record, Request]:
    labeler = user.startswith("labeler")
    prompt, request, form = writer.draw(kind, 0.3 if labeler else 0.08, 0.3 if labeler else 0.1)
    source = f"labeler_{form}" if labeler else "customer"
    return {"prompt": prompt, "user": user, "source": source, "kind": kind}, request


def demonstrate(rng: random.Random, records: list[tuple[Record, Request]]) -> list[Record]:
    """Adds completions: BAD of them bad by the judge, FAIR fair, the rest best; which is which is drawn exactly."""
    n = len(records)
    quality = ["bad"] * int(BAD * n) + ["fair"] * int(FAIR * n)
    quality += ["best"] * (n - len(quality))
    rng.shuffle(quality)
    written: list[Record] = []
    for (record, request), grade in zip(records, quality):
        completion = compose_open(request, rng, tries=200)
        if grade == "bad":
            completion, _ = corrupt(record["prompt"], completion, rng)
        elif grade == "fair":
            completion = blemish(record["prompt"], completion, rng)
        written.append({"prompt": record["prompt"], "completion": completion, **record})
    return written


# ---- files


def training_records(writer: Writer, name: str, scale: float) -> list[Record]:
    """Clean records in Table 1's proportions, and among them what the data stage removes."""
    n, share = round(SIZES[name] * scale), LABELER_SHARE[name]
    writer.used.clear()
    clean = prompt_records(writer, n, share)
    extra = []
    if any(record["user"].startswith("customer-heavy") for record, _ in clean):
        owners = [f"customer-heavy-{i}" for i, more in enumerate(HEAVY_EXTRA, 1) for _ in range(more)]
        extra += [one_record(writer, kind, user) for kind, user in zip(writer.kinds(len(owners)), owners)]
    private = prompt_records(writer, max(1, round(PERSONAL * n)), share)
    if name == "demonstrations":
        grades = demonstrate(writer.rng, clean), demonstrate(writer.rng, private)
    else:
        grades = [record for record, _ in clean + extra], [record for record, _ in private]
    records = grades[0] + near_duplicates(writer.rng, grades[0]) + signed(writer.rng, grades[1])
    writer.rng.shuffle(records)
    return records


def evaluation_records(writer: Writer) -> list[Record]:
    """Other users, other requests; facts and phrasings that training never has, apart from the familiar ones.

    As many at every scale: training asks none of them, and the small kinds have not many more.
    """
    fact_kinds = {t.kind_of(task) for task in t.FACT_TASKS}
    options = {
        "familiar": (None, {}),
        "held_out_fact": (fact_kinds, {"hidden": True, "tasks": t.FACT_TASKS}),
        "held_out_phrasing": (None, {"held_out": True}),
    }
    records = []
    for group, (kinds, drawn_from) in options.items():
        n = EVAL_SIZES[group]
        few_shot, setting = (0.08, 0.1) if group == "familiar" else (0.0, 0.0)
        for kind, user in zip(writer.kinds(n, kinds), users(writer.rng, n, 0.0, "eval-")):
            prompt, request, _ = writer.draw(kind, few_shot, setting, **drawn_from)
            writer.taken.add(identity(request))
            records.append({"prompt": prompt, "user": user, "source": "customer", "kind": kind, "group": group})
    return records


def write_lines(path: Path, records: list[Record]) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def manifest(seed: int, scale: float, files: dict[str, list[Record]]) -> dict:
    shares = {
        name: {
            kind: round(100 * count / len(records), 2) for kind, count in Counter(r["kind"] for r in records).items()
        }
        for name, records in files.items()
        if records and "kind" in records[0]
    }
    demonstrations = files["demonstrations"]
    scores = [judge(record["prompt"], record["completion"]).utility for record in demonstrations]
    return {
        "seed": seed,
        "scale": scale,
        "counts": {name: len(records) for name, records in files.items()},
        "percent_by_kind": shares,
        "table_1": t.KINDS,
        "demonstrations": {
            "bad_below": BAR,
            "bad_share": round(sum(score < BAR for score in scores) / len(scores), 4),
            "mean_utility": round(sum(scores) / len(scores), 4),
        },
        "user_cap": USER_CAP,
        "held_out_facts": [[name, prop, FACTS[name][prop]] for name, prop in HIDDEN.items()],
    }


def generate(out: Path, seed: int = 0, scale: float = 1.0) -> dict:
    """Writes every file into `out`; returns the manifest, which is also written, last, as world.json."""
    if scale <= 0:
        raise ValueError(f"--scale must be positive, not {scale}")
    out.mkdir(parents=True, exist_ok=True)
    writer = Writer(random.Random(f"{seed}|prompts"))
    files = {"eval_prompts": evaluation_records(writer)}
    for name in SIZES:
        files[name] = training_records(writer, name, scale)
    text_scale = max(0.1, min(1.0, scale))  # the world's facts do not grow with the number of prompts
    for name, words in (("base", BASE_WORDS * text_scale), ("base_heldout", BASE_HELDOUT_WORDS)):
        files[name] = [{"text": text} for text in documents(random.Random(f"{seed}|{name}"), int(words))]
    for name, records in files.items():
        write_lines(out / f"{name}.jsonl", records)
    told = manifest(seed, scale, files)
    (out / "world.json").write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="1.0 is a tenth of the paper's sizes")
    args = parser.parse_args()
    print(json.dumps(generate(args.out, args.seed, args.scale), indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
