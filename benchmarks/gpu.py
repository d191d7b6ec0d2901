"""How fast SFT, reward model and PPO are on one GPU: GPT-2 (124M) and OPT-1.3B with random weights, at realistic lengths.

    python benchmarks/gpu.py --out gpu.json          # a Markdown table, and the same as JSON; under 4 minutes on an H200
    python benchmarks/gpu.py --smoke                 # tiny models, also without a GPU: whether everything runs
    accelerate launch --config_file configs/accelerate/zero3_offload.yaml --num_processes 1 benchmarks/gpu.py \
        --models opt-1.3b --stages ppo --options sdpa                        # one row, by DeepSpeed

Each row calls the stage itself (`rlhf.sft.run` and so on) on data made here; only the publication at its end is left out. The
first steps of each row are not timed. How to read the table: docs/performance.md.

Model FLOPs, counted on real tokens, with B weights in the layers' matrices, d the width, V the vocabulary:
    forward = 2 B tokens + 2 d V unembedded tokens + 4 d layers pairs       (pairs: query and key that see each other)
    training = 3 forward; what gradient checkpointing computes again does not count, nor is adapters' backward counted as less
    PPO: sampling 1 forward; scoring 1 forward of policy, reference, critic and reward model; update 3 forward of policy and
    critic; pretraining mix 3 forward
MFU = FLOPs / (seconds × --peak-tflops), by default 989, the dense bfloat16 peak of H100 and H200.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import os
import platform
import random
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    OPTConfig,
    PreTrainedTokenizerFast,
)

from rlhf import ppo, reward, rollout, sft
from rlhf.config import PPOArgs, RewardArgs, SFTArgs

CUDA = torch.cuda.is_available()
HEADINGS = ["model", "stage", "options", "s/step", "rollout", "scoring", "update", "tokens/s", "peak GiB", "MFU"]


# ----------------------------------------------------------------------------------------------------------------- shapes


@dataclass(frozen=True)
class Sizes:
    """Tokens of a sequence, and items of a step."""

    prompt: int
    completion: int
    batch: int


@dataclass(frozen=True)
class Shape:
    """An architecture at one size, and the batches that it is trained with."""

    config: Any
    tokens: int  # that its tokenizer has
    sft: Sizes
    rm: Sizes  # completion: of each of K = 4 to 9
    ppo: Sizes
    mini_batches: int = 4
    micro_batch: int = 32
    ptx_block: int = 512

    @property
    def width(self) -> int:
        return self.config.hidden_size

    @property
    def layers(self) -> int:
        return self.config.num_hidden_layers

    def forward(self, tokens: float, pairs: float, unembedded: float = 0) -> float:
        """FLOPs of one forward pass."""
        inner = getattr(self.config, "ffn_dim", None) or 4 * self.width
        body = self.layers * (4 * self.width**2 + 2 * self.width * inner)
        head = self.width * self.config.vocab_size
        return 2 * body * tokens + 2 * head * unembedded + 4 * self.width * self.layers * pairs


def causal(length: float) -> float:
    """Pairs of one causal sequence."""
    return length * (length + 1) / 2


def opt(width: int, layers: int, heads: int, positions: int, vocabulary: int) -> OPTConfig:
    return OPTConfig(
        hidden_size=width,
        word_embed_proj_dim=width,
        ffn_dim=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=positions,
        vocab_size=vocabulary,
    )


SHAPES = {
    "gpt2": Shape(GPT2Config(), 50_257, Sizes(512, 512, 32), Sizes(256, 256, 8), Sizes(256, 128, 256)),
    "opt-1.3b": Shape(
        opt(2048, 24, 32, 2048, 50_272),
        50_265,
        Sizes(512, 512, 8),
        Sizes(256, 256, 4),
        Sizes(256, 128, 128),
        micro_batch=8,
    ),
}
SMALL = {"sft": Sizes(8, 8, 4), "rm": Sizes(6, 4, 2), "ppo": Sizes(8, 4, 8), "mini_batches": 2, "micro_batch": 4}
SMALL |= {"ptx_block": 16}
TINY = {
    "gpt2": Shape(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=200), 200, **SMALL),
    "opt-1.3b": Shape(opt(32, 2, 4, 64, 207), 200, **SMALL),
}


@dataclass
class Case:
    """One row: what is run, and by which of the stage's options."""

    model: str
    stage: str
    label: str
    options: dict[str, Any] = field(default_factory=dict)
    growing: bool = False  # decode with the cache that grows


