"""Our numbers beside those of TRL 1.12.0's PPOTrainer on fixed rollouts (tests/fixtures, made by benchmarks/parity_trl.py).

First parity: switched to TRL's way, everything agrees. Then each difference that is meant, one test each: TRL's way gives
TRL's numbers, and ours differs by what docs/ppo.md says.
"""

import dataclasses
import importlib.util
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch.testing import assert_close

from rlhf import objectives, ppo
from rlhf.config import STAGE_ARGS, ConfigError, PPOArgs
from rlhf.rollout import Actors, Rollout

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("parity_trl", ROOT / "benchmarks" / "parity_trl.py")
parity = importlib.util.module_from_spec(spec)
spec.loader.exec_module(parity)

TENSORS, DESCRIPTION = parity.load_fixture()
TOLERANCE = 1e-5  # relative to TRL's largest number of each tensor; measured: 3.4e-7 at most


def captured(run, process=0):
    return parity.Captured(TENSORS, DESCRIPTION, run, process)


def ours(run, process=0):
    return parity.Ours(parity.start_models(TENSORS), captured(run, process))


def relative(a, b):
    return parity.deviation(torch.as_tensor(a), torch.as_tensor(b))


def assert_same(a, b):
    assert relative(a, b) <= TOLERANCE


def gradient_of(parts, name="policy"):
    """All gradients of one model as one vector, in the order of their names."""
    return torch.cat([parts[key].flatten() for key in sorted(parts) if key.startswith(name)])


# --- parity


@pytest.fixture(scope="module")
def deviations():
    return parity.compare(TENSORS, DESCRIPTION)


def test_the_fixture_is_of_trl_1_12_0_and_small():
    assert "trl==1.12.0" in DESCRIPTION["requirements"]
    assert parity.FIXTURE.stat().st_size < 500_000


@pytest.mark.parametrize(
    "quantity", ["logprobs", "ref_logprobs", "values", "scores", "rewards", "advantages", "returns"]
)
def test_rollouts_agree(deviations, quantity):
    found = [quantities[quantity] for quantities in deviations.values() if quantity in quantities]
    assert len(found) == 6
    assert max(found) <= TOLERANCE


@pytest.mark.parametrize("run", ["plain", "plain, second step", "accumulated", "full_length", "two_processes"])
def test_losses_and_gradients_agree(deviations, run):
    found = {name: value for name, value in deviations[run].items() if name.endswith(("loss", "gradient"))}
    assert len(found) == {"plain": 3, "two_processes": 2}.get(run, 4)
    assert max(found.values()) <= TOLERANCE, found


def test_the_second_step_has_clips_that_bind():
    """Otherwise the comparison of that step would say nothing about clipping."""
    trl = captured("plain")
    mask, longer = trl["mask"], trl["mask_p1"]
    index = trl["backward1.micro_batch_inds"]
    logp, values = trl["backward1.new_logprobs"], trl["backward1.vpred"]
    policy = objectives.policy_clip_fraction(logp, trl["logprobs"][index], trl["advantages"][index], mask[index])
    value = objectives.value_clip_fraction(values, trl["values"][index], trl["returns"][index], longer[index])
    assert policy > 0.1
    assert value > 0.1


def test_prompts_and_responses_have_all_the_lengths_that_matter():
    whole = captured("plain")
    length = whole["mask"].sum(1)
    ended = (whole["query_responses"][:, int(whole["context_length"]) :] == parity.EOS).any(1)
    assert {1, parity.RESPONSE_LENGTH} <= set(length.tolist())
    assert (ended & (length == parity.RESPONSE_LENGTH)).any() and not ended.all()
    assert (whole["query_responses"][:, 0] == parity.PAD).any()


# --- differences that are meant


