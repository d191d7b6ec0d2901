"""What each stage keeps on one GPU, part by part, in bytes.

States follow ZeRO's accounting (Rajbhandari et al. 2020, section 3.1): with bf16, a parameter takes 2 bytes of weights, 2 of
gradients and 12 of optimiser (a float32 copy and Adam's two moments); ZeRO 1 spreads the optimiser over the GPUs, ZeRO 2 the
gradients too, ZeRO 3 the weights too. Without DeepSpeed, weights, gradients and moments are float32 (4 + 4 + 8), and bf16 is
autocast on top; FSDP 2 spreads all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from rlhf.planning import activations as act
from rlhf.planning.activations import Mode, Pass
from rlhf.planning.shapes import Shape

STAGES = ("sft", "rm", "ppo")
PARTS = (
    "weights",
    "gradients",
    "optimizer",
    "buffers",
    "activations",
    "kv_cache",
    "reference",
    "reward_model",
    "critic",
    "ema",
)

# configs/accelerate/deepspeed/*.json; a test holds them together.
REDUCE_BUCKET, MAX_LIVE = 200_000_000, 1_000_000_000
NF4_BYTES = 0.5 + 4 / 64  # four bits, and a float32 scale for 64 of them (Dettmers et al. 2023)


@dataclass(frozen=True)
class Sharding:
    """What a strategy spreads over the GPUs: 1 optimiser, 2 gradients too, 3 weights too; 0 nothing."""

    level: int
    offload: bool = False
    fsdp: bool = False

    @property
    def deepspeed(self) -> bool:
        return self.level > 0 and not self.fsdp


SHARDING = {
    "single": Sharding(0),
    "ddp": Sharding(0),
    "zero1": Sharding(1),
    "zero2": Sharding(2),
    "zero3": Sharding(3),
    "zero3_offload": Sharding(3, offload=True),
    "fsdp2": Sharding(3, fsdp=True),
}


@dataclass(frozen=True)
class Job:
    """What is to be trained on what. Lengths in tokens, batches over all GPUs."""

    model: Shape
    reward: Shape
    gpus: int = 1
    gpu_gib: float = 80.0
    per_node: int = 8
    precision: Literal["bf16", "fp32"] = "bf16"
    device: Literal["cuda", "cpu"] = "cuda"
    sft_length: int = 2048
    sft_batch: int = 32
    rm_length: int = 2048
    rm_batch: int = 64
    completions: int = 9
    prompt: int = 1024
    response: int = 1024
    ppo_batch: int = 512
    ppo_minibatch: int = 64
    rollout_batch: int = 64
    ptx: bool = True
    ptx_block: int = 128
    ema: bool = True
    lora_r: int = 16
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of a base below adapters

    @property
    def machines(self) -> int:
        return math.ceil(self.gpus / self.per_node)


@dataclass(frozen=True)
class Setup:
    """One configuration. micro: items a GPU takes through one forward and backward; rollout: prompts that it decodes at once.

    gather: whether ZeRO 3 has a whole model on each GPU in a rollout, or a layer at a time (`ds3_gather_for_generation`).
    """

    strategy: str
    method: Literal["full", "lora", "qlora"] = "full"
    checkpointing: bool = False
    micro: int = 1
    rollout: int = 1
    gather: bool = True

    @property
    def sharding(self) -> Sharding:
        return SHARDING[self.strategy]


@dataclass
class Memory:
    """Bytes of each part in each phase of a stage, and of the machine's own memory for one GPU's share (offload)."""

    phases: dict[str, dict[str, float]]
    host: float = 0.0
    parts: dict[str, float] = field(init=False)
    peak: float = field(init=False)
    phase: str = field(init=False)

    def __post_init__(self) -> None:
        self.parts = {part: max(p.get(part, 0.0) for p in self.phases.values()) for part in PARTS}
        totals = {name: sum(p.values()) for name, p in self.phases.items()}
        self.phase = max(totals, key=lambda name: totals[name])
        self.peak = totals[self.phase]


# ------------------------------------------------------------------------------------------------------------------ states


@dataclass(frozen=True)
class States:
    """Bytes of a model in training: weights, gradients, optimiser, communication buffers; host: in the machine's memory.

    live: weights that ZeRO 3 has gathered for a step, of which a rollout has none: there whole models are gathered.
    """

    weights: float
    gradients: float
    optimizer: float
    buffers: float = 0.0
    host: float = 0.0
    live: float = 0.0

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer


def mode(job: Job, setup: Setup) -> Mode:
    if job.precision == "fp32":
        return "fp32"
    if setup.sharding.fsdp:  # gathers weights in 16 bits
        return "bf16"
    low = setup.sharding.deepspeed if setup.method == "full" else job.dtype == "bfloat16"
    return "bf16" if low else "autocast"


def forward(job: Job, setup: Setup, rows: int, length: int, **kind: bool) -> Pass:
    """A pass of `rows` sequences in this configuration. kind: see Pass."""
    return Pass(rows, length, mode(job, setup), job.device, adapters=setup.method != "full", **kind)


def lora_parameters(shape: Shape, r: int) -> int:
    """Numbers in adapters of rank r on query and value (GPT-2: on its joint projection), peft's defaults."""
    h, a = shape.hidden, shape.attention_width
    layer = r * (h + 3 * h) if shape.family == "gpt2" else r * (2 * h + a + shape.kv_heads * shape.head_dim)
    return shape.layers * layer


