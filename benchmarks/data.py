"""`rlhf data prepare` at size: writes prompts, cleans them, and prints wall time, processor time and peak memory.

    python benchmarks/data.py --prompts 1000000 --folder /tmp/bench

The prompts are made up: words by Zipf's law, 8 to 300 of them (median 40), 20,000 users, of whom some hundred are heavy; 4 % are
near-duplicates of an earlier prompt (something added, or one word changed), 1 % hold an e-mail address or a phone number.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

VOCABULARY, USERS, CHUNK = 30_000, 20_000, 10_000
NEAR, PERSONAL = 0.04, 0.01


def prompts(count: int, seed: int = 0) -> Iterator[dict[str, str]]:
    rng = np.random.default_rng(seed)
    letters = np.array(list("aabcdeefghiiklmnooprsttuvw"))
    words = ["".join(rng.choice(letters, size)) for size in rng.integers(2, 10, VOCABULARY)]
    shares = 1 / (np.arange(VOCABULARY) + 10.0)
    limits = np.cumsum(shares / shares.sum())
    earlier: list[str] = []
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        lengths = np.clip(rng.lognormal(np.log(40), 0.8, size), 8, 300).astype(int)
        drawn = np.searchsorted(limits, rng.random(int(lengths.sum())))
        users = (USERS * rng.random(size) ** 1.5).astype(int)
        kinds = rng.random(size)
        place = 0
        for length, user, kind in zip(lengths.tolist(), users.tolist(), kinds.tolist()):
            text = " ".join(map(words.__getitem__, drawn[place : place + length].tolist()))
            place += length
            if kind < NEAR and earlier:
                text = earlier[int(kind * 1e9) % len(earlier)]
                text = text + " Thanks." if kind < NEAR / 2 else text.replace(" ", " indeed ", 1)
            elif kind < NEAR + PERSONAL:
                text += f" Write to {words[length]}@mail.example.org or +1 202 555 {100 + length % 100:04d}."
            elif len(earlier) < 50_000:
                earlier.append(text)
            yield {"prompt": text, "user": f"user-{user}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="where files go (default: a temporary folder)")
    parser.add_argument("arguments", nargs="*", help="further arguments of `rlhf data prepare`, after --")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        raw, out = Path(folder) / "raw.jsonl", Path(folder) / "clean"
        with raw.open("w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(record) + "\n" for record in prompts(args.prompts))
        command = [sys.executable, "-m", "rlhf.cli", "data", "prepare", str(raw), "--out", str(out), *args.arguments]
        start, load = time.perf_counter(), os.getloadavg()[0]
        subprocess.run(command, check=True)
        wall = time.perf_counter() - start
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss is in bytes there, in KiB elsewhere
        written = sum(split["records"] for split in json.loads((out / "manifest.json").read_text())["splits"].values())
        rows = [
            ("prompts read", f"{args.prompts:,}"),
            ("file", f"{raw.stat().st_size / 2**20:,.0f} MiB"),
            ("records written", f"{written:,}"),
            ("wall time", f"{wall:,.0f} s"),
            ("processor time", f"{used.ru_utime + used.ru_stime:,.0f} s"),
            ("peak memory of the largest process", f"{used.ru_maxrss / unit:,.0f} MiB"),
            ("load average before, after", f"{load:.1f}, {os.getloadavg()[0]:.1f}"),
        ]
        for name, value in rows:
            print(f"{name:36}{value:>14}")


if __name__ == "__main__":
    main()