def test_the_score_is_on_the_last_token_and_not_one_place_later():
    run, trl = ours("plain"), captured("plain")
    length = run.mask.sum(1)
    kl = objectives.kl_penalty(trl["logprobs"], trl["ref_logprobs"])
    rewards = objectives.shaped_rewards(trl["scores"], kl, run.mask, run.settings.kl_coef)
    with_place = (length < parity.RESPONSE_LENGTH).nonzero().squeeze(1)
    at_last, after_last = (with_place, length[with_place] - 1), (with_place, length[with_place])
    assert_same(trl["rewards"][after_last], trl["scores"][with_place])
    assert not rewards[~run.mask].any()
    assert_same(rewards[at_last] - trl["rewards"][at_last], trl["scores"][with_place])
    # The same reward in all, and without a place after it the same place.
    assert_same(rewards.sum(1), trl["rewards"].sum(1))
    full = length == parity.RESPONSE_LENGTH
    assert_same(rewards[full], trl["rewards"][full])


def test_no_value_is_learned_after_the_last_token():
    run, trl = ours("plain"), captured("plain")
    rollout = run.rollout()
    extra = parity.one_longer(run.mask) & ~run.mask
    assert torch.equal(parity.one_longer(run.mask), trl["mask_p1"])
    assert trl["values"][extra].all() and trl["returns"][extra].all()
    _, returns = objectives.gae(rollout["rewards"].masked_fill(extra, 0), rollout["values"], run.mask)
    assert not returns[extra].any()
    loss = objectives.clipped_value_loss(rollout["values"], rollout["values"], trl["returns"], run.mask)
    more = 0.5 * (trl["values"] - trl["returns"])[extra].square().sum()
    places = run.mask.sum() + extra.sum()
    assert_same((loss * run.mask.sum() + more) / places, trl["backward0.vf_loss"])
    assert relative(loss, trl["backward0.vf_loss"]) > 1e-3


def test_variance_is_biased():
    run = ours("plain")
    raw = captured("plain")["returns"] - captured("plain")["values"]
    n = run.mask.sum()
    whitened = objectives.masked_whiten(raw, run.mask)
    assert_same(whitened * ((n - 1) / n).sqrt(), captured("plain")["advantages"])
    assert relative(whitened, captured("plain")["advantages"]) > 0.5 / n


def test_whitening_is_over_all_processes():
    parts = [captured("two_processes", process) for process in range(2)]
    raw, masks = [part["returns"] - part["values"] for part in parts], [part["mask"] for part in parts]
    for part, x, mask in zip(parts, raw, masks):  # TRL: each process has mean 0 for itself
        assert_same(objectives.masked_whiten(x, mask, parity.unbiased(x, mask)), part["advantages"])
        assert abs(objectives.masked_mean(part["advantages"], mask)) < 1e-6
    merged = objectives.merge_moments(objectives.moments(x, mask) for x, mask in zip(raw, masks))
    whitened = [objectives.masked_whiten(x, mask, merged) for x, mask in zip(raw, masks)]
    assert all(relative(x, part["advantages"]) > 0.05 for x, part in zip(whitened, parts))
    whole = objectives.moments(torch.cat(whitened), torch.cat(masks))
    assert_close(torch.stack([whole.mean, whole.variance]), torch.tensor([0.0, 1.0]), rtol=0, atol=1e-5)


def test_losses_are_over_all_tokens_of_the_minibatch():
    """`plain` and `accumulated` are the same episodes and weights, in one micro-batch of 8 and in 4 of 2."""
    one, four = captured("plain"), captured("accumulated")
    for name in parity.Recorder.ROLLOUT:
        assert torch.equal(one[name], four[name])
    trl = [gradient_of(part.group("step0.gradient.")) for part in (one, four)]
    assert relative(trl[1], trl[0]) > 0.05  # TRL: short responses weigh more where they share a micro-batch

    run = ours("accumulated")
    rollout, tokens = run.rollout(), int(run.mask.sum())
    places = int(parity.one_longer(run.mask).sum())
    mine = []
    for micro_batches in (one.micro_batches[:1], four.micro_batches):
        losses = [run.losses(rollout, index, tokens, places) for index in micro_batches]
        mine.append(gradient_of(run.gradients(sum(p + run.settings.vf_coef * v for p, v in losses))))
    assert_same(mine[1], mine[0])
    assert_same(mine[0], trl[0])  # with one micro-batch the mean over tokens is TRL's too


