"""Stage 3: PPO on the reward model's score with a per-token KL penalty and a pretraining mix (InstructGPT, section 3.5, C.4).

    maximise  E[r(x, y) - β log(π(y|x) / π_ref(y|x))] + γ E_pretrain[log π(x)]                                    (eq. 2)

A response is a bandit episode: the score comes at its last token, nothing follows. Policy and reference start from the SFT model,
the critic from the reward model. How this differs from the paper: GAE's λ = 0.95, the value clip 0.2 and the value coefficient
0.1 are Ziegler et al.'s, because the paper does not give them; policy and critic are clipped to their own gradient norms.

Everything random is keyed: prompts by (seed, epoch), samples by (seed, rollout, episode), minibatches by (seed, rollout, inner
epoch). Nothing depends on the number of processes, and a resumed run repeats what the killed one would have done.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    TorchDynamoPlugin,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, set_seed

from rlhf import RLHFError, adapters, diagnosis, objectives
from rlhf.actors import ActorCritic, critic_source, distinct, load_models, refuse_other_tokenizers, reward_sources
from rlhf.bases import check_optimizer, fingerprint_of_model, keep_embeddings_precise
from rlhf.config import PPOArgs, to_dict
from rlhf.data import fingerprint
from rlhf.data.encode import blocks, encode_prompts
from rlhf.engine import check_precision, local, prepare, put, state_dict
from rlhf.evaluation import mean_ci95
from rlhf.hub_api import one_line
from rlhf.models import context_length, load_tokenizer, quiet
from rlhf.muon import Muon, hidden_matrices
from rlhf.progress import Progress
from rlhf.registry import Artifact
from rlhf.rewards import Reward
from rlhf.rollout import Actors, Prompts, Rollout, collect, gather, rows_of
from rlhf.training import (
    COMPLETE,
    TrainingError,
    check_processes,
    discard,
    is_main,
    keep_fitting,
    keep_newest,
    load_splits,
    load_text,
    log_folder,
    mark_complete,
    needs_gloo,
    open_registry,
    optimizer_name,
    pin_inputs,
    publish,
    push_published,
    refuse_other_architecture,
    resolve,
    say,
    settle_precision,
    synchronise,
    trackers,
    work_folder,
)

RUNNING = ""
MOST_BAD_STEPS = 3
HELD_OUT = -1  # step of the sampling keys of held-out prompts: rollouts count from 0


def run(args: PPOArgs) -> Artifact | None:
    """Trains and publishes `RUN_NAME/ppo`; returns the artifact on the first process."""
    registry = open_registry(args)
    sft_path, sft = resolve(registry, args.sft_model_path, args.run_name, "sft")
    sources = reward_sources(args, registry)
    critic_path, critic = critic_source(args, registry, sources, sft_path)
    parents = distinct(a for a in (sft, *(artifact for _, artifact in sources), critic) if a)
    refuse_other_tokenizers((sft_path, sft), [*sources, (critic_path, critic)], args.trust_remote_code)
    with work_folder(args, registry, "ppo") as (work, resume):
        make_optimizer = optimizer_factory(args)
        accelerator = make_accelerator(args, work)
        check_processes()
        set_seed(args.seed)
        tokenizer = load_tokenizer(sft_path, trust_remote_code=args.trust_remote_code)
        model, actors = load_models(args, accelerator, tokenizer, sft_path, sources, critic_path)
        prompts, held_out, data = load_prompts(args, tokenizer, actors)
        pretraining = load_pretraining(args, tokenizer, actors.policy, data)
        models = {"sft_model_path": (sft_path, sft), "critic_path": (critic_path, critic)}
        models |= {f"reward_model_path {i}": source for i, source in enumerate(sources, start=1)}
        # What is no version has to hold the same weights: no checkpoint has the reference, the reward models, bases of adapters.
        weights = {path: fingerprint_of_model(path) for path in {path for path, a in models.values() if a is None}}
        models = {name: (weights.get(path, path), a) for name, (path, a) in models.items()}
        pin_inputs(work, resume, models, data, any_processes=True)
        refuse_other_architecture(model, resume)
        trainer = PPO(args, accelerator, model, make_optimizer(model), actors, prompts, pretraining)
        before = held_out_answers(trainer, held_out)
        if resume is not None:
            trainer.load(resume)
        trainer.train(work)
        artifact = publish(
            registry,
            args,
            "ppo",
            trainer.saver(tokenizer),
            parents=parents,
            base_model=None if sft else sft_path,
            data=data,
            metrics=final_metrics(trainer, before, held_out),
            history=trainer.state.history,
            extra={"samples": trainer.state.samples[-4:]},
            models={"here": actors.policy, "critic": actors.critic}
            | ({} if trainer.average is None else {"ema": actors.policy}),
        )
        for tracker in accelerator.trackers:  # the processes' group is the caller's: another stage may follow
            tracker.finish()
    return push_published(args, artifact)


# ------------------------------------------------------------------------------------------------------------- preparation


def make_accelerator(args: PPOArgs, work: Path) -> Accelerator:
    handlers = [InitProcessGroupKwargs(backend="gloo")] if needs_gloo() else []
    settle_precision(args)
    try:
        accelerator = Accelerator(
            mixed_precision="bf16" if args.bf16 else "no",
            # Not the launcher's: a step is the loop's own, and layers are compiled by torch_compile.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            dynamo_plugin=TorchDynamoPlugin(backend="no"),
            log_with=trackers(args) or None,
            project_config=ProjectConfiguration(project_dir=str(work), logging_dir=str(log_folder(work))),
            kwargs_handlers=handlers,
        )
    except ValueError as error:  # a precision of the launch that is not for this machine, or not the stage's
        raise TrainingError(f"the launch and the stage's options do not go together: {one_line(error)}") from error
    if accelerator.state.deepspeed_plugin is not None:
        check_precision(accelerator.state.deepspeed_plugin.deepspeed_config, args.bf16)
    known = (
        *(DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU),
        *(DistributedType.DEEPSPEED, DistributedType.FSDP),
    )
    if accelerator.distributed_type not in known:
        raise TrainingError(
            f"PPO runs on one process, under data parallelism, ZeRO and FSDP, not under {accelerator.distributed_type.value}; "
            "launch with --config_file configs/accelerate/zero3.yaml"
        )
    return accelerator


def load_prompts(args: PPOArgs, tokenizer: Any, actors: Actors) -> tuple[Prompts, Prompts, list[dict[str, Any]]]:
    """Training and held-out prompts that leave room for a response, and the data's fingerprints."""
    train, held_out = load_splits(args, "prompts")
    every_token = args.max_prompt_length + args.response_length
    models = (actors.policy, actors.critic, *(reward.model for reward in actors.rewards if reward.model is not None))
    context = min(context_length(model) or every_token for model in models)
    limit = min(args.max_prompt_length, context - args.response_length)
    if limit < 1:
        raise TrainingError(
            f"response_length: {args.response_length} leaves no room for a prompt in a context of {context} tokens; lower it"
        )
    splits = []
    for records in (train, held_out.select(range(min(args.eval_episodes, len(held_out))))):
        ids = encode_prompts(tokenizer, records["prompt"][:])
        columns = {name: records[name][:] for name in records.column_names if name != "prompt"}
        kept = keep_fitting("prompts", [len(row) <= limit for row in ids], limit)
        splits.append(Prompts(ids, records["prompt"][:], columns).select(kept))
    return splits[0], splits[1], [fingerprint(train)]


