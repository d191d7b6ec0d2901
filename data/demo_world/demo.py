"""`make demo`: the whole pipeline in the demo world, measured by its judge. See data/README.md.

Training sees demonstrations, rankings by simulated labelers and raw text; the judge is asked only afterwards, about answers to
held-out prompts. `ensure(stage)` makes what a single stage of the demo needs and is not there yet.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .generate import generate
from .labelers import Labelers, agreement

RESPONSE_LENGTH = 64
K = 9  # samples a prompt, the most of InstructGPT's 4 to 9; those that differ are ranked
STAGE_OF = {"base": "pretrain", "sft": "sft", "rm": "reward", "ppo": "ppo"}
SAMPLE_SEED = 1  # offset of the seed that answers for labelers and for evaluation are sampled with


@dataclass
class Demo:
    """One run of the demo: where it is, its choices, and the seconds of each stage."""

    root: Path
    run: str
    seed: int
    scale: float = 1.0
    labelers: str = "simulated"
    overrides: dict[str, list[str]] = field(default_factory=dict)  # further arguments of a stage
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def data(self) -> Path:
        return self.root / self.run / "data"

    def timed(self, name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        self.seconds[name] = round(time.perf_counter() - start, 1)
        return result

    def has(self, stage: str) -> bool:
        from rlhf.registry import Registry

        return bool(Registry(self.root).list(self.run, stage))

    def train(self, stage: str) -> Any:
        """Runs a stage with the demo's recipe; paths and seed are this run's."""
        from rlhf import config

        name = STAGE_OF[stage]
        argv = ["--config", str(config.demo_config(name)), "--output_dir", str(self.root), "--run_name", self.run]
        argv += ["--seed", str(self.seed), *data_arguments(name, self.data), *self.overrides.get(stage, [])]
        return importlib.import_module(f"rlhf.{name}").run(config.parse(name, argv))


def data_arguments(name: str, data: Path) -> list[str]:
    """The recipe's files, in this run's folder."""
    file = {"pretrain": "base", "sft": "demonstrations", "reward": "comparisons", "ppo": "prompts"}[name]
    argv = ["--dataset_name", str(data / f"{file}.jsonl")]
    if name == "reward":
        argv += ["--demonstrations_name", str(data / "demonstrations.jsonl")]
    if name == "ppo":
        argv += ["--ptx_dataset_name", str(data / "base.jsonl")]
    return argv


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, records: Sequence[dict[str, Any]]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    temporary.replace(path)


def load_policy(artifact: Any) -> tuple[Any, Any]:
    from rlhf import models

    tokenizer = models.load_tokenizer(artifact.path)
    return models.load_policy(artifact.path, tokenizer).eval(), tokenizer


# ---- data

CLEANED = ("demonstrations", "comparison_prompts", "prompts")  # what people write is dirty; the rest is written by us


def prepare(demo: Demo) -> tuple[dict[str, Any], str]:
    """Writes the world and cleans what people wrote in it; returns the world's manifest and what was removed."""
    from rlhf.data.clean import clean_files, summary

    raw = demo.data / "raw"
    world = generate(raw, demo.seed, demo.scale)
    reports = clean_files(
        [raw / f"{name}.jsonl" for name in CLEANED], demo.data, evaluation=[raw / "eval_prompts.jsonl"]
    )
    for name in ("base.jsonl", "base_heldout.jsonl", "eval_prompts.jsonl", "world.json"):
        (raw / name).replace(demo.data / name)
    return world, summary(reports)


# ---- feedback


