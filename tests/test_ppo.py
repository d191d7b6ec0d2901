"""The PPO loop: its invariants, its optimiser steps, its checkpoints, and what it does with bad rewards."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import tiny
import torch
from torch.testing import assert_close

from rlhf import RLHFError, models, objectives, ppo
from rlhf.actors import load_models, reward_sources
from rlhf.config import PPOArgs
from rlhf.data.encode import encode_completions, encode_prompts
from rlhf.registry import Registry
from rlhf.rollout import rows_of
from rlhf.training import step_of


def count_the(prompts, completions, **columns):
    """A rule: bytes of the completion that are the letter e."""
    return [float(text.count("e")) for text in completions]


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
    model, actors = load_models(args, accelerator, tokenizer, str(sft.path), sources, sources[0][0])
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


def test_the_first_line_says_so(tmp_path):
    stages(tmp_path)
    trainer = trainer_of(ppo_args(tmp_path))
    _, line = trainer.step()
    assert line["objective/kl"] == 0 and line["policy/first_ratio"] == pytest.approx(1, abs=1e-5)


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
    args = ppo_args(
        tmp_path,
        critic_path="tiny/rm",
        learning_rate=3e-3,
        **RULE,
    )
    history = tiny.history(ppo.run(args))
    start, end = history[0]["objective/scores"], history[-1]["objective/scores"]
    assert end > start + 1, f"{start} -> {end}"
    assert history[-1]["value/explained_variance"] is not None


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


def test_a_later_round_starts_from_the_published_critic(tmp_path):
    stages(tmp_path)
    first = ppo.run(ppo_args(tmp_path))
    args = ppo_args(tmp_path, sft_model_path="tiny/ppo", critic_path="tiny/ppo", total_episodes=8)
    registry = Registry(args.output_dir)
    path, artifact = ppo.critic_source(args, registry, reward_sources(args, registry), "")
    assert artifact == first and path == str(first.path / "critic")
    second = ppo.run(args)
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


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("test_ppo", "package.module:function"),
        ("no_such_module:f", "cannot import no_such_module"),
        ("test_ppo:no_such", "no function 'no_such'"),
        ("test_ppo:broken", "raised KeyError: 'colour'"),
        ("test_ppo:too_few", "returned 1 rewards for"),
        ("test_ppo:not_numbers", "'good' for completion 0, which is no number"),
        ("test_ppo:not_finite", "nan for completion 0"),
    ],
)
def test_bad_reward_functions_are_one_line(tmp_path, function, says):
    registry = stages(tmp_path)
    with pytest.raises(RLHFError, match=says.replace("(", r"\(")) as caught:
        ppo.run(ppo_args(tmp_path, reward_functions=[function]))
    assert "\n" not in str(caught.value)
    assert not registry.list("tiny", "ppo")


def test_a_reward_that_fails_later_leaves_a_checkpoint(tmp_path, monkeypatch):
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


def test_a_reward_model_with_another_tokenizer_is_refused(tmp_path):
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
    with pytest.raises(RLHFError, match="another tokenizer"):
        ppo.run(ppo_args(tmp_path, reward_model_path=[str(foreign.path)]))


def test_a_checkpoint_without_a_head_is_refused(tmp_path):
    registry = stages(tmp_path)
    with pytest.raises(RLHFError, match="no scalar head"):
        ppo.run(ppo_args(tmp_path, reward_model_path=[str(registry.require("sft", "tiny").path)]))


def test_prompts_that_leave_no_room_are_refused(tmp_path):
    stages(tmp_path)
    with pytest.raises(RLHFError, match="no room for a prompt"):
        ppo.run(ppo_args(tmp_path, response_length=64))
    with pytest.raises(RLHFError, match="over 2 tokens"):
        ppo.run(ppo_args(tmp_path, max_prompt_length=2))


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


# ------------------------------------------------------------------------------------------------------------------ resume


def ppo_checkpoints(registry):
    return sorted(registry.work_dir("tiny", "ppo").glob("*/checkpoint-*"), key=step_of)


def resumable(tmp_path, **changes):
    """Everything that a checkpoint must carry is on: average, adaptive KL, running statistics, ptx, inner epochs."""
    settings = {
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


@pytest.mark.slow
def test_a_killed_run_resumes_bit_equal_from_any_moment(tmp_path):
    registry = stages(tmp_path)
    args = resumable(tmp_path)
    whole = ppo.run(args)
    config = tiny.write_config(tmp_path / "ppo.json", args, resume_from_checkpoint="latest")
    command = [sys.executable, "scripts/ppo.py", "--config", config]
    kills = int(os.environ.get("RLHF_TEST_KILLS", "3"))
    generator = torch.Generator().manual_seed(0)
    for _ in range(kills):
        process = subprocess.Popen(command, cwd=tiny.ROOT, env=tiny.environment(), stderr=subprocess.DEVNULL)
        started = time.monotonic()
        while not list(registry.work_dir("tiny", "ppo").glob("*/config.json")) and time.monotonic() - started < 120:
            time.sleep(0.05)
        time.sleep(2 * torch.rand(1, generator=generator).item())
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = tiny.launch(command)
    assert done.returncode == 0, done.stderr[-2000:]
    assert registry.require("ppo", "tiny").weights_sha256 == whole.weights_sha256


def test_resuming_with_other_settings_says_which(tmp_path, monkeypatch):
    stages(tmp_path)
    monkeypatch.setattr(ppo.PPO, "collect", interrupt_after(ppo.PPO.collect, 2))
    with pytest.raises(KeyboardInterrupt):
        ppo.run(resumable(tmp_path))
    monkeypatch.undo()
    with pytest.raises(RLHFError, match=r"kl_coef \(0.02 -> 0.5\)"):
        ppo.run(resumable(tmp_path, resume_from_checkpoint="latest", kl_coef=0.5))


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
