"""K-way training of a reward model beside the same comparisons as pairs in trl.RewardTrainer, and beside one row a completion.

    python benchmarks/rm_vs_trl.py DATA                  # DATA/pref and DATA/tokenizer as in docs/reward.md
    python benchmarks/rm_vs_trl.py DATA --prompts 32 --layers 4 --width 256 --rounds 3

One GPT-2 with random weights, GPT-2's own tokens, float32, no dropout, no checkpointing of activations, Adam. First the
gradient of one batch is compared: all pairs of one prompt, for TRL as pairs, for us as one ranking. Then the trainers run over
the same prompts in turns, with the same number of optimiser steps (TRL accumulates its micro-batches), and prompts a second
are reported with the ratio of each turn.

1. alpaca_eval_kway_dev: K = 7 to 9 outputs a prompt; `trl.RewardTrainer` on every strictly ordered pair of them.
2. the same, and qa_feedback_k4 (K = 4, prompts with the passages, most of the tokens): ours against our own plain K-way, which
   takes one padded row a completion.
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers
from datasets import Dataset, disable_progress_bars
from transformers import GPT2Config, GPT2ForSequenceClassification, TrainerCallback, TrainingArguments
from trl import RewardConfig
from trl import RewardTrainer as PairTrainer

from rlhf import pretrain, reward, shared_prompt
from rlhf.config import PretrainArgs
from rlhf.data import load
from rlhf.training import Rows

SHARED = {
    "learning_rate": 1e-5,
    "num_train_epochs": 1,
    "logging_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "seed": 1,
    "use_cpu": not torch.cuda.is_available(),
}


def make_model(args, tokenizer):
    torch.manual_seed(0)
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=args.width,
        n_layer=args.layers,
        n_head=max(1, args.width // 64),
        n_positions=args.max_length,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
        activation_function="gelu_pytorch_tanh",  # gelu_new as one kernel, for both alike
        **dropout,
    )
    return GPT2ForSequenceClassification(config)


def pairs(items):
    """Every strictly ordered pair of every prompt, as TRL takes it: prompt and completion in one."""
    rows = []
    for item in items:
        texts = [item["prompt"] + completion for completion in item["completions"]]
        ranked = list(zip(item["ranks"], texts))
        rows += [{"chosen_ids": a, "rejected_ids": b} for i, a in ranked for j, b in ranked if i < j]
    return rows


class Clock(TrainerCallback):
    """CPU seconds of the process, which other work on the machine does not lengthen; with a GPU, seconds of the clock."""

    now = staticmethod(time.perf_counter if torch.cuda.is_available() else time.process_time)

    def on_train_begin(self, *args, **kwargs):
        self.start = self.now()

    def on_train_end(self, *args, **kwargs):
        self.seconds = (self.now() - self.start) / (1 if torch.cuda.is_available() else torch.get_num_threads())


def our_trainer(args, tokenizer, items, folder, share=True):
    model = make_model(args, tokenizer)
    if share:
        shared_prompt.enable(model)
    size = {"per_device_train_batch_size": args.step, "remove_unused_columns": False, "label_names": ["ranks"]}
    clock = Clock()
    trainer = reward.RewardTrainer(
        model=model,
        args=TrainingArguments(output_dir=folder, **SHARED, **size),
        train_dataset=Rows(items),
        processing_class=tokenizer,
        data_collator=reward.Collator(tokenizer.pad_token_id, share),
        callbacks=[clock],
    )
    return trainer, clock


def pair_trainer(args, tokenizer, items, folder):
    rows = pairs(items)
    accumulate = max(1, round(len(rows) / args.pairs / (len(items) / args.step)))
    clock = Clock()
    config = RewardConfig(
        output_dir=folder,
        **SHARED,
        per_device_train_batch_size=args.pairs,
        gradient_accumulation_steps=accumulate,
        max_length=None,
        bf16=False,
        activation_checkpointing=False,
    )
    trainer = PairTrainer(
        model=make_model(args, tokenizer),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    return trainer, clock


def gradient(trainer, inputs, **more):
    trainer.model.zero_grad()
    inputs = trainer._prepare_inputs(inputs)
    loss = trainer.compute_loss(trainer.model, inputs, **more)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}


def compare_gradients(args, tokenizer, items, folder):
    """One prompt: the mean over its pairs is the loss of both."""
    item = min(items, key=lambda item: sum(map(len, item["completions"])))
    ours, _ = our_trainer(args, tokenizer, [item], folder)
    theirs, _ = pair_trainer(args, tokenizer, [item], folder)
    mine, gradients = gradient(ours, ours.data_collator([item]))
    other, expected = gradient(theirs, theirs.data_collator(pairs([item])))
    # The loss does not change when all rewards do, so the gradient of the last norm's bias is 0 but for rounding.
    floor = 1e-3 * torch.stack([value.norm() for value in expected.values()]).norm()
    worst = max(
        ((gradients[name] - value).norm() / value.norm().clamp(min=floor)).item() for name, value in expected.items()
    )
    print(f"one prompt, K = {len(item['ranks'])}, {len(pairs([item]))} pairs: loss {mine:.7f} and TRL's {other:.7f};")
    print(f"largest relative difference of a weight's gradient: {worst:.1e}\n", flush=True)
    assert worst < 1e-4, "the two do not compute the same"


def race(title, items, rounds, makers):
    """Seconds of each, in turns; the first named is ours."""
    times: dict[str, list[float]] = {name: [] for name in makers}
    for turn in range(rounds):
        for name in list(makers) if turn % 2 == 0 else list(makers)[::-1]:
            with contextlib.redirect_stdout(None):
                trainer, clock = makers[name]()
                trainer.train()
            times[name].append(clock.seconds)
            print(f"turn {turn + 1}, {name}: {clock.seconds:.1f} s", file=sys.stderr, flush=True)
    ours = next(iter(makers))
    print(f"{title}\n\n| | seconds (each turn) | prompts a second | ours is faster by |\n|---|---|---|---|")
    for name, seconds in times.items():
        ratios = [b / a for a, b in zip(times[ours], seconds)]
        listed = ", ".join(f"{s:.1f}" for s in seconds)
        faster = "" if name == ours else f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {name} | {listed} | {len(items) / statistics.median(seconds):.3f} | {faster} |")
    print(flush=True)


def tokens(items):
    """What each way computes: tokens in shared rows, in one row a completion, and in pairs, without padding."""
    shared = sum(len(i["prompt"]) + sum(map(len, i["completions"])) for i in items)
    alone = sum(len(i["prompt"]) * len(i["completions"]) + sum(map(len, i["completions"])) for i in items)
    paired = sum(len(row[name]) for row in pairs(items) for name in row)
    share = sum(len(i["prompt"]) * len(i["completions"]) for i in items) / alone
    k = sorted({len(i["ranks"]) for i in items})
    print(
        f"{len(items)} prompts, K = {k[0]} to {k[-1]}, {len(pairs(items))} pairs; the prompt is {share:.0%} of a row;"
    )
    print(f"tokens: {shared:,} shared, {alone:,} one row a completion ({alone / shared:.2f} times),", end=" ")
    print(f"{paired:,} as pairs ({paired / shared:.2f} times)\n", flush=True)


def read(args, tokenizer, name, count):
    records = load("comparisons", args.data / "pref" / name).shuffle(seed=0)
    return reward.encode(tokenizer, records, args.max_length).rows[:count]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("data", type=Path, metavar="DATA", help="folder with pref/ and tokenizer/")
    add("--prompts", type=int, default=16, help="of alpaca_eval (default: %(default)s)")
    add("--long-prompts", type=int, default=48, help="of qa_feedback (default: %(default)s)")
    add("--step", type=int, default=8, help="prompts in an optimiser step (default: %(default)s)")
    add("--pairs", type=int, default=8, help="pairs in TRL's micro-batch (default: %(default)s)")
    add("--layers", type=int, default=4)
    add("--width", type=int, default=256)
    add("--max-length", type=int, default=1024)
    add("--rounds", type=int, default=3, help="turns of each (default: %(default)s)")
    add("--skip-trl", action="store_true", help="only ours against our own")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    disable_progress_bars()
    vocab, merges = (str(args.data / "tokenizer" / name) for name in ("gpt2_encoder.json", "gpt2_vocab.bpe"))
    tokenizer = pretrain.make_tokenizer(
        PretrainArgs(tokenizer_vocab_file=vocab, tokenizer_merges_file=merges, max_position_embeddings=1 << 20), []
    )
    tokenizer.pad_token or tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    print(
        f"GPT-2 of {args.layers} layers x {args.width}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"
    )
    with tempfile.TemporaryDirectory() as folder:
        items = read(args, tokenizer, "alpaca_eval_kway_dev.jsonl", args.prompts)
        long = read(args, tokenizer, "qa_feedback_k4.jsonl", args.long_prompts)
        mine = "ours, shared prompt"
        if not args.skip_trl:
            compare_gradients(args, tokenizer, items, folder)
            tokens(items)
            race(
                "alpaca_eval_kway_dev beside TRL",
                items,
                args.rounds,
                {
                    mine: lambda: our_trainer(args, tokenizer, items, folder),
                    "trl.RewardTrainer, pairs": lambda: pair_trainer(args, tokenizer, items, folder),
                },
            )
        for name, rows in (("alpaca_eval_kway_dev", items), ("qa_feedback_k4", long)):
            tokens(rows)
            race(
                f"{name} beside one row a completion",
                rows,
                args.rounds,
                {
                    mine: lambda rows=rows: our_trainer(args, tokenizer, rows, folder),
                    "ours, one row a completion": lambda rows=rows: our_trainer(args, tokenizer, rows, folder, False),
                },
            )


if __name__ == "__main__":
    main()