def test_pad_is_excluded_from_the_distribution():
    run, trl = ours("plain"), captured("plain")
    with torch.no_grad():
        assert_same(run.logp("policy")[run.mask], trl["logprobs"][run.mask])
        run.banned = torch.tensor([parity.PAD])
        without_pad = run.logp("policy")[run.mask]
    gain = without_pad - trl["logprobs"][run.mask]
    assert (gain > 0).all() and gain.max() > 0.01  # log 1 / (1 - p(PAD))


def test_temperature_is_what_the_config_says():
    """TRL adds 1e-7, so that a temperature of 0 is none: too little to see, and we refuse 0 instead."""
    run = ours("plain")
    run.temperature = run.settings.temperature
    theirs = captured("plain")["logprobs"][run.mask]
    with torch.no_grad():
        assert_same(run.logp("policy")[run.mask], theirs)
        run.temperature *= 1.01
        assert relative(run.logp("policy")[run.mask], theirs) > 10 * TOLERANCE  # a temperature of its own is seen
    with pytest.raises(ConfigError, match="temperature"):
        PPOArgs(run_name="a", temperature=0.0)


# --- our loop itself, without any switch but whitening


def trainer_on(run, **choices):
    """Our loop with the models and settings of a run of TRL's; its optimiser changes nothing and is watched."""
    shared = ("temperature", "cliprange", "cliprange_value", "vf_coef")
    args = PPOArgs(
        **{name: getattr(run.settings, name) for name in shared},
        batch_size=8,
        ptx_coef=0,
        ema_decay=None,
        **{"num_mini_batches": 1, "max_grad_norm": 0.0, **choices},
    )
    model = ppo.ActorCritic(run.models["policy"], run.models["critic"])
    optimizer, steps = torch.optim.SGD(model.parameters(), lr=0.0), []
    actors = Actors(
        policy=model.policy,
        reference=None,
        critic=model.critic,
        rewards=[],
        tokenizer=SimpleNamespace(pad_token_id=parity.PAD),
        banned=run.banned,
        temperature=args.temperature,
        response_length=args.response_length,
        batch_size=args.batch_size,
    )
    trainer = ppo.PPO(args, Accelerator(cpu=True), model, optimizer, actors, [], None)
    optimizer.register_step_pre_hook(
        lambda *_: steps.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
    )
    return trainer, steps


def rollout_of(run, trl):
    """TRL's rollout as ours."""
    width = int(trl["context_length"])
    found = run.rollout()
    return Rollout(
        prompts=trl["query_responses"][:, :width],
        prompt_mask=trl["query_responses"][:, :width] != parity.PAD,
        responses=trl["query_responses"][:, width:],
        mask=run.mask,
        ended=run.ended,
        logp=found["logprobs"],
        logp_ref=found["ref_logprobs"],
        values=found["values"],
        scores=found["scores"],
    )


@pytest.mark.parametrize("size", [2, 3, 8])
def test_our_loop_has_trl_s_gradient_where_responses_are_of_one_length(size):
    """Nothing is after the last token then, and means of micro-batches are means of all: only whitening still differs."""
    run, trl = ours("full_length"), captured("full_length")
    trainer, steps = trainer_on(run, per_device_train_batch_size=size)
    sums = trainer.update(rollout_of(run, trl), trl["advantages"], trl["returns"], torch.arange(8))
    assert len(steps) == 1
    for name in ("policy", "critic"):
        assert_same(gradient_of(steps[0], name), gradient_of(trl.group("step0.gradient."), name))
    losses = [torch.stack([trl[f"backward{i}.{name}"] for i in range(4)]).mean() for name in ("pg_loss", "vf_loss")]
    assert abs(sums["loss/policy"] - losses[0]) < 1e-6  # both are 0 but for rounding: the mean of whitened advantages
    assert_same(sums["loss/value"], losses[1])


