"""The PPO loop: its invariants, its optimiser steps, its checkpoints, and what it does with bad rewards."""

import dataclasses
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from conftest import random_model
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, GPT2Config

from rlhf import RLHFError, diagnosis, models, objectives, ppo
from rlhf.actors import load_models, reward_sources
from rlhf.cli import run_stage
from rlhf.config import PPOArgs
from rlhf.data.encode import encode_completions, encode_prompts
from rlhf.registry import Registry
from rlhf.rollout import rows_of
from rlhf.training import resolve, step_of


def count_the(prompts, completions, **columns):
    """A rule: bytes of the completion that are the letter e."""
    return [float(text.count("e")) for text in completions]


def other_letters(prompts, completions, **columns):
    """Share of the completion that is no e: what a policy that has found the rule above gives up."""
    return [1 - text.count("e") / max(1, len(text)) for text in completions]


RULE = {  # a reward that a tiny model learns in fourteen rollouts
    "reward_model_path": [],
    "reward_functions": ["test_ppo:count_the"],
    "missing_eos_penalty": None,
    "total_episodes": 64 * 14,
    "batch_size": 64,
    "per_device_train_batch_size": 32,
    "per_device_rollout_batch_size": 64,
    "num_ppo_epochs": 2,
    "warmup_steps": 0,
    "kl_coef": 0.0,
    "ptx_coef": 0.0,
    "ema_decay": None,
}


def ppo_args(tmp_path, **changes):
    prompts = [{"prompt": f"Say {i}:", "tag": i} for i in range(16)]
    values = {
        **tiny.QUICK,
        "output_dir": str(tmp_path / "runs"),
        "dataset_name": tiny.write_lines(tmp_path / "prompts.jsonl", prompts),
        "ptx_dataset_name": tiny.write_lines(tmp_path / "text.jsonl", [{"text": t} for t in tiny.text()]),
        "ptx_block_size": 16,
        "ptx_ratio": 0.5,
        "ptx_coef": 0.5,
        "eval_fraction": 0.0,
        "total_episodes": 24,
        "batch_size": 8,
        "num_mini_batches": 2,
        "per_device_train_batch_size": 4,
        "per_device_rollout_batch_size": 8,
        "max_prompt_length": 16,
        "response_length": 6,
        "learning_rate": 1e-3,
        "critic_learning_rate": 1e-3,
        "sample_steps": None,
    }
    return PPOArgs(**values | changes)


def stages(tmp_path, architecture="gpt2"):
    """A registry with base, sft and rm of the run `tiny`; the reward model is the SFT weights with a random head."""
    registry = tiny.published(tmp_path, "base", "sft", architecture=architecture)
    sft = registry.require("sft", "tiny")
    tokenizer = models.load_tokenizer(sft.path)
    torch.manual_seed(1)
    model = models.load_scalar_model(sft.path, tokenizer, new_head=True)
    with torch.no_grad():
        model.score.weight.mul_(3)
    with registry.draft("tiny", "rm") as draft:
        model.save_pretrained(draft.path)
        tokenizer.save_pretrained(draft.path)
        draft.publish(parents=[sft])
    return registry


def trainer_of(args, architecture="gpt2"):
    """The loop with all its parts, as `run` makes it."""
    registry = Registry(args.output_dir)
    sft = registry.require("sft", "tiny")
    sources = reward_sources(args, registry)
    make_optimizer = ppo.optimizer_factory(args)
    accelerator = ppo.make_accelerator(args, registry.root)
    tokenizer = models.load_tokenizer(sft.path)
    critic = sources[0][0] if args.critic_path is None else resolve(registry, args.critic_path, "tiny", "rm")[0]
    model, actors = load_models(args, accelerator, tokenizer, str(sft.path), sources, critic)
    prompts, _, data = ppo.load_prompts(args, tokenizer, actors)
    pretraining = ppo.load_pretraining(args, tokenizer, actors.policy, data)
    return ppo.PPO(args, accelerator, model, make_optimizer(model), actors, prompts, pretraining)


def gradients(trainer):
    module = trainer.accelerator.unwrap_model(trainer.model)
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def gradient_of_update(args, trainer=None):
    """The gradient of the first minibatch of the first rollout, before clipping and stepping."""
    trainer = trainer or trainer_of(args)
    rollout = trainer.collect(range(args.batch_size), 0)
    advantages = torch.randn(rollout.mask.shape, generator=torch.Generator().manual_seed(0))
    returns = torch.randn(rollout.mask.shape, generator=torch.Generator().manual_seed(1))
    caught = {}
    trainer.clip_gradients = lambda: caught.update(gradients(trainer)) or {}
    trainer.update(rollout, advantages, returns, torch.arange(args.mini_batch_size))
    return caught, rollout, advantages, returns, trainer


# -------------------------------------------------------------------------------------------------------------- invariants


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_kl_is_zero_and_the_ratio_one_before_the_first_update(tmp_path, architecture):
    stages(tmp_path, architecture)
    trainer = trainer_of(ppo_args(tmp_path))
    rollout = trainer.collect(range(8), 0)
    assert torch.equal(rollout.logp, rollout.logp_ref)
    assert rollout.kl.abs().max() == 0
    rows = rows_of(rollout, torch.arange(8), trainer.pad_token_id)
    logp, values = trainer.model(rows, 1.0, trainer.actors.banned)
    assert_close(torch.exp(logp - rollout.logp)[rollout.mask], torch.ones(int(rollout.mask.sum())), rtol=0, atol=1e-5)
    assert_close(values[rollout.mask], rollout.values[rollout.mask], rtol=0, atol=1e-5)


def test_the_critic_starts_as_the_reward_model_head_and_all(tmp_path):
    registry = stages(tmp_path)
    trainer = trainer_of(ppo_args(tmp_path))
    critic, saved = trainer.model.critic.state_dict(), tiny.weights(registry.require("rm", "tiny"))
    assert "score.weight" in saved and saved.keys() <= critic.keys()
    assert all(torch.equal(critic[name], weight) for name, weight in saved.items())


def test_adam_has_the_epsilon_and_betas_of_the_settings(tmp_path):
    stages(tmp_path)
    for changes, eps, betas in (({}, 1e-5, (0.9, 0.95)), ({"adam_epsilon": 1e-4, "adam_beta2": 0.9}, 1e-4, (0.9, 0.9))):
        groups = trainer_of(ppo_args(tmp_path, **changes)).optimizer.param_groups
        assert [(group["eps"], group["betas"]) for group in groups] == [(eps, betas)] * 2