def frozen_bytes(shape: Shape, parameters: int, job: Job, setup: Setup) -> float:
    """A model that is only read: whole on every GPU, in 16 bits where the policy is; spread under ZeRO 3."""
    if setup.method == "qlora":
        each = 2 if mode(job, setup) == "bf16" else 4
        return NF4_BYTES * shape.matrix_parameters + each * (parameters - shape.matrix_parameters)
    whole = (2 if mode(job, setup) == "bf16" else 4) * parameters
    if setup.sharding.offload:
        return 0.0
    return whole / job.gpus if setup.sharding.level == 3 else whole


def states(shape: Shape, parameters: int, job: Job, setup: Setup) -> States:
    """A model in training. parameters: of the causal LM or of the scalar-head model of this shape."""
    if setup.method != "full":
        trained = lora_parameters(shape, job.lora_r)
        buckets = 4 * trained if job.gpus > 1 else 0
        return States(frozen_bytes(shape, parameters, job, setup) + 4 * trained, 4 * trained, 8 * trained, buckets)
    n, world, sharding = parameters, job.gpus, setup.sharding
    if sharding.fsdp:
        # Float32 in pieces. In a step the layer at work and the next are whole in 16 bits, and what is outside of the layers all
        # the time; of the widest of them a gradient, and what is added up of it in float32.
        each = 2 if job.precision == "bf16" else 4
        layer = shape.matrix_parameters // shape.layers
        outside = n - layer * shape.layers
        live, reduced = each * (outside + 2 * layer), (each + 4) * max(outside, layer)
        return States(4 * n / world, 4 * n / world, 8 * n / world, live=live + reduced)
    if not sharding.deepspeed:
        # DistributedDataParallel copies gradients into buckets that it keeps.
        return States(4 * n, 4 * n, 8 * n, 4 * n if world > 1 else 0)
    each = 2 if job.precision == "bf16" else 4
    optimizer = 12 * n / world
    buckets = 2 * each * min(n, REDUCE_BUCKET)  # two, so that one is filled while the other is reduced
    gradients = each * n / (world if sharding.level >= 2 else 1)
    if sharding.level < 3:
        return States(each * n, gradients, optimizer, buckets)
    layer = shape.matrix_parameters // shape.layers  # gathered at once, even where it is more than may be live
    gathered = each * min(n, max(MAX_LIVE, layer))
    if sharding.offload:
        return States(0, 0, 0, buckets, host=each * n / world + gradients + optimizer, live=gathered)
    return States(each * n / world, gradients, optimizer, buckets, live=gathered)


# ------------------------------------------------------------------------------------------------------------------ stages


def sft(job: Job, setup: Setup) -> Memory:
    """Demonstrations of `sft_length`, with residual dropout (InstructGPT); every token learned, which is an upper bound."""
    shape, held = job.model, states(job.model, job.model.parameters, job, setup)
    kind = {"dropout": True, "adapter_dropout": True, "masked": setup.micro > 1}
    p = forward(job, setup, setup.micro, job.sft_length, **kind)
    return _training("sft", job, setup, held, shape, p, *act.sft_head(shape, p))


def rm(job: Job, setup: Setup) -> Memory:
    """Prompts, each with `completions` rows of `rm_length`, one scalar a position."""
    shape, held = job.reward, states(job.reward, job.reward.scalar_parameters, job, setup)
    p = forward(job, setup, setup.micro * job.completions, job.rm_length, adapter_dropout=True)
    return _training("rm", job, setup, held, shape, p, p.tokens * (shape.embed * p.s + 8), 0)


