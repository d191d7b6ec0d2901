"""Seconds a step of SFT, RM and PPO: two processes under DDP, ZeRO 2 and ZeRO 3 beside one process.

    python benchmarks/zero.py                  # three rounds of one process, DDP, ZeRO 2, ZeRO 3; some minutes
    python benchmarks/zero.py --rounds 5 --stages ppo --profile

The model and the batches are those of the demo's recipes (configs/*/demo.yaml). Texts are random words of about the
demo's lengths, the weights are random: what is learned does not matter to the time.

The global batch is the same everywhere, and so are the threads: one process has as many as the two have together. Start-up and
the first steps of each stage are left out. Launches alternate, so that what else the machine does falls on all; the table has the
median over the steps of all rounds. --profile prints where the first process of each launch spent its time.
"""

import argparse
import cProfile
import gc
import itertools
import json
import os
import pstats
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("sft", "reward", "ppo")
LAUNCHES = {"one": 1, "cpu_ddp": 2, "zero2": 2, "zero3": 2}
LEFT_OUT = {"sft": 3, "reward": 2, "ppo": 1}  # steps of the start: allocations, DeepSpeed's first trace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of a launch, over all of its processes")
    parser.add_argument("--episodes", type=int, default=256, help="of a PPO rollout")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--launches", nargs="+", choices=LAUNCHES, default=list(LAUNCHES))
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args, *map(Path, args.child))
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), args.episodes)
        seconds: dict[tuple[str, str], list[float]] = {}
        load = [os.getloadavg()[0]]
        for number in range(args.rounds):
            for name in args.launches:
                out = Path(folder) / f"{name}-{number}.json"
                launch(args, name, Path(folder), out)
                for stage, steps in json.loads(out.read_text()).items():
                    seconds.setdefault((stage, name), []).extend(steps)
                    print(f"{name} {stage} {statistics.median(steps):.3f} s", file=sys.stderr, flush=True)
                load.append(os.getloadavg()[0])
    show(args, seconds, load)


def show(args: argparse.Namespace, seconds: dict[tuple[str, str], list[float]], load: list[float]) -> None:
    base, ppo = yaml_of("pretrain"), yaml_of("ppo")
    steps = ppo["num_mini_batches"] * ppo["num_ppo_epochs"]
    print(
        f"{base['num_hidden_layers']} layers of {base['hidden_size']}, {base['vocab_size']} tokens; milliseconds a step,"
    )
    print(f"median (PPO: a rollout of {args.episodes} episodes with its {steps} optimiser steps);")
    print(f"{args.threads} threads in each launch;", end=" ")
    print(f"{args.rounds} rounds; load average {min(load):.1f} to {max(load):.1f} on {os.cpu_count()} cores")
    print(f"{'':8}" + "".join(f"{name:>16}" for name in args.launches))
    for stage in args.stages:
        medians = [statistics.median(seconds[stage, name]) for name in args.launches]
        cells = [f"{1000 * m:8.1f} ({m / medians[0]:4.2f}x)" for m in medians]
        print(f"{stage:8}" + "".join(f"{cell:>16}" for cell in cells))