def test_the_first_line_says_so_and_has_every_figure(tmp_path):
    stages(tmp_path)
    trainer = trainer_of(ppo_args(tmp_path))
    _, line = trainer.step()
    assert line["objective/kl"] == 0 and line["policy/first_ratio"] == pytest.approx(1, abs=1e-5)
    assert line["policy/first_approx_kl"] < 1e-10
    assert line.keys() == {
        *("objective/scores", "objective/scores_std", "objective/rlhf_reward", "reward/tiny/rm/v1", "watching"),
        *("objective/kl", "objective/kl_k3", "objective/kl_coef", "objective/entropy", "objective/entropy_per_token"),
        *("policy/clip_fraction", "value/clip_fraction", "policy/approx_kl", "value/explained_variance"),
        *("policy/ratio", "policy/ratio_max", "policy/first_ratio", "policy/first_approx_kl"),
        *("response/length", "response/ended", "response/repeated_trigrams", "dropped_steps"),
        *("policy/grad_norm", "critic/grad_norm", "loss/policy", "loss/value", "loss/pretraining"),
        *("lr/policy", "lr/critic", "time/rollout", "time/update"),
        *("time/generation", "time/forwards", "time/rewards", "time/gather"),
    }
    parts = sum(line[f"time/{name}"] for name in ("generation", "forwards", "rewards", "gather"))
    assert line["time/rollout"] == pytest.approx(parts) and line["time/generation"] > 0 < line["time/update"]


def test_an_update_that_sees_other_log_probabilities_raises_the_alarm(tmp_path, monkeypatch):
    """With dropout in the update their mean ratio is still near 1: it is their spread that tells."""
    stages(tmp_path)
    trainer = trainer_of(ppo_args(tmp_path))
    update = ppo.PPO.update

    def with_dropout(self, *args):
        for block in self.model.policy.transformer.h:
            block.mlp.dropout.p = 0.1
        self.args.gradient_checkpointing = True  # which puts the modules in training mode
        return update(self, *args)

    monkeypatch.setattr(ppo.PPO, "update", with_dropout)
    _, line = trainer.step()
    assert "first_ratio" in diagnosis.alarms([line], trainer.args)
    assert line["policy/first_ratio"] == pytest.approx(1, abs=0.05)


def test_temperature_divides_the_logits_in_rollout_reference_and_update(tmp_path):
    stages(tmp_path)
    trainer = trainer_of(ppo_args(tmp_path, temperature=0.5))
    rollout = trainer.collect(range(8), 0)
    rows = rows_of(rollout, torch.arange(8), trainer.pad_token_id)
    warm = rows.fill(
        trainer.model.policy(rows.ids).logits[rows.where].mul(2).log_softmax(-1).gather(1, rows.tokens[:, None])[:, 0]
    )
    # The banned ids are left out of the distribution, so that it is a little larger than the plain softmax.
    assert_close(rollout.logp[rollout.mask], warm[rollout.mask], rtol=0, atol=0.05)
    assert (rollout.logp[rollout.mask] >= warm[rollout.mask] - 1e-5).all()
    assert torch.equal(rollout.logp, rollout.logp_ref)
    logp, _ = trainer.model(rows, 0.5, trainer.actors.banned)
    assert_close(logp[rollout.mask], rollout.logp[rollout.mask], rtol=0, atol=1e-5)


def test_the_loss_does_not_see_padding(tmp_path):
    stages(tmp_path)
    trainer = trainer_of(ppo_args(tmp_path))
    rollout = trainer.collect(range(8), 0)
    wide = dataclasses.replace(
        rollout,
        **{
            name: torch.nn.functional.pad(getattr(rollout, name), (0, 5), value=float("nan") if value else 0)
            for name, value in (("responses", 0), ("mask", 0), ("logp", 1), ("logp_ref", 1), ("values", 1))
        },
    )
    sums, other = {}, {}
    for part, found in ((rollout, sums), (wide, other)):
        ones = torch.ones(part.mask.shape)
        trainer.ppo_objective(part, ones, ones, torch.arange(8), True, int(part.mask.sum()), found)
    assert sums == pytest.approx(other, abs=1e-6)