def _update(shape: Shape, p: Pass, setup: Setup, kept: int, transient: int) -> int:
    """Forward and backward of one model: what is saved, and the wider of the head's backward and a layer's."""
    saved = act.backbone(shape, p, setup.checkpointing) + _weight_copies(shape, p, setup)
    # What the head keeps is gone when the layers' turn comes.
    return saved + max(kept + transient, act.backward_of_a_layer(shape, p, setup.checkpointing))


def _training(
    stage: str, job: Job, setup: Setup, held: States, shape: Shape, p: Pass, kept: int, transient: int
) -> Memory:
    """A stage of one model. kept, transient: bytes of its head.

    Gradients stay from one micro-batch of a step to the next. Where it has but one they come as activations go: all of them are
    there for the first layer's alone.
    """
    fixed = {"weights": held.weights, "optimizer": held.optimizer, "buffers": held.buffers + held.live}
    learned = fixed | {"gradients": held.gradients}
    first_layer = act.block(shape, p) + _weight_copies(shape, p, setup) + act.backward_of_a_layer(shape, p)
    several = items(stage, job) > setup.micro
    phases = {
        "update": {**(learned if several else fixed), "activations": _update(shape, p, setup, kept, transient)},
        "backward": {**learned, "activations": first_layer},
        "step": {**learned, "activations": _step_transient(held, job, setup)},
    }
    return Memory(phases, held.host)


def _step_transient(held: States, job: Job, setup: Setup) -> float:
    """torch's AdamW on CUDA works on all tensors at once, with a temporary as large as the weights in float32."""
    return held.optimizer / 2 if job.device == "cuda" and not setup.sharding.deepspeed else 0.0


def ppo(job: Job, setup: Setup) -> Memory:
    """Policy and critic in training, reference and reward model, an average of the policy; rollouts, then updates.

    With adapters the reference is the policy's base and the reward model the critic's (docs/peft.md): weights are counted once a
    base, and two bases, because whether there is but one depends on how the reward model was trained.
    """
    policy = states(job.model, job.model.parameters, job, setup)
    critic = states(job.reward, job.reward.scalar_parameters, job, setup)
    own = setup.method == "full"
    fixed: dict[str, float] = {
        "weights": policy.weights,
        "optimizer": policy.optimizer,
        "buffers": _shared_buffers(policy, critic, setup),
        "reference": frozen_bytes(job.model, job.model.parameters, job, setup) if own else 0.0,
        "reward_model": frozen_bytes(job.reward, job.reward.scalar_parameters, job, setup) if own else 0.0,
        "critic": critic.weights + critic.optimizer,
        "ema": ema_bytes(job, setup),
    }
    learning = {
        # Of FSDP's one module all that is outside of the layers is whole.
        "buffers": fixed["buffers"]
        + (policy.live + critic.live if setup.sharding.fsdp else max(policy.live, critic.live)),
        "gradients": policy.gradients,
        "critic": fixed["critic"] + critic.gradients,
    }
    phases = {
        "prefill": {
            **fixed,
            "kv_cache": kv_cache(job, setup, prefilled(job, setup)),
            "activations": _prefill(job, setup),
        },
        "decode": {**fixed, "kv_cache": kv_cache(job, setup), "activations": _decode(job, setup)},
        "score": {**fixed, "activations": _score(job, setup)},
        "update": {**fixed, **learning, "activations": ppo_update(job, setup)},
        "step": {**fixed, **learning, "activations": sum(_step_transient(h, job, setup) for h in (policy, critic))},
    }
    host = policy.host + critic.host
    if setup.sharding.offload:
        frozen = job.model.parameters + job.reward.scalar_parameters
        host += ((2 if job.precision == "bf16" else 4) * frozen + 4 * job.ema * job.model.parameters) / job.gpus
    return Memory(phases, host)


def _shared_buffers(policy: States, critic: States, setup: Setup) -> float:
    """One engine drives policy and critic, with one set of buckets; DDP's are as large as all gradients."""
    return max(policy.buffers, critic.buffers) if setup.sharding.deepspeed else policy.buffers + critic.buffers


def ema_bytes(job: Job, setup: Setup) -> float:
    """The float32 average of what is trained of the policy, where its weights are: on the GPU, spread under ZeRO 3."""
    if not job.ema or setup.sharding.offload:
        return 0.0
    trained = job.model.parameters if setup.method == "full" else lora_parameters(job.model, job.lora_r)
    return 4 * trained / (job.gpus if setup.sharding.level == 3 else 1)


