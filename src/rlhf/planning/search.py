"""The smallest configuration that fits, how it is launched, and how long it takes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from rlhf.planning.memory import MEMORY, Job, Memory, Setup, ema_bytes, gathered_policy, items
from rlhf.planning.shapes import PlanError

GIB = 2**30
STRATEGIES = (
    "ddp",
    "zero1",
    "zero2",
    "zero3",
    "zero3_offload",
    "lora",
    "qlora",
)  # from the simplest to the last resort
ENOUGH_TOKENS = 2048  # a micro-batch with fewer leaves a GPU idle: recomputing activations for a larger one comes first
SCRIPTS = {"sft": "scripts/sft.py", "rm": "scripts/reward.py", "ppo": "scripts/ppo.py"}


@dataclass(frozen=True)
class Assumptions:
    """What the hours rest on. All of it is printed beside them."""

    tflops: float = 312.0  # A100, dense bf16 (NVIDIA's data sheet)
    mfu: float = 0.35
    generation_share: float = 0.66  # of PPO's time without pretraining mix: DeepSpeed-Chat's own log
    gather_gb_s: float = 25.0  # gigabytes of others' weights that a GPU gets a second: a card of 200 Gb/s for each
    reserve: float = 0.08  # of a GPU's memory: CUDA context, NCCL, fragmentation
    demonstrations: int = 12_725  # InstructGPT, table 6: training sets
    sft_epochs: float = 16
    comparisons: int = 33_207
    episodes: int = 256_000
    ppo_epochs: int = 1
    ptx_ratio: float = 8.0


@dataclass(frozen=True)
class Plan:
    """The smallest configuration of one stage that fits."""

    stage: str
    setup: Setup
    memory: Memory
    accumulation: int
    hours: float
    command: str
    notes: list[str] = field(default_factory=list)


def candidates(stage: str, job: Job, strategies: Sequence[str]) -> Iterator[Setup]:
    """Configurations from the simplest and fastest to the most frugal."""
    most = items(stage, job)
    micros = micro_batches(stage, most)
    enough = [m for m in micros if is_enough(stage, job, m)]
    # One GPU has nobody to share with. Gathering layers one at a time is the last resort: the slowest.
    possible = [name for name in strategies if job.gpus > 1 or name not in ("zero1", "zero2", "zero3", "fsdp2")]
    by_layer = [name for name in possible if name.startswith("zero3") and stage == "ppo"]
    for name, gather in [(name, True) for name in possible] + [(name, False) for name in by_layer]:
        for checkpointing, sizes in ((False, enough), (True, micros), (False, micros)):
            for micro in sizes:
                yield replace(setup_of(name, job, checkpointing, micro), gather=gather)


def is_enough(stage: str, job: Job, micro: int) -> bool:
    """Whether a micro-batch keeps a GPU busy, or is all there is."""
    length = {"sft": job.sft_length, "rm": job.rm_length * job.completions, "ppo": job.prompt + job.response}[stage]
    return micro * length >= ENOUGH_TOKENS or micro == items(stage, job)


def micro_batches(stage: str, most: int) -> list[int]:
    """Sizes to try, from all items of a GPU down to one.

    SFT's and RM's micro-batches are all alike, so that only sizes that divide the items keep the batch; PPO's last one may be
    smaller than the others.
    """
    if stage == "ppo":
        return [most] + [2**k for k in range(int(math.log2(most)), -1, -1) if 2**k < most]
    small = [k for k in range(1, math.isqrt(most) + 1) if most % k == 0]
    return sorted({*small, *(most // k for k in small)}, reverse=True)


def setup_of(name: str, job: Job, checkpointing: bool, micro: int) -> Setup:
    plain = "ddp" if job.gpus > 1 else "single"
    setup = Setup(plain if name in ("ddp", "lora", "qlora") else name, checkpointing=checkpointing, micro=micro)
    if name == "lora":
        return replace(setup, method="lora")
    return replace(setup, method="qlora") if name == "qlora" else setup


def with_rollout(job: Job, setup: Setup, limit: float) -> Setup:
    """The largest number of prompts decoded at once that fits, from what is asked for down to one."""
    rollout = max(1, min(job.rollout_batch, math.ceil(job.ppo_batch / job.gpus)))
    while rollout > 1 and _rollout_peak(job, replace(setup, rollout=rollout)) > limit:
        rollout = max(1, rollout // 2)
    return replace(setup, rollout=rollout)


def _rollout_peak(job: Job, setup: Setup) -> float:
    phases = MEMORY["ppo"](job, setup).phases
    return max(sum(phases[name].values()) for name in ("prefill", "decode", "score"))


def smallest(stage: str, job: Job, assume: Assumptions, strategies: Sequence[str] = STRATEGIES) -> Plan:
    """The first candidate whose peak is below the memory there is. Raises PlanError with the closest one and what would help."""
    limit = job.gpu_gib * GIB * (1 - assume.reserve)
    closest: tuple[float, Setup, Memory] | None = None
    for candidate in candidates(stage, job, strategies):
        setup = with_rollout(job, candidate, limit) if stage == "ppo" else candidate
        memory = MEMORY[stage](job, setup)
        if memory.peak <= limit:
            plan = _plan(stage, job, setup, memory, assume)
            return replace(plan, notes=[*plan.notes, *_faster(plan, job, assume, strategies)])
        if closest is None or memory.peak < closest[0]:
            closest = (memory.peak, setup, memory)
    if closest is None:
        raise PlanError(f"{stage}: nothing to try among {', '.join(strategies)} on {job.gpus} GPU; add ddp")
    raise PlanError(_closest(stage, job, closest[1], closest[2], limit, strategies))


def _faster(plan: Plan, job: Job, assume: Assumptions, strategies: Sequence[str]) -> list[str]:
    """A note where a more frugal strategy fits as well, and need not compute activations again."""
    limit, found = job.gpu_gib * GIB * (1 - assume.reserve), plan.setup
    for candidate in candidates(plan.stage, job, strategies) if found.checkpointing else ():
        alike = candidate.method == found.method and candidate.gather == found.gather
        costly = candidate.checkpointing or candidate.sharding.offload
        if costly or not alike or not is_enough(plan.stage, job, candidate.micro):
            continue
        setup = with_rollout(job, candidate, limit) if plan.stage == "ppo" else candidate
        taken = hours(plan.stage, job, setup, assume)
        if MEMORY[plan.stage](job, setup).peak <= limit and round(taken, 1) < round(plan.hours, 1):
            return [f"{describe(setup)}, fits as well without gradient checkpointing, and takes {taken:.1f} hours"]
    return []


def _closest(stage: str, job: Job, setup: Setup, memory: Memory, limit: float, strategies: Sequence[str]) -> str:
    shape = job.reward if stage == "rm" else job.model
    moment = memory.phases[memory.phase]
    largest = max(moment, key=lambda part: moment[part])
    gathered = gathered_policy(job, setup) if stage == "ppo" else 0.0
    help_ = [f"GPUs with {math.ceil(memory.peak / (limit / job.gpu_gib))} GiB"]
    if moment[largest] - gathered > memory.peak / 4 and largest in ("activations", "kv_cache"):
        help_.append("shorter sequences")
    if setup.sharding.level == 3 and gathered < limit / 2 and largest not in ("activations", "kv_cache"):
        help_.append("more GPUs")
    if stage == "ppo" and ema_bytes(job, setup) > memory.peak / 20:
        help_.append("--no-ema")
    if job.gpus == 1 and not setup.sharding.offload and len(strategies) > 1:
        help_.append("more GPUs")
    if missing := [name for name in STRATEGIES if name not in strategies]:
        help_.append(f"--strategy {' or '.join(missing)}")
    part = "the policy gathered for a rollout" if gathered > memory.peak / 2 else largest.replace("_", " ")
    size = gathered if gathered > memory.peak / 2 else moment[largest]
    return (
        f"{stage} of {shape.name} fits nowhere on {job.gpus} x {job.gpu_gib:g} GiB: the closest, {describe(setup)}, needs "
        f"{memory.peak / GIB:.1f} of {limit / GIB:.1f} GiB, {size / GIB:.1f} of it {part}; "
        f"what would help: {', '.join(dict.fromkeys(help_))}"
    )


def describe(setup: Setup) -> str:
    """A configuration in a few words."""
    words = [setup.strategy if setup.method == "full" else setup.method]
    words += [] if setup.gather else ["a layer at a time"]
    words += ["gradient checkpointing"] if setup.checkpointing else []
    return ", ".join([*words, f"micro-batch {setup.micro}"])


def _plan(stage: str, job: Job, setup: Setup, memory: Memory, assume: Assumptions) -> Plan:
    accumulation = math.ceil(items(stage, job) / setup.micro)
    command = launch_command(stage, job, setup, accumulation)
    return Plan(
        stage, setup, memory, accumulation, hours(stage, job, setup, assume), command, _notes(stage, job, setup, memory)
    )


def _notes(stage: str, job: Job, setup: Setup, memory: Memory) -> list[str]:
    found = []
    shape = job.reward if stage == "rm" else job.model
    share, wanted = items(stage, job), {"sft": job.sft_batch, "rm": job.rm_batch}.get(stage)
    if wanted not in (None, share * job.gpus):  # PPO's processes may have unequal shares
        found.append(f"an optimiser step is of {share * job.gpus}, not {wanted}: each of {job.gpus} GPUs takes {share}")
    if shape.approximate:
        found.append(f"activations of {shape.name} are estimated by {shape.family}'s layers")
    if setup.sharding.offload:
        found.append(
            f"{memory.host * job.gpus / job.machines / GIB:.0f} GiB of memory on each machine; hours are without "
            "the time of moving states between CPU and GPU"
        )
    if not setup.gather:
        found.append(
            "the policy does not fit on a GPU: every layer is gathered for every token, which takes most of the hours"
        )
    if setup.method != "full" and stage == "ppo":
        found.append("two bases are counted; a reward model that is an adapter on the policy's base saves the critic's")
    return found


# ----------------------------------------------------------------------------------------------------------------- launch


def launch_command(stage: str, job: Job, setup: Setup, accumulation: int) -> str:
    """`accelerate launch` with the strategy's file and the overrides; what is left to fill in is in capitals."""
    launch = [f"accelerate launch --config_file configs/accelerate/{setup.strategy}.yaml --num_processes {job.gpus}"]
    if job.machines > 1:
        launch.append(
            f"--num_machines {job.machines} --machine_rank MACHINE --main_process_ip FIRST_MACHINE --main_process_port 29500"
        )
    return " ".join([*launch, SCRIPTS[stage], "--config RECIPE.yaml", *_overrides(stage, job, setup, accumulation)])