@pytest.mark.parametrize("ptx", [0.0, 0.5])
def test_micro_batches_of_1_2_and_4_give_equal_gradients(tmp_path, ptx):
    stages(tmp_path)
    reference, *_ = gradient_of_update(ppo_args(tmp_path, ptx_coef=ptx))
    for size in (1, 2):
        changes = {"per_device_train_batch_size": size, "per_device_ptx_batch_size": size}
        found, *_ = gradient_of_update(ppo_args(tmp_path, ptx_coef=ptx, **changes))
        for name, gradient in reference.items():
            assert_close(found[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_gradient_checkpointing_gives_the_same_gradients_by_a_second_forward(tmp_path, monkeypatch):
    stages(tmp_path)
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

    calls, forward = [], GPT2MLP.forward
    monkeypatch.setattr(GPT2MLP, "forward", lambda self, *args: calls.append(1) or forward(self, *args))
    plain, *_ = gradient_of_update(ppo_args(tmp_path, ptx_coef=0.0))
    once = len(calls)
    again, *_ = gradient_of_update(ppo_args(tmp_path, ptx_coef=0.0, gradient_checkpointing=True))
    assert len(calls) - once == once + 2 * 2  # each of two models' two layers once more, in the backward pass
    for name, gradient in plain.items():
        assert_close(again[name], gradient, rtol=1e-5, atol=1e-8, msg=name)


def test_ppo_and_pretraining_gradients_add_up_in_one_buffer(tmp_path):
    stages(tmp_path)
    both, *_ = gradient_of_update(ppo_args(tmp_path, ptx_coef=3.0, ptx_ratio=1.0))
    alone, *_ = gradient_of_update(ppo_args(tmp_path, ptx_coef=0.0))
    fresh = trainer_of(ppo_args(tmp_path, ptx_coef=3.0, ptx_ratio=1.0))
    ((text, _, count),) = fresh.pretraining_batches()
    assert len(text) == 4 and count == 4 * 15
    policy = fresh.accelerator.unwrap_model(fresh.model).policy
    loss = policy(input_ids=text, labels=text).loss  # transformers' own: the mean over the same tokens
    (3.0 * loss).backward()
    for name, parameter in policy.named_parameters():
        expected = alone[f"policy.{name}"] + parameter.grad
        assert_close(both[f"policy.{name}"], expected, rtol=1e-4, atol=1e-6, msg=name)
    critic = [name for name in both if name.startswith("critic.")]
    assert critic
    for name in critic:
        assert_close(both[name], alone[name], rtol=1e-5, atol=1e-7)


def test_padding_of_packed_documents_is_not_learned(tmp_path):
    stages(tmp_path)
    text = tiny.write_lines(
        tmp_path / "short.jsonl", [{"text": t[: 5 + 9 * (i % 3)]} for i, t in enumerate(tiny.text())]
    )
    packed = {"ptx_dataset_name": text, "ptx_packing_strategy": "bfd_split", "ptx_coef": 3.0, "ptx_ratio": 1.0}
    alone, *_ = gradient_of_update(ppo_args(tmp_path, ptx_coef=0.0))
    fresh = trainer_of(ppo_args(tmp_path, **packed))
    ((rows, _, count),) = fresh.pretraining_batches()
    padding = rows == fresh.actors.tokenizer.pad_token_id
    assert padding.any() and count == (~padding[:, 1:]).sum() < 4 * 15
    policy = fresh.accelerator.unwrap_model(fresh.model).policy
    (3.0 * policy(input_ids=rows, labels=rows.masked_fill(padding, -100)).loss).backward()
    for size in (4, 1):
        both, *_ = gradient_of_update(ppo_args(tmp_path, **packed, per_device_ptx_batch_size=size))
        for name, parameter in policy.named_parameters():
            expected = alone[f"policy.{name}"] + parameter.grad
            assert_close(both[f"policy.{name}"], expected, rtol=1e-4, atol=1e-6, msg=name)


def test_the_objective_is_the_papers(tmp_path):
    stages(tmp_path)
    args = ppo_args(tmp_path, ptx_coef=0.0)
    found, rollout, advantages, returns, _ = gradient_of_update(args)
    trainer = trainer_of(args)
    index = torch.arange(args.mini_batch_size)
    rows = rows_of(rollout, index, trainer.pad_token_id)
    logp, values = trainer.model(rows, 1.0, trainer.actors.banned)
    mask = rollout.mask[index]
    loss = objectives.clipped_policy_loss(logp, rollout.logp[index], advantages[index], mask, 0.2)
    loss = loss + 0.1 * objectives.clipped_value_loss(values, rollout.values[index], returns[index], mask, 0.2)
    loss.backward()
    for name, gradient in gradients(trainer).items():
        assert_close(found[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_norms_are_those_of_the_parts_they_are_named_for(tmp_path):
    stages(tmp_path)
    for line in tiny.history(ppo.run(ppo_args(tmp_path, vf_coef=0.0))):
        assert line["policy/grad_norm"] > 0 == line["critic/grad_norm"]


def test_a_step_takes_the_estimator_coefficients_and_whitening_that_are_asked_for(tmp_path, monkeypatch):
    stages(tmp_path)
    choices = {"kl_estimator": "k3", "kl_coef": 0.5, "whiten_rewards": True, "gamma": 0.9, "lam": 0.7}
    trainer = trainer_of(ppo_args(tmp_path, **choices))
    with torch.no_grad():
        for weight in trainer.actors.reference.parameters():
            weight.mul_(1.1)  # so that there is a KL
    seen = []
    monkeypatch.setattr(ppo.PPO, "update", lambda self, *args: seen.append(args) or {"dropped": 1.0} | NO_FIGURES)
    rollout, _ = trainer.step()
    scores = torch.where(rollout.ended, rollout.scores, rollout.scores - 1)
    kl = objectives.kl_penalty(rollout.logp, rollout.logp_ref, "k3")
    rewards = objectives.masked_scale(objectives.shaped_rewards(scores, kl, rollout.mask, 0.5), rollout.mask)
    advantages, returns = objectives.gae(rewards, rollout.values, rollout.mask, 0.9, 0.7)
    assert rollout.kl.abs().max() > 0 and len(seen) == 2
    for of, mine, targets, _ in seen:
        assert of is rollout
        assert_close(mine, objectives.masked_whiten(advantages, rollout.mask))
        assert_close(targets, returns)


NO_FIGURES = {"policy/ratio": 1.0, "policy/ratio_max": 1.0, "policy/approx_kl": 0.0}


# ---------------------------------------------------------------------------------------------------------------- the loop


def test_optimiser_steps_are_minibatches_times_inner_epochs(tmp_path):
    stages(tmp_path)
    trainer = trainer_of(ppo_args(tmp_path, num_ppo_epochs=3))
    trainer.step()
    assert trainer.state.steps == 2 * 3
    assert all(state["step"] == 6 for state in trainer.optimizer.state.values())


def test_each_inner_epoch_has_a_permutation_of_its_own():
    first, again, second = ([m.tolist() for m in ppo.minibatches(8, 2, (0, 0, epoch))] for epoch in (0, 0, 1))
    assert first == again and first != second
    assert sorted(i for m in first for i in m) == sorted(i for m in second for i in m) == list(range(8))


def test_prompts_come_in_a_fresh_order_each_epoch_and_all_of_them():
    one, two = ppo.prompt_batch(0, 0, 16, 16), ppo.prompt_batch(0, 1, 16, 16)
    assert sorted(one) == sorted(two) == list(range(16)) and one != two
    assert ppo.prompt_batch(0, 0, 8, 16) + ppo.prompt_batch(0, 1, 8, 16) == one


def test_the_learning_rate_warms_up_from_a_tenth(tmp_path):
    stages(tmp_path)
    trainer = trainer_of(ppo_args(tmp_path, warmup_steps=2, learning_rate=1e-3, critic_learning_rate=2e-3))
    rates = []
    for rollouts in range(4):
        trainer.state.rollouts = rollouts
        trainer.set_learning_rate()
        rates.append([group["lr"] for group in trainer.optimizer.param_groups])
    policy, critic = zip(*rates)
    assert policy == pytest.approx([1e-4, 5.5e-4, 1e-3, 1e-3])
    assert critic == pytest.approx([2e-4, 1.1e-3, 2e-3, 2e-3])


def test_a_missing_eos_costs_its_penalty_or_sets_the_score(tmp_path):
    scores, ended = torch.tensor([2.0, 2.0]), torch.tensor([True, False])
    assert ppo.penalise_missing_eos(scores, ended, ppo_args(tmp_path)).tolist() == [2.0, 1.0]
    replaced = ppo_args(tmp_path, missing_eos_penalty=None, missing_eos_score=-1.0)
    assert ppo.penalise_missing_eos(scores, ended, replaced).tolist() == [2.0, -1.0]


def test_scores_are_scaled_by_all_seen_so_far_and_clipped(tmp_path):
    stages(tmp_path)
    args = ppo_args(tmp_path, scale_scores=True, clip_scores=0.5, missing_eos_penalty=None, total_episodes=8)
    trainer = trainer_of(args)
    rollout = trainer.collect(range(8), 0)
    shaped = trainer.shape_scores(rollout)
    expected = (rollout.scores / rollout.scores.std(unbiased=False)).clamp(-0.5, 0.5)
    assert_close(shaped, expected, rtol=1e-4, atol=1e-5)
    again = trainer.shape_scores(dataclasses.replace(rollout, scores=rollout.scores * 3, rewards=None))
    assert trainer.state.scores[0] == 16
    pooled = torch.cat([rollout.scores, rollout.scores * 3])
    assert_close(again, (rollout.scores * 3 / pooled.std(unbiased=False)).clamp(-0.5, 0.5), rtol=1e-4, atol=1e-5)


def test_the_average_follows_the_weights_once_a_step(tmp_path):
    stages(tmp_path)
    trainer = trainer_of(ppo_args(tmp_path, ema_decay=0.75))
    before = [p.detach().clone() for p in trainer.policy_parameters()]
    rollout = trainer.collect(range(8), 0)
    ones = torch.ones(rollout.mask.shape)
    trainer.update(rollout, ones, ones, torch.arange(4))
    for mean, old, new in zip(trainer.average, before, trainer.policy_parameters()):
        assert_close(mean, 0.75 * old + 0.25 * new.detach(), rtol=0, atol=1e-7)


def test_policy_and_critic_change_and_reference_and_reward_do_not(tmp_path):
    stages(tmp_path)
    trainer = trainer_of(ppo_args(tmp_path))
    module = trainer.accelerator.unwrap_model(trainer.model)
    parts = {"policy": module.policy, "critic": module.critic, "reference": trainer.actors.reference}
    before = {name: [p.detach().clone() for p in part.parameters()] for name, part in parts.items()}
    trainer.step()
    moved = {
        name: any(not torch.equal(a, b) for a, b in zip(before[name], part.parameters()))
        for name, part in parts.items()
    }
    assert moved == {"policy": True, "critic": True, "reference": False}


def test_ppo_learns_what_a_rule_rewards(tmp_path):
    stages(tmp_path)
    rewards = {"reward_functions": ["test_ppo:count_the", "test_ppo:other_letters"], "reward_weights": [1.0, 0.0]}
    longer = {"total_episodes": 64 * 18}
    history = tiny.history(
        ppo.run(ppo_args(tmp_path, critic_path="tiny/rm", learning_rate=3e-3, **RULE | rewards | longer))
    )
    start, end = history[0]["objective/scores"], history[-1]["objective/scores"]
    assert end > start + 1, f"{start} -> {end}"
    assert history[-1]["value/explained_variance"] is not None
    # The reward that only watches falls meanwhile, and the run says so.
    found = [line["alarms"]["over_optimisation"] for line in history if "over_optimisation" in line.get("alarms", {})]
    assert found and "other_letters, which only watches, falls" in found[0]


def test_a_kl_penalty_keeps_the_policy_near_the_reference(tmp_path):
    stages(tmp_path)
    changes = {"total_episodes": 80, "learning_rate": 3e-3, "ptx_coef": 0.0, "warmup_steps": 0, "num_ppo_epochs": 2}
    kl = [
        sum(line["objective/kl_k3"] for line in tiny.history(ppo.run(ppo_args(tmp_path, kl_coef=coef, **changes))))
        for coef in (0.0, 5.0)
    ]
    assert kl[1] < kl[0]


def test_the_adaptive_coefficient_follows_zieglers_rule(tmp_path):
    stages(tmp_path)
    args = ppo_args(tmp_path, kl_target=6.0, kl_horizon=100, total_episodes=16)
    history = tiny.history(ppo.run(args))
    assert history[0]["objective/kl_coef"] == 0.02
    assert history[1]["objective/kl_coef"] == pytest.approx(0.02 * (1 - 0.2 * 8 / 100))  # KL 0 is clipped at -0.2


def test_a_run_stops_once_it_is_over_its_kl_budget(tmp_path):
    stages(tmp_path)
    args = ppo_args(tmp_path, kl_budget=1e-6, total_episodes=800, learning_rate=1e-2, kl_coef=0.0)
    artifact = ppo.run(args)
    metrics = artifact.manifest["metrics"]
    assert metrics["rollouts"] < 100 and "over the budget" in metrics["stopped"]
    assert "kl_over_budget" in tiny.history(artifact)[-1]["alarms"]


# ------------------------------------------------------------------------------------------------------------- publication


def test_what_is_published_loads_in_plain_transformers_with_critic_and_average(tmp_path):
    stages(tmp_path)
    artifact = ppo.run(ppo_args(tmp_path, eval_fraction=0.3, sample_steps=1))
    policy, tokenizer = tiny.load_causal(artifact)
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    average = AutoModelForCausalLM.from_pretrained(artifact.path / "ema")
    critic = AutoModelForSequenceClassification.from_pretrained(artifact.path / "critic")
    assert critic.score.weight.shape == (1, 32)
    sft, _ = tiny.load_causal(Registry(tmp_path / "runs").require("sft", "tiny"))
    name = "transformer.h.0.mlp.c_fc.weight"
    raw, mean, start = (model.state_dict()[name] for model in (policy, average, sft))
    assert not torch.equal(raw, start)
    assert (mean - start).norm() < (raw - start).norm()
    metrics = artifact.manifest["metrics"]
    assert {"score_difference_ci95", "kl", "ema"} <= metrics.keys()
    assert artifact.manifest["extra"]["samples"]
    assert [parent["ref"] for parent in artifact.parents] == ["tiny/sft/v1", "tiny/rm/v1"]
    ids = tokenizer("Say 1:", return_tensors="pt")
    assert policy.generate(**ids, max_new_tokens=2, do_sample=False).shape[1] > ids["input_ids"].shape[1]


def test_the_average_itself_is_evaluated(tmp_path):
    """An average that never moves is the SFT model: the same answers to the held-out prompts, and no KL."""
    stages(tmp_path)
    metrics = ppo.run(ppo_args(tmp_path, ema_decay=1.0, eval_fraction=0.3, learning_rate=1e-2)).manifest["metrics"]
    assert metrics["ema"]["kl"] == 0 and metrics["ema"]["ppo_score"] == metrics["sft_score"]
    assert metrics["kl"] != 0 and metrics["ppo_score"] != metrics["sft_score"]


def test_a_later_round_starts_from_the_published_critic(tmp_path, monkeypatch):
    registry = stages(tmp_path)
    first = ppo.run(ppo_args(tmp_path))
    args = ppo_args(tmp_path, sft_model_path="tiny/ppo", critic_path="tiny/ppo", total_episodes=8)
    path, artifact = ppo.critic_source(args, registry, reward_sources(args, registry), "")
    assert artifact == first and path == str(first.path / "critic")
    tokenizer = models.load_tokenizer(first.path)
    learned, start = (
        models.load_scalar_model(path, tokenizer),
        models.load_scalar_model(registry.require("rm", "tiny").path, tokenizer),
    )
    assert not torch.equal(learned.score.weight, start.score.weight)  # the head that this round starts from has learned
    loaded = []
    load = ppo.load_models
    monkeypatch.setattr(ppo, "load_models", lambda *args: loaded.append(load(*args)) or loaded[-1])
    monkeypatch.setattr(ppo.PPO, "train", lambda self, work: None)
    second = ppo.run(args)
    for name, weight in loaded[0][1].critic.state_dict().items():
        assert torch.equal(weight, learned.state_dict()[name])
    assert [p["ref"] for p in second.parents] == ["tiny/ppo/v1", "tiny/rm/v1"]


def test_two_runs_with_one_seed_are_equal_and_another_seed_is_not(tmp_path):
    stages(tmp_path)
    one, two = (ppo.run(ppo_args(tmp_path)) for _ in range(2))
    other = ppo.run(ppo_args(tmp_path, seed=7))
    assert one.weights_sha256 == two.weights_sha256 != other.weights_sha256


# --------------------------------------------------------------------------------------------------------- several rewards


def add_tags(prompts, completions, tag, **columns):
    assert all(prompt.startswith("Say") for prompt in prompts)
    return [float(t) for t in tag]


def broken(prompts, completions, **columns):
    raise KeyError("colour")


def too_few(prompts, completions, **columns):
    return [1.0]


def not_numbers(prompts, completions, **columns):
    return ["good"] * len(completions)


def not_finite(prompts, completions, **columns):
    return [float("nan")] * len(completions)


def test_rewards_are_weighted_summed_and_logged_one_by_one(tmp_path):
    stages(tmp_path)
    args = ppo_args(
        tmp_path, reward_functions=["test_ppo:add_tags", "test_ppo:count_the"], reward_weights=[0.5, 2.0, 0.0]
    )
    trainer = trainer_of(args)
    rollout = trainer.collect([3, 5], 0)
    assert_close(rollout.rewards[:, 1], torch.tensor([3.0, 5.0]))
    assert_close(rollout.scores, 0.5 * rollout.rewards[:, 0] + 2.0 * rollout.rewards[:, 1])
    _, line = trainer.step()
    assert {"reward/tiny/rm/v1", "reward/add_tags", "reward/count_the"} <= line.keys()
    assert line["watching"] == ["count_the"]


def test_several_reward_models_are_an_ensemble(tmp_path):
    """Two versions at half weight: the score is their mean, and how far they are apart is logged."""
    registry = stages(tmp_path)
    sft = registry.require("sft", "tiny")
    tokenizer = models.load_tokenizer(sft.path)
    torch.manual_seed(2)
    with registry.draft("tiny", "rm") as draft:
        models.load_scalar_model(sft.path, tokenizer, new_head=True).save_pretrained(draft.path)
        tokenizer.save_pretrained(draft.path)
        draft.publish(parents=[sft])
    trainer = trainer_of(ppo_args(tmp_path, reward_model_path=["tiny/rm/v1", "tiny/rm/v2"], reward_weights=[0.5, 0.5]))
    rollout = trainer.collect([3, 5], 0)
    assert rollout.rewards.shape == (2, 2) and (rollout.rewards[:, 0] - rollout.rewards[:, 1]).abs().min() > 1e-3
    assert_close(rollout.scores, rollout.rewards.mean(dim=1))
    _, line = trainer.step()
    assert {"reward/tiny/rm/v1", "reward/tiny/rm/v2"} <= line.keys()
    assert line["objective/reward_models_std"] > 1e-3


def test_the_reward_is_read_at_the_last_token_of_prompt_and_response(tmp_path):
    registry = stages(tmp_path)
    trainer = trainer_of(ppo_args(tmp_path))
    rollout = trainer.collect(range(4), 0)
    model, _ = tiny.load_reward(registry.require("rm", "tiny"))
    rows = [
        [*rollout.prompts[i][rollout.prompt_mask[i]].tolist(), *rollout.responses[i][rollout.mask[i]].tolist()]
        for i in range(4)
    ]
    assert_close(rollout.scores, tiny.scores(model, rows), rtol=0, atol=1e-5)


def grid(prompts, completions, **columns):
    return torch.zeros(len(completions), 2)


def nothing(prompts, completions, **columns):
    pass


def huge(prompts, completions, **columns):
    return [10**400] * len(completions)


def chatty(prompts, completions, **columns):
    raise ValueError("two\nlines")


def of_one_argument(prompts):
    return [0.0] * len(prompts)


def run_wrongly(capsys, args, **changes):
    """The one line that the stage ends with, at status 2 and with nothing published."""
    capsys.readouterr()
    registry = Registry(args.output_dir)
    before = registry.list("tiny", "ppo")
    config = tiny.write_config(Path(args.output_dir).parent / "wrong.json", args, **changes)
    with pytest.raises(SystemExit) as exit:
        run_stage("ppo", ["--config", config])
    assert exit.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], lines
    assert registry.list("tiny", "ppo") == before
    return lines[-1]


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("test_ppo", "package.module:function"),
        ("no_such_module:f", "cannot import no_such_module"),
        ("half_written:f", "importing half_written raised SyntaxError: "),
        ("test_ppo:no_such", "no function 'no_such'"),
        ("test_ppo:broken", "raised KeyError: 'colour'"),
        ("test_ppo:chatty", "raised ValueError: two lines (/"),
        ("test_ppo:of_one_argument", "raised TypeError: of_one_argument() "),
        ("test_ppo:too_few", "returned 1 rewards for"),
        ("test_ppo:nothing", "returned NoneType, not a list of numbers"),
        ("test_ppo:not_numbers", "'good' for completion 0, which is no number"),
        ("test_ppo:grid", "tensor([0., 0.]) for completion 0, which is no number"),
        ("test_ppo:huge", "for completion 0, which is no number"),
        ("test_ppo:not_finite", "nan for completion 0"),
    ],
)
def test_bad_reward_functions_are_one_line(tmp_path, monkeypatch, capsys, function, says):
    stages(tmp_path)
    (tmp_path / "half_written.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    told = run_wrongly(capsys, ppo_args(tmp_path, reward_functions=[function]))
    assert says in told and function.split(":")[0] in told


def with_weights(registry, change):
    """Another version of the reward model, its weights changed."""
    path = registry.require("rm", "tiny").path
    tokenizer, model = models.load_tokenizer(path), None
    model = models.load_scalar_model(path, tokenizer)
    with torch.no_grad():
        change(model)
    with registry.draft("tiny", "rm") as draft:
        model.save_pretrained(draft.path)
        tokenizer.save_pretrained(draft.path)
        return draft.publish(parents=[registry.require("sft", "tiny")])


def test_models_whose_numbers_are_not_finite_are_named(tmp_path, capsys):
    registry = stages(tmp_path)
    with_weights(registry, lambda model: model.score.weight.fill_(float("nan")))
    args = ppo_args(tmp_path, critic_path="tiny/rm/v1")
    assert "reward model tiny/rm/v2 scored a response nan" in run_wrongly(capsys, args)
    told = run_wrongly(capsys, args, reward_model_path=["tiny/rm/v1"], critic_path="tiny/rm/v2")
    assert "values: not finite on a real token" in told and "the critic's weights" in told


def test_a_policy_that_is_no_causal_model_is_refused(tmp_path, capsys):
    registry = stages(tmp_path)
    from transformers import T5Config, T5ForConditionalGeneration

    other = tmp_path / "t5"
    T5ForConditionalGeneration(
        T5Config(vocab_size=300, d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2)
    ).save_pretrained(other)
    models.load_tokenizer(registry.require("sft", "tiny").path).save_pretrained(other)
    assert f"cannot load {other}" in run_wrongly(capsys, ppo_args(tmp_path, sft_model_path=str(other)))


def test_a_reward_that_fails_later_leaves_a_checkpoint(tmp_path, monkeypatch, capsys):
    registry = stages(tmp_path)
    calls = []

    def fails_third(prompts, completions, **columns):
        calls.append(1)
        return count_the(prompts, completions) if len(calls) < 3 else not_finite(prompts, completions)

    monkeypatch.setattr(sys.modules[__name__], "sometimes", fails_third, raising=False)
    with pytest.raises(RLHFError, match="must be finite"):
        ppo.run(ppo_args(tmp_path, reward_functions=["test_ppo:sometimes"], eval_episodes=0))
    (checkpoint,) = ppo_checkpoints(registry)
    assert step_of(checkpoint) == 2
    assert f"what was learned is in {checkpoint}; go on from there" in capsys.readouterr().err
    # Once the function is mended, the run ends where it would have ended.
    monkeypatch.setattr(sys.modules[__name__], "sometimes", count_the, raising=False)
    args = ppo_args(tmp_path, reward_functions=["test_ppo:sometimes"], eval_episodes=0)
    resumed = ppo.run(dataclasses.replace(args, resume_from_checkpoint="latest"))
    assert resumed.weights_sha256 == ppo.run(args).weights_sha256


def test_a_reward_model_with_another_tokenizer_is_refused(tmp_path, capsys):
    stages(tmp_path)
    other = tmp_path / "other"
    stages(other, "opt")
    registry = Registry(other / "runs")
    rm = registry.require("rm", "tiny")
    tokenizer = models.load_tokenizer(rm.path)
    tokenizer.add_tokens(["<another>"])
    model = models.load_scalar_model(rm.path, tokenizer)
    with registry.draft("tiny", "rm") as draft:
        model.save_pretrained(draft.path)
        tokenizer.save_pretrained(draft.path)
        foreign = draft.publish()
    told = run_wrongly(capsys, ppo_args(tmp_path, reward_model_path=[str(foreign.path)]))
    assert "tiny/rm/v2 has another tokenizer than tiny/sft/v1; train a reward model from tiny/sft/v1" in told
    # As plain folders, which have no manifest: the tokenizers themselves are asked.
    for ref, name in ((foreign, "rm"), (Registry(tmp_path / "runs").require("sft", "tiny"), "sft")):
        shutil.copytree(ref.path, tmp_path / name, ignore=shutil.ignore_patterns("stage.json"))
    plain = {"reward_model_path": [str(tmp_path / "rm")], "sft_model_path": str(tmp_path / "sft")}
    told = run_wrongly(capsys, ppo_args(tmp_path, **plain))
    assert f"{tmp_path / 'rm'} has another tokenizer than {tmp_path / 'sft'}" in told
    assert ppo.run(ppo_args(tmp_path, sft_model_path=str(tmp_path / "sft"), total_episodes=8)) is not None


def test_rewards_of_one_name_are_told_apart_by_the_whole_of_it(tmp_path, capsys):
    """Two checkpoints called rm and two functions called one; the same one twice is a mistake."""
    registry = stages(tmp_path)
    paths = [tmp_path / folder / "rm" for folder in "ab"]
    for path in paths:
        shutil.copytree(registry.require("rm", "tiny").path, path, ignore=shutil.ignore_patterns("stage.json"))
    (tmp_path / "other_rules.py").write_text(
        "def one(prompts, completions, **columns):\n    return [2.0] * len(completions)\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        rules = ["test_ppo:one", "other_rules:one"]
        args = ppo_args(tmp_path, reward_model_path=[str(p) for p in paths], reward_functions=rules, total_episodes=8)
        (line,) = tiny.history(ppo.run(args))
    finally:
        sys.path.remove(str(tmp_path))
    named = {name.removeprefix("reward/"): value for name, value in line.items() if name.startswith("reward/")}
    assert {str(p) for p in paths} | set(rules) <= named.keys(), named
    assert named["test_ppo:one"] == 1 and named["other_rules:one"] == 2
    twice = run_wrongly(capsys, dataclasses.replace(args, reward_functions=rules[:1] * 2))
    assert "test_ppo:one is given twice" in twice


def one(prompts, completions, **columns):
    return [1.0] * len(completions)


def test_a_checkpoint_without_a_head_is_refused(tmp_path, capsys):
    registry = stages(tmp_path)
    args = ppo_args(tmp_path, reward_model_path=[str(registry.require("sft", "tiny").path)])
    assert "no scalar head" in run_wrongly(capsys, args)


def test_prompts_that_leave_no_room_are_refused(tmp_path):
    stages(tmp_path)
    with pytest.raises(RLHFError, match="no room for a prompt"):
        ppo.run(ppo_args(tmp_path, response_length=64))
    with pytest.raises(RLHFError, match="over 2 tokens"):
        ppo.run(ppo_args(tmp_path, max_prompt_length=2))


@pytest.mark.parametrize("which", ["reward model", "critic"])
def test_a_reward_model_or_critic_with_a_shorter_context_leaves_less_room(tmp_path, which):
    """A row of prompt and response goes through all models."""
    registry = stages(tmp_path)
    tokenizer = models.load_tokenizer(registry.require("sft", "tiny").path)
    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2, n_positions=12, num_labels=1, pad_token_id=1)
    random_model(AutoModelForSequenceClassification, config).save_pretrained(tmp_path / "short")
    tokenizer.save_pretrained(tmp_path / "short")
    scorers = [str(tmp_path / "short"), "tiny/rm/v1"]
    reward_model, critic = scorers if which == "reward model" else scorers[::-1]
    changes = {"reward_model_path": [reward_model], "critic_path": critic}
    with pytest.raises(RLHFError, match="leaves no room for a prompt in a context of 12 tokens"):
        ppo.run(ppo_args(tmp_path, response_length=12, **changes))
    trainer = trainer_of(ppo_args(tmp_path, response_length=6, **changes))
    assert max(map(len, trainer.prompts.ids)) <= 6


def test_accumulation_and_compilation_that_the_launcher_asks_for_are_not_ppo_s(tmp_path, monkeypatch):
    """Its steps are its own; and layers are compiled by torch_compile, so that weights keep their names."""
    stages(tmp_path)
    expected = ppo.run(ppo_args(tmp_path))
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    found = ppo.run(ppo_args(tmp_path))
    assert found.weights_sha256 == expected.weights_sha256
    assert [line["policy/grad_norm"] for line in tiny.history(found)] == [
        line["policy/grad_norm"] for line in tiny.history(expected)
    ]


def test_prompts_that_are_too_long_are_dropped_and_counted(tmp_path, capsys):
    stages(tmp_path)
    asked = ["Say 1:", "Say 2: " + "the river runs north " * 3, "Say 3:"]
    prompts = tiny.write_lines(tmp_path / "mixed.jsonl", [{"prompt": text} for text in asked])
    trainer = trainer_of(ppo_args(tmp_path, dataset_name=prompts))
    assert list(trainer.prompts.texts) == [asked[0], asked[2]]
    assert "dropped 1 of 3 prompts: over 16 tokens" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- steps that go wrong


def test_a_step_that_is_not_finite_is_dropped_and_three_stop_the_run(tmp_path):
    stages(tmp_path)
    trainer = trainer_of(ppo_args(tmp_path, ptx_coef=0.0))
    before = [p.detach().clone() for p in trainer.policy_parameters()]
    rollout = trainer.collect(range(8), 0)
    good, bad = torch.ones(rollout.mask.shape), torch.full(rollout.mask.shape, float("inf"))
    for _ in range(2):
        assert trainer.update(rollout, bad, good, torch.arange(4))["dropped"] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.policy_parameters()))
    assert trainer.update(rollout, good, good, torch.arange(4))["dropped"] == 0
    assert not all(torch.equal(a, b) for a, b in zip(before, trainer.policy_parameters()))
    trainer.update(rollout, bad, good, torch.arange(4))
    trainer.update(rollout, bad, good, torch.arange(4))
    with pytest.raises(RLHFError, match="3 optimiser steps in a row"):
        trainer.update(rollout, bad, good, torch.arange(4))


