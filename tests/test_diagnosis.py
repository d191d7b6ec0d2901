"""Figures by hand, and alarms: each is raised by the figures that it is about, at its limit, and by no others."""

import json
import math

import pytest
import torch

from rlhf.config import PPOArgs
from rlhf.diagnosis import ALARMS, QUIET, TREND, alarms, describe, repeated_ngrams, rise
from rlhf.rewards import Reward
from rlhf.rollout import Rollout

FINE = {
    "policy/first_ratio": 1.0,
    "policy/first_approx_kl": 0.0,
    "objective/kl": 1.0,
    "objective/entropy_per_token": 2.0,
    "objective/scores": 0.0,
    "response/ended": 0.9,
    "response/length": 20.0,
    "dropped_steps": 0.0,
}
ARGS = PPOArgs(ptx_coef=0.0, kl_budget=10.0)
HALF = PPOArgs(ptx_coef=0.0, bf16=True)
T, F = True, False


def raised(*lines, args=ARGS):
    """Names of the alarms that the last of these lines raises, each line being what is fine but for what it says."""
    return list(alarms([FINE | line for line in lines], args))


# ------------------------------------------------------------------------------------------------------------------ figures


def rollout():
    """Two episodes of 3 and 1 tokens; log-ratios to the reference 0.5, -1, 0 and 1."""
    return Rollout(
        prompts=torch.tensor([[5, 6], [0, 7]]),
        prompt_mask=torch.tensor([[T, T], [F, T]]),
        responses=torch.tensor([[8, 9, 2], [3, 0, 0]]),
        mask=torch.tensor([[T, T, T], [T, F, F]]),
        ended=torch.tensor([T, F]),
        logp=torch.tensor([[-1.0, -2.0, -3.0], [-4.0, math.nan, math.nan]]),
        logp_ref=torch.tensor([[-1.5, -1.0, -3.0], [-5.0, math.nan, math.nan]]),
        values=torch.tensor([[0.0, 1.0, 1.0], [2.0, math.nan, math.nan]]),
        scores=torch.tensor([1.0, 3.0]),
        rewards=torch.tensor([[1.0, 5.0], [3.0, -5.0]]),
    )


def step(**changes):
    figures = {"policy/ratio": 1.0, "policy/ratio_max": 1.0, "policy/approx_kl": 0.0, "policy/grad_norm": 2.0}
    return figures | {"dropped": 0.0} | changes


def line(*steps):
    rewards = [Reward("rm", 1.0, None), Reward("rule", 0.0, None)]
    shaped = torch.tensor([1.0, 2.0])  # the second had no EOS
    returns = torch.tensor([[1.0, 1.0, 2.0], [2.0, math.nan, math.nan]])
    return describe(rollout(), shaped, returns, rewards, steps, kl_coef=0.1)


def test_figures_by_hand():
    found = line(step(), step(**{"policy/ratio": 1.2, "policy/ratio_max": 3.0, "policy/grad_norm": 4.0}))
    # k1 of a response: -0.5 and 1. k3 = exp(-lr) - 1 + lr.
    k3 = [math.exp(-lr) - 1 + lr for lr in (0.5, -1.0, 0.0, 1.0)]
    # Residuals 1, 0, 1, 0 have variance 1/4; returns 1, 1, 2, 2 too.
    assert found == pytest.approx(
        {
            "objective/scores": 2.0,
            "objective/scores_std": 1.0,
            "objective/kl": 0.25,
            "objective/kl_k3": sum(k3) / 2,
            "objective/kl_coef": 0.1,
            "objective/rlhf_reward": 1.5 - 0.1 * 0.25,
            "objective/entropy": 5.0,
            "objective/entropy_per_token": 2.5,
            "response/length": 2.0,
            "response/ended": 0.5,
            "response/repeated_trigrams": 0.0,
            "value/explained_variance": 0.0,
            "policy/first_ratio": 1.0,
            "policy/first_approx_kl": 0.0,
            "policy/ratio": 1.1,
            "policy/ratio_max": 3.0,
            "policy/approx_kl": 0.0,
            "policy/grad_norm": 3.0,
            "dropped_steps": 0.0,
            "reward/rm": 2.0,
            "reward/rule": 0.0,
        },
        abs=1e-6,
    )


def test_dropped_steps_are_counted_and_stay_out_of_the_figures():
    bad = step(**{"policy/ratio": math.nan, "policy/ratio_max": math.inf, "policy/grad_norm": math.nan, "dropped": 1.0})
    found = line(bad, step(), bad)
    assert (found["dropped_steps"], found["policy/grad_norm"], found["policy/ratio_max"]) == (2.0, 2.0, 1.0)
    assert found["policy/first_ratio"] is None
    for steps in ((bad, step()), (bad, bad)):
        json.dumps(line(*steps), allow_nan=False)


def test_repeated_trigrams_by_hand():
    tokens = torch.tensor([[1, 2, 3, 1, 2, 3], [1, 1, 1, 1, 9, 9], [1, 2, 9, 9, 9, 9]])
    mask = torch.tensor([[T] * 6, [T] * 4 + [F] * 2, [T] * 2 + [F] * 4])
    # 123 231 312 123: one of four again. 111 111: one of two. Too short for one.
    assert repeated_ngrams(tokens, mask, 3) == pytest.approx((1 / 4 + 1 / 2 + 0) / 3)


# ------------------------------------------------------------------------------------------------------------------- alarms