def collect_comparisons(demo: Demo) -> float:
    """K samples of the SFT model a prompt, ranked by the simulated labelers; returns how far two of them agree."""
    from rlhf.feedback import collect_completions, comparison
    from rlhf.registry import Registry

    records = read(demo.data / "comparison_prompts.jsonl")
    policy, tokenizer = load_policy(Registry(demo.root).require("sft", demo.run))
    samples = collect_completions(
        policy,
        tokenizer,
        [r["prompt"] for r in records],
        [K] * len(records),
        response_length=RESPONSE_LENGTH,
        seed=demo.seed + SAMPLE_SEED,
        batch_size=512,  # fewer and larger steps: in small ones most is launching
        shown_as="sampling",
    )
    labelers = make_labelers(demo)
    comparisons = []
    for record, sample in zip(records, samples):
        if len(sample.completions) >= 2:
            name = labelers.assign(sample.prompt)
            ranks = labelers.rank(sample.prompt, sample.completions, name)
            comparisons.append(comparison(sample, ranks, name, user=record["user"], use_case=record["kind"]))
    write(demo.data / "comparisons.jsonl", comparisons)
    both = [
        [labelers.rank(c["prompt"], c["completions"], name, key="agreement") for c in comparisons[:300]]
        for name in labelers.names[:2]
    ]
    return agreement(*both)


def make_labelers(demo: Demo) -> Labelers:
    if demo.labelers == "random":
        return Labelers(demo.seed, names=[f"random-{i}" for i in range(1, 6)])
    return Labelers(demo.seed)


def ensure(stage: str, root: Path = Path("runs"), run: str = "demo", seed: int = 42) -> None:
    """Makes what the demo's `stage` needs and is not there yet, each with a line that says so."""
    demo = Demo(root, run, seed)
    if not (demo.data / "world.json").is_file():
        print(f"writing the demo world to {demo.data}", file=sys.stderr)
        print(prepare(demo)[1], file=sys.stderr)
    for needed in list(STAGE_OF)[: list(STAGE_OF).index(stage)]:
        if needed == "rm" and not (demo.data / "comparisons.jsonl").is_file():
            collect_comparisons(demo)
        if not demo.has(needed):
            print(f"the demo's {needed} is not there yet: making it first", file=sys.stderr)
            demo.train(needed)
    if stage == "rm" and not (demo.data / "comparisons.jsonl").is_file():
        print("sampling answers and having them ranked", file=sys.stderr)
        collect_comparisons(demo)


# ---- the demo


def run(demo: Demo) -> dict[str, Any]:
    """All stages, evaluation and summary.json; returns the summary."""
    from .evaluate import evaluate
    from .terminal import say_stage

    say_stage("world", "prompts, demonstrations and raw text")
    world, removed = demo.timed("world", lambda: prepare(demo))
    say_stage("base", "a language model from scratch on the world's text")
    demo.timed("base", lambda: demo.train("base"))
    say_stage("sft", "supervised fine-tuning on imperfect demonstrations")
    demo.timed("sft", lambda: demo.train("sft"))
    say_stage("feedback", "answers of the SFT model, ranked by simulated labelers")
    agreed = demo.timed("feedback", lambda: collect_comparisons(demo))
    say_stage("rm", "a reward model on the rankings")
    demo.timed("rm", lambda: demo.train("rm"))
    say_stage("ppo", "PPO with KL penalty and pretraining mix")
    demo.timed("ppo", lambda: demo.train("ppo"))
    say_stage("evaluation", "held-out prompts, judged by the truth")
    summary = demo.timed("evaluation", lambda: evaluate(demo, world, agreed))
    summary["cleaning"] = removed
    summary["seconds"] = demo.seconds | {"total": round(sum(demo.seconds.values()), 1)}
    summary["peak_memory_gib"] = peak_memory()
    (demo.root / demo.run / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def peak_memory() -> float | None:
    """The most memory that this process has had at once, in GiB; None where the system does not count it."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 2)


def main() -> None:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("runs"), help="root folder of the registry")
    parser.add_argument("--run_name", default="demo", help="name of the run")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--scale", type=float, default=1.0, help="1 is a tenth of InstructGPT's data, 10 all of it")
    parser.add_argument(
        "--labelers", choices=("simulated", "random"), default="simulated", help="random: rankings that say nothing"
    )
    args = parser.parse_args()
    from rlhf import RLHFError
    from rlhf.cli import silence_libraries

    from .terminal import show

    silence_libraries()
    try:
        demo = Demo(args.output_dir, args.run_name, args.seed, args.scale, args.labelers)
        show(demo, run(demo))
    except RLHFError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