def test_a_run_of_bad_steps_ends_with_the_last_good_weights_in_a_checkpoint(tmp_path, monkeypatch, capsys):
    registry = stages(tmp_path)
    good = objectives.gae
    calls = []

    def bad_later(*args):
        calls.append(1)
        advantages, returns = good(*args)
        return advantages, returns if len(calls) < 3 else returns * float("inf")

    monkeypatch.setattr(objectives, "gae", bad_later)
    args = ppo_args(tmp_path, num_mini_batches=4, save_steps=2)
    told = run_wrongly(capsys, args)
    assert "3 optimiser steps in a row had a loss or gradient that is not finite, at rollout 3" in told
    (checkpoint,) = ppo_checkpoints(registry)
    assert step_of(checkpoint) == 2 and json.loads((checkpoint / "state.json").read_text())["rollouts"] == 2
    monkeypatch.undo()
    resumed = ppo.run(dataclasses.replace(args, resume_from_checkpoint="latest"))
    assert resumed.weights_sha256 == ppo.run(args).weights_sha256  # of the step before, and not of half a rollout


def test_a_rollout_that_ends_in_an_error_is_not_counted_in_the_checkpoint_it_leaves(tmp_path, monkeypatch, capsys):
    """Nothing was saved before: the weights are those of the last good step, the rest as before the rollout."""
    registry = stages(tmp_path)
    good, calls = objectives.gae, []

    def bad_later(*args):
        calls.append(1)
        advantages, returns = good(*args)
        return advantages, returns if len(calls) < 3 else returns * float("inf")

    monkeypatch.setattr(objectives, "gae", bad_later)
    run_wrongly(capsys, ppo_args(tmp_path, num_mini_batches=4, scale_scores=True))
    (checkpoint,) = ppo_checkpoints(registry)
    state = json.loads((checkpoint / "state.json").read_text())
    assert (state["rollouts"], state["steps"], state["scores"][0]) == (2, 8, 16)  # of 8 episodes in 4 minibatches each


