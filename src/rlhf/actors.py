"""The models of a PPO run: policy and critic that learn, reference and rewards that do not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from rlhf import adapters
from rlhf.config import PPOArgs
from rlhf.models import (
    banned_ids,
    compile_layers,
    load_policy,
    load_scalar_model,
    load_tokenizer,
    logprobs_at,
    switch_off_dropout,
    values_at,
)
from rlhf.registry import Artifact, Registry
from rlhf.rewards import Reward, function_reward, model_reward
from rlhf.rollout import Actors, Rows, response_logp
from rlhf.training import TrainingError, resolve, say

Source = tuple[str, Artifact | None]  # where to load from, and the artifact it is


def reward_sources(args: PPOArgs, registry: Registry) -> list[Source]:
    """The reward models asked for; the run's own where nothing is."""
    if args.reward_model_path is None:
        return [resolve(registry, None, args.run_name, "rm")]
    return [resolve(registry, path, args.run_name, "rm") for path in args.reward_model_path]


def critic_source(args: PPOArgs, registry: Registry, rewards: Sequence[Source], sft_path: str) -> Source:
    """Where the critic starts: as asked, at a ppo version's own critic, else at the first reward model, else at the policy."""
    if args.critic_path is None:
        return rewards[0] if rewards else (sft_path, None)
    path, artifact = resolve(registry, args.critic_path, args.run_name, "ppo")
    return (str(Path(path) / "critic") if (Path(path) / "critic").is_dir() else path), artifact


def distinct(artifacts: Iterable[Artifact]) -> list[Artifact]:
    return list(dict.fromkeys(artifacts))


def refuse_other_tokenizers(sft: Source, others: Sequence[Source], trust_remote_code: bool = False) -> None:
    """Policy, critic and reward models must read the same tokens: versions say so by a hash, other folders are asked."""
    name = sft[1].ref if sft[1] else sft[0]
    for path, artifact in dict.fromkeys(others):
        if sft[1] is not None and artifact is not None:
            same = artifact.manifest.get("tokenizer_sha256") == sft[1].manifest.get("tokenizer_sha256")
        else:
            same = _vocabulary(path, trust_remote_code) == _vocabulary(sft[0], trust_remote_code)
        if not same:
            other = artifact.ref if artifact else path
            raise TrainingError(f"{other} has another tokenizer than {name}; train a reward model from {name}")


def _vocabulary(path: str, trust_remote_code: bool) -> tuple[dict[str, int], Any]:
    """What text becomes: each token's id, and how a sample is cut. An added PAD is no part of it."""
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    tokens = {token: i for token, i in tokenizer.get_vocab().items() if i != tokenizer.pad_token_id}
    return tokens, (tokenizer.eos_token_id, tokenizer("One line. 12 of them,\n  it's…")["input_ids"])


class ActorCritic(nn.Module):
    """Policy and critic as one module: one engine drives both, also where a module is sharded."""

    def __init__(self, policy: Any, critic: Any):
        super().__init__()
        self.policy, self.critic = policy, critic
        self.weight_bytes = 0  # of these two, reference and reward models together
        self.every_part_uses_all = False  # set by an engine that needs a gradient of each parameter from each forward
        self._no_split_modules: list[str] = []  # the classes of its layers, for an engine that gathers one at a time

    def forward(self, rows: Rows | None, temperature: float, banned: Tensor, text: Tensor | None = None) -> Any:
        """Log-probabilities and values [B, T] of the responses in `rows`; or log-probabilities [b, L-1] of raw text [b, L]."""
        if text is not None:
            places = torch.arange(text.numel(), device=text.device).view(text.shape)[:, :-1].flatten()
            logp = logprobs_at(self.policy, text, torch.ones_like(text), places, text[:, 1:].flatten())
            if self.every_part_uses_all:
                one = torch.ones_like(text[:1, :1])
                logp = logp + 0.0 * values_at(self.critic, text[:1, :1], one, one.bool())
            return logp.view(text.shape[0], -1)
        assert rows is not None
        logp = response_logp(self.policy, rows, temperature, banned)
        values = values_at(self.critic, rows.ids, rows.attention, rows.place)
        return rows.fill(logp), rows.fill(values)


