"""Figures that say whether a model is better, each with its interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf.data.encode import batches, blocks, decode_completions, encode_prompts, pad
from rlhf.models import banned_ids, logits_at, scalar_scores
from rlhf.objectives import token_logprobs
from rlhf.rollout import join, response_logp, sample_responses


def bootstrap_ci95(items: Any, statistic: Callable[[Any], Any], *, resamples: int = 2000, seed: int = 0) -> list[float]:
    """95 % percentile interval of `statistic` over resampled rows of `items` [N, ...] (Efron 1979).

    `statistic` takes resampled items [R, N, ...] and returns [R]: the rows are what was sampled independently (prompts).
    """
    items = np.asarray(items, dtype=np.float64)
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(0, resamples, 100):
        values.append(statistic(items[generator.integers(0, len(items), size=(100, len(items)))]))
    low, high = np.quantile(np.concatenate(values), [0.025, 0.975])
    return [float(low), float(high)]


def mean_ci95(values: Sequence[float]) -> tuple[float, list[float]]:
    """Mean of independent values and its bootstrap interval."""
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()), bootstrap_ci95(array, lambda sample: sample.mean(axis=1))


def ranking_metrics(scores: Sequence[Sequence[float]], ranks: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Share of strictly ordered pairs that the scores order as the ranks do; equal scores count half.

    scores, ranks: a list a prompt, of its K completions; rank 1 is best. The interval resamples prompts, because the pairs of
    one prompt are not independent. Pairs are counted alike, so a prompt with more completions weighs more.
    """
    rows = []
    for score, rank in zip(scores, ranks):
        s, r = np.asarray(score, dtype=np.float64), np.asarray(rank)
        better = r[:, None] < r[None, :]
        gap = s[:, None] - s[None, :]
        rows.append(((gap > 0)[better].sum() + 0.5 * (gap == 0)[better].sum(), better.sum(), gap[better].sum()))
    table = np.asarray([row for row in rows if row[1] > 0], dtype=np.float64).reshape(-1, 3)
    if not len(table):
        return {"accuracy": 0.5, "accuracy_ci95": [0.0, 1.0], "pairs": 0, "prompts": 0, "margin": 0.0}
    right, pairs, gaps = table.sum(axis=0)
    interval = bootstrap_ci95(table, lambda sample: sample[..., 0].sum(axis=1) / sample[..., 1].sum(axis=1))
    return {
        "accuracy": float(right / pairs),
        "accuracy_ci95": interval,
        "pairs": int(pairs),
        "prompts": len(table),
        "margin": float(gaps / pairs),
    }


