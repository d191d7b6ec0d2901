"""What a launch asks of this machine: checked before anything is loaded, and told apart when the memory does not do."""

from __future__ import annotations

import errno
import os
import sys
import time
from pathlib import Path

from rlhf import RLHFError

TRUE = ("1", "true", "yes", "on")
LONGEST_COMPILATION = 15  # minutes; four were the most that was seen


class LaunchError(RLHFError):
    """The processes that were started cannot work together here. Every one of them knows: the first one says it."""


def check_launch() -> None:
    """Refuses a launch that would fail later with a trace, or train each process alone, or without what it asks for."""
    import torch

    world, here = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    on_cpu, deepspeed, fsdp = map(launched_with, ("CPU", "DEEPSPEED", "FSDP"))
    gpus = 0 if on_cpu else torch.cuda.device_count()
    if deepspeed and on_cpu:
        raise LaunchError(
            "ACCELERATE_USE_CPU=true switches DeepSpeed off in silence; unset it: ZeRO runs on CPU processes without it"
        )
    if fsdp and gpus == 0:
        raise LaunchError(
            "FSDP is for CUDA, and no GPU is used here; launch with --config_file configs/accelerate/zero3.yaml, or on CPUs "
            "ACCELERATE_USE_CPU=true accelerate launch --config_file configs/accelerate/cpu_ddp.yaml"
        )
    if fsdp:
        refuse_other_fsdp()
    if gpus and here > gpus:
        raise LaunchError(
            f"{here} processes were launched on a machine with {gpus} GPU{'s' * (gpus > 1)}; give --num_processes "
            f"{gpus * world // here}"
        )
    if gpus == 0 and world > 1 and not (on_cpu or deepspeed):
        raise LaunchError(
            f"{world} processes were launched for as many GPUs, and there is none; they would not synchronise. On CPUs: "
            "ACCELERATE_USE_CPU=true accelerate launch --config_file configs/accelerate/cpu_ddp.yaml"
        )

    if deepspeed:
        refuse_stale_locks()


def refuse_other_fsdp() -> None:
    """FSDP 1 flattens weights, and what each process does not hold or has elsewhere cannot be gathered for a rollout."""
    wanted = {"version": "2", "cpu_ram_efficient_loading": "false", "offload_params": "false"}
    for name, value in wanted.items():
        found = os.environ.get(f"FSDP_{name.upper()}", "1" if name == "version" else "false").lower()
        if found != value:
            raise LaunchError(
                f"fsdp_{name} is {found}: the stages run under FSDP 2, each process reads the whole checkpoint, and weights stay "
                f"on the GPU; set it to {value}, as in configs/accelerate/fsdp2.yaml"
            )


def refuse_stale_locks() -> None:
    """Refuses to wait for a compiler that is not there any more: torch waits for a lock file as long as it exists.

    DeepSpeed compiles its extensions at its first start under such a lock; a launch that is killed then leaves it behind.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    for lock in sorted({*root.glob("*/lock"), *root.glob("*/*/lock")}):
        minutes = (time.time() - lock.stat().st_mtime) / 60
        if minutes > LONGEST_COMPILATION:
            raise LaunchError(
                f"a launch that was killed left {lock} {minutes:.0f} minutes ago; DeepSpeed would wait for it forever: remove it"
            )
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(
                f"waiting for {lock}: DeepSpeed is compiled elsewhere; if it is not, remove the file", file=sys.stderr
            )


def launched_with(what: str) -> bool:
    """Whether the launcher asks accelerate for CPU, DEEPSPEED or FSDP."""
    return os.environ.get(f"ACCELERATE_USE_{what}", "").lower() in TRUE


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether it is the device's or the machine's memory that did not do."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error)
    if isinstance(error, ImportError):  # of a library that is loaded only now
        return "failed to map segment" in text
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "bad_alloc" in text)


def lost_a_process(error: BaseException) -> bool:
    """Whether the connection to another process of the launch broke, as gloo says it."""
    return isinstance(error, RuntimeError) and any(
        text in str(error) for text in ("Connection reset by peer", "Connection closed by peer")
    )


def strategy_of_launch() -> str:
    """The name of the launch's strategy, as `rlhf plan` has it."""
    if not launched_with("DEEPSPEED"):
        if launched_with("FSDP"):
            return "fsdp2"
        return "ddp" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else "single"
    from accelerate.state import AcceleratorState

    plugin = AcceleratorState().deepspeed_plugin
    offload = plugin.deepspeed_config["zero_optimization"].get("offload_optimizer", {}).get("device", "none")
    return f"zero{plugin.zero_stage}" + ("_offload" if plugin.zero_stage == 3 and offload != "none" else "")


def ran_out_of_space(error: BaseException) -> bool:
    """Whether a file could not be written because the disk is full; safetensors and torch say so in words of their own."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    text = str(error)
    return "No space left" in text or "iostream error" in text or ("unexpected pos" in text and "vs" in text)