def load_models(
    args: PPOArgs,
    accelerator: Accelerator,
    tokenizer: Any,
    sft_path: str,
    sources: Sequence[Source],
    critic_path: str,
) -> tuple[ActorCritic, Actors]:
    """Policy and reference from the SFT version, critic and rewards from their own; all without dropout."""
    how: dict[str, Any] = {
        "dtype": args.dtype,
        "attn_implementation": args.attn_implementation,
        "trust_remote_code": args.trust_remote_code,
        "peft": args,
        "bases": {} if args.use_peft and args.share_base and not spreads_weights(accelerator) else None,
    }
    frozen = how | {"trainable": False}
    policy, reference = load_policy(sft_path, tokenizer, **how), load_policy(sft_path, tokenizer, **frozen)
    critic = load_scalar_model(critic_path, tokenizer, new_head=not sources and args.critic_path is None, **how)
    rewards = [load_scalar_model(path, tokenizer, **frozen) for path, _ in sources]
    for model in (policy, reference, critic, *rewards):
        switch_off_dropout(model.eval())  # so that the first ratio is 1
    for model in (reference, *rewards):
        model.requires_grad_(False)
        if not getattr(model, "is_quantized", False):  # which is on its device, and must not be asked to move
            model.to(accelerator.device)
    if args.gradient_checkpointing:
        for model in (policy, critic):
            model.gradient_checkpointing_enable()
    if args.torch_compile:
        for model in (policy, reference, critic):  # the reference too, so that KL is 0 at the start
            compile_layers(model)
    actor_critic = ActorCritic(policy, critic).to(accelerator.device)
    actor_critic.weight_bytes = adapters.weight_bytes((policy, reference, critic, *rewards))
    tell_memory(args, actor_critic)
    actors = Actors(
        policy=policy,
        reference=reference,
        critic=critic,
        rewards=make_rewards(args, sources, rewards, tokenizer),
        tokenizer=tokenizer,
        banned=banned_ids(policy, tokenizer).to(accelerator.device),
        temperature=args.temperature,
        response_length=args.response_length,
        batch_size=args.per_device_rollout_batch_size,
    )
    return actor_critic, actors


def spreads_weights(accelerator: Accelerator) -> bool:
    """Whether each process holds a piece of the weights only (ZeRO 3, FSDP), so that no other model can stand on them."""
    if accelerator.distributed_type == DistributedType.FSDP:
        return True
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    return deepspeed and accelerator.state.deepspeed_plugin.zero_stage == 3


def tell_memory(args: PPOArgs, model: ActorCritic) -> None:
    """Says how many bytes the weights take, and under `use_peft` which bases they stand on."""
    say(f"weights in memory: {model.weight_bytes:,} bytes in policy, reference, critic and reward models together")
    if not args.use_peft:
        return
    for name, part in (("policy", model.policy), ("critic", model.critic)):
        say(f"{name}: {adapters.describe(part)}")
    ours, theirs = model.policy.started_from, model.critic.started_from
    if args.share_base and ours.sha256 != theirs.sha256:
        say(
            f"two bases are held: the critic's, {theirs.name}, has other weights than the policy's, {ours.name}; to hold one, "
            f"train the reward model with --use_peft true from the policy's sft, as an adapter on {ours.name}"
        )


def make_rewards(args: PPOArgs, sources: Sequence[Source], models: Sequence[Any], tokenizer: Any) -> list[Reward]:
    """Reward models and then functions, with their weights and distinct names: short ones, and whole where two are alike."""
    weights = args.reward_weights or [1.0] * (len(models) + len(args.reward_functions))
    whole = [artifact.ref if artifact else path for path, artifact in sources] + args.reward_functions
    short = [artifact.ref if artifact else Path(path).name for path, artifact in sources]
    short += [reference.partition(":")[2] for reference in args.reward_functions]
    names = [full if short.count(name) > 1 else name for name, full in zip(short, whole)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise TrainingError(f"rewards: {', '.join(twice)} is given twice; give it once, with the sum of its weights")
    rewards = [
        model_reward(name, weight, model, tokenizer.pad_token_id, args.per_device_rollout_batch_size)
        for name, weight, model in zip(names, weights, models)
    ]
    functions = zip(names[len(models) :], weights[len(models) :], args.reward_functions)
    return rewards + [function_reward(name, weight, reference) for name, weight, reference in functions]