def load_pretraining(args: PPOArgs, tokenizer: Any, policy: Any, data: list[dict[str, Any]]) -> Tensor | None:
    """Blocks [N, ptx_block_size] of raw text for the pretraining mix, with PAD where no text is; None without one."""
    if args.ptx_coef == 0 or args.ptx_dataset_name is None:
        return None
    text = load_text(args)
    data.append(fingerprint(text))
    size = min(args.ptx_block_size, context_length(policy) or args.ptx_block_size)
    try:
        return blocks(tokenizer, text["text"][:], size, args.ptx_packing_strategy)
    except ValueError as error:
        raise TrainingError(f"{args.ptx_dataset_name}: {error}; give more text, or a smaller ptx_block_size") from None


# --------------------------------------------------------------------------------------------------------------- the loop


@dataclass
class State:
    """Where the run stands; with the weights and the optimiser, all that a resumed run needs."""

    rollouts: int = 0
    steps: int = 0
    kl_coef: float = 0.0
    scores: tuple[float, float, float] = (0.0, 0.0, 0.0)  # count, mean, sum of squares around it: of all scores so far
    bad_steps: int = 0  # optimiser steps in a row that were dropped
    stopped: str = RUNNING
    history: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)


class PPO:
    """The loop, and what it holds: models, optimiser, averages and state."""

    def __init__(
        self,
        args: PPOArgs,
        accelerator: Accelerator,
        model: ActorCritic,
        optimizer: torch.optim.Optimizer,
        actors: Actors,
        prompts: Prompts,
        pretraining: Tensor | None,
    ):
        self.args, self.accelerator = args, accelerator
        self.prompts, self.pretraining = prompts, pretraining
        self.pad_token_id = actors.tokenizer.pad_token_id
        self.state = State(kl_coef=args.kl_coef)
        adapters.keep_only_trained(accelerator, model)
        self.engine = prepare(
            accelerator, model, optimizer, args.per_device_train_batch_size, args.ds3_gather_for_generation
        )
        self.model, self.optimizer = self.engine.model, self.engine.optimizer
        self.engine.freeze(m for m in (actors.reference, *(r.model for r in actors.rewards)) if m is not None)
        self.actors = replace(actors, whole=self.engine.whole)
        self.average = None
        if args.ema_decay is not None:
            self.average = [p.float().clone() for p in local(self.policy_parameters())]
        self.peak = [group["lr"] for group in self.optimizer.param_groups]

    def train(self, work: Path) -> None:
        """All rollouts from where the state stands, with checkpoints, logs and samples in `work`."""
        args, state = self.args, self.state
        self.accelerator.init_trackers(args.run_name, config=flat(to_dict(args)))
        with Progress(args.num_rollouts, state.rollouts, hidden=args.disable_tqdm or not is_main()) as bar:
            while state.rollouts < args.num_rollouts and state.stopped == RUNNING:
                before = state.scores, state.steps
                try:
                    rollout, line = self.step()
                except RLHFError:
                    state.scores, state.steps = before  # the resumed run does this rollout again
                    self.keep(work / f"checkpoint-{state.rollouts}")
                    raise
                state.rollouts += 1
                self.report(rollout, line, bar)
                if args.save_steps and state.rollouts % args.save_steps == 0:
                    self.save(work / f"checkpoint-{state.rollouts}")

    def report(self, rollout: Rollout, line: dict[str, Any], bar: Progress) -> None:
        """Keeps the figures of a rollout, raises its alarms, and decides whether the run is over its KL budget."""
        args, state = self.args, self.state
        state.history.append({"rollout": state.rollouts, "episode": state.rollouts * args.batch_size} | line)
        found = diagnosis.alarms(state.history, args)
        if found:
            state.history[-1]["alarms"] = found
            for text in found.values():
                bar.alarm(f"rollout {state.rollouts}: {text}")
        bar.advance(reward=line["objective/scores"], kl=line["objective/kl"], length=line["response/length"])
        if state.rollouts % args.logging_steps == 0:
            self.accelerator.log({k: v for k, v in line.items() if isinstance(v, float)}, step=state.rollouts)
        if args.sample_steps and (state.rollouts - 1) % args.sample_steps == 0:
            self.show_samples(rollout, bar)
        if args.early_stop and args.kl_budget is not None and line["objective/kl"] > args.kl_budget:
            state.stopped = f"KL of {line['objective/kl']:.2f} nats over the budget of {args.kl_budget:g}"

    def step(self) -> tuple[Rollout, dict[str, Any]]:
        """One rollout and what is learned from it."""
        args, state, clock = self.args, self.state, Clock()
        self.set_learning_rate()
        indices = prompt_batch(args.seed, state.rollouts, args.batch_size, len(self.prompts))
        rollout = self.collect(indices, state.rollouts, clock.lap)
        clock.laps["time/rollout"] = sum(clock.laps.values())

        scores = self.shape_scores(rollout)
        kl = objectives.kl_penalty(rollout.logp, rollout.logp_ref, args.kl_estimator)
        rewards = objectives.shaped_rewards(scores, kl, rollout.mask, state.kl_coef)
        if args.whiten_rewards:
            rewards = objectives.masked_scale(rewards, rollout.mask)
        advantages, returns = objectives.gae(rewards, rollout.values, rollout.mask, args.gamma, args.lam)
        advantages = objectives.masked_whiten(advantages, rollout.mask)

        statistics: list[dict[str, float]] = []
        for epoch in range(args.num_ppo_epochs):
            for minibatch in minibatches(len(rollout), args.num_mini_batches, (args.seed, state.rollouts, epoch)):
                statistics.append(self.update(rollout, advantages, returns, minibatch))
        clock.lap("update")

        line = diagnosis.describe(rollout, scores, returns, self.actors.rewards, statistics, state.kl_coef) | clock.laps
        line["watching"] = [reward.name for reward in self.actors.rewards if reward.weight == 0]
        line |= {f"lr/{group['part']}": group["lr"] for group in self.optimizer.param_groups}
        if args.kl_target is not None:
            state.kl_coef = objectives.next_kl_coef(
                state.kl_coef, line["objective/kl"], args.kl_target, args.kl_horizon, len(rollout)
            )
        return rollout, line

    def shape_scores(self, rollout: Rollout) -> Tensor:
        """Scores [B] as they enter the reward: scaled and clipped where asked for, then the missing EOS."""
        scores = rollout.scores
        if self.args.scale_scores:
            everything = torch.ones_like(scores, dtype=torch.bool)
            before = objectives.Moments(*(torch.tensor(x, dtype=torch.float64) for x in self.state.scores))
            seen = objectives.merge_moments([before, objectives.moments(scores.double(), everything)])
            self.state.scores = (float(seen.count), float(seen.mean), float(seen.m2))
            scores = scores / float((seen.variance + 1e-8).sqrt())
        if self.args.clip_scores is not None:
            scores = scores.clamp(-self.args.clip_scores, self.args.clip_scores)
        return penalise_missing_eos(scores, rollout.ended, self.args)

    def collect(self, indices: Sequence[int], step: int, lap: Callable[[str], None] = lambda phase: None) -> Rollout:
        """The rollout of these prompts, sampled by all processes together; every process gets the whole of it."""
        return self.answer(self.prompts.select(indices), step, lap)

    def answer(self, prompts: Prompts, step: int, lap: Callable[[str], None] = lambda phase: None) -> Rollout:
        """One response to each prompt; its random numbers are keyed by (seed, step, place of the prompt)."""
        self.model.eval()
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        share = range(rank, len(prompts), processes)
        with self.engine.autocast():
            mine = collect(self.actors, prompts.select(share), [(self.args.seed, step, i) for i in share], lap)
        whole = gather(mine, processes)
        lap("gather")
        return whole

    def update(self, rollout: Rollout, advantages: Tensor, returns: Tensor, minibatch: Tensor) -> dict[str, float]:
        """One optimiser step on the episodes `minibatch`: PPO and pretraining gradients in one buffer (InstructGPT C.4)."""
        args = self.args
        self.model.train(
            args.gradient_checkpointing
        )  # transformers checkpoints in training mode only; there is no dropout
        tokens = int(rollout.mask[minibatch].sum())
        sums: dict[str, float] = {}
        work: list[Callable[[], Tensor]] = []
        for text, real, count in self.pretraining_batches():
            mix = (text, real, count, sums)
            work.append(lambda mix=mix: self.pretraining_objective(*mix))  # type: ignore[misc]
        for index, real in self.shares(minibatch[rollout.lengths[minibatch].argsort(stable=True)]):
            part = (rollout, advantages, returns, index, real, tokens, sums)
            work.append(lambda part=part: self.ppo_objective(*part))  # type: ignore[misc]
        self.engine.backward(work)
        norms = self.clip_gradients()
        sums = self.totals(sums) | norms
        bad = not all(math.isfinite(value) for value in sums.values())
        self.engine.step(drop=bad)
        if not bad and self.average is not None:
            objectives.ema_update(self.average, local(self.policy_parameters()), float(args.ema_decay or 0.0))
        self.state.steps += 1
        self.count_bad_step(bad)
        return sums | {"dropped": float(bad)}

    def count_bad_step(self, bad: bool) -> None:
        """A step whose loss or gradient is not finite is dropped; after three in a row the run stops."""
        self.state.bad_steps = self.state.bad_steps + 1 if bad else 0
        if self.state.bad_steps >= MOST_BAD_STEPS:
            raise TrainingError(
                f"{MOST_BAD_STEPS} optimiser steps in a row had a loss or gradient that is not finite, at rollout "
                f"{self.state.rollouts + 1}; the weights before them are in the checkpoint. Try a lower learning_rate, or float32"
            )

    def ppo_objective(
        self,
        rollout: Rollout,
        advantages: Tensor,
        returns: Tensor,
        index: Tensor,
        real: bool,
        tokens: int,
        sums: dict[str, float],
    ) -> Tensor:
        """Clipped policy loss plus vf_coef times clipped value loss of the episodes `index`, over `tokens` of the minibatch."""
        args, device = self.args, self.accelerator.device
        rows = rows_of(rollout, index, self.pad_token_id).to(device)
        old, values_old, advantage, target = (
            tensor[index].to(device) for tensor in (rollout.logp, rollout.values, advantages, returns)
        )
        logp, values = self.model(rows, args.temperature, self.actors.banned)
        mask = rows.mask & real
        policy = objectives.clipped_policy_loss(logp, old, advantage, mask, args.cliprange, count=tokens)
        value = objectives.clipped_value_loss(values, values_old, target, mask, args.cliprange_value, count=tokens)
        with torch.no_grad():
            parts = {
                "loss/policy": policy,
                "loss/value": value,
                "policy/clip_fraction": objectives.policy_clip_fraction(
                    logp, old, advantage, mask, args.cliprange, count=tokens
                ),
                "value/clip_fraction": objectives.value_clip_fraction(
                    values, values_old, target, mask, args.cliprange_value, count=tokens
                ),
                "policy/approx_kl": objectives.approx_kl(logp, old, mask, count=tokens),
                "policy/ratio": objectives.masked_mean(torch.exp(logp - old), mask, count=tokens),
            }
            if real:
                largest = float(objectives.ratio_max(logp, old, mask))
                sums["policy/ratio_max"] = max(sums.get("policy/ratio_max", 0.0), largest)
            for name, figure in zip(parts, torch.stack([part.double() for part in parts.values()]).tolist()):
                sums[name] = sums.get(name, 0.0) + figure
        return (policy + args.vf_coef * value) * self.accelerator.num_processes

    def pretraining_objective(self, text: Tensor, real: bool, count: int, sums: dict[str, float]) -> Tensor:
        """ptx_coef times the negative log-likelihood of raw text [b, L], over `count` tokens of the minibatch."""
        text = text.to(self.accelerator.device)
        logp = self.model(None, self.args.temperature, self.actors.banned, text=text)
        mask = self.is_text(text) if real else torch.zeros_like(logp, dtype=torch.bool)
        loss = objectives.pretraining_loss(logp, mask, count=count)
        sums["loss/pretraining"] = sums.get("loss/pretraining", 0.0) + float(loss.detach())
        return self.args.ptx_coef * loss * self.accelerator.num_processes

    def shares(self, minibatch: Tensor) -> Iterator[tuple[Tensor, bool]]:
        """This process's micro-batches of a minibatch sorted by length."""
        yield from self.parts(minibatch, self.args.per_device_train_batch_size)

    def parts(self, minibatch: Tensor, size: int) -> Iterator[tuple[Tensor, bool]]:
        """This process's share of indices [n], at most `size` at once, each with whether it counts.

        Every process gets as many parts, because sharded modules are gathered by all of them together; one that has too few runs
        a part that counts for nothing.
        """
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        mine = minibatch[rank::processes]
        parts = list(mine.split(size)) if len(mine) else []
        most = math.ceil(math.ceil(len(minibatch) / processes) / size)
        yield from ((part, True) for part in parts)
        yield from ((minibatch[:1], False) for _ in range(most - len(parts)))

    def pretraining_batches(self) -> Iterator[tuple[Tensor, bool, int]]:
        """This process's raw text for one optimiser step, ptx_ratio examples an episode; whether it counts; the step's tokens."""
        if self.pretraining is None:
            return
        args = self.args
        count = max(1, round(args.mini_batch_size * args.ptx_ratio))
        wanted = torch.tensor(prompt_batch(args.seed + 1, self.state.steps, count, len(self.pretraining)))
        tokens = int(self.is_text(self.pretraining[wanted]).sum())
        for part, real in self.parts(wanted, args.per_device_ptx_batch_size):
            yield self.pretraining[part], real, tokens

    def is_text(self, text: Tensor) -> Tensor:
        """Which tokens of raw text [b, L], from its second on, are to be learned [b, L-1]: those that are not PAD."""
        return text[:, 1:] != self.actors.tokenizer.pad_token_id

    def clip_gradients(self) -> dict[str, float]:
        """Clips policy and critic each to max_grad_norm, so that neither's scale decides the other's step; their norms."""
        limit = self.args.max_grad_norm or float("inf")
        module = self.accelerator.unwrap_model(self.model)
        norms = self.engine.clip({"policy": module.policy, "critic": module.critic}, limit)
        return {f"{part}/grad_norm": norm for part, norm in norms.items()}

    def totals(self, sums: dict[str, float]) -> dict[str, float]:
        """Sums over all processes of what each has summed over its part of the minibatch."""
        if self.accelerator.num_processes == 1:
            return sums
        names = sorted(sums.keys() | {"policy/ratio_max"})
        values = torch.tensor([[sums.get(n, 0.0) for n in names]], dtype=torch.float64, device=self.accelerator.device)
        everyone = self.accelerator.gather(values)
        totals = dict(zip(names, everyone.sum(dim=0).tolist()))
        return totals | {"policy/ratio_max": float(everyone[:, names.index("policy/ratio_max")].max())}

    def set_learning_rate(self) -> None:
        """Linear from a tenth of the peak over `warmup_steps` rollouts, constant afterwards (InstructGPT C.4)."""
        done = min(1.0, self.state.rollouts / self.args.warmup_steps) if self.args.warmup_steps else 1.0
        for group, peak in zip(self.optimizer.param_groups, self.peak):
            group["lr"] = peak * (0.1 + 0.9 * done)

    def policy_parameters(self) -> list[nn.Parameter]:
        return adapters.trained_parameters(self.accelerator.unwrap_model(self.model).policy)

    def show_samples(self, rollout: Rollout, bar: Progress) -> None:
        """Keeps and prints two episodes as text."""
        decode = self.actors.tokenizer.decode
        for i in range(min(2, len(rollout))):
            sample = {
                "rollout": self.state.rollouts,
                "prompt": decode(rollout.prompts[i][rollout.prompt_mask[i]]),
                "completion": decode(rollout.responses[i][rollout.mask[i]], skip_special_tokens=True),
                "score": round(float(rollout.scores[i]), 4),
            }
            self.state.samples.append(sample)
            bar.sample(sample)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The policy with the average of its weights, for the time of the block."""
        parameters = self.policy_parameters()
        raw = [p.clone() for p in local(parameters)]
        try:
            put(parameters, self.average or [])
            yield
        finally:
            put(parameters, raw)

    # --- checkpoints

    def keep(self, folder: Path) -> None:
        """A checkpoint of a run that is about to end in an error, unless its last one is of this rollout anyway."""
        self.state.bad_steps = 0
        if not (folder / COMPLETE).is_file():
            self.save(folder)
        say(f"what was learned is in {folder}; go on from there with --resume_from_checkpoint latest")

    def save(self, folder: Path) -> None:
        """A checkpoint, its marker written last; the oldest go."""
        if is_main():
            discard(folder)
        synchronise()
        self.accelerator.save_state(str(folder), safe_serialization=True)
        if self.average is not None and (is_main() or self.engine.sharded):
            save_file({str(i): tensor.cpu() for i, tensor in enumerate(self.average)}, self.average_file(folder))
        if is_main():
            (folder / "state.json").write_text(json.dumps(asdict(self.state)), encoding="utf-8")
        synchronise()
        if is_main():
            mark_complete(folder)
            keep_newest(folder.parent, self.args.save_total_limit)

    def load(self, folder: Path) -> None:
        """Weights, optimiser, average and state of a checkpoint."""
        self.accelerator.load_state(str(folder))
        self.state = State(**json.loads((folder / "state.json").read_text(encoding="utf-8")))
        self.state.scores = tuple(self.state.scores)  # type: ignore[assignment]  # JSON makes it a list
        if self.average is not None:
            saved = load_file(self.average_file(folder))
            self.average = [saved[str(i)].to(tensor.device) for i, tensor in enumerate(self.average)]

    def average_file(self, folder: Path) -> Path:
        """Where the average is in a checkpoint: each process's own piece where it is spread."""
        rank = f"-{self.accelerator.process_index}" if self.engine.sharded else ""
        return folder / f"average{rank}.safetensors"

    def saver(self, tokenizer: Any) -> Callable[[Path | None], None]:
        """`save` for `publish`: the policy, its average in `ema/`, the critic with its head in `critic/`."""

        def save(folder: Path | None) -> None:
            self.write({"policy": folder, "critic": folder and folder / "critic"}, tokenizer)
            if self.average is not None:
                with self.averaged():
                    self.write({"policy": folder and folder / "ema"}, tokenizer)

        return save

    def write(self, places: dict[str, Path | None], tokenizer: Any) -> None:
        """Parts of the module as folders that plain transformers or peft loads. Without a folder a process helps to gather."""
        weights = state_dict(self.accelerator, self.model)
        module = self.accelerator.unwrap_model(self.model)
        for name, folder in places.items():
            if folder is not None:
                with quiet():
                    adapters.save(getattr(module, name), folder, strip(weights, f"{name}."))
                tokenizer.save_pretrained(folder)


