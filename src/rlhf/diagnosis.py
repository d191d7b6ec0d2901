"""What a PPO run says about itself: the figures of each rollout, and alarms in plain sentences with what to try.

Alarms read the history of figures and nothing else, so that a resumed run raises the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf import objectives
from rlhf.config import PPOArgs
from rlhf.rewards import Reward
from rlhf.rollout import Rollout

Line = dict[str, Any]
QUIET = 10  # rollouts before the same alarm is raised again
TREND = 8  # rollouts over which a trend is judged


def describe(
    rollout: Rollout,
    scores: Tensor,
    returns: Tensor,
    rewards: Sequence[Reward],
    statistics: Sequence[dict[str, float]],
    kl_coef: float,
) -> Line:
    """The figures of one rollout. KL and entropy are in nats a response, estimated on its own samples (temperature 1 or not)."""
    mask, length = rollout.mask, rollout.mask.sum(dim=1).float()
    good = [s for s in statistics if not s["dropped"]]
    first = statistics[0]
    kl3 = torch.where(mask, objectives.kl_penalty(rollout.logp, rollout.logp_ref, "k3"), 0.0)
    entropy = -torch.where(mask, rollout.logp, 0.0).sum()
    line: Line = {
        "objective/scores": float(rollout.scores.mean()),
        "objective/scores_std": float(rollout.scores.std(unbiased=False)),
        "objective/kl": float(rollout.kl.mean()),
        "objective/kl_k3": float(kl3.sum(dim=1).mean()),
        "objective/kl_coef": kl_coef,
        "objective/rlhf_reward": float((scores - kl_coef * rollout.kl).mean()),
        "objective/entropy": float(entropy / len(rollout)),
        "objective/entropy_per_token": float(entropy / mask.sum()),
        "response/length": float(length.mean()),
        "response/ended": float(rollout.ended.float().mean()),
        "response/repeated_trigrams": repeated_ngrams(rollout.responses, mask, 3),
        "value/explained_variance": finite(objectives.explained_variance(rollout.values, returns, mask)),
        "policy/first_ratio": finite(first["policy/ratio"]),
        "policy/first_approx_kl": finite(first["policy/approx_kl"]),
        "dropped_steps": sum(s["dropped"] for s in statistics),
    }
    assert rollout.rewards is not None
    for i, reward in enumerate(rewards):
        line[f"reward/{reward.name}"] = float(rollout.rewards[:, i].mean())
    models = [i for i, reward in enumerate(rewards) if reward.model is not None]
    if len(models) > 1:  # how far an ensemble's members are apart on a response
        line["objective/reward_models_std"] = float(rollout.rewards[:, models].std(dim=1, unbiased=False).mean())
    for name in sorted({name for s in good for name in s} - {"dropped", "policy/ratio_max"}):
        line[name] = sum(s[name] for s in good) / len(good)
    if good:
        line["policy/ratio_max"] = max(s["policy/ratio_max"] for s in good)
    return line


def finite(value: Tensor | float) -> float | None:
    """The number, or None where there is none (JSON has no NaN)."""
    return float(value) if math.isfinite(value) else None


def repeated_ngrams(tokens: Tensor, mask: Tensor, n: int) -> float:
    """Mean share of a response's n-grams that it has had before; 0 for responses shorter than n."""
    shares = []
    for row, real in zip(tokens.tolist(), mask.sum(dim=1).tolist()):
        grams = [tuple(row[i : i + n]) for i in range(real - n + 1)]
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return sum(shares) / len(shares)


# -------------------------------------------------------------------------------------------------------------- alarms


def first_ratio(history: Sequence[Line], args: PPOArgs) -> str | None:
    """Before the first update every ratio is 1. Their mean alone does not tell: it is 1 on average whatever the update sees."""
    ratio, approx_kl = history[-1]["policy/first_ratio"], history[-1]["policy/first_approx_kl"]
    if ratio is None or approx_kl is None:
        return None  # that step was dropped, and says so itself
    low_precision = args.bf16 or args.dtype != "float32"
    spread = (2 * approx_kl) ** 0.5
    if abs(ratio - 1) <= (1e-2 if low_precision else 1e-3) and spread <= (5e-2 if low_precision else 1e-3):
        return None
    return (
        f"the first ratios of the rollout are {ratio:.4f} in the mean, {spread:.4f} around 1, and not 1: rollout and update see "
        "different log-probabilities. Try dtype float32, attn_implementation eager, and dropout off in the model's code"
    )


