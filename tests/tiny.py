"""A tiny run for the tests of the stages: texts, records, and base and SFT versions of some thousand weights.

The versions are random weights published through the registry, so that no test of one stage waits for another.
"""

import atexit
import functools
import gc
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed

from rlhf import pretrain
from rlhf.config import PretrainArgs, RewardArgs, SFTArgs
from rlhf.registry import Registry

ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)  # as the processes below have it: the order of a sum depends on the number of threads
gc.freeze()  # Trainer collects garbage after each training, and half a second of that went over the imports

WORDS = ["the", "river", "runs", "north", "past", "a", "mill", "and", "old", "bridge", "feed", "grey", "geese"]
CONTEXT = 64
QUICK = {"run_name": "tiny", "disable_tqdm": True, "logging_steps": 1}


def text(count=60, seed=0):
    """Sentences of a dozen words."""
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=12)) + ".\n" for _ in range(count)]


def demonstrations(count=8, seed=0):
    """Prompts of a few words with answers of one to eight."""
    generator = random.Random(seed)
    return [
        {
            "prompt": f"Say {i}: " + " ".join(generator.choices(WORDS, k=3)),
            "completion": " " + " ".join(generator.choices(WORDS, k=1 + 3 * i % 8)),
        }
        for i in range(count)
    ]


def comparisons(count=8, seed=0, sizes=range(2, 10)):
    """Rankings of K = 2 … 9 completions, with ties; the better one holds more geese."""
    generator = random.Random(seed)
    records = []
    for i in range(count):
        geese = [generator.randrange(4) for _ in range(sizes[i % len(sizes)])]
        geese[:2] = 0, 3  # so that each record has a pair
        completions = [" geese" * n + " " + " ".join(generator.choices(WORDS[:9], k=4)) for n in geese]
        ranks = [1 + sum(other > n for other in geese) for n in geese]
        records.append({"prompt": f"Feed {i}:", "completions": completions, "ranks": ranks})
    return records


def write_lines(path, records):
    """Records as JSON lines; returns the path as text, as a config has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


# Arguments: the smallest settings that still train


def pretrain_args(tmp_path, **changes):
    texts = changes.pop("texts", None) or text()
    values = {
        **QUICK,
        "output_dir": str(tmp_path / "runs"),
        "dataset_name": write_lines(tmp_path / "text.jsonl", [{"text": t} for t in texts]),
        "hidden_size": 32,
        "vocab_size": 300,
        "block_size": 16,
        "max_position_embeddings": CONTEXT,
        "max_steps": 2,
        "warmup_steps": 0,
        "eval_fraction": 0.1,
    }
    return PretrainArgs(**values | changes)


def sft_args(tmp_path, records=None, **changes):
    values = {
        **QUICK,
        "output_dir": str(tmp_path / "runs"),
        "dataset_name": write_lines(tmp_path / "demonstrations.jsonl", records or demonstrations()),
        "eval_fraction": 0.0,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
    }
    return SFTArgs(**values | changes)


def reward_args(tmp_path, records=None, **changes):
    values = {
        **QUICK,
        "output_dir": str(tmp_path / "runs"),
        "dataset_name": write_lines(tmp_path / "comparisons.jsonl", records or comparisons()),
        "eval_fraction": 0.0,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
    }
    return RewardArgs(**values | changes)


# Versions to start from


@functools.cache
def _versions(architecture, dropout):
    """A registry with tiny/base/v1 and tiny/sft/v1 of one set of random weights; made once a process."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    args = pretrain_args(folder, architecture=architecture, embd_pdrop=dropout)
    tokenizer = pretrain.make_tokenizer(args, text())
    set_seed(0)
    model = AutoModelForCausalLM.from_config(pretrain.model_config(args, tokenizer))
    parents = []
    for stage in ("base", "sft"):
        with Registry(args.output_dir).draft("tiny", stage) as draft:
            model.save_pretrained(draft.path)
            tokenizer.save_pretrained(draft.path)
            parents = [draft.publish(parents=parents)]
    return Path(args.output_dir)


def published(tmp_path, *stages, architecture="gpt2", dropout=0.0):
    """A registry in `tmp_path` that holds these stages of the run `tiny`."""
    registry = Registry(tmp_path / "runs")
    for stage in stages:
        shutil.copytree(_versions(architecture, dropout) / "tiny" / stage, registry.root / "tiny" / stage)
    return registry


# Looking at results


def load_causal(artifact):
    return AutoModelForCausalLM.from_pretrained(artifact.path).eval(), AutoTokenizer.from_pretrained(artifact.path)


def load_reward(artifact):
    """By plain transformers, as someone without this package would."""
    model = AutoModelForSequenceClassification.from_pretrained(artifact.path).eval()
    return model, AutoTokenizer.from_pretrained(artifact.path)


@torch.no_grad()
def scores(model, rows):
    """Rewards [N] by the model's own pooling, a row at a time: no padding, nothing of ours."""
    return torch.stack([model(input_ids=torch.tensor([row])).logits[0, 0] for row in rows])


def weights(artifact):
    """All tensors of a version by name."""
    from safetensors.torch import load_file

    return load_file(artifact.path / "model.safetensors")


def history(artifact):
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (artifact.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def largest_difference(left, right):
    """The largest absolute difference between two versions' weights."""
    a, b = weights(left), weights(right)
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def left_over(registry, stage):
    """What the folder of a stage holds besides versions and the registry's lock: drafts, work folders."""
    folder = registry.root / "tiny" / stage
    names = sorted(p.name for p in folder.iterdir()) if folder.exists() else []
    return [name for name in names if not name.startswith("v") and name != ".lock"]


# Real processes


AROUND = (  # what `accelerate launch` and `make` hand to the processes that they start
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"),
    *("MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "RUN", "CONFIG", "ARGS"),
)


def environment(**changes):
    """One thread, no accelerator, no network; and no launch or make of ours around it."""
    inherited = {k: v for k, v in os.environ.items() if k not in AROUND}
    fixed = {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return {**inherited, **fixed, **changes}


def write_config(path, args, **changes):
    """The choices of `args` as a YAML file (JSON is YAML)."""
    from rlhf.config import to_dict

    path.write_text(json.dumps({**to_dict(args), **changes}, indent=1), encoding="utf-8")
    return str(path)


def program(name):
    """A program of the environment that the tests run in."""
    return str(Path(sys.executable).parent / name)


def launch(command, **changes):
    """Runs a command in the checkout and returns it with its output as text."""
    return subprocess.run(
        command, cwd=ROOT, env=environment(**changes), capture_output=True, text=True, timeout=900, check=False
    )