def cases(smoke: bool) -> list[Case]:
    """The rows, the ones that matter most first."""
    rows = [Case(model, stage, "sdpa") for model in SHAPES for stage in ("sft", "rm", "ppo")]
    rows += [
        Case("gpt2", "sft", "eager", {"attn_implementation": "eager"}),
        Case("gpt2", "sft", "gradient checkpointing", {"gradient_checkpointing": True}),
        Case("gpt2", "ppo", "growing cache", growing=True),
        Case("gpt2", "sft", "muon", {"optim": "muon"}),
    ]
    adapters = {"use_peft": True} | ({} if smoke else {"dtype": "bfloat16"})  # as `rlhf plan` launches them
    rows += [Case("opt-1.3b", stage, "LoRA", adapters) for stage in ("sft", "rm", "ppo")]
    if not smoke:  # 4-bit kernels of a CPU take longer than all the rest
        rows += [Case("opt-1.3b", stage, "QLoRA", {**adapters, "load_in_4bit": True}) for stage in ("sft", "rm", "ppo")]
    if transformers.utils.is_flash_attn_2_available():
        rows.append(Case("gpt2", "sft", "flash_attention_2", {"attn_implementation": "flash_attention_2"}))
    if not smoke:
        rows += [Case("gpt2", stage, "torch_compile", {"torch_compile": True}) for stage in ("sft", "ppo")]
    return rows


# ------------------------------------------------------------------------------------------------------- models and texts