@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("first_ratio", {"policy/first_ratio": 1.1}),
        ("first_ratio", {"policy/first_ratio": 0.9}),
        ("first_ratio", {"policy/first_approx_kl": 0.01}),
        ("negative_kl", {"objective/kl": -0.5}),
        ("kl_over_budget", {"objective/kl": 11.0}),
        ("never_ends", {"response/ended": 0.0}),
        ("dropped_steps", {"dropped_steps": 1.0}),
    ],
)
def test_bad_figures_raise_their_alarm_once_in_a_while(name, figures):
    history = [FINE | figures for _ in range(3)]
    found = alarms(history, ARGS)
    assert list(found) == [name]
    history[-1]["alarms"] = found
    for _ in range(QUIET):
        assert not alarms([*history, FINE | figures], ARGS)
        history.append(FINE | figures)
    assert list(alarms([*history, FINE | figures], ARGS)) == [name]


@pytest.mark.parametrize(
    "figures",
    [
        {},
        {"policy/first_ratio": 1.0009, "policy/first_approx_kl": 4e-7},
        {"policy/first_ratio": None, "policy/first_approx_kl": None},
        {"objective/kl": -0.09},
        {"objective/kl": 10.0},
        {"response/ended": 0.03},
        {"response/ended": 1.0},
        {"response/ended": 1.0, "response/length": 2.0},  # short from the start
        {"objective/entropy_per_token": 0.01},
    ],
)
def test_figures_that_are_well_raise_nothing(figures):
    assert not raised(*[figures] * 5)


def test_16_bits_may_round():
    rounded = {"policy/first_ratio": 1.005, "policy/first_approx_kl": 1e-3}
    assert raised(rounded) == ["first_ratio"] and not raised(rounded, args=HALF)
    assert raised({"policy/first_ratio": 1.02}, args=HALF) == ["first_ratio"]
    assert raised({"policy/first_approx_kl": 2e-3}, args=HALF) == ["first_ratio"]


def test_kl_is_negative_three_times_in_a_row():
    low = {"objective/kl": -0.5}
    assert not raised(low, low) and not raised(low, {"objective/kl": 0.1}, low) and not raised(low, low, {})
    assert raised({}, low, low, low) == ["negative_kl"]


def test_without_a_budget_no_kl_is_too_much():
    assert not raised({"objective/kl": 1e4}, args=HALF)


def test_what_falls_from_where_it_was():
    assert raised({}, {}, {"objective/entropy_per_token": 0.19}) == ["entropy_collapse"]
    assert not raised({}, {}, {"objective/entropy_per_token": 0.21}) and not raised(
        {}, {"objective/entropy_per_token": 0.1}
    )
    assert raised({}, {"response/ended": 1.0, "response/length": 2.0}) == ["ends_at_once"]
    assert raised({}, {"response/ended": 1.0, "response/length": 5.0}) == ["ends_at_once"]
    assert not raised({}, {"response/ended": 1.0, "response/length": 6.0})
    assert not raised({}, {"response/ended": 0.9, "response/length": 2.0})


def watched(score, other, rollouts=2 * TREND):
    """A history in which the score and the reward that only watches move by these steps a rollout."""
    return [
        FINE | {"objective/scores": score * i, "reward/other": other * i, "watching": ["other"]}
        for i in range(rollouts)
    ]


def test_the_reward_rises_while_the_one_that_watches_falls():
    assert list(alarms(watched(1.0, -1.0), ARGS)) == ["over_optimisation"]
    for history in (
        watched(1.0, 1.0),
        watched(-1.0, -1.0),
        watched(1.0, 0.0),
        watched(0.0, -1.0),
        watched(1.0, -1.0, 2 * TREND - 1),
    ):
        assert not alarms(history, ARGS)
    assert not alarms([row | {"watching": []} for row in watched(1.0, -1.0)], ARGS)  # one that steers may well fall


def test_noise_is_no_trend():
    """Two halves from one distribution: at two standard errors some 8 % of 16 normal values look like a trend, no more."""
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(2 * TREND, generator=generator).tolist() for _ in range(400)]
    found = [rise([{"x": value} for value in row], "x") for row in noise]
    assert sum(value != 0 for value in found) / len(found) < 0.12
    shifted = [rise([{"x": v + 3 * (i >= TREND)} for i, v in enumerate(row)], "x") for row in noise]
    assert sum(value > 0 for value in shifted) / len(shifted) > 0.95


def test_every_alarm_is_a_sentence_with_what_to_try():
    histories = {
        "first_ratio": [FINE | {"policy/first_ratio": 1.1}],
        "negative_kl": [FINE | {"objective/kl": -1.0}] * 3,
        "kl_over_budget": [FINE | {"objective/kl": 11.0}],
        "entropy_collapse": [FINE, FINE, FINE | {"objective/entropy_per_token": 0.1}],
        "never_ends": [FINE | {"response/ended": 0.0}],
        "ends_at_once": [FINE, FINE | {"response/ended": 1.0, "response/length": 1.0}],
        "over_optimisation": watched(1.0, -1.0),
        "dropped_steps": [FINE | {"dropped_steps": 1.0}],
    }
    assert set(histories) == {alarm.__name__ for alarm in ALARMS}
    for name, history in histories.items():
        text = alarms(history, ARGS)[name]
        assert len(text) > 60 and "\n" not in text and ("Try " in text or "or try " in text)