# ------------------------------------------------------------------------------------------------------------------ resume


def ppo_checkpoints(registry):
    return sorted(registry.work_dir("tiny", "ppo").glob("*/checkpoint-*"), key=step_of)


def a_coin(prompts, completions, **columns):
    """A reward that draws from the random state of the process, which a resumed run must find as it was."""
    return [random.random() + torch.rand(1).item() for _ in completions]


def resumable(tmp_path, **changes):
    """Everything that a checkpoint must carry is on: average, adaptive KL, running statistics, ptx, inner epochs."""
    settings = {
        "reward_functions": ["test_ppo:a_coin"],
        "total_episodes": 48,
        "num_ppo_epochs": 2,
        "kl_target": 1.0,
        "kl_horizon": 50,
        "scale_scores": True,
        "ema_decay": 0.9,
        "save_steps": 1,
        "eval_fraction": 0.2,
    }
    return ppo_args(tmp_path, **settings | changes)


def test_a_resumed_run_is_bit_equal(tmp_path, monkeypatch):
    stages(tmp_path)
    whole = ppo.run(resumable(tmp_path))
    stop = ppo.PPO.report

    def stop_at_four(self, *args):
        stop(self, *args)
        if self.state.rollouts == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(ppo.PPO, "report", stop_at_four)
    with pytest.raises(KeyboardInterrupt):
        ppo.run(resumable(tmp_path))
    monkeypatch.setattr(ppo.PPO, "report", stop)
    resumed = ppo.run(resumable(tmp_path, resume_from_checkpoint="latest"))
    assert resumed.weights_sha256 == whole.weights_sha256  # policy, average and critic
    figures = [
        [{k: v for k, v in line.items() if "time" not in k} for line in tiny.history(a)] for a in (whole, resumed)
    ]
    assert figures[0] == figures[1]
    assert not tiny.left_over(Registry(tmp_path / "runs"), "ppo")


