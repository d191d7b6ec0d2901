"""How many bytes of weights PPO's models take in each memory mode, and whether they learn the same.

    python benchmarks/memory_modes.py                                   # GPT-2's architecture, 8 layers of 512: 26 M weights
    python benchmarks/memory_modes.py --architecture opt --num_hidden_layers 12 --hidden_size 768
    python benchmarks/memory_modes.py --modes one_base four_models --json

Random weights are published as an SFT model, a whole reward model and one that is an adapter are trained on it for a step by
their stage, and PPO takes one rollout and its update in each mode. Bytes are those of the distinct storages of all
parameters, buffers and quantisation constants of policy, reference, critic and reward model, by
`rlhf.adapters.weight_bytes`; gradients and the optimiser's state are given beside them, activations are not counted.
Everything runs on the CPU in float32, with one thread.
"""

import argparse
import contextlib
import io
import json
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from transformers import AutoModelForCausalLM, set_seed

from rlhf import cli, models, ppo, pretrain, reward
from rlhf.actors import critic_source, load_models, reward_sources
from rlhf.config import PPOArgs, PretrainArgs, RewardArgs
from rlhf.registry import Registry
from rlhf.training import resolve

WORDS = "the river runs north past a mill and old bridge feed grey geese"
# what the run trains, and which reward model it takes
MODES = {
    "full": ({}, "whole/rm"),
    "four_models": ({"use_peft": True, "share_base": False}, "adapter/rm"),
    "two_bases": ({"use_peft": True}, "whole/rm"),
    "one_base": ({"use_peft": True}, "adapter/rm"),
    "one_base_8bit": ({"use_peft": True, "load_in_8bit": True}, "adapter/rm"),
    "one_base_4bit": ({"use_peft": True, "load_in_4bit": True}, "adapter/rm"),
}
SAYS = {
    "full": "full fine-tuning of policy and critic",
    "four_models": "LoRA, four models",
    "two_bases": "LoRA, whole reward model: two bases",
    "one_base": "LoRA, reward model an adapter: one base",
    "one_base_8bit": "the same, base in 8 bits",
    "one_base_4bit": "the same, base in 4 bits",
}


def lines(path: Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def publish_base(folder: Path, options: argparse.Namespace) -> Registry:
    """`whole/base` and `whole/sft`: one set of random weights with a tokenizer trained on a few words."""
    registry = Registry(folder / "runs")
    args = PretrainArgs(
        output_dir=str(registry.root),
        architecture=options.architecture,
        hidden_size=options.hidden_size,
        num_hidden_layers=options.num_hidden_layers,
        num_attention_heads=8,
        vocab_size=300,
        max_position_embeddings=64,
        block_size=16,
    )
    tokenizer = pretrain.make_tokenizer(args, [WORDS])
    set_seed(0)
    model = AutoModelForCausalLM.from_config(pretrain.model_config(args, tokenizer))
    for stage in ("base", "sft"):
        with registry.draft("whole", stage) as draft:
            model.save_pretrained(draft.path)
            tokenizer.save_pretrained(draft.path)
            draft.publish()
    return registry


def train_rewards(folder: Path, registry: Registry, options: argparse.Namespace) -> None:
    """`whole/rm` and `adapter/rm`, one step each from whole/sft."""
    records = [{"prompt": f"Feed {i}:", "completions": [" geese", " mill"], "ranks": [1, 2]} for i in range(4)]
    for run, peft in (("whole", False), ("adapter", True)):
        args = RewardArgs(
            output_dir=str(registry.root),
            run_name=run,
            model_name_or_path="whole/sft",
            dataset_name=lines(folder / "comparisons.jsonl", records),
            eval_fraction=0.0,
            max_steps=1,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            use_peft=peft,
            lora_r=options.lora_r,
            disable_tqdm=True,
        )
        with contextlib.redirect_stdout(io.StringIO()):
            reward.run(args)


def measure(mode: str, folder: Path, registry: Registry, options: argparse.Namespace) -> dict:
    """One rollout and its update in a mode: bytes, and the losses."""
    changes, rm = MODES[mode]
    args = PPOArgs(
        output_dir=str(registry.root),
        run_name="measured",
        sft_model_path="whole/sft",
        reward_model_path=[rm],
        dataset_name=lines(folder / "prompts.jsonl", [{"prompt": f"Say {i}:"} for i in range(8)]),
        eval_fraction=0.0,
        total_episodes=8,
        batch_size=8,
        num_mini_batches=2,
        per_device_train_batch_size=4,
        max_prompt_length=16,
        response_length=8,
        learning_rate=1e-3,
        critic_learning_rate=1e-3,
        ptx_coef=0.0,
        ema_decay=None,
        disable_tqdm=True,
        lora_r=options.lora_r,
        **changes,
    )
    began = time.perf_counter()
    sft_path, _ = resolve(registry, args.sft_model_path, args.run_name, "sft")
    sources = reward_sources(args, registry)
    make_optimizer = ppo.optimizer_factory(args)
    accelerator = ppo.make_accelerator(args, registry.root)
    set_seed(args.seed)
    tokenizer = models.load_tokenizer(sft_path)
    critic_path, _ = critic_source(args, registry, sources, sft_path)
    model, actors = load_models(args, accelerator, tokenizer, sft_path, sources, critic_path)
    loaded = time.perf_counter() - began
    prompts, _, _ = ppo.load_prompts(args, tokenizer, actors)
    trainer = ppo.PPO(args, accelerator, model, make_optimizer(model), actors, prompts, None)
    _, line = trainer.step()
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    states = [t for s in trainer.optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    return {
        "weights_bytes": model.weight_bytes,
        "trained": trained,
        "gradient_bytes": 4 * trained,
        "optimizer_bytes": sum(t.numel() * t.element_size() for t in states),
        "policy_loss": line["loss/policy"],
        "value_loss": line["loss/value"],
        "score": line["objective/scores"],
        "seconds_to_load": round(loaded, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=["gpt2", "opt"], default="gpt2")
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--num_hidden_layers", type=int, default=8)
    parser.add_argument("--lora_r", type=int, default=16)
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cli.silence_libraries()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        registry = publish_base(folder, options)
        train_rewards(folder, registry, options)
        base = registry.require("sft", "whole").path
        parameters = models.load_policy(base, models.load_tokenizer(base)).num_parameters()
        found = {mode: measure(mode, folder, registry, options) for mode in options.modes}
    if options.json:
        print(json.dumps({"parameters": parameters, "modes": found}))
        return
    print(f"{options.architecture}, {parameters:,} parameters, LoRA of rank {options.lora_r}, float32, CPU")
    most = found.get("four_models", found.get("full", next(iter(found.values()))))["weights_bytes"]
    columns = ("weights, MB", "of four", "trained", "gradient, MB", "Adam, MB", "policy loss")
    print(f"{'mode':<42} " + " ".join(f"{name:>13}" for name in columns))
    for mode, row in found.items():
        share = row["weights_bytes"] / most
        sizes = [f"{row['weights_bytes'] / 1e6:.1f}", f"{share:.3f}", f"{row['trained']:,}"]
        sizes += [
            f"{row['gradient_bytes'] / 1e6:.1f}",
            f"{row['optimizer_bytes'] / 1e6:.1f}",
            f"{row['policy_loss']:.7f}",
        ]
        print(f"{SAYS[mode]:<42} " + " ".join(f"{size:>13}" for size in sizes))


if __name__ == "__main__":
    main()