def make_tokenizer(shape: Shape, architecture: str) -> PreTrainedTokenizerFast:
    """As many tokens as the real one; each word is one token, so that texts have known lengths."""
    special = ["<s>", "<pad>", "</s>"] if architecture == "opt" else ["<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(special)}
    for i in range(shape.tokens - len(special)):
        vocabulary[f"w{i}"] = len(vocabulary)
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    roles = {"eos_token": special[-1], "bos_token": special[-1]}
    if architecture == "opt":
        roles["pad_token"] = "<pad>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **roles)


def make_models(shape: Shape, folder: Path) -> None:
    """Random weights as `folder`/sft and `folder`/rm, in bfloat16 to spare the disk; the stages load them as float32."""
    tokenizer = make_tokenizer(shape, shape.config.model_type)
    kinds = {"sft": AutoModelForCausalLM, "rm": AutoModelForSequenceClassification}
    for name, kind in kinds.items():
        config = type(shape.config)(**shape.config.to_dict())
        if name == "rm":
            config.num_labels = 1
        config.pad_token_id = None if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        torch.manual_seed(0)
        with torch.device("cuda" if CUDA else "cpu"):
            model = kind.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        del model


def words(generator: random.Random, shape: Shape, count: int) -> str:
    return " ".join(f"w{generator.randrange(1, shape.tokens - 4)}" for _ in range(count))


def write(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


# ----------------------------------------------------------------------------------------------------------------- clocks


def now() -> float:
    """Seconds, once the GPU has done all that it was given."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


class Stopwatch(sft.MarkComplete):
    """Times a Trainer's steps after the first ones; takes the place of the callback that both trainers are given."""

    warm_up = 3
    seconds = 0.0
    steps = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.warm_up:
            type(self)._start = now()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        type(self).seconds = now() - self._start
        type(self).steps = state.global_step - self.warm_up


@contextlib.contextmanager
def replaced(*places: tuple[Any, str, Any]) -> Iterator[None]:
    """Attributes of modules and classes replaced for the time of the block."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    for owner, name, value in places:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def timed(function: Callable[..., Any], laps: list[tuple[str, float]], name: str) -> Callable[..., Any]:
    """The function, whose seconds go to `laps`."""

    def run(*args: Any, **kwargs: Any) -> Any:
        start = now()
        result = function(*args, **kwargs)
        laps.append((name, now() - start))
        return result

    return run


# ------------------------------------------------------------------------------------------------------------------- rows


def common(shape: Shape, case: Case, folder: Path, smoke: bool) -> dict[str, Any]:
    """Options of every stage."""
    return {
        "output_dir": str(folder / "runs"),
        "run_name": "bench",
        "eval_fraction": 0.0,
        "disable_tqdm": True,
        "logging_steps": 1000,
        "bf16": not smoke,
        "attn_implementation": "sdpa",
    } | case.options


def run_sft(shape: Shape, case: Case, folder: Path, steps: int, smoke: bool) -> dict[str, Any]:
    sizes, generator = shape.sft, random.Random(0)
    records = [
        {"prompt": words(generator, shape, sizes.prompt), "completion": words(generator, shape, sizes.completion - 1)}
        for _ in range(sizes.batch * (Stopwatch.warm_up + steps))
    ]
    sft.run(
        SFTArgs(
            **common(shape, case, folder, smoke),
            model_name_or_path=str(folder / case.model / "sft"),
            dataset_name=write(folder / "demonstrations.jsonl", records),
            max_length=sizes.prompt + sizes.completion,
            max_prompt_length=sizes.prompt,
            max_steps=Stopwatch.warm_up + steps,
            per_device_train_batch_size=sizes.batch,
        )
    )
    length = sizes.prompt + sizes.completion
    flops = 3 * sizes.batch * shape.forward(length, causal(length), sizes.completion)
    return trained(sizes.batch * length, flops)


def run_rm(shape: Shape, case: Case, folder: Path, steps: int, smoke: bool) -> dict[str, Any]:
    sizes, generator = shape.rm, random.Random(0)
    records = []
    for i in range(sizes.batch * (Stopwatch.warm_up + steps)):
        k = 4 + i % 6
        completions = [words(generator, shape, sizes.completion - 1) for _ in range(k)]
        prompt = words(generator, shape, sizes.prompt)
        records.append({"prompt": prompt, "completions": completions, "ranks": list(range(1, k + 1))})
    reward.run(
        RewardArgs(
            **common(shape, case, folder, smoke),
            model_name_or_path=str(folder / case.model / "sft"),
            dataset_name=write(folder / "comparisons.jsonl", records),
            max_length=sizes.prompt + sizes.completion,
            max_steps=Stopwatch.warm_up + steps,
            per_device_train_batch_size=sizes.batch,
        )
    )
    k, p, c = 6.5, sizes.prompt, sizes.completion  # K's mean; a prompt and its completions share a row
    pairs = causal(p) + k * (p * c + causal(c))
    return trained(sizes.batch * (p + k * c), 3 * sizes.batch * shape.forward(p + k * c, pairs))


def trained(tokens: float, flops: float) -> dict[str, Any]:
    """Figures of a Trainer's row from one step's tokens and FLOPs."""
    seconds = Stopwatch.seconds / Stopwatch.steps
    return {"seconds": seconds, "tokens_per_second": tokens / seconds, "flops": flops, "timed_steps": Stopwatch.steps}


def run_ppo(shape: Shape, case: Case, folder: Path, steps: int, smoke: bool) -> dict[str, Any]:
    sizes, generator = shape.ppo, random.Random(0)
    warm_up = 1 if not case.options.get("torch_compile") else 2
    rollouts = warm_up + steps
    prompts = [{"prompt": words(generator, shape, sizes.prompt)} for _ in range(2 * sizes.batch)]
    text = [{"text": words(generator, shape, shape.ptx_block * 64)} for _ in range(4)]
    laps: list[tuple[str, float]] = []
    history: list[dict[str, Any]] = []
    places = [
        (ppo.PPO, "step", timed(ppo.PPO.step, laps, "step")),
        (ppo.PPO, "update", timed(ppo.PPO.update, laps, "update")),
        (ppo, "collect", timed(ppo.collect, laps, "collect")),
        (rollout, "sample_responses", timed(rollout.sample_responses, laps, "rollout")),
        (ppo, "publish", lambda *args, **kwargs: history.extend(kwargs["history"])),
    ]
    if case.growing:
        places.append((rollout, "can_preallocate", lambda policy: False))
    with replaced(*places):
        ppo.run(
            PPOArgs(
                **common(shape, case, folder, smoke),
                sft_model_path=str(folder / case.model / "sft"),
                reward_model_path=[str(folder / case.model / "rm")],
                dataset_name=write(folder / "prompts.jsonl", prompts),
                ptx_dataset_name=write(folder / "text.jsonl", text),
                total_episodes=rollouts * sizes.batch,
                batch_size=sizes.batch,
                num_mini_batches=shape.mini_batches,
                per_device_train_batch_size=shape.micro_batch,
                per_device_rollout_batch_size=sizes.batch,
                per_device_ptx_batch_size=shape.micro_batch,
                max_prompt_length=sizes.prompt,
                response_length=sizes.completion,
                ptx_ratio=1.0,
                ptx_block_size=shape.ptx_block,
                sample_steps=None,
            )
        )
    return ppo_figures(shape, laps, history, warm_up)


def ppo_figures(
    shape: Shape, laps: list[tuple[str, float]], history: list[dict[str, Any]], warm_up: int
) -> dict[str, Any]:
    """Mean seconds a rollout of each phase, without the first rollouts."""
    phases: list[dict[str, float]] = []
    open_: dict[str, float] = {}
    for name, seconds in laps:  # a step's parts come before the step itself
        open_[name] = open_.get(name, 0.0) + seconds
        if name == "step":
            phases.append(open_)
            open_ = {}
    kept = phases[warm_up:]
    mean = {name: statistics.fmean(phase[name] for phase in kept) for name in ("step", "collect", "rollout", "update")}
    answer = statistics.fmean(line["response/length"] for line in history[warm_up:])
    episodes, length = shape.ppo.batch, shape.ppo.prompt + answer
    with_head = shape.forward(length, causal(length), answer)
    without = shape.forward(length, causal(length))
    block = shape.forward(shape.ptx_block, causal(shape.ptx_block), shape.ptx_block - 1)
    parts = {
        "rollout": episodes * with_head,
        "scoring": episodes * (2 * with_head + 2 * without),
        "update": 3 * episodes * (with_head + without + block),
    }
    return {
        "seconds": mean["step"],
        "rollout": mean["rollout"],
        "scoring": mean["collect"] - mean["rollout"],
        "update": mean["update"],
        "tokens_per_second": episodes * answer / mean["step"],
        "episodes_per_second": episodes / mean["step"],
        "decoded_tokens_per_second": episodes * answer / mean["rollout"],
        "response_length": answer,
        "first_ratio": history[0]["policy/first_ratio"],
        "flops": sum(parts.values()),
        "flops_of": parts,
        "timed_steps": len(kept),
    }


STAGES = {"sft": run_sft, "rm": run_rm, "ppo": run_ppo}


def measure(shape: Shape, case: Case, folder: Path, steps: int, smoke: bool, peak: float) -> dict[str, Any]:
    """One row of the table."""
    if not (folder / case.model / "rm").exists():
        make_models(shape, folder / case.model)
    free_memory()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    places = [(module, "MarkComplete", Stopwatch) for module in (sft, reward)]
    places += [(module, "publish", lambda *args, **kwargs: None) for module in (sft, reward)]
    began = time.perf_counter()
    with replaced(*places):
        row = STAGES[case.stage](shape, case, folder, steps, smoke)
    row["wall_seconds"] = time.perf_counter() - began
    row["tflops_per_second"] = row["flops"] / row["seconds"] / 1e12
    if CUDA:
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        row["mfu"] = row["tflops_per_second"] / peak
    return {"model": case.model, "stage": case.stage, "options": label(case)} | row


def label(case: Case) -> str:
    """A row's options; a launch by DeepSpeed adds its file's name, one by FSDP says so."""
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        file = "fsdp2"
    return f"{case.label}, {Path(file).stem}" if file else case.label


def free_memory() -> None:
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------------------------ output


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown; a dash where a figure does not apply."""
    lines = [HEADINGS, ["---"] * 3 + ["---:"] * (len(HEADINGS) - 3)]
    for row in rows:
        if "error" in row:
            lines.append([row["model"], row["stage"], row["options"], row["error"], *["–"] * (len(HEADINGS) - 4)])
            continue
        phases = [f"{row[name]:.3f}" if name in row else "–" for name in ("rollout", "scoring", "update")]
        memory = f"{row['peak_gib']:.1f}" if "peak_gib" in row else "–"
        share = f"{100 * row['mfu']:.1f} %" if "mfu" in row else "–"
        figures = [f"{row['seconds']:.3f}", *phases, f"{row['tokens_per_second']:,.0f}", memory, share]
        lines.append([row["model"], row["stage"], row["options"], *figures])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument(
        "--options", nargs="+", metavar="LABEL", help="rows of these options alone, as the table names them"
    )
    parser.add_argument("--steps", type=int, help="timed steps (default 10, of PPO 3)")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="dense bfloat16 peak of the GPU")
    parser.add_argument("--time-limit", type=float, default=225.0, help="no row starts after this many seconds")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--smoke", action="store_true", help="tiny models: whether everything runs")
    args = parser.parse_args(argv)
    if not CUDA and not args.smoke:
        parser.error("no CUDA device; --smoke runs tiny models without one")
    return args


def main(argv: list[str] | None = None) -> int:
    began, args = time.perf_counter(), arguments(argv)
    folder = Path(tempfile.mkdtemp(prefix="rlhf-benchmark-"))
    shapes, rows = (TINY if args.smoke else SHAPES), []
    if args.smoke:
        Stopwatch.warm_up = 1
    try:
        for case in cases(args.smoke):
            if case.model not in args.models or case.stage not in args.stages:
                continue
            if args.options and case.label not in args.options:
                continue
            if time.perf_counter() - began > args.time_limit:
                rows.append({"model": case.model, "stage": case.stage, "options": label(case), "error": "out of time"})
                continue
            steps = args.steps or (2 if args.smoke else 3 if case.stage == "ppo" else 10)
            try:
                row = measure(shapes[case.model], case, folder, steps, args.smoke, args.peak_tflops)
            except Exception as error:  # the other rows are worth having
                traceback.print_exc()
                kind = {"model": case.model, "stage": case.stage, "options": label(case)}
                row = kind | {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"}
            rows.append(row)
            print(
                table([row]).splitlines()[-1], f"after {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True
            )
            if args.out:
                args.out.write_text(json.dumps(report(args, rows), indent=1))  # what is known if a later row dies
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    device = torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} threads"
    print(f"\n{device}, torch {torch.__version__}, transformers {transformers.__version__}\n\n{table(rows)}")
    return int(any("error" in row and row["error"] != "out of time" for row in rows))


def report(args: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name() if CUDA else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peak_tflops": args.peak_tflops,
        "shapes": {
            name: {key: value for key, value in dataclasses.asdict(shape).items() if key != "config"}
            for name, shape in (TINY if args.smoke else SHAPES).items()
        },
        "rows": rows,
    }


if __name__ == "__main__":
    sys.exit(main())