def paths():
    """Where a process of its own finds the reward functions of this file."""
    return {"PYTHONPATH": os.pathsep.join([str(tiny.ROOT / "tests"), *sys.path])}


# A run killed at each of these points in turn, each time by a process of its own that goes on from the newest checkpoint.
KILLED = """
import json, os, signal, sys
from pathlib import Path
from rlhf import ppo, training
from rlhf.config import PPOArgs

def die_at(owner, name, call, when=lambda *args: True):
    function, calls = getattr(owner, name), []
    def run(*args, **kwargs):
        calls.append(when(*args))
        if sum(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    setattr(owner, name, run)

a_checkpoint = lambda path, **_: Path(path).name.startswith("checkpoint-") and Path(path).is_dir()
POINTS = [
    (ppo, "collect", 3),  # the second rollout: the first call is for held-out prompts
    (ppo.PPO, "update", 3),  # its second inner epoch
    (ppo, "save_file", 1),  # a checkpoint without average and state
    (ppo, "mark_complete", 1),  # one that lacks its marker only
    (ppo, "keep_newest", 1),  # two complete ones, where one is kept
    (training.shutil, "rmtree", 1, a_checkpoint),  # the older one half removed
    (ppo, "publish", 1),  # trained, and not published
]
for point in POINTS:
    child = os.fork()
    if child == 0:
        die_at(*point)
        ppo.run(PPOArgs(**json.loads(sys.argv[1])))
        os._exit(0)
    print(point[1], os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.slow
def test_a_run_killed_at_any_point_of_a_rollout_and_of_a_save_resumes_bit_equal(tmp_path, capsys):
    registry = stages(tmp_path)
    args = resumable(tmp_path, save_total_limit=1)
    whole = ppo.run(args)
    args = dataclasses.replace(args, resume_from_checkpoint="latest")
    choices = json.dumps(vars(args))
    killed = tiny.launch([sys.executable, "-c", KILLED, choices], **paths())
    names = ["collect", "update", "save_file", "mark_complete", "keep_newest", "rmtree", "publish"]
    # Libraries write there, too.
    told = [line.split() for line in killed.stdout.splitlines() if line.startswith(tuple(names))]
    assert told == [[name, "-9"] for name in names], killed.stderr[-3000:]
    resumed = [line.split()[3] for line in killed.stderr.splitlines() if line.startswith("resuming after rollout")]
    assert resumed == ["1", "1", "1", "1", "2", "3"]
    assert registry.list("tiny", "ppo") == [whole]  # nothing half-made is visible
    capsys.readouterr()
    assert ppo.run(args).weights_sha256 == whole.weights_sha256
    assert "resuming after rollout 6 " in capsys.readouterr().err


# Runs that are killed at a random moment from outside, and then go on from the newest checkpoint to their end.
KILLED_BY_CHANCE = """
import json, os, random, signal, sys, time
from rlhf import ppo
from rlhf.config import PPOArgs

