"""The command `rlhf plan`: arguments to a job, plans as a table or as JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
from typing import Any

from rlhf.manifest import MANIFEST
from rlhf.planning.memory import PARTS, Job
from rlhf.planning.search import GIB, STRATEGIES, Assumptions, Plan, describe, smallest
from rlhf.planning.shapes import TOO_LARGE, PlanError, Shape, find
from rlhf.registry import STAGES, Registry

POSITIVE = (
    "gpus", "gpus_per_node", "gpu_memory", "max_length", "prompt_length", "response_length", "sft_batch", "rm_batch",
    "completions", "ppo_batch", "num_mini_batches", "rollout_batch", "tflops", "gather_gb_s", "sft_epochs",
)  # fmt: skip
SHORTEST = 8  # `max_length` in the stages' own configs, at least
FROM_ZERO = ("demonstrations", "comparisons", "episodes", "ptx_ratio")


def run(args: argparse.Namespace) -> None:
    """Prints the plans. Raises PlanError after them where a stage fits nowhere."""
    check_numbers(args)
    job, assume = job_of(args), assumptions_of(args)
    plans: list[Plan] = []
    failures: list[str] = []
    for stage in dict.fromkeys(args.stage):
        try:
            plans.append(smallest(stage, job, assume, args.strategy or STRATEGIES))
        except PlanError as error:
            failures.append(str(error))
    if args.json:
        print(json.dumps(as_json(job, assume, plans, failures), indent=2))
    elif plans:
        show(job, assume, plans)
    if failures:
        sys.stdout.flush()
        raise PlanError("; ".join(failures))


def job_of(args: argparse.Namespace) -> Job:
    check_counts(args)
    model = shape_of(args.model, args.root)
    reward = shape_of(args.reward_model, args.root) if args.reward_model else model
    sft, rm = (args.max_length or min(2048, shape.positions) for shape in (model, reward))
    context = min(model.positions, reward.positions)
    response = args.response_length or max(1, min(1024, context // 2))
    prompt = args.prompt_length or max(1, min(1024, context - response))
    for stage, length, limit, option in (
        ("sft", sft, model.positions, "--max-length"),
        ("rm", rm, reward.positions, "--max-length"),
        ("ppo", prompt + response, context, "--prompt-length or --response-length"),
    ):
        if stage in args.stage and length > limit:
            raise PlanError(f"{stage}: {length} tokens do not fit in the context of {limit}; lower {option}")
        if stage in args.stage and stage != "ppo" and length < SHORTEST:
            raise PlanError(
                f"{stage}: {length} tokens are less than the {SHORTEST} that the stage takes at least; raise {option}"
            )
    return Job(
        model=model,
        reward=reward,
        gpus=args.gpus,
        gpu_gib=args.gpu_memory,
        per_node=args.gpus_per_node,
        precision=args.precision,
        sft_length=sft,
        sft_batch=args.sft_batch,
        rm_length=rm,
        rm_batch=args.rm_batch,
        completions=args.completions,
        prompt=prompt,
        response=response,
        ppo_batch=args.ppo_batch,
        ppo_minibatch=args.ppo_batch // args.num_mini_batches,
        rollout_batch=args.rollout_batch,
        ptx=not args.no_ptx,
        ema=not args.no_ema,
    )


def shape_of(model: str, root: str) -> Shape:
    """The shape of a version, of an adapter's base (on the Hub too), or what `find` knows, for which torch is not imported."""
    if os.path.exists(model):
        known = any(os.path.isfile(os.path.join(model, name)) for name in (MANIFEST, "adapter_config.json"))
    else:
        known = model.partition("/")[2].replace("@", "/").split("/")[0] in STAGES
    if not known:
        try:
            return find(model)
        except PlanError:
            from rlhf.bases import start_of

            if os.path.exists(model) or (base := start_of(model).base.path) == model:
                raise
            return find(base)
    from rlhf.bases import start_of
    from rlhf.training import resolve

    path, artifact = resolve(Registry(root), model, "", "")
    shape = find(start_of(path).base.path)
    return shape if artifact is None else dataclasses.replace(shape, name=artifact.ref)


def check_numbers(args: argparse.Namespace) -> None:
    """Raises PlanError for a number that nothing can be counted with."""
    for name in (*POSITIVE, *FROM_ZERO):
        value, option = getattr(args, name), f"--{name.replace('_', '-')}"
        if value is None:
            continue
        if not (value > 0 or (value == 0 and name in FROM_ZERO)):
            raise PlanError(f"{option} must be {'0 or more' if name in FROM_ZERO else 'above 0'} and is {value}")
        if value >= TOO_LARGE:
            raise PlanError(f"{option} must be below {TOO_LARGE:.0e} and is {str(value)[:20]}")