def test_a_step_is_taken_for_each_minibatch():
    """2 mini-batches of 2 micro-batches: TRL accumulated 4 and took 1 step, and 4 at the end of a data epoch."""
    assert captured("mini_batches").steps == {"1": 1, "2": 4}
    run, trl = ours("accumulated"), captured("accumulated")
    trainer, steps = trainer_on(run, num_mini_batches=2, per_device_train_batch_size=2)
    rollout = rollout_of(run, trl)
    for minibatch in ppo.minibatches(8, 2, (0, 0, 0)):
        trainer.update(rollout, trl["advantages"], trl["returns"], minibatch)
    assert len(steps) == 2


def test_gradients_are_clipped_for_policy_and_critic_each():
    """TRL's PPOTrainer does not look at max_grad_norm: it stepped with a norm above its 1.0."""
    run, trl = ours("full_length"), captured("full_length")
    theirs = trl.group("step0.gradient.")
    assert gradient_of(theirs).norm() > 1.5
    trainer, steps = trainer_on(run, max_grad_norm=0.05)
    trainer.update(rollout_of(run, trl), trl["advantages"], trl["returns"], torch.arange(8))
    for name in ("policy", "critic"):
        assert_same(gradient_of(steps[0], name).norm(), 0.05)


def test_on_full_length_responses_only_whitening_differs():
    """Rewards, returns and advantages with no switch at all: TRL's but for the variance of whitening."""
    run, trl = ours("full_length"), captured("full_length")
    rollout = replace(rollout_of(run, trl), values=trl["values"])
    kl = objectives.kl_penalty(rollout.logp, rollout.logp_ref)
    rewards = objectives.shaped_rewards(rollout.scores, kl, rollout.mask, run.settings.kl_coef)
    advantages, returns = objectives.gae(rewards, rollout.values, rollout.mask, run.settings.gamma, run.settings.lam)
    assert_same(rewards, trl["rewards"])
    assert_same(returns, trl["returns"])
    n = rollout.mask.sum()
    white = objectives.masked_whiten(advantages, rollout.mask)
    assert relative(white, trl["advantages"]) > TOLERANCE
    assert_same(white * ((n - 1) / n).sqrt(), trl["advantages"])


# --- docs/ppo.md


@pytest.fixture(scope="module")
def page():
    return (ROOT / "docs" / "ppo.md").read_text(encoding="utf-8")


def default(stage, name):
    field = {f.name: f for f in dataclasses.fields(STAGE_ARGS[stage])}[name]
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def test_defaults_in_the_documentation_are_the_config_s(page):
    found = re.findall(r"`(?:(sft|reward)\.)?(\w+)=([^`\s]+)`", page)
    assert len(found) > 40
    words = {"null": None, "true": True, "false": False}
    for stage, name, value in found:
        known = default(stage or "ppo", name)
        assert (words[value] if value in words else type(known)(value)) == known, name


def test_the_tests_that_the_documentation_names_exist(page):
    names = re.findall(r"`(tests/\w+\.py)::(\w+)`", page)
    names += [("tests/test_parity_trl.py", name) for name in re.findall(r"`(test_\w+)`", page)]
    assert len(names) > 80
    for file, name in names:
        assert f"\ndef {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{name}"


def test_every_row_of_details_names_a_test(page):
    rows = [line for line in page.splitlines() if line.startswith("| ") and re.search(r"\| N(\+| |\b)", line)]
    assert len(rows) > 45
    assert [row for row in rows if "`tests/" not in row] == [row for row in rows if "DPO" in row]