def optimizer_factory(args: PPOArgs) -> Callable[[ActorCritic], torch.optim.Optimizer]:
    """Makes the optimiser asked for by transformers' name, with policy and critic as groups at their own learning rates.

    Called before there is an Accelerator: TrainingArguments resets accelerate's state.
    """
    check_optimizer(args.optim)
    try:
        chosen = TrainingArguments(
            output_dir=args.output_dir,
            optim=optimizer_name(args),
            adam_beta1=args.adam_beta1,
            adam_beta2=args.adam_beta2,
            adam_epsilon=args.adam_epsilon,
            ddp_backend="gloo" if needs_gloo() else None,
            report_to="none",
        )
        cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(chosen)
    except (ValueError, ImportError) as error:
        raise TrainingError(f"optim: {' '.join(str(error).split())}") from error
    kwargs.pop("lr", None)

    def make(model: ActorCritic) -> torch.optim.Optimizer:
        rates = {"policy": args.learning_rate, "critic": args.critic_learning_rate}
        trained = {part: [p for p in getattr(model, part).parameters() if p.requires_grad] for part in rates}
        groups = [{"part": part, "params": trained[part], "lr": lr} for part, lr in rates.items()]
        if kwargs.get("optim_bits") == 8:
            keep_embeddings_precise(model)
        if args.optim == "muon":
            return Muon(groups, hidden_matrices(model), weight_decay=args.weight_decay, **kwargs)
        return cls(groups, weight_decay=args.weight_decay, **kwargs)

    return make


