"""Figures and their intervals: by hand where a hand can, by coverage where it takes many."""

import itertools
import math

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.data.encode import blocks
from rlhf.evaluation import (
    answer,
    best_of_n,
    best_of_n_kl,
    bootstrap_ci95,
    expected_best,
    mean_ci95,
    perplexity,
    ranking_metrics,
    win_rate,
)
from rlhf.models import load_policy, load_tokenizer


def test_ranking_by_hand():
    # Prompt 1, ranks 1 2 3: the pairs are (3, 1), (3, 2), (1, 2); scores order the first two. Prompt 2: its pair is wrong.
    found = ranking_metrics([[3.0, 1.0, 2.0], [0.0, 0.5]], [[1, 2, 3], [1, 2]])
    assert (found["accuracy"], found["pairs"], found["prompts"]) == (2 / 4, 4, 2)
    assert found["margin"] == pytest.approx((2 + 1 - 1 - 0.5) / 4)


def test_ties_in_rank_make_no_pair():
    found = ranking_metrics([[1.0, 5.0, 0.0], [1.0, 2.0]], [[1, 1, 3], [2, 2]])
    assert (found["accuracy"], found["pairs"], found["prompts"], found["margin"]) == (1.0, 2, 1, 3.0)


def test_equal_scores_count_half():
    assert ranking_metrics([[1.0, 1.0, 0.0]], [[1, 2, 3]])["accuracy"] == pytest.approx(2.5 / 3)


@pytest.mark.parametrize("scores, ranks", [([], []), ([[1.0, 2.0]], [[1, 1]])])
def test_without_a_pair_nothing_is_known(scores, ranks):
    found = ranking_metrics(scores, ranks)
    assert (found["accuracy"], found["accuracy_ci95"], found["pairs"], found["prompts"]) == (0.5, [0.0, 1.0], 0, 0)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_negated_scores_have_the_accuracy_that_is_left(data):
    ranks = data.draw(st.lists(st.lists(st.integers(1, 4), min_size=2, max_size=5), min_size=1, max_size=4))
    scores = [data.draw(st.lists(st.integers(-3, 3), min_size=len(r), max_size=len(r))) for r in ranks]
    found, negated = ranking_metrics(scores, ranks), ranking_metrics([[-s for s in row] for row in scores], ranks)
    assert found["accuracy"] + negated["accuracy"] == pytest.approx(1)
    assert found["margin"] == pytest.approx(-negated["margin"])
    assert found["pairs"] == negated["pairs"] == sum(a < b for row in ranks for a in row for b in row)
    low, high = found["accuracy_ci95"]
    assert 0 <= low <= found["accuracy"] + 1e-9 and found["accuracy"] - 1e-9 <= high <= 1


def test_the_interval_of_a_perfect_ranking_is_a_point():
    assert ranking_metrics([[2.0, 1.0]] * 30, [[1, 2]] * 30)["accuracy_ci95"] == [1.0, 1.0]


def test_the_interval_resamples_prompts_not_pairs():
    """100 prompts, all 36 pairs of one right or wrong together: the accuracy's sd is 0.5/sqrt(100), not 0.5/sqrt(3600)."""
    nine = list(range(1, 10))
    scores = [[-r if i % 2 else r for r in nine] for i in range(100)]
    low, high = ranking_metrics(scores, [nine] * 100)["accuracy_ci95"]
    assert (high - low) / 2 == pytest.approx(1.96 * 0.5 / math.sqrt(100), rel=0.1)


def test_the_interval_is_the_same_at_each_call():
    values = np.random.default_rng(0).normal(size=50)
    assert mean_ci95(values) == mean_ci95(list(values))


def test_the_mean_s_interval_is_the_normal_one_for_many_values():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    mean, (low, high) = mean_ci95(values)
    half = 1.96 * values.std() / 20
    assert mean == pytest.approx(values.mean())
    assert low == pytest.approx(mean - half, abs=0.08 * half) and high == pytest.approx(mean + half, abs=0.08 * half)


def test_one_value_s_interval_is_a_point():
    assert mean_ci95([2.0]) == (2.0, [2.0, 2.0])


def test_intervals_cover_the_truth_about_95_times_in_100():
    """300 samples of 60 exponential values (mean 1): coverage is about 0.93 at this size, its deviation 0.015."""
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(300):
        low, high = bootstrap_ci95(generator.exponential(size=60), lambda s: s.mean(axis=1), resamples=400)
        covered += low <= 1 <= high
    assert 0.885 < covered / 300 < 0.975


def test_wins_by_hand():
    found = win_rate([2.0, 1.0, 0.0, 5.0], [1.0, 1.0, 1.0, 1.0])  # won, tied, lost, won
    assert found["win_rate"] == 2.5 / 4
    assert found["win_rate_ci95"][0] < 2.5 / 4 < found["win_rate_ci95"][1]


def test_best_of_n_is_the_best_of_the_same_samples(checkpoints):
    tokenizer = load_tokenizer(checkpoints["gpt2"])
    policy = load_policy(checkpoints["gpt2"], tokenizer).eval()
    prompts = ["he", "hello", "or"]

    def total(rows):
        return torch.tensor([float(sum(row)) for row in rows])

    chosen, scores, kl = best_of_n(policy, tokenizer, prompts, total, 4, response_length=5)
    tries = [answer(policy, tokenizer, prompts, response_length=5, step=k) for k in range(4)]
    for i in range(3):
        sums = [sum(a.prompts[i]) + sum(a.tokens[i]) for a in tries]
        assert scores[i] == max(sums) == sum(chosen.prompts[i]) + sum(chosen.tokens[i])
    assert kl == pytest.approx(math.log(4) - 3 / 4)
    assert best_of_n(policy, tokenizer, prompts, total, 1, response_length=5)[2] == 0


def test_the_expected_best_is_the_mean_over_all_choices():
    scores = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    for n in (1, 2, 4, 6):
        chosen = [scores[list(some)].max(dim=0).values for some in itertools.combinations(range(6), n)]
        assert expected_best(scores, n).tolist() == pytest.approx(torch.stack(chosen).mean(dim=0).tolist(), abs=1e-6)
    for n in (0, 7):
        with pytest.raises(ValueError, match="from 1 to the 6 tries"):
            expected_best(scores, n)


def test_the_kl_of_best_of_n_is_that_of_its_distribution():
    """Over many equally likely answers, the i-th worst of M is the best of n with probability (i^n - (i-1)^n) / M^n."""
    i = torch.arange(1, 20_001, dtype=torch.float64)
    for n in (1, 2, 16):
        p = (i / len(i)) ** n - ((i - 1) / len(i)) ** n
        kl = torch.special.xlogy(p, p * len(i)).sum()
        assert best_of_n_kl(n) == pytest.approx(float(kl), abs=2e-3)


@pytest.mark.parametrize("strategy", ["wrapped", "bfd_split"])
def test_perplexity_is_that_of_transformers_loss_without_padding(tmp_path, strategy):
    path = tiny.published(tmp_path, "base").require("base", "tiny").path
    tokenizer = load_tokenizer(path)
    model = load_policy(path, tokenizer).eval()
    texts = [text[: 6 + 7 * (i % 4)] for i, text in enumerate(tiny.text())]
    ids = blocks(tokenizer, texts, 16, strategy)
    padding = ids == tokenizer.pad_token_id
    assert padding.any() == (strategy == "bfd_split")
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids.masked_fill(padding, -100)).loss
    found = perplexity(model, tokenizer, texts, block_size=16, packing_strategy=strategy, batch_size=7)
    assert found == pytest.approx(math.exp(float(loss)), rel=1e-5)