def negative_kl(history: Sequence[Line], args: PPOArgs) -> str | None:
    recent = [line["objective/kl"] for line in history[-3:]]
    if len(recent) < 3 or max(recent) >= -0.1:
        return None
    return (
        f"KL has been negative for three rollouts ({recent[-1]:.2f} nats): the policy loses probability on its own samples. "
        "Try a lower learning_rate, or fewer num_ppo_epochs"
    )


def kl_over_budget(history: Sequence[Line], args: PPOArgs) -> str | None:
    kl = history[-1]["objective/kl"]
    if args.kl_budget is None or kl <= args.kl_budget:
        return None
    return (
        f"KL is {kl:.1f} nats a response, over the budget of {args.kl_budget:g}: the reward model is asked about texts unlike "
        "those it learned from. Try a higher kl_coef, or stop earlier"
    )


def entropy_collapse(history: Sequence[Line], args: PPOArgs) -> str | None:
    before, now = (history[i]["objective/entropy_per_token"] for i in (0, -1))
    if len(history) < 3 or now > 0.1 * before:
        return None
    return (
        f"entropy fell from {before:.2f} to {now:.2f} nats a token: the policy says one thing only. "
        "Try a higher kl_coef, or a lower learning_rate"
    )


def never_ends(history: Sequence[Line], args: PPOArgs) -> str | None:
    ended = history[-1]["response/ended"]
    if ended > 0.02:
        return None
    return (
        f"{ended:.0%} of the responses end by themselves: nearly all are cut at response_length {args.response_length}. "
        "Try a longer response_length, a higher missing_eos_penalty, or an SFT model that has learned EOS"
    )


def ends_at_once(history: Sequence[Line], args: PPOArgs) -> str | None:
    before, now, ended = history[0]["response/length"], history[-1]["response/length"], history[-1]["response/ended"]
    if ended < 0.98 or now > max(3.0, 0.25 * before) or now > 0.5 * before:  # some answers are short from the start
        return None
    return (
        f"{ended:.0%} of the responses end, after {now:.1f} tokens ({before:.1f} at the start): the policy has gone mute. "
        "Try a higher kl_coef, or a reward model that sees short answers lose"
    )


def over_optimisation(history: Sequence[Line], args: PPOArgs) -> str | None:
    watching = history[-1].get("watching") or []
    if len(history) < 2 * TREND or not watching or rise(history, "objective/scores") <= 0:
        return None
    falling = [name for name in watching if rise(history, f"reward/{name}") < 0]
    if not falling:
        return None
    return (
        f"the reward rises while {', '.join(falling)}, which only watches, falls: the policy learns the reward model's mistakes. "
        "Stop here, or try a higher kl_coef, or a reward model trained on samples of this policy"
    )


def rise(history: Sequence[Line], name: str) -> float:
    """Mean of the last TREND rollouts less that of the TREND before, in standard errors; 0 where it is under two of them."""
    values = torch.tensor([line[name] for line in history[-2 * TREND :]], dtype=torch.float64)
    before, after = values[:TREND], values[TREND:]
    gap = after.mean() - before.mean()
    error = ((before.var() + after.var()) / TREND).sqrt().clamp(min=1e-12)
    return float(gap / error) if abs(gap) > 2 * error else 0.0


def dropped_steps(history: Sequence[Line], args: PPOArgs) -> str | None:
    count = history[-1]["dropped_steps"]
    if not count:
        return None
    return (
        f"{count:g} optimiser steps had a loss or gradient that is not finite and were dropped. "
        "Try a lower learning_rate, float32, or look at the rewards"
    )


ALARMS: tuple[Callable[[Sequence[Line], PPOArgs], str | None], ...] = (
    first_ratio,
    negative_kl,
    kl_over_budget,
    entropy_collapse,
    never_ends,
    ends_at_once,
    over_optimisation,
    dropped_steps,
)


def alarms(history: Sequence[Line], args: PPOArgs) -> dict[str, str]:
    """The alarms that the newest line of the history raises, by name; one raised in the last rollouts is not repeated."""
    recent = {name for line in history[-1 - QUIET : -1] for name in line.get("alarms", {})}
    found = ((alarm.__name__, alarm(history, args)) for alarm in ALARMS if alarm.__name__ not in recent)
    return {name: text for name, text in found if text is not None}