def prompt_batch(seed: int, step: int, size: int, count: int) -> list[int]:
    """Indices of batch `step`, out of `count` items visited in a fresh order each epoch; a function of its arguments alone."""
    indices = []
    for position in range(step * size, (step + 1) * size):
        epoch, offset = divmod(position, count)
        indices.append(int(_order(seed, epoch, count)[offset]))
    return indices


_orders: dict[tuple[int, int, int], Tensor] = {}


def _order(seed: int, epoch: int, count: int) -> Tensor:
    key = (seed, epoch, count)
    if key not in _orders:
        if len(_orders) > 8:
            _orders.clear()
        _orders[key] = torch.randperm(count, generator=keyed_generator(*key))
    return _orders[key]


def keyed_generator(*key: int) -> torch.Generator:
    """A generator that depends on nothing but `key`."""
    import hashlib

    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def minibatches(episodes: int, count: int, key: tuple[int, int, int]) -> Iterator[Tensor]:
    """A fresh permutation of the episodes, cut into `count` minibatches."""
    yield from torch.randperm(episodes, generator=keyed_generator(*key)).tensor_split(count)


def penalise_missing_eos(scores: Tensor, ended: Tensor, args: PPOArgs) -> Tensor:
    """Scores [B] in which responses without EOS have a penalty subtracted, or a constant for a score."""
    if args.missing_eos_score is not None:
        return torch.where(ended, scores, args.missing_eos_score)
    return torch.where(ended, scores, scores - (args.missing_eos_penalty or 0.0))