def start(resume):
    child = os.fork()
    if child == 0:
        artifact = ppo.run(PPOArgs(**json.loads(sys.argv[1]) | {"resume_from_checkpoint": resume}))
        print(artifact.weights_sha256, flush=True)
        os._exit(0)
    return child

began = time.monotonic()
os.waitpid(start(None), 0)
seconds = time.monotonic() - began
generator = random.Random(0)
for _ in range(int(sys.argv[2])):
    child = start(None)
    time.sleep(generator.uniform(0, seconds))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.waitpid(start("latest"), 0)
"""


@pytest.mark.slow
def test_a_killed_run_resumes_bit_equal_from_any_moment(tmp_path):
    stages(tmp_path)
    kills = os.environ.get("RLHF_TEST_KILLS", "3")
    words = [sys.executable, "-c", KILLED_BY_CHANCE, json.dumps(vars(resumable(tmp_path))), kills]
    done = subprocess.run(
        words, cwd=tiny.ROOT, env=tiny.environment(**paths()), capture_output=True, text=True, check=False
    )
    hashes = [word for word in done.stdout.split() if re.fullmatch("[0-9a-f]{64}", word)]
    assert len(hashes) > int(kills), done.stderr[-3000:]  # one more where a run was through before it was killed
    assert len(set(hashes)) == 1
    assert "resuming after rollout" in done.stderr  # some kill left a checkpoint to go on from


def interrupted(monkeypatch, args):
    """A run that stopped after its first rollout, with a checkpoint."""
    monkeypatch.setattr(ppo.PPO, "collect", interrupt_after(ppo.PPO.collect, 1))
    with pytest.raises(KeyboardInterrupt):
        ppo.run(args)
    monkeypatch.undo()


def test_resuming_with_other_settings_says_which(tmp_path, monkeypatch, capsys):
    registry = stages(tmp_path)
    args = resumable(tmp_path)
    interrupted(monkeypatch, args)
    told = run_wrongly(capsys, args, resume_from_checkpoint="latest", kl_coef=0.5, logging_steps=7)
    assert "with other settings: kl_coef (0.02 -> 0.5); set them back" in told
    (checkpoint,) = ppo_checkpoints(registry)
    assert (checkpoint / "complete").is_file()  # nothing is lost


def test_resuming_from_other_models_or_data_says_which(tmp_path, monkeypatch, capsys):
    registry = stages(tmp_path)
    args = resumable(tmp_path)
    whole = ppo.run(args)
    interrupted(monkeypatch, args)
    resume = dataclasses.replace(args, resume_from_checkpoint="latest")
    first = registry.require("rm", "tiny")
    second = with_weights(registry, lambda model: model.score.weight.mul_(2))
    told = run_wrongly(capsys, resume)
    for name in ("reward_model_path 1", "critic_path"):
        assert f"{name} (tiny/rm/v1 {first.weights_sha256[:12]} -> tiny/rm/v2 {second.weights_sha256[:12]})" in told
    assert "sft_model_path" not in told
    named = dataclasses.replace(resume, reward_model_path=["tiny/rm/v1"])
    data = Path(args.dataset_name)
    lines = data.read_text()
    data.write_text(lines.replace("Say 1", "Tell 1"))
    told = run_wrongly(capsys, named)
    assert "prompts of prompts.jsonl (" in told and "text of" not in told and "rm/v1" not in told
    data.write_text(lines)
    assert ppo.run(named).weights_sha256 == whole.weights_sha256  # the version that it was trained with, by name


def test_resuming_with_another_architecture_is_refused(tmp_path, monkeypatch, capsys):
    registry, other = stages(tmp_path), stages(tmp_path / "other", "opt")
    folder = tmp_path / "policy"
    shutil.copytree(registry.require("sft", "tiny").path, folder, ignore=shutil.ignore_patterns("stage.json"))
    args = resumable(tmp_path, sft_model_path=str(folder))
    interrupted(monkeypatch, args)
    shutil.rmtree(folder)
    shutil.copytree(other.require("sft", "tiny").path, folder, ignore=shutil.ignore_patterns("stage.json"))
    told = run_wrongly(capsys, args, resume_from_checkpoint="latest")
    assert f"trained from something else: sft_model_path ({folder} " in told
    (inputs,) = registry.work_dir("tiny", "ppo").glob("*/inputs.json")
    inputs.unlink()  # as of a version of rlhf that did not write it
    told = run_wrongly(capsys, args, resume_from_checkpoint="latest")
    assert "its weights are of another model (policy.transformer.h.0" in told and "is not here" in told


def test_a_checkpoint_of_another_stage_is_refused(tmp_path, capsys):
    stages(tmp_path)
    other = tiny.sft_args(tmp_path)
    folder = tmp_path / "sft" / "checkpoint-2"
    folder.mkdir(parents=True)
    (folder / "complete").touch()
    (folder.parent / "config.json").write_text(json.dumps(vars(other)))
    told = run_wrongly(capsys, ppo_args(tmp_path), resume_from_checkpoint=str(folder))
    assert "another stage, or another version of rlhf, wrote it" in told


@pytest.mark.slow
def test_processes_of_their_own_end_in_one_line_and_status_2(tmp_path, monkeypatch):
    """Side by side: a reward function that raises, and a resume with other settings."""
    stages(tmp_path)
    args = resumable(tmp_path)
    interrupted(monkeypatch, args)
    wrong = {
        "raised KeyError: 'colour'": {"reward_functions": ["test_ppo:broken"]},
        "lam (0.95 -> 0.9)": {"resume_from_checkpoint": "latest", "lam": 0.9},
    }
    started = {}
    for i, (says, changes) in enumerate(wrong.items()):
        command = [
            sys.executable,
            "scripts/ppo.py",
            "--config",
            tiny.write_config(tmp_path / f"{i}.json", args, **changes),
        ]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started[says] = subprocess.Popen(command, cwd=tiny.ROOT, env=tiny.environment(**paths()), **pipes)
    for says, process in started.items():
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == 2 and "Traceback" not in stderr, stderr
        errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and says in errors[0]


def interrupt_after(function, calls):
    count = []

    def wrapper(*args, **kwargs):
        count.append(1)
        if len(count) > calls:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return wrapper


def test_metrics_are_plain_json(tmp_path):
    stages(tmp_path)
    artifact = ppo.run(ppo_args(tmp_path))
    for line in (artifact.path / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line, parse_constant=lambda c: pytest.fail(f"{c} in metrics.jsonl"))
        assert all(math.isfinite(v) for v in values.values() if isinstance(v, float))


def test_encode_is_the_same_for_prompts_and_rewards(tmp_path):
    registry = stages(tmp_path)
    tokenizer = models.load_tokenizer(registry.require("sft", "tiny").path)
    assert (
        encode_prompts(tokenizer, ["Say 1:"])[0] + encode_completions(tokenizer, [" geese"])[0][:-1]
        == tokenizer("Say 1: geese")["input_ids"]
    )


def test_tensorboard_files_outlive_the_run(tmp_path):
    registry = stages(tmp_path)
    ppo.run(ppo_args(tmp_path, report_to=["tensorboard"]))
    assert list((registry.root / "tiny" / "ppo" / "logs").rglob("events.out.tfevents.*"))