def launch(args: argparse.Namespace, name: str, folder: Path, out: Path) -> None:
    """One launch of all stages; their seconds a step go to `out`."""
    processes = LAUNCHES[name]
    config = "cpu" if processes == 1 else name
    words = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"configs/accelerate/{config}.yaml"]
    words += ["--num_processes", str(processes)] + (["--main_process_port", "0"] if processes > 1 else [])
    words += [__file__, "--child", str(folder), str(out), "--stages", *args.stages]
    words += ["--profile"] if args.profile else []
    threads = str(max(1, args.threads // processes))
    env = {**os.environ, "OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    env |= {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    env |= {"ACCELERATE_USE_CPU": "true"} if name == "cpu_ddp" else {}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-4000:]}")
    if args.profile:
        print(f"--- {name}\n{done.stdout}")


# ------------------------------------------------------------------------------------------------------- in the processes


def child(args: argparse.Namespace, folder: Path, out: Path) -> None:
    """Runs the stages one after the other and writes what each step took."""
    import importlib

    from rlhf import training
    from rlhf.cli import run_stage

    main_process = os.environ.get("RANK", "0") == "0"
    moments: list[float] = []
    training.MarkComplete.on_step_end = lambda self, *_, **__: moments.append(time.perf_counter())
    found: dict[str, list[float]] = {}
    for i, stage in enumerate(args.stages):
        importlib.import_module(f"rlhf.{stage}")
        if stage == "ppo":
            sys.modules["rlhf.ppo"].PPO.report = timed(sys.modules["rlhf.ppo"].PPO.report, moments)
        moments.clear()
        profile = cProfile.Profile()
        if args.profile and main_process:
            profile.enable()
        words = ["--config", str(folder / f"{stage}.json"), "--output_dir", str(folder / f"runs-{out.stem}")]
        if stage != "ppo":  # whose batches are totals
            batch = yaml_of(stage)["per_device_train_batch_size"]
            words += ["--per_device_train_batch_size", str(batch // int(os.environ.get("WORLD_SIZE", "1")))]
        run_stage(stage, words, last=i + 1 == len(args.stages))
        gc.collect()  # transformers knows of a launch under ZeRO 3 by an object of the stage before
        profile.disable()
        found[stage] = [b - a for a, b in itertools.pairwise(moments)][LEFT_OUT[stage] :]
        if args.profile and main_process:
            print(f"--- {stage}", flush=True)
            pstats.Stats(profile).sort_stats("tottime").print_stats(25)
    if main_process:
        out.write_text(json.dumps(found))


def timed(report, moments):
    """PPO's `report`, which ends each rollout, with a note of the moment."""

    def wrapper(*args):
        moments.append(time.perf_counter())
        return report(*args)

    return wrapper


# ------------------------------------------------------------------------------------------------------ what they work on


def prepare(folder: Path, episodes: int) -> None:
    """Data, base, sft and rm of random weights for each launch's registry, and the stages' configs."""
    import torch

    from rlhf import models, pretrain
    from rlhf.config import PretrainArgs

    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=generator.randint(2, 7))) for _ in range(400)]

    def some(least: int, most: int) -> str:
        return " ".join(generator.choices(words, k=generator.randint(least, most)))

    data = {
        "base": [{"text": some(40, 200)} for _ in range(600)],
        "demonstrations": [{"prompt": some(8, 40), "completion": " " + some(4, 24)} for _ in range(700)],
        "comparisons": [comparison(generator, some) for _ in range(420)],
        "prompts": [{"prompt": some(8, 40)} for _ in range(1400)],
    }
    for name, records in data.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    base = PretrainArgs(**{k: v for k, v in yaml_of("pretrain").items() if k != "dataset_name"})
    tokenizer = pretrain.make_tokenizer(base, [r["text"] for r in data["base"]])
    torch.manual_seed(0)
    policy = models.AutoModelForCausalLM.from_config(pretrain.model_config(base, tokenizer))
    for name in ("sft", "rm"):
        model = policy if name == "sft" else models.load_scalar_model(folder / "sft", tokenizer, new_head=True)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    shared = {"model_name_or_path": str(folder / "sft"), "eval_fraction": 0.0, "logging_steps": 1000}
    changes = {
        "sft": {**shared, "max_steps": 80, "num_train_epochs": 1},
        "reward": {**shared, "max_steps": 40, "demonstrations_name": None},
        "ppo": {
            "sft_model_path": str(folder / "sft"),
            "reward_model_path": [str(folder / "rm")],
            "total_episodes": 3 * episodes,
            "batch_size": episodes,
            "eval_episodes": 0,
            "kl_budget": None,
            "ptx_dataset_name": str(folder / "base.jsonl"),
        },
    }
    names = {"sft": "demonstrations", "reward": "comparisons", "ppo": "prompts"}
    for stage in STAGES:
        values = {**yaml_of(stage), **changes[stage], "dataset_name": str(folder / f"{names[stage]}.jsonl")}
        values["disable_tqdm"] = True
        (folder / f"{stage}.json").write_text(json.dumps(values))


def comparison(generator: random.Random, some) -> dict:
    count = generator.randint(4, 9)
    return {
        "prompt": some(8, 40),
        "completions": [" " + some(4, 24) for _ in range(count)],
        "ranks": generator.sample(range(1, count + 1), count),
    }


def yaml_of(stage: str) -> dict:
    """The demo's recipe of a stage."""
    from rlhf.config import STAGE_ARGS, read_yaml

    return read_yaml(STAGE_ARGS[stage], str(ROOT / "configs" / stage / "demo.yaml"))


if __name__ == "__main__":
    main()