# ---------------------------------------------------------------------------------------------------------------- figures


class Clock:
    """Seconds of each phase, those of one name together."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[f"time/{name}"] = self.laps.get(f"time/{name}", 0.0) + now - self._last
        self._last = now


def flat(values: dict[str, Any]) -> dict[str, Any]:
    """Choices as trackers take them: plain scalars."""
    return {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in values.items()}


def held_out_answers(trainer: PPO, prompts: Prompts) -> Rollout | None:
    """One answer to each held-out prompt, with the same random numbers at every call."""
    return trainer.answer(prompts, HELD_OUT) if len(prompts) else None


def final_metrics(trainer: PPO, before: Rollout | None, held_out: Prompts) -> dict[str, Any]:
    """What the run came to, on held-out prompts for the last weights and for their average."""
    state = trainer.state
    metrics: dict[str, Any] = {
        "episodes": state.rollouts * trainer.args.batch_size,
        "rollouts": state.rollouts,
        "stopped": state.stopped if state.stopped != RUNNING else "all episodes done",
        "weights_bytes": trainer.accelerator.unwrap_model(trainer.model).weight_bytes,
    }
    if before is None:
        return metrics
    metrics |= compare(before, held_out_answers(trainer, held_out), trainer.actors.rewards)
    if trainer.average is not None:
        with trainer.averaged():
            metrics["ema"] = compare(before, held_out_answers(trainer, held_out), trainer.actors.rewards)
    return metrics


def compare(before: Rollout, after: Rollout | None, rewards: Sequence[Reward]) -> dict[str, Any]:
    """What PPO changed on held-out prompts: the score and its paired difference with interval, KL, length, EOS rate."""
    assert after is not None and before.rewards is not None and after.rewards is not None
    difference, interval = mean_ci95((after.scores - before.scores).tolist())
    figures = {
        "held_out_prompts": len(after),
        "sft_score": float(before.scores.mean()),
        "ppo_score": float(after.scores.mean()),
        "score_difference": difference,
        "score_difference_ci95": interval,
        "kl": float(after.kl.mean()),
        "sft_length": float(before.mask.sum(dim=1).float().mean()),
        "ppo_length": float(after.mask.sum(dim=1).float().mean()),
        "sft_ended": float(before.ended.float().mean()),
        "ppo_ended": float(after.ended.float().mean()),
    }
    if len(rewards) > 1:
        for i, reward in enumerate(rewards):
            change, its_interval = mean_ci95((after.rewards[:, i] - before.rewards[:, i]).tolist())
            figures[f"reward/{reward.name}"] = {"difference": change, "difference_ci95": its_interval}
    return figures


def strip(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries of a state dict below `prefix`, without it."""
    return {name[len(prefix) :]: tensor for name, tensor in weights.items() if name.startswith(prefix)}