def _overrides(stage: str, job: Job, setup: Setup, accumulation: int) -> list[str]:
    words = [f"--per_device_train_batch_size {setup.micro}"]
    if stage == "ppo":
        words += [
            f"--batch_size {job.ppo_batch} --num_mini_batches {max(1, job.ppo_batch // job.ppo_minibatch)}",
            f"--per_device_rollout_batch_size {setup.rollout}",
            f"--max_prompt_length {job.prompt} --response_length {job.response}",
        ]
        words += (
            [f"--per_device_ptx_batch_size {setup.micro} --ptx_block_size {job.ptx_block}"]
            if job.ptx
            else ["--ptx_coef 0"]
        )
        words += [] if job.ema else ["--ema_decay null"]
        words += [] if setup.gather else ["--ds3_gather_for_generation false"]
    else:
        words.append(f"--gradient_accumulation_steps {accumulation}")
        words.append(f"--max_length {job.sft_length if stage == 'sft' else job.rm_length}")
    if job.precision == "bf16":
        words.append("--bf16 true")
        # DeepSpeed keeps a float32 copy of what is trained; what is only read is half as large.
        words += ["--dtype bfloat16"] if setup.sharding.deepspeed or setup.method != "full" else []
    words += ["--gradient_checkpointing true"] if setup.checkpointing else []
    words += [f"--use_peft true --lora_r {job.lora_r}"] if setup.method != "full" else []
    words += ["--load_in_4bit true"] if setup.method == "qlora" else []
    return words