def check_counts(args: argparse.Namespace) -> None:
    """Raises PlanError for what a launch refuses or does otherwise: accelerate starts as many processes on each machine."""
    gpus, size = args.gpus, args.gpus_per_node
    machines = math.ceil(gpus / size)
    if gpus % machines:
        fewer, more = max(gpus // machines * machines, (machines - 1) * size), (gpus // machines + 1) * machines
        raise PlanError(f"--gpus {gpus} are not the same number on each of {machines} machines; give {fewer} or {more}")
    if "ppo" in args.stage and args.ppo_batch % args.num_mini_batches:
        raise PlanError(f"--num-mini-batches must divide --ppo-batch ({args.ppo_batch}) and is {args.num_mini_batches}")


def assumptions_of(args: argparse.Namespace) -> Assumptions:
    names = {f.name for f in dataclasses.fields(Assumptions)}
    assume = Assumptions(**{name: getattr(args, name) for name in names if getattr(args, name, None) is not None})
    for name in ("mfu", "generation_share", "reserve"):
        value = getattr(assume, name)
        if not 0 <= value < 1 or (name == "mfu" and value == 0):
            least = "above 0" if name == "mfu" else "from 0"
            raise PlanError(f"--{name.replace('_', '-')} is a share {least} and below 1 and is {value}")
    return assume


def as_json(job: Job, assume: Assumptions, plans: list[Plan], failures: list[str]) -> dict[str, Any]:
    """Everything that the table says, in bytes."""
    return {
        "model": _model(job.model, job.model.parameters),
        "reward_model": _model(job.reward, job.reward.scalar_parameters),
        "job": {k: v for k, v in dataclasses.asdict(job).items() if k not in ("model", "reward")},
        "assumptions": dataclasses.asdict(assume),
        "stages": {
            plan.stage: {
                "setup": dataclasses.asdict(plan.setup),
                "gradient_accumulation_steps": plan.accumulation,
                "bytes": {part: int(size) for part, size in plan.memory.parts.items()},
                "peak_bytes": int(plan.memory.peak),
                "peak_phase": plan.memory.phase,
                "host_bytes_per_gpu": int(plan.memory.host),
                "hours": plan.hours,
                "command": plan.command,
                "notes": plan.notes,
            }
            for plan in plans
        },
        "failures": failures,
    }


def _model(shape: Shape, parameters: int) -> dict[str, Any]:
    return {"name": shape.name, "family": shape.family, "parameters": parameters}


def show(job: Job, assume: Assumptions, plans: list[Plan]) -> None:
    """The table, the commands and what the numbers rest on; without colour or box where stdout is no terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    terminal = sys.stdout.isatty()
    console = Console(width=None if terminal else 160, highlight=False, soft_wrap=not terminal)
    console.print(
        f"{job.model.name}, {_count(job.model.parameters)} parameters; reward model and critic {job.reward.name}, "
        f"{_count(job.reward.scalar_parameters)}; {job.gpus} x {job.gpu_gib:g} GiB, {job.precision}"
    )
    table = Table("GiB a GPU", box=box.SIMPLE_HEAD if terminal else box.ASCII2, show_edge=terminal)
    for plan in plans:
        table.add_column(plan.stage, justify="right")
    for part in PARTS:
        sizes = [plan.memory.parts[part] for plan in plans]
        if any(sizes):
            table.add_row(part.replace("_", " "), *(f"{size / GIB:.2f}" if size else "" for size in sizes))
    table.add_section()
    table.add_row("peak", *(f"{plan.memory.peak / GIB:.2f}" for plan in plans))
    table.add_row("in", *(plan.memory.phase for plan in plans))
    table.add_row("smallest that fits", *(describe(plan.setup).replace(", ", "\n") for plan in plans))
    table.add_row("hours", *(f"{plan.hours:.1f}" for plan in plans))
    console.print(table)
    for plan in plans:
        console.print(f"{plan.stage}:  {plan.command}", markup=False)
        for note in plan.notes:
            console.print(f"      {note}", markup=False)
    console.print(f"\n{assumptions(job, assume, plans)}", markup=False)


def assumptions(job: Job, assume: Assumptions, plans: list[Plan]) -> str:
    """The sentence under the table."""
    ptx = f", {assume.ptx_ratio:g} pretraining examples of {job.ptx_block} tokens an episode" if job.ptx else ""
    lengths = {"sft": f"{job.sft_length}", "rm": f"{job.rm_length}", "ppo": f"{job.prompt} + {job.response}"}
    long = ", ".join(f"{plan.stage} {lengths[plan.stage]}" for plan in plans)
    generation = f"generation is {assume.generation_share:.0%} of PPO's time without pretraining mix"
    if any(not plan.setup.gather for plan in plans):
        generation += f", or comes at {assume.gather_gb_s:g} GB/s a GPU where layers are gathered one at a time"
    return (
        f"Assumed: {assume.tflops:g} TFLOP/s a GPU of which {assume.mfu:.0%} are reached; {generation}; "
        f"{assume.reserve:.0%} of the memory is for "
        f"CUDA, NCCL and fragmentation; all sequences as long as they may be ({long}); {assume.demonstrations} "
        f"demonstrations x {assume.sft_epochs:g} epochs, {assume.comparisons} prompts with {job.completions} completions, "
        f"{assume.episodes} episodes{ptx}. The parts are each at their largest; the peak is of one moment, and can be less "
        "than their sum."
    )


def _count(parameters: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if parameters >= size:
            return f"{parameters / size:.4g}{unit}"
    return str(parameters)