def win_rate(scores: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    """Share of prompts on which `scores` beats `others`, ties half, with its interval by prompt."""
    a, b = np.asarray(scores, dtype=np.float64), np.asarray(others, dtype=np.float64)
    rate, interval = mean_ci95((a > b) + 0.5 * (a == b))
    return {"win_rate": rate, "win_rate_ci95": interval}


@dataclass(frozen=True)
class Answers:
    """One answer of a policy to each prompt: its text, its tokens with their EOS, and whether it ended."""

    texts: list[str]
    prompts: list[list[int]]
    tokens: list[list[int]]
    ended: list[bool]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each answer, EOS included."""
        return [len(row) for row in self.tokens]


def answer(
    policy: Any,
    tokenizer: Any,
    prompts: Sequence[Any],
    *,
    response_length: int,
    seed: int = 0,
    step: int = 0,
    temperature: float = 1.0,
    batch_size: int = 64,
    shown_as: str | None = None,
) -> Answers:
    """Samples one answer to each prompt. Its random numbers are keyed by (seed, step, place of the prompt).

    shown_as: the name of a progress bar, on a terminal; None shows none.
    """
    ids = encode_prompts(tokenizer, prompts)
    tokens, ended = sample_responses(
        policy,
        ids,
        [(seed, step, i) for i in range(len(ids))],
        response_length=response_length,
        temperature=temperature,
        batch_size=batch_size,
        tokenizer=tokenizer,
        banned=banned_ids(policy, tokenizer),
        shown_as=shown_as,
    )
    return Answers(decode_completions(tokenizer, tokens), ids, tokens, ended)


@torch.no_grad()
def response_logps(
    model: Any, tokenizer: Any, answers: Answers, *, temperature: float = 1.0, batch_size: int = 64
) -> Tensor:
    """Log-probability [B] of each whole answer under `model`, in nats, at the temperature it was sampled with."""
    result = torch.empty(len(answers.tokens))
    banned = banned_ids(model, tokenizer).to(model.device)
    for batch in batches([len(p) + len(t) for p, t in zip(answers.prompts, answers.tokens)], batch_size):
        prompts, prompt_mask = pad([answers.prompts[i] for i in batch], tokenizer.pad_token_id, side="left")
        responses, mask = pad([answers.tokens[i] for i in batch], tokenizer.pad_token_id)
        rows = join(prompts, prompt_mask, responses, mask, tokenizer.pad_token_id).to(model.device)
        result[torch.tensor(batch)] = rows.fill(response_logp(model, rows, temperature, banned)).sum(dim=1).cpu()
    return result


@torch.no_grad()
def score_answers(reward: Any, tokenizer: Any, rows: Sequence[Sequence[int]], *, batch_size: int = 64) -> Tensor:
    """Rewards [N] of token rows, prompt and answer in one."""
    result = torch.empty(len(rows))
    for batch in batches([len(row) for row in rows], batch_size):
        ids, mask = (tensor.to(reward.device) for tensor in pad([rows[i] for i in batch], tokenizer.pad_token_id))
        result[torch.tensor(batch)] = scalar_scores(reward, ids, mask).float().cpu()
    return result


@torch.no_grad()
def perplexity(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    block_size: int = 128,
    packing_strategy: str = "wrapped",
    batch_size: int = 32,
) -> float:
    """exp of the mean negative log-likelihood a token of raw text, in blocks of `block_size` (rlhf.data.encode.blocks)."""
    text = blocks(tokenizer, texts, block_size, packing_strategy)
    total, count = 0.0, 0
    for part in text.split(batch_size):
        part = part.to(model.device)
        where = (part != tokenizer.pad_token_id).roll(-1, dims=1)
        where[:, -1] = False
        logits = logits_at(model, part, torch.ones_like(part), where)
        total -= token_logprobs(logits[None], part.roll(-1, dims=1)[where][None]).sum().item()
        count += len(logits)
    return math.exp(total / count)


def best_of_n(
    policy: Any,
    tokenizer: Any,
    prompts: Sequence[Any],
    score: Callable[[Sequence[Sequence[int]]], Tensor],
    n: int,
    *,
    response_length: int,
    seed: int = 0,
    temperature: float = 1.0,
    batch_size: int = 64,
) -> tuple[Answers, Tensor, float]:
    """The best of n samples a prompt by `score` (token rows -> rewards [N]): answers, their scores [B], and the KL in nats."""
    kl = best_of_n_kl(n)
    how: dict[str, Any] = {
        "response_length": response_length,
        "seed": seed,
        "temperature": temperature,
        "batch_size": batch_size,
    }
    tries = [answer(policy, tokenizer, prompts, step=k, **how) for k in range(n)]
    scores = torch.stack([score([p + t for p, t in zip(a.prompts, a.tokens)]) for a in tries])
    best = scores.argmax(dim=0).tolist()
    chosen = Answers(
        texts=[tries[k].texts[i] for i, k in enumerate(best)],
        prompts=tries[0].prompts,
        tokens=[tries[k].tokens[i] for i, k in enumerate(best)],
        ended=[tries[k].ended[i] for i, k in enumerate(best)],
    )
    return chosen, scores.max(dim=0).values, kl


def best_of_n_kl(n: int) -> float:
    """log n - (n - 1)/n, in nats: KL(best of n || policy), whatever the reward; less where answers are equal.

    Source: Stiennon et al. 2020, appendix G.3; as an upper bound Beirami et al. 2024.
    """
    if n < 1:
        raise ValueError(f"n: must be at least 1, got {n}")
    return math.log(n) - (n - 1) / n


def expected_best(scores: Tensor, n: int) -> Tensor:
    """The mean best of n [B] over all choices of n of the N tries whose scores [N, B] are known; float64.

    sum_i C(i - 1, n - 1) s_(i) / C(N, n) with s_(1) <= … <= s_(N): unbiased, and steadier than the best of the first n.
    Raises ValueError unless 1 <= n <= N.
    Source: Nakano et al. 2021 (WebGPT), appendix I.
    """
    if not 1 <= n <= len(scores):
        raise ValueError(f"n: must be from 1 to the {len(scores)} tries, got {n}")
    chances = [math.comb(i, n - 1) / math.comb(len(scores), n) for i in range(len(scores))]
    return (scores.double().sort(dim=0).values * torch.tensor(chances, dtype=torch.float64)[:, None]).sum(dim=0)
