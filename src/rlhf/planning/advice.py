"""What a stage that was launched keeps in memory, for the line that says it ran out."""

from __future__ import annotations

import os
from typing import Any

import torch

from rlhf import RLHFError
from rlhf.bases import start_of
from rlhf.launch import strategy_of_launch
from rlhf.planning.memory import MEMORY, Job, Memory, Setup
from rlhf.planning.search import GIB
from rlhf.planning.shapes import Shape, find
from rlhf.registry import Registry
from rlhf.training import resolve

PLANNED = {"sft": "sft", "reward": "rm", "ppo": "ppo"}


def memory_advice(stage: str, args: Any) -> str:
    """One line: what to lower, and what `rlhf plan` counts for this stage as it was launched."""
    lower = [f"per_device_train_batch_size ({args.per_device_train_batch_size})"]
    if stage == "ppo":
        lower.append(f"per_device_rollout_batch_size ({args.per_device_rollout_batch_size})")
        lower.append(f"per_device_ptx_batch_size ({args.per_device_ptx_batch_size})" if args.ptx_coef else "")
    lower.append("" if args.gradient_checkpointing else "set gradient_checkpointing")
    text = f"{stage} ran out of memory; lower {', '.join(filter(None, lower))}"
    if not (getattr(args, "load_in_4bit", False) or getattr(args, "load_in_8bit", False)):  # which are not spread
        text += f", or spread the model: {_wider()}"
    try:
        return f"{text}; {counted(stage, args)}"
    except (
        RLHFError,
        OSError,
        KeyError,
        ValueError,
    ):  # a model that planning does not know: the line says enough without
        return text


def _wider() -> str:
    strategy = strategy_of_launch()
    wider = {"single": "ddp", "ddp": "zero1", "zero1": "zero2", "zero2": "zero3"}.get(strategy, "zero3_offload")
    return f"--config_file configs/accelerate/{wider if strategy != 'single' else 'zero3_offload'}.yaml"


def counted(stage: str, args: Any) -> str:
    """`rlhf plan` counts 12.3 GiB in the update, 8.1 of it activations. Raises KeyError for a stage without a plan."""
    job, setup = job_of(stage, args), setup_of(args)
    memory: Memory = MEMORY[PLANNED[stage]](job, setup)
    moment = memory.phases[memory.phase]
    parts = sorted(moment, key=lambda part: moment[part], reverse=True)[:3]
    largest = ", ".join(f"{moment[part] / GIB:.2f} {part.replace('_', ' ')}" for part in parts)
    return (
        f"`rlhf plan` counts {memory.peak / GIB:.2f} of {job.gpu_gib:.1f} GiB in the {memory.phase} under {setup.strategy}: "
        f"{largest}"
    )


def setup_of(args: Any) -> Setup:
    method: Any = "full"
    if getattr(args, "use_peft", False):
        method = "qlora" if args.load_in_4bit else "lora"
    return Setup(
        strategy_of_launch(),
        method,
        checkpointing=args.gradient_checkpointing,
        micro=args.per_device_train_batch_size,
        rollout=getattr(args, "per_device_rollout_batch_size", 1),
        gather=getattr(args, "ds3_gather_for_generation", True),
    )


def job_of(stage: str, args: Any) -> Job:
    """The stage's models and lengths on this machine's devices."""
    registry = Registry(args.output_dir)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available()
    total = torch.cuda.get_device_properties(0).total_memory if cuda else _host_memory() / world
    common: dict[str, Any] = {
        "gpus": world,
        "gpu_gib": total / GIB,
        "device": "cuda" if cuda else "cpu",
        "precision": "bf16" if args.bf16 else "fp32",
        "lora_r": getattr(args, "lora_r", 16),
        "dtype": "bfloat16" if args.dtype == "bfloat16" else "float32",
    }
    if stage != "ppo":
        parent = {"sft": "base", "reward": "sft"}[stage]
        shape = _shape(resolve(registry, args.model_name_or_path, args.run_name, parent)[0])
        length = min(args.max_length, shape.positions)
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * world
        lengths = {"sft_length": length, "rm_length": length, "sft_batch": batch, "rm_batch": batch}
        return Job(model=shape, reward=shape, **lengths, **common)
    policy = _shape(resolve(registry, args.sft_model_path, args.run_name, "sft")[0])
    path = (args.reward_model_path or [None])[0]
    reward = policy if args.reward_model_path == [] else _shape(resolve(registry, path, args.run_name, "rm")[0])
    return Job(
        model=policy,
        reward=reward,
        prompt=args.max_prompt_length,
        response=args.response_length,
        ppo_batch=args.batch_size,
        ppo_minibatch=args.mini_batch_size,
        rollout_batch=args.per_device_rollout_batch_size,
        ptx=args.ptx_coef > 0,
        ptx_block=args.ptx_block_size,
        ema=args.ema_decay is not None,
        **common,
    )


def _shape(path: str) -> Shape:
    """Of an adapter the shape of its base."""
    return find(start_of(path).base.path)


def _host_memory() -> float:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