def kv_cache(job: Job, setup: Setup, length: int | None = None) -> int:
    """Keys and values of `rollout` sequences of `length` tokens; by default of whole ones but for the last token."""
    length = job.prompt + job.response - 1 if length is None else length
    return (4 if mode(job, setup) == "fp32" else 2) * setup.rollout * length * job.model.kv_values


def prefilled(job: Job, setup: Setup) -> int | None:
    """Tokens that the cache has room for in the prefill: all, where it has its final size from the start (`rlhf.decoding`)."""
    grows = job.device == "cpu" or (setup.sharding.level == 3 and not setup.gather)
    return job.prompt if grows else None


def gathered_policy(job: Job, setup: Setup) -> float:
    """What ZeRO 3 has of the policy on a GPU in a rollout: all, gathered once, or what is outside of the layers and one layer."""
    shape = job.model
    if setup.sharding.level < 3:
        return 0.0
    numbers = shape.parameters
    if not setup.gather:
        numbers -= shape.matrix_parameters * (shape.layers - 1) // shape.layers
    return (2 if job.precision == "bf16" else 4) * numbers


def _prefill(job: Job, setup: Setup) -> float:
    """The forward over the prompts."""
    p = forward(job, setup, setup.rollout, job.prompt)
    return act.without_gradient(job.model, p) + _copies(job, setup) + gathered_policy(job, setup)


def _decode(job: Job, setup: Setup) -> float:
    """The choice of a token: logits twice, probabilities in float32, two float64 of their sums. Measured: 28 bytes in float32."""
    p = forward(job, setup, setup.rollout, 1)
    choice = setup.rollout * job.model.vocab * (2 * p.s + 4 + 8 + 8)
    return choice + _copies(job, setup) + gathered_policy(job, setup)


def _score(job: Job, setup: Setup) -> float:
    """Log-probabilities of the responses, at `rollout` sequences a time."""
    p = forward(job, setup, setup.rollout, job.prompt + job.response)
    head = act.scoring_head(job.model, p, setup.rollout * job.response, chunked=_chunked(p, setup))
    return max(act.without_gradient(job.model, p), head) + _copies(job, setup) + gathered_policy(job, setup)


def _copies(job: Job, setup: Setup) -> int:
    """Autocast keeps its copies of trainable weights for a whole rollout."""
    if setup.method != "full":  # of frozen weights a cast is kept by the graph alone
        return 0
    p = forward(job, setup, 1, 1)
    return act.weight_copies(job.model, p) + act.weight_copies(job.reward, p)


def _weight_copies(shape: Shape, p: Pass, setup: Setup) -> int:
    """Autocast's, of weights that are not packed in four bits."""
    return 0 if setup.method == "qlora" else act.weight_copies(shape, p)


def _chunked(p: Pass, setup: Setup) -> bool:
    """Whether `rlhf.unembed` takes the policy's log-probabilities: in 16 bits, where the unembedding is whole."""
    return p.mode != "fp32" and (setup.sharding.level < 3 or setup.sharding.fsdp)


def ppo_update(job: Job, setup: Setup) -> float:
    """Policy and critic over one micro-batch, or the policy over raw text.

    Both graphs are there after the forward; the critic's backward runs first, and what it saved is gone in the policy's.
    """
    p = forward(job, setup, setup.micro, job.prompt + job.response)
    kept, transient = act.logits_head(job.model, p, setup.micro * job.response, _chunked(p, setup))
    policy = _update(job.model, p, setup, kept, transient)
    critic = _update(job.reward, p, setup, p.tokens * job.reward.embed * p.s, 0)
    saved = act.backbone(job.model, p, setup.checkpointing) + _weight_copies(job.model, p, setup) + kept
    update = max(policy, saved + critic)
    if not job.ptx:
        return update
    text = forward(job, setup, setup.micro, job.ptx_block, masked=False)
    head = act.logits_head(job.model, text, setup.micro * (job.ptx_block - 1), _chunked(text, setup))
    return max(update, _update(job.model, text, setup, *head))


MEMORY = {"sft": sft, "rm": rm, "ppo": ppo}


def items(stage: str, job: Job) -> int:
    """Items of one optimiser step on one GPU: the largest micro-batch that has a sense."""
    batch = {"sft": job.sft_batch, "rm": job.rm_batch, "ppo": job.ppo_minibatch}[stage]
    return max(1, math.ceil(batch / job.gpus))