# ------------------------------------------------------------------------------------------------------------------ hours


def hours(stage: str, job: Job, setup: Setup, assume: Assumptions) -> float:
    """Training FLOPs over what the GPUs do at the assumed utilisation; PPO's generation as its share of the whole.

    A backward pass costs two forwards; gradient checkpointing runs the forward once more. Every sequence is as long as its
    limit: an upper bound. Where layers are gathered one at a time, generation is the time in which they come.
    """
    update = 4 if setup.checkpointing else 3
    if stage == "sft":
        tokens = assume.demonstrations * assume.sft_epochs * job.sft_length
        return _at(update * tokens * job.model.forward_flops(job.sft_length), job, assume)
    if stage == "rm":
        tokens = assume.comparisons * job.completions * job.rm_length
        return _at(update * tokens * job.reward.forward_flops(job.rm_length), job, assume)
    length = job.prompt + job.response
    both = job.model.forward_flops(length) + job.reward.forward_flops(length)
    scored = 2 * both  # policy, reference, critic and reward model, each once
    learned = assume.ppo_epochs * update * both
    ppo = _at(assume.episodes * length * (scored + learned), job, assume)
    if setup.gather:
        ppo /= 1 - assume.generation_share
    else:  # all weights once a token of each batch that is decoded
        tokens = math.ceil(assume.episodes / (job.gpus * setup.rollout)) * job.response
        ppo += tokens * gathered_policy(job, replace(setup, gather=True)) / (assume.gather_gb_s * 1e9) / 3600
    if not job.ptx:
        return ppo
    text = assume.episodes * assume.ptx_ratio * job.ptx_block * update * job.model.forward_flops(job.ptx_block)
    return ppo + _at(text * assume.ppo_epochs, job, assume)


def _at(flops: float, job: Job, assume: Assumptions) -> float:
    return flops / (assume.tflops * 1e12 * assume.mfu * job.gpus) / 3600
