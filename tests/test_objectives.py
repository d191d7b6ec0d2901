"""rlhf.objectives: golden literals worked out by hand, identities from the papers, and properties that always hold."""

import ast
import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf import objectives as ob
from rlhf.objectives import Moments

# math.log and math.exp keep the literals exact; math is not what is under test.
LN2 = math.log(2)
GARBAGE = [math.nan, math.inf, -math.inf, 1e30, -7.0]
examples = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**32 - 1)
garbage = st.sampled_from(GARBAGE)


def T(data, **kwargs):
    return torch.tensor(data, **({"dtype": torch.float32} | kwargs))


def M(data):
    return torch.tensor(data, dtype=torch.bool)


def assert_close(actual, expected, atol=1e-6):
    expected = expected if isinstance(expected, torch.Tensor) else torch.tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def randn(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def prefix_mask(seed, batch, time, shortest=1):
    lengths = torch.randint(shortest, time + 1, (batch,), generator=torch.Generator().manual_seed(seed + 1))
    return torch.arange(time) < lengths[:, None]


def at_padding(x, mask, value):
    return torch.where(mask, x, torch.full_like(x, value))


def gradient(function, x, *rest, **kwargs):
    x = x.detach().clone().requires_grad_()
    value = function(x, *rest, **kwargs)
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


# Every function of tensors that share a [B, T] mask, differentiable in its first argument: name -> (function, arguments).
MASKED = {
    "masked_mean": (ob.masked_mean, 1),
    "masked_whiten": (ob.masked_whiten, 1),
    "masked_scale": (ob.masked_scale, 1),
    "variance": (lambda x, mask: ob.moments(x, mask).variance, 1),
    "merged": (lambda x, mask: ob.merge_moments([ob.moments(x, mask), ob.moments(2 * x, mask)]).m2, 1),
    "shaped_rewards": (lambda kl, mask: ob.shaped_rewards(torch.ones(len(kl), dtype=kl.dtype), kl, mask, 0.5), 1),
    "gae_advantages": (lambda r, v, mask: ob.gae(r, v, mask, 0.9, 0.8)[0], 2),
    "gae_returns": (lambda v, r, mask: ob.gae(r, v, mask, 0.9, 0.8)[1], 2),
    "clipped_policy_loss": (ob.clipped_policy_loss, 3),
    "clipped_value_loss": (ob.clipped_value_loss, 3),
    "pretraining_loss": (ob.pretraining_loss, 1),
    "approx_kl": (ob.approx_kl, 2),
    "ratio_mean": (lambda logp, old, mask: ob.ratio_moments(logp, old, mask).mean, 2),
    "ratio_variance": (lambda logp, old, mask: ob.ratio_moments(logp, old, mask).variance, 2),
    "ratio_max": (ob.ratio_max, 2),
    "explained_variance": (ob.explained_variance, 2),
}
SPLITTABLE = {  # those that take a count
    "masked_mean": (ob.masked_mean, 1),
    "clipped_policy_loss": (ob.clipped_policy_loss, 3),
    "clipped_value_loss": (ob.clipped_value_loss, 3),
    "pretraining_loss": (ob.pretraining_loss, 1),
    "approx_kl": (ob.approx_kl, 2),
}
FRACTIONS = {"policy": ob.policy_clip_fraction, "value": ob.value_clip_fraction}


def test_imports_only_torch_and_typing():
    imported = set()
    for node in ast.walk(ast.parse(inspect.getsource(ob))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module)
    assert imported <= {"torch", "typing", "collections.abc"}, imported


def test_every_public_function_has_a_docstring_and_no_boolean_argument():
    functions = [f for name, f in vars(ob).items() if inspect.isfunction(f) and not name.startswith("_")]
    assert len(functions) >= 23
    for function in functions:
        assert function.__doc__, function.__name__
        for parameter in inspect.signature(function).parameters.values():
            assert parameter.annotation is not bool and not isinstance(parameter.default, bool), function.__name__


def test_signatures_are_the_contract():
    expected = {
        "token_logprobs": "logits tokens temperature=1.0",
        "masked_mean": "x mask count=None",
        "moments": "x mask",
        "merge_moments": "parts",
        "masked_whiten": "x mask moments=None",
        "masked_scale": "x mask moments=None",
        "ranking_loss": "rewards ranks prompt_index count=None",
        "ordered_pairs": "ranks prompt_index",
        "ordered_and_tied_pairs": "ranks prompt_index",
        "smoothed_pairs": "targets smoothing",
        "rating_margins": "ratings scale",
        "pairwise_ranking_loss": "rewards targets prompt_index margins=None count=None",
        "centring_penalty": "rewards targets prompt_index count=None",
        "kl_penalty": "logp logp_ref kind='k1'",
        "shaped_rewards": "scores kl mask kl_coef",
        "gae": "rewards values mask gamma=1.0 lam=0.95",
        "clipped_policy_loss": "logp logp_old advantages mask clip=0.2 count=None",
        "clipped_value_loss": "values values_old returns mask clip=0.2 count=None",
        "pretraining_loss": "logp mask count=None",
        "ema_update": "average weights decay",
        "next_kl_coef": "kl_coef observed_kl target horizon n",
    }
    for name, arguments in expected.items():
        parameters = inspect.signature(getattr(ob, name)).parameters.values()
        shown = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters]
        assert " ".join(shown) == arguments, name


# --- token_logprobs and entropy


def test_token_logprobs_by_hand():
    # softmax of (0, ln 2, ln 5) is (1, 2, 5) / 8; of (ln 3, 0, 0) is (3, 1, 1) / 5
    logits = T([[[0, LN2, math.log(5)], [math.log(3), 0, 0]]])
    logp = ob.token_logprobs(logits, torch.tensor([[1, 0]]))
    assert_close(logp, [[math.log(2 / 8), math.log(3 / 5)]])


def test_temperature_divides_the_logits():
    # (ln 4, 0) / 2 = (ln 2, 0): softmax (2, 1) / 3. At temperature 1/2: (ln 16, 0): (16, 1) / 17
    logits = T([[[math.log(4), 0]]])
    token = torch.tensor([[0]])
    assert_close(ob.token_logprobs(logits, token, temperature=2.0), [[math.log(2 / 3)]])
    assert_close(ob.token_logprobs(logits, token, temperature=0.5), [[math.log(16 / 17)]])


def test_token_logprobs_survive_huge_logits_and_excluded_tokens():
    # (1e4, 0): log-probs (0, -1e4). An excluded token leaves its share to the others: (ln 2, 0) -> (2, 1) / 3
    assert_close(ob.token_logprobs(T([[[1e4, 0]] * 2]), torch.tensor([[0, 1]])), [[0.0, -1e4]])
    logits = T([[[LN2, 0, -math.inf]]])
    logp, grad = gradient(ob.token_logprobs, logits, torch.tensor([[0]]))
    assert_close(logp, [[math.log(2 / 3)]])
    assert_close(grad, [[[1 / 3, -1 / 3, 0.0]]])  # one-hot - softmax


@examples
@given(seeds, st.sampled_from([0.5, 1.0, 1.7]))
def test_token_logprobs_are_a_distribution(seed, temperature):
    logits = randn(seed, 2, 3, 5)
    every = torch.stack([ob.token_logprobs(logits, torch.full((2, 3), v), temperature) for v in range(5)], -1)
    assert_close(every.exp().sum(-1), torch.ones(2, 3, dtype=torch.float64), atol=1e-12)
    assert_close(
        ob.token_logprobs(logits + 100, torch.zeros(2, 3, dtype=torch.long), temperature), every[..., 0], atol=1e-10
    )


def test_token_logprobs_errors():
    with pytest.raises(ValueError, match=r"\(1, 2, 3\) and \(1, 3\)"):
        ob.token_logprobs(torch.zeros(1, 2, 3), torch.zeros(1, 3, dtype=torch.long))
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temperature"):
            ob.token_logprobs(torch.zeros(1, 1, 3), torch.zeros(1, 1, dtype=torch.long), temperature)


def test_entropy_by_hand():
    # uniform over 4: ln 4. (1, 1, 2)/4: 2 * 1/4 ln 4 + 1/2 ln 2 = 3/2 ln 2. Excluded tokens add 0: ln 2. Certain: 0
    logits = T(
        [[[3, 3, 3, 3], [0, 0, LN2, -math.inf], [1, 1, -math.inf, -math.inf], [0, -math.inf, -math.inf, -math.inf]]]
    )
    value, grad = gradient(ob.entropy, logits)
    assert_close(value, [[math.log(4), 1.5 * LN2, LN2, 0.0]])
    assert grad.isfinite().all()
    # at temperature 2, (2 ln 3, 0) is (3, 1) / 4: ln 4 - 3/4 ln 3
    assert_close(ob.entropy(T([[[2 * math.log(3), 0]]]), temperature=2.0), [[math.log(4) - 0.75 * math.log(3)]])


# --- masked_mean, moments, whitening


def test_masked_mean_by_hand():
    x, mask = T([[1, 2, 9], [4, 9, 9]]), M([[1, 1, 0], [1, 0, 0]])
    assert_close(ob.masked_mean(x, mask), 7 / 3)  # (1 + 2 + 4) / 3
    for count in (14, 14.0, torch.tensor(14), torch.tensor(14.0, dtype=torch.float64)):
        result = ob.masked_mean(x, mask, count)
        assert_close(result, 0.5)  # 7 / 14
        assert result.dtype == torch.float32


def test_nothing_real_is_zero_and_attached():
    x, nothing = T([[math.nan, 1]]), M([[0, 0]])
    for function, arity in SPLITTABLE.values():
        for count in (None, 0, 5):
            value, grad = gradient(function, x, *[x] * (arity - 1), nothing, count=count)
            assert_close(value, 0.0, atol=0)
            assert_close(grad, [[0.0, 0.0]], atol=0)


def test_count_errors():
    x, mask = T([[1, 2]]), M([[1, 1]])
    for count in (0, -1, math.nan, torch.tensor(0)):
        for function, arity in SPLITTABLE.values():
            with pytest.raises(ValueError, match="2 real items"):
                function(*[x] * arity, mask, count=count)
        with pytest.raises(ValueError, match="1 real items"):
            ob.ranking_loss(T([1, 2]), torch.tensor([1, 2]), torch.tensor([0, 0]), count)


@pytest.mark.parametrize("name", MASKED)
def test_shape_and_mask_errors(name):
    function, arity = MASKED[name]
    x = T([[1, 2, 3]])
    with pytest.raises(ValueError, match=r"shapes differ: .*mask \(1, 2\)"):
        function(*[x] * arity, M([[1, 1]]))
    with pytest.raises(ValueError, match="mask must be bool"):
        function(*[x] * arity, torch.ones(1, 3, dtype=torch.long))
    for position in range(1, arity):  # [1, 1] would broadcast in silence
        arguments = [x] * arity
        arguments[position] = x[:, :1]
        with pytest.raises(ValueError, match=r"shapes differ: .*\(1, 1\)"):
            function(*arguments, M([[1, 1, 1]]))


def test_moments_by_hand():
    # 1, 2, 6: mean 3, m2 = 4 + 1 + 9 = 14, biased variance 14/3
    m = ob.moments(T([[1, 2, 50], [6, 50, 50]]), M([[1, 1, 0], [1, 0, 0]]))
    assert_close(torch.stack(m), [3.0, 3.0, 14.0])
    assert_close(m.variance, 14 / 3)
    with pytest.raises(ValueError, match="no token is real"):
        ob.moments(T([[1.0]]), M([[0]]))


def test_moments_do_not_cancel():
    # 4096 ± 1/64: E[x^2] - E[x]^2 would lose all of the variance 2^-12 in float32, two passes lose nothing
    x = T([[4096 + 1 / 64, 4096 - 1 / 64]])
    assert_close(ob.moments(x, M([[1, 1]])).variance, 2.0**-12, atol=1e-9)


def test_merge_moments_by_hand():
    # {1, 3}: (2, 2, 2) and {8}: (1, 8, 0). Union: mean 4, m2 = 9 + 1 + 16 = 26 = 2 + 0 + 6^2 * 2 * 1 / 3
    merged = ob.merge_moments(iter([Moments(*T([2, 2, 2])), Moments(*T([0, 0, 0])), Moments(*T([1, 8, 0]))]))
    assert_close(torch.stack(merged), [3.0, 4.0, 26.0])
    for parts in ([], [Moments(*T([0, 0, 0]))]):
        with pytest.raises(ValueError, match="no part has a real token"):
            ob.merge_moments(parts)


@examples
@given(seeds, st.integers(1, 5))
def test_merged_moments_are_the_moments_of_the_whole(seed, batch):
    x, mask = randn(seed, batch, 4) + 5, prefix_mask(seed, batch, 4)
    parts = [ob.moments(x[i : i + 1], mask[i : i + 1]) for i in range(batch)]
    whole = torch.stack(ob.moments(x, mask))
    assert_close(torch.stack(ob.merge_moments(parts)), whole, atol=1e-11)
    assert_close(torch.stack(ob.merge_moments(parts[::-1])), whole, atol=1e-11)


def test_whiten_and_scale_by_hand():
    # 0, 2, 4, 10: mean 4, m2 = 16 + 4 + 0 + 36 = 56, var 14
    x, mask = T([[0, 2, 4], [10, 77, 77]]), M([[1, 1, 1], [1, 0, 0]])
    sd = 14**0.5
    assert_close(ob.masked_whiten(x, mask), [[-4 / sd, -2 / sd, 0.0], [6 / sd, 0, 0]])
    assert_close(ob.masked_scale(x, mask), [[4 - 4 / sd, 4 - 2 / sd, 4.0], [4 + 6 / sd, 0, 0]])
    # with the moments of a larger rollout: mean 2, var 18/2 = 9
    rollout = Moments(*T([2, 2, 18]))
    assert_close(ob.masked_whiten(x, mask, rollout), [[-2 / 3, 0, 2 / 3], [8 / 3, 0, 0]])
    assert_close(ob.masked_scale(x, mask, rollout), [[4 / 3, 2, 8 / 3], [14 / 3, 0, 0]])


def test_whiten_of_a_constant_is_zero():
    # the 1e-8 under the root: (3 - 3) * 1e4 = 0, and (3.0001 - 3) * 1e4 = 1 for given moments
    x, mask = T([[3, 3, 3]]), M([[1, 1, 1]])
    assert_close(ob.masked_whiten(x, mask), [[0.0, 0, 0]])
    assert_close(ob.masked_scale(x, mask), [[3.0, 3, 3]])
    x64 = T([[3.0001]], dtype=torch.float64)
    assert_close(ob.masked_whiten(x64, M([[1]]), Moments(*T([1, 3, 0], dtype=torch.float64))), [[1.0]], atol=1e-6)


@examples
@given(seeds)
def test_whitened_has_mean_0_and_variance_1_and_scaled_keeps_the_mean(seed):
    x, mask = 7 * randn(seed, 4, 6) + 3, prefix_mask(seed, 4, 6, shortest=2)
    before, white, scaled = (ob.moments(y, mask) for y in (x, ob.masked_whiten(x, mask), ob.masked_scale(x, mask)))
    assert_close(white.mean, 0.0, atol=1e-12)
    assert_close(white.variance, 1.0, atol=1e-7)
    assert_close(scaled.mean, before.mean, atol=1e-12)
    assert_close(scaled.variance, 1.0, atol=1e-7)


# --- ranking_loss


def naive_ranking_loss(rewards, ranks, prompt_index):
    """The definition, pair by pair: -1/|pairs| sum log sigmoid(r_w - r_l) a prompt, mean over prompts with a pair."""
    per_prompt = []
    for prompt in sorted(set(prompt_index)):
        members = [i for i, p in enumerate(prompt_index) if p == prompt and ranks[i] >= 0]
        pairs = [(i, j) for i in members for j in members if ranks[i] < ranks[j]]
        if pairs:
            losses = [math.log1p(math.exp(-(rewards[i] - rewards[j]))) for i, j in pairs]
            per_prompt.append(sum(losses) / len(pairs))
    return sum(per_prompt) / max(len(per_prompt), 1)


def ranking_batch(seed, prompts=4, K=5):
    """Rewards, ranks with ties and padding, and prompt indices, flattened from [prompts, K]."""
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.randint(1, 4, (prompts, K), generator=generator)
    ranks[torch.rand(prompts, K, generator=generator) < 0.3] = -100
    return randn(seed, prompts * K), ranks.flatten(), torch.arange(prompts).repeat_interleave(K)


def test_ranking_loss_by_hand():
    # prompt 7: rewards ln 3, 0, 0 for ranks 1, 2, 2: two pairs (the tie has none), each -log(3/4): mean ln(4/3).
    # prompt 5: rank 1 has reward 0, rank 2 has ln 4: one pair, -log(1/5): ln 5. The mean of the two prompts.
    rewards = T([math.log(3), 0, 0, 0, math.log(4)])
    ranks, prompts = torch.tensor([1, 2, 2, 1, 2]), torch.tensor([7, 7, 7, 5, 5])
    assert_close(ob.ranking_loss(rewards, ranks, prompts), (math.log(4 / 3) + math.log(5)) / 2)
    assert_close(ob.ranking_loss(rewards, ranks, prompts, count=8), (math.log(4 / 3) + math.log(5)) / 8)


@examples
@given(st.floats(-30, 30), st.floats(-30, 30))
def test_ranking_loss_of_two_is_minus_log_sigmoid(better, worse):
    rewards = T([worse, better], dtype=torch.float64)
    loss = ob.ranking_loss(rewards, torch.tensor([2, 1]), torch.tensor([0, 0]))
    assert_close(loss, math.log1p(math.exp(worse - better)), atol=1e-12)


@examples
@given(seeds)
def test_ranking_loss_is_the_double_loop(seed):
    rewards, ranks, prompts = ranking_batch(seed)
    expected = naive_ranking_loss(rewards.tolist(), ranks.tolist(), prompts.tolist())
    assert_close(ob.ranking_loss(rewards, ranks, prompts), expected, atol=1e-12)


@examples
@given(seeds)
def test_ranking_loss_ignores_order_and_constants(seed):
    rewards, ranks, prompts = ranking_batch(seed)
    loss, grad = gradient(ob.ranking_loss, rewards, ranks, prompts)
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(seed))  # within and across prompts
    permuted, permuted_grad = gradient(ob.ranking_loss, rewards[order], ranks[order], 10 - prompts[order])
    assert_close(permuted, loss, atol=1e-12)
    assert_close(permuted_grad, grad[order], atol=1e-12)
    constants = randn(seed + 1, 4)[prompts]  # one for each prompt cancels too
    assert_close(ob.ranking_loss(rewards + constants + 3, ranks, prompts), loss, atol=1e-12)
    for prompt in range(4):
        assert_close(grad[prompts == prompt].sum(), 0.0, atol=1e-12)


@examples
@given(seeds, garbage)
def test_ranking_loss_padding_never_leaks(seed, value):
    rewards, ranks, prompts = ranking_batch(seed)
    real = ranks >= 0
    short, short_grad = gradient(ob.ranking_loss, rewards[real], ranks[real], prompts[real])
    loss, grad = gradient(ob.ranking_loss, at_padding(rewards, real, value), ranks, prompts)
    assert_close(loss, short, atol=1e-12)
    assert_close(grad[real], short_grad, atol=1e-12)
    assert_close(grad[~real], torch.zeros_like(grad[~real]))


@examples
@given(seeds)
def test_ranking_loss_splits_agree(seed):
    rewards, ranks, prompts = ranking_batch(seed)
    whole, grad = gradient(ob.ranking_loss, rewards, ranks, prompts)
    have_pair = sum(
        ob.ranking_loss(rewards[prompts == p], ranks[prompts == p], prompts[prompts == p]) > 0 for p in range(4)
    )
    parts = [
        gradient(ob.ranking_loss, *(x[prompts == p] for x in (rewards, ranks, prompts)), have_pair) for p in range(4)
    ]
    assert_close(sum(loss for loss, _ in parts), whole, atol=1e-12)
    assert_close(torch.cat([g for _, g in parts]), grad, atol=1e-12)


@pytest.mark.parametrize("ranks", [[1, 1, 1], [1, -100, -100], [-100, -100, -100], [1, 2, 3]])
def test_ranking_loss_without_a_pair_is_zero_and_attached(ranks):
    prompts = torch.tensor([0, 1, 2]) if ranks == [1, 2, 3] else torch.tensor([0, 0, 0])  # three prompts of one
    for count in (None, 0, 3):
        loss, grad = gradient(ob.ranking_loss, T([3, 1, 2]), torch.tensor(ranks), prompts, count=count)
        assert_close(loss, 0.0, atol=0)
        assert_close(grad, [0.0, 0, 0], atol=0)


def test_ranking_loss_of_an_empty_batch_is_zero():
    nothing = torch.tensor([], dtype=torch.long)
    assert_close(ob.ranking_loss(T([]), nothing, nothing), 0.0)


def test_ranking_loss_of_huge_gaps():
    # -log sigmoid(-1e4) = 1e4 with gradient -1, -log sigmoid(1e4) = 0: exp would overflow
    ranks, prompts = torch.tensor([1, 2]), torch.tensor([0, 0])
    for gap, loss, slope in ((-1e4, 1e4, -1.0), (1e4, 0.0, 0.0)):
        value, grad = gradient(ob.ranking_loss, T([gap, 0]), ranks, prompts)
        assert_close(value, loss)
        assert_close(grad, [slope, -slope])


def test_ranking_loss_errors():
    with pytest.raises(ValueError, match=r"rewards \(2,\), ranks \(3,\)"):
        ob.ranking_loss(T([1, 2]), torch.tensor([1, 2, 3]), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="flatten"):
        ob.ranking_loss(torch.zeros(2, 9), torch.ones(2, 9), torch.ones(2, 9))


def test_ranking_loss_of_64_prompts_of_9():
    rewards, ranks, prompts = ranking_batch(0, prompts=64, K=9)
    expected = naive_ranking_loss(rewards.tolist(), ranks.tolist(), prompts.tolist())
    assert_close(ob.ranking_loss(rewards, ranks, prompts), expected, atol=1e-12)


# --- other losses on pairs


def all_pairs(ranks, prompts):
    return ob.ordered_pairs(torch.tensor(ranks), torch.tensor(prompts))


def test_targets_by_hand():
    # prompt 0: ranks 1, 2, 2; prompt 1: ranks 3, 3; a padded completion of prompt 1
    ranks, prompts = torch.tensor([1, 2, 2, 3, 3, -100]), torch.tensor([0, 0, 0, 1, 1, 1])
    strict = [[0, 1, 1, 0, 0, 0], *[[0] * 6] * 5]
    assert_close(ob.ordered_pairs(ranks, prompts), T(strict), atol=0)
    tied = [[0, 1, 1, 0, 0, 0], [0, 0, 0.5, 0, 0, 0], [0, 0.5, 0, 0, 0, 0], [0, 0, 0, 0, 0.5, 0], [0, 0, 0, 0.5, 0, 0]]
    assert_close(ob.ordered_and_tied_pairs(ranks, prompts), T([*tied, [0] * 6]), atol=0)
    # eps = 1/4: three quarters one way, one quarter the other
    assert_close(ob.smoothed_pairs(T([[0, 1], [0, 0]]), 0.25), T([[0, 0.75], [0.25, 0]]), atol=0)
    # grades 3, 1 at half a unit each: the first shall lead by 1
    assert_close(ob.rating_margins(T([3, 1]), 0.5), T([[0, 1], [-1, 0]]), atol=0)


def test_soft_ties_by_hand():
    # Tied rewards ln 3 and 0: half of -log(3/4) and half of -log(1/4), that is (ln(4/3) + ln 4) / 2
    prompts = torch.tensor([0, 0])
    targets = ob.ordered_and_tied_pairs(torch.tensor([2, 2]), prompts)
    loss, grad = gradient(ob.pairwise_ranking_loss, T([math.log(3), 0]), targets, prompts)
    assert_close(loss, (math.log(4 / 3) + math.log(4)) / 2)
    assert_close(grad, [0.25, -0.25])  # sigmoid(ln 3) - 1/2: it draws the two together
    assert_close(ob.pairwise_ranking_loss(T([5, 5]), targets, prompts), LN2)


def test_label_smoothing_by_hand():
    # gap ln 3, eps = 1/4: 3/4 ln(4/3) + 1/4 ln 4, and no gradient, because sigmoid(ln 3) is 3/4 already
    prompts = torch.tensor([0, 0])
    targets = ob.smoothed_pairs(all_pairs([1, 2], [0, 0]), 0.25)
    loss, grad = gradient(ob.pairwise_ranking_loss, T([math.log(3), 0]), targets, prompts)
    assert_close(loss, 0.75 * math.log(4 / 3) + 0.25 * math.log(4))
    assert_close(grad, [0.0, 0.0], atol=1e-7)
    for smoothing in (-0.1, 0.5, math.nan):
        with pytest.raises(ValueError, match="smoothing must be in"):
            ob.smoothed_pairs(targets, smoothing)


def test_margins_by_hand():
    # gap ln 6 with a margin of ln 2 leaves ln 3: -log sigmoid is ln(4/3); and the same with the worse one first
    prompts = torch.tensor([0, 0])
    margins = ob.rating_margins(T([1, 0]), LN2)
    better_first = ob.pairwise_ranking_loss(T([math.log(6), 0]), all_pairs([1, 2], [0, 0]), prompts, margins)
    assert_close(better_first, math.log(4 / 3))
    margins = ob.rating_margins(T([0, 1]), LN2)
    worse_first = ob.pairwise_ranking_loss(T([0, math.log(6)]), all_pairs([2, 1], [0, 0]), prompts, margins)
    assert_close(worse_first, math.log(4 / 3))


def test_centring_penalty_by_hand():
    # prompt 0: one pair, (3 - 1)^2 = 4; prompt 1: rewards 1, 2, 0 with ranks 1, 2, 2: ((1 + 2)^2 + (1 + 0)^2) / 2 = 5
    rewards, prompts = T([3, -1, 1, 2, 0]), torch.tensor([0, 0, 1, 1, 1])
    targets = all_pairs([1, 2, 1, 2, 2], [0, 0, 1, 1, 1])
    assert_close(ob.centring_penalty(rewards, targets, prompts), (4 + 5) / 2)
    assert_close(ob.centring_penalty(rewards, targets, prompts, count=9), 1.0)


@examples
@given(seeds)
def test_pairwise_loss_of_ordered_pairs_is_the_papers(seed):
    rewards, ranks, prompts = ranking_batch(seed)
    expected = naive_ranking_loss(rewards.tolist(), ranks.tolist(), prompts.tolist())
    assert_close(ob.pairwise_ranking_loss(rewards, ob.ordered_pairs(ranks, prompts), prompts), expected, atol=1e-12)


@examples
@given(seeds, st.floats(0, 0.49), garbage)
def test_pairwise_losses_do_not_see_padding_order_or_constants(seed, smoothing, value):
    """With soft ties, smoothing and margins: constants a prompt cancel, order is nothing, padding never leaks."""
    rewards, ranks, prompts = ranking_batch(seed)
    ratings = randn(seed + 1, len(ranks))

    def loss(rewards, ranks, prompts, ratings):
        targets = ob.smoothed_pairs(ob.ordered_and_tied_pairs(ranks, prompts), smoothing)
        return ob.pairwise_ranking_loss(rewards, targets, prompts, ob.rating_margins(ratings, 0.3))

    whole, grad = gradient(loss, rewards, ranks, prompts, ratings)
    assert_close(grad.sum(), 0.0, atol=1e-7)
    assert_close(loss(rewards + prompts, ranks, prompts, ratings), whole, atol=1e-7)
    order = torch.randperm(len(ranks), generator=torch.Generator().manual_seed(seed))
    assert_close(loss(*(x[order] for x in (rewards, ranks, prompts, ratings))), whole, atol=1e-7)
    real = ranks >= 0
    dirty, dirty_grad = gradient(loss, at_padding(rewards, real, value), ranks, prompts, ratings)
    assert_close(dirty, whole, atol=1e-7)
    assert_close(dirty_grad, grad, atol=1e-7)
    pairs = ob.ordered_pairs(ranks, prompts)
    penalty, pull = gradient(ob.centring_penalty, at_padding(rewards, real, value), pairs, prompts)
    assert penalty.isfinite() and not pull[~real].any()


@examples
@given(seeds)
def test_pairwise_losses_split_and_agree(seed):
    rewards, ranks, prompts = ranking_batch(seed)
    targets = ob.ordered_and_tied_pairs(ranks, prompts)
    count = sum(bool((targets[prompts == p] > 0).any()) for p in range(4))
    for function in (ob.pairwise_ranking_loss, ob.centring_penalty):
        whole = function(rewards, targets, prompts)
        own = [prompts == p for p in range(4)]
        parts = [function(rewards[o], targets[o][:, o], prompts[o], count=count) for o in own]
        assert_close(torch.stack(parts).sum(), whole, atol=1e-12)


def test_pairwise_losses_errors():
    prompts = torch.tensor([0, 0])
    for function in (ob.pairwise_ranking_loss, ob.centring_penalty):
        with pytest.raises(ValueError, match="shapes differ"):
            function(T([1, 2]), torch.zeros(2, 3), prompts)
        with pytest.raises(ValueError, match="1 real items"):
            function(T([1, 2]), all_pairs([1, 2], [0, 0]), prompts, count=0)
        assert_close(function(T([1, 2]), torch.zeros(2, 2), prompts), 0.0, atol=0)
    with pytest.raises(ValueError, match="shapes differ"):
        ob.pairwise_ranking_loss(T([1, 2]), torch.zeros(2, 2), prompts, torch.zeros(1, 2))
    with pytest.raises(ValueError, match="must be"):
        ob.ordered_pairs(torch.ones(2, 9), torch.ones(2, 9))


# --- kl_penalty and shaped_rewards


def test_kl_penalty_by_hand():
    # lr = ln 2, -ln 2, 0.  k1 = lr.  k2 = lr^2 / 2.  k3 = 1/2 - 1 + ln 2,  2 - 1 - ln 2,  0
    logp, ref = T([[-1, -1 - LN2, -3]]), T([[-1 - LN2, -1, -3]])
    assert_close(ob.kl_penalty(logp, ref), [[LN2, -LN2, 0]])
    assert_close(ob.kl_penalty(logp, ref, "k1"), [[LN2, -LN2, 0]])
    assert_close(ob.kl_penalty(logp, ref, "k2"), [[LN2**2 / 2, LN2**2 / 2, 0]])
    assert_close(ob.kl_penalty(logp, ref, "k3"), [[LN2 - 0.5, 1 - LN2, 0]])


def test_kl_penalty_errors():
    with pytest.raises(ValueError, match="'k1', 'k2' or 'k3', not 'k4'"):
        ob.kl_penalty(T([[1]]), T([[1]]), "k4")
    with pytest.raises(ValueError, match=r"logp \(1, 1\), logp_ref \(1, 2\)"):
        ob.kl_penalty(T([[1]]), T([[1, 1]]))


@examples
@given(seeds, st.floats(1e-6, 10))
def test_k3_is_never_negative_and_equal_policies_have_no_kl(seed, scale):
    logp, ref = scale * randn(seed, 3, 4), scale * randn(seed + 1, 3, 4)
    assert (ob.kl_penalty(logp, ref, "k3") >= -1e-15).all()
    for kind in ("k1", "k2", "k3"):
        assert_close(ob.kl_penalty(logp, logp, kind), torch.zeros_like(logp), atol=0)


def test_k1_and_k3_are_unbiased_and_k2_is_not():
    # pi = (1/2, 1/2), ref = (1/4, 3/4): KL = 1/2 ln 2 + 1/2 ln(2/3) = 1/2 ln(4/3)
    logp, ref = T([[0.5, 0.5]]).log(), T([[0.25, 0.75]]).log()
    expected = 0.5 * math.log(4 / 3)
    for kind in ("k1", "k3"):
        assert_close((logp.exp() * ob.kl_penalty(logp, ref, kind)).sum(), expected)
    biased = 0.25 * (LN2**2 + math.log(2 / 3) ** 2)
    assert_close((logp.exp() * ob.kl_penalty(logp, ref, "k2")).sum(), biased)


def test_k3_keeps_small_gaps():
    # k3(1e-4) = 1e-8 / 2 - ... ; exp(-lr) - 1 in float32 would keep one digit of it
    assert_close(ob.kl_penalty(T([[1e-4]]), T([[0]]), "k3"), [[5e-9]], atol=2e-11)


def test_shaped_rewards_by_hand():
    # -0.5 * kl on real tokens, plus 10 on the 2nd of two, 20 on the only one, 30 on the last of three
    kl, mask = T([[1, 2, 9], [4, 9, 9], [0, 0, -2]]), M([[1, 1, 0], [1, 0, 0], [1, 1, 1]])
    rewards = ob.shaped_rewards(T([10, 20, 30]), kl, mask, 0.5)
    assert_close(rewards, [[-0.5, 9, 0], [18, 0, 0], [0, 0, 31.0]])
    assert_close(ob.shaped_rewards(T([10, 20, 30]), kl, mask, torch.tensor(0.5)), rewards)


@examples
@given(seeds, st.floats(0, 2))
def test_shaped_rewards_sum_to_the_score_less_the_kl(seed, kl_coef):
    scores, kl, mask = randn(seed, 4), randn(seed + 1, 4, 5), prefix_mask(seed, 4, 5)
    rewards = ob.shaped_rewards(scores, kl, mask, kl_coef)
    assert_close(rewards.sum(1), scores - kl_coef * (kl * mask).sum(1), atol=1e-12)
    assert (rewards[~mask] == 0).all()


def test_shaped_rewards_errors():
    kl = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="no real token"):
        ob.shaped_rewards(T([1, 2]), kl, M([[1, 1, 0], [0, 0, 0]]), 0.1)
    for holes in ([1, 0, 1], [0, 1, 1]):
        with pytest.raises(ValueError, match="prefix"):
            ob.shaped_rewards(T([1, 2]), kl, M([[1, 1, 1], holes]), 0.1)
    for scores in (T([1, 2, 3]), T([[1], [2]])):
        with pytest.raises(ValueError, match=r"scores must be \[B\] = \(2,\)"):
            ob.shaped_rewards(scores, kl, M([[1, 1, 1], [1, 1, 0]]), 0.1)
    with pytest.raises(ValueError, match=r"\[B, T\]"):
        ob.shaped_rewards(T([1, 2]), torch.zeros(3), M([1, 1, 0]), 0.1)


# --- gae


def test_gae_by_hand():
    # deltas are (0, 0, 1/2), so A_t = (γλ)^(2-t) / 2 with γ = 1, λ = 1/2; returns = A + 1/2
    advantages, returns = ob.gae(T([[0, 0, 1]]), T([[0.5, 0.5, 0.5]]), M([[1, 1, 1]]), gamma=1.0, lam=0.5)
    assert_close(advantages, [[0.125, 0.25, 0.5]])
    assert_close(returns, [[0.625, 0.75, 1.0]])


def test_gae_by_hand_with_discount_and_padding():
    # γ = 1/2, λ = 1/2. Row 0, two real tokens: delta_1 = 4 - 2 = 2 (V_2 is 0, whatever padding holds);
    # delta_0 = 1 + 1/2 * 2 - 8 = -6; A_0 = -6 + 1/4 * 2 = -5.5. Row 1 has no real token.
    mask = M([[1, 1, 0], [0, 0, 0]])
    advantages, returns = ob.gae(T([[1, 4, 9], [9, 9, 9]]), T([[8, 2, 9], [9, 9, 9]]), mask, gamma=0.5, lam=0.5)
    assert_close(advantages, [[-5.5, 2, 0], [0, 0, 0]])
    assert_close(returns, [[2.5, 4, 0], [0, 0, 0]])


def test_gae_defaults_are_gamma_1_and_lambda_095():
    # delta = (0, 1): A_0 = 0.95
    advantages, _ = ob.gae(T([[0, 1]]), T([[0, 0]]), M([[1, 1]]))
    assert_close(advantages, [[0.95, 1.0]])


@examples
@given(seeds, st.floats(0.1, 1))
def test_lambda_1_gives_monte_carlo_returns(seed, gamma):
    rewards, values, mask = randn(seed, 3, 5), randn(seed + 1, 3, 5), prefix_mask(seed, 3, 5)
    _, returns = ob.gae(rewards, values, mask, gamma=gamma, lam=1.0)
    real = torch.where(mask, rewards, torch.zeros_like(rewards))
    discounted = torch.stack([sum(gamma ** (s - t) * real[:, s] for s in range(t, 5)) for t in range(5)], dim=1)
    assert_close(returns, discounted, atol=1e-12)


@examples
@given(seeds, st.floats(0.1, 1))
def test_lambda_0_gives_one_step_deltas(seed, gamma):
    rewards, values, mask = randn(seed, 3, 5), randn(seed + 1, 3, 5), prefix_mask(seed, 3, 5)
    advantages, returns = ob.gae(rewards, values, mask, gamma=gamma, lam=0.0)
    v_t = torch.where(mask, values, torch.zeros_like(values))
    v_tp1 = torch.cat([v_t[:, 1:], torch.zeros(3, 1, dtype=v_t.dtype)], 1)
    zero = torch.zeros_like(rewards)
    assert_close(advantages, torch.where(mask, rewards + gamma * v_tp1 - v_t, zero), atol=1e-12)
    assert_close(returns, torch.where(mask, rewards + gamma * v_tp1, zero), atol=1e-12)


def test_gae_mask_errors():
    x = torch.zeros(1, 3)
    for holes in ([1, 0, 1], [0, 1, 1]):
        with pytest.raises(ValueError, match="prefix"):
            ob.gae(x, x, M([holes]))
    with pytest.raises(ValueError, match=r"\[B, T\]"):
        ob.gae(x[0], x[0], M([1, 1, 1]))


# --- losses of PPO


def test_clipped_policy_loss_by_hand():
    # ratio 2, 1/2, 2, 1/2, 1 with A = 1, 1, -1, -1, 3 and clip 0.2, -min(ratio A, clip(ratio) A):
    # -1.2 (clipped), -0.5, 2, 0.8 (clipped), -3; a sixth token is padding
    logp = T([[2, 0.5, 2, 0.5, 1, 9]]).log()
    advantages, mask = T([[1, 1, -1, -1, 3, 9]]), M([[1, 1, 1, 1, 1, 0]])
    old = torch.zeros(1, 6)
    loss, grad = gradient(ob.clipped_policy_loss, logp, old, advantages, mask)
    assert_close(loss, (-1.2 - 0.5 + 2 + 0.8 - 3) / 5)
    # d loss / d logp = -ratio A / 5 where unclipped, 0 where the clip binds outward
    assert_close(grad, [[0, -0.1, 0.4, 0, -0.6, 0]])
    assert_close(ob.clipped_policy_loss(logp, old, advantages, mask, clip=0.5), (-1.5 - 0.5 + 2 + 0.5 - 3) / 5)
    assert_close(ob.clipped_policy_loss(logp, old, advantages, mask, count=19), -1.9 / 19)
    assert_close(ob.policy_clip_fraction(logp, old, advantages, mask), 2 / 5)
    assert_close(ob.policy_clip_fraction(logp, old, advantages, mask, clip=1.0), 0.0)
    assert_close(ob.policy_clip_fraction(logp, old, advantages, mask, count=20), 2 / 20)


def test_clipped_value_loss_by_hand():
    # clip 0.2 around V_old = 0.  V = 1, R = 2: clipped 0.2, errors 1 and 3.24 -> 3.24 (the clip binds).
    # V = 1, R = 0: 1 and 0.04 -> 1.  V = -1, R = -2: 3.24 (binds).  V = 0.1, R = 1: 0.81 twice. Padding.
    values, returns, mask = T([[1, 1, -1, 0.1, 9]]), T([[2, 0, -2, 1, -9]]), M([[1, 1, 1, 1, 0]])
    old = torch.zeros(1, 5)
    loss, grad = gradient(ob.clipped_value_loss, values, old, returns, mask)
    assert_close(loss, 0.5 * (3.24 + 1 + 3.24 + 0.81) / 4)
    assert_close(grad, [[0, 0.25, 0, -0.225, 0]])  # (V - R) / 4 where the clip does not bind
    # clip 0.5: errors of the clipped values 2.25, 2.25 in the binding places
    assert_close(ob.clipped_value_loss(values, old, returns, mask, clip=0.5), 0.5 * (2.25 + 1 + 2.25 + 0.81) / 4)
    assert_close(ob.clipped_value_loss(values, old, returns, mask, count=8), 0.5 * 8.29 / 8)
    assert_close(ob.value_clip_fraction(values, old, returns, mask), 2 / 4)
    assert_close(ob.value_clip_fraction(values, old, returns, mask, clip=1.0), 0.0)
    # around V_old = 1 the clipped value of V = 2 is 1.2, not 0.2: R = 2 gives (0.8)^2 / 2
    assert_close(ob.clipped_value_loss(T([[2]]), T([[1]]), T([[2]]), M([[1]])), 0.32)


def test_rounding_does_not_count_as_clipped():
    # V_old + (V - V_old) differs from V by a rounding for some of these, all of them well inside the clip
    old, values, returns = (0.02 * randn(i, 50, 50, dtype=torch.float32) for i in range(3))
    mask = torch.ones(50, 50, dtype=torch.bool)
    assert (old + (values - old) != values).any()
    assert_close(ob.value_clip_fraction(values, old, returns, mask), 0.0, atol=0)
    assert_close(ob.policy_clip_fraction(values, old, returns, mask), 0.0, atol=0)


def test_negative_clip_is_an_error():
    x, mask = T([[1, 2]]), M([[1, 1]])
    for function in (ob.clipped_policy_loss, ob.clipped_value_loss, *FRACTIONS.values()):
        with pytest.raises(ValueError, match="clip must be at least 0"):
            function(x, x, x, mask, clip=-0.2)


@examples
@given(seeds)
def test_ratio_1_clips_nothing_and_the_loss_is_minus_the_mean_advantage(seed):
    logp, advantages, mask = randn(seed, 3, 4), randn(seed + 1, 3, 4), prefix_mask(seed, 3, 4)
    loss, grad = gradient(ob.clipped_policy_loss, logp, logp, advantages, mask)
    assert_close(loss, -advantages[mask].mean(), atol=1e-12)
    assert_close(grad, -advantages * mask / mask.sum(), atol=1e-12)  # the plain policy gradient
    assert_close(ob.policy_clip_fraction(logp, logp, advantages, mask), 0.0, atol=0)
    assert_close(ob.approx_kl(logp, logp, mask), 0.0, atol=0)
    assert_close(ob.ratio_moments(logp, logp, mask).mean, 1.0, atol=0)
    assert_close(ob.ratio_moments(logp, logp, mask).variance, 0.0, atol=0)
    assert_close(ob.ratio_max(logp, logp, mask), 1.0, atol=0)


@examples
@given(seeds, st.floats(0, 0.9))
def test_clipped_losses_are_at_least_the_unclipped_ones(seed, clip):
    x, old, target = (randn(seed + i, 3, 4) for i in range(3))
    mask = prefix_mask(seed, 3, 4)
    policy = -((x - old).exp() * target)[mask].mean()
    value = 0.5 * (x - target).square()[mask].mean()
    assert ob.clipped_policy_loss(x, old, target, mask, clip) >= policy - 1e-12
    assert ob.clipped_value_loss(x, old, target, mask, clip) >= value - 1e-12
    assert_close(ob.clipped_policy_loss(x, old, target, mask, clip=1e9), policy, atol=1e-10)
    assert_close(ob.clipped_value_loss(x, old, target, mask, clip=1e9), value, atol=1e-10)


@examples
@given(seeds)
def test_gradient_is_zero_exactly_where_the_clip_binds(seed):
    x, old, target = (randn(seed + i, 3, 4) for i in range(3))
    mask = prefix_mask(seed, 3, 4)
    _, grad = gradient(ob.clipped_policy_loss, x, old, target, mask)
    ratio = (x - old).exp()
    outward = ((ratio > 1.2) & (target > 0)) | ((ratio < 0.8) & (target < 0))
    assert torch.equal(grad == 0, outward | ~mask)
    assert_close(ob.policy_clip_fraction(x, old, target, mask), outward[mask].double().mean().float())
    _, grad = gradient(ob.clipped_value_loss, x, old, target, mask)
    bound = (grad == 0) & mask
    assert ((x - old).abs()[bound] > 0.2).all()
    assert_close(ob.value_clip_fraction(x, old, target, mask), bound[mask].double().mean().float())


def test_targets_get_no_gradient():
    x, old, target = (randn(i, 2, 3).requires_grad_() for i in range(3))
    mask = M([[1, 1, 1], [1, 1, 0]])
    for function in (ob.clipped_policy_loss, ob.clipped_value_loss):
        grads = torch.autograd.grad(function(x, old, target, mask), (x, old, target), allow_unused=True)
        assert grads[0].any() and grads[1] is None and grads[2] is None


def test_pretraining_loss_by_hand():
    # tokens of probability 1/2 and 1/4: (ln 2 + 2 ln 2) / 2
    loss, grad = gradient(ob.pretraining_loss, T([[-LN2, -2 * LN2, -50]]), M([[1, 1, 0]]))
    assert_close(loss, 1.5 * LN2)
    assert_close(grad, [[-0.5, -0.5, 0]])
    assert_close(ob.pretraining_loss(T([[-LN2, -2 * LN2, -50]]), M([[1, 1, 0]]), count=6), 0.5 * LN2)


# --- controllers


def test_ema_update_by_hand():
    # 0.75 * (4, 8) + 0.25 * (0, 4) = (3, 7); 0.75 * 1 + 0.25 * 5 = 2
    average = [T([4, 8]), T([[1]])]
    weights = [T([0, 4]), T([[5]])]
    before = [a.data_ptr() for a in average]
    assert ob.ema_update(iter(average), iter(weights), 0.75) is None
    assert_close(average[0], [3.0, 7])
    assert_close(average[1], [[2.0]])
    assert_close(weights[0], [0.0, 4])
    assert [a.data_ptr() for a in average] == before


def test_ema_update_of_bfloat16_weights_keeps_float32():
    # from 1 towards 2 by 1 % : 1.01 in float32, where bfloat16 (steps of 2^-7 here) would stay at 1 or jump to 1.0078
    average = torch.nn.Parameter(T([1.0]))
    ob.ema_update([average], [T([2.0]).bfloat16()], 0.99)
    assert average.dtype == torch.float32 and average.grad_fn is None
    assert_close(average.detach(), [1.01])


def test_ema_converges_as_a_power_of_decay():
    # 1 - 0.992^100 of the way after 100 steps: the start still holds 0.448
    average, weights = [T([1.0], dtype=torch.float64)], [T([0.0], dtype=torch.float64)]
    for _ in range(100):
        ob.ema_update(average, weights, 0.992)
    assert_close(average[0], [0.992**100], atol=1e-12)


def test_ema_update_errors_change_nothing():
    average = [T([1.0]), T([1, 1])]
    with pytest.raises(ValueError, match="2 tensors and weights has 1"):
        ob.ema_update(average, [T([2.0])], 0.5)
    with pytest.raises(ValueError, match=r"average \(2,\), weights \(1,\)"):
        ob.ema_update(average, [T([2.0]), T([2.0])], 0.5)
    for decay in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="decay"):
            ob.ema_update(average, [T([2.0]), T([2, 2])], decay)
    assert_close(average[0], [1.0])
    assert_close(average[1], [1.0, 1])


def test_next_kl_coef_by_hand():
    # target 6, horizon 10,000, n 500: KL 6.6 is 10 % over: 1 + 0.1 * 0.05; KL 60 and 0 are clipped at ±0.2: 1 ± 0.01
    for observed, factor in ((6.0, 1.0), (6.6, 1.005), (60.0, 1.01), (math.inf, 1.01), (0.0, 0.99), (-3.0, 0.99)):
        result = ob.next_kl_coef(0.2, observed, 6.0, 10_000, 500)
        assert isinstance(result, float) and result == pytest.approx(0.2 * factor, abs=1e-12)
    assert ob.next_kl_coef(0.2, torch.tensor(60.0), 6, 10_000, 0) == 0.2


def test_next_kl_coef_errors():
    for arguments in ((math.nan, 6, 10, 1), (6, 0, 10, 1), (6, 6, 0, 1), (6, 6, 10, 50), (6, 6, 10, -1)):
        with pytest.raises(ValueError):
            ob.next_kl_coef(0.2, *arguments)
    assert ob.next_kl_coef(0.2, 0.0, 6, 10, 49) > 0


# --- statistics


def test_ratio_statistics_by_hand():
    # ratios 1/2, 1, 3: mean 3/2, m2 = 1 + 1/4 + 9/4 = 7/2, max 3. lr^2: (ln 2)^2, 0, (ln 3)^2
    logp, old, mask = T([[0.5, 2, 3, 99]]).log(), T([[1, 2, 1, 1]]).log(), M([[1, 1, 1, 0]])
    assert_close(torch.stack(ob.ratio_moments(logp, old, mask)), [3, 1.5, 3.5])
    assert_close(ob.ratio_moments(logp, old, mask).variance, 3.5 / 3)
    assert_close(ob.ratio_max(logp, old, mask), 3.0)
    assert_close(ob.ratio_max(old, logp, M([[0, 0, 1, 0]])), 1 / 3)  # below 1: padding's 1 is not the maximum
    squares = LN2**2 + math.log(3) ** 2
    assert_close(ob.approx_kl(logp, old, mask), squares / 6)
    assert_close(ob.approx_kl(logp, old, mask, count=6), squares / 12)
    for function in (ob.ratio_moments, ob.ratio_max):
        with pytest.raises(ValueError, match="no token is real"):
            function(logp, old, M([[0, 0, 0, 0]]))


def test_explained_variance_by_hand():
    # returns 0, 2, 4: m2 8. errors 0, 0, 3: mean 1, m2 6: 1 - 6/8. A constant error explains everything: 1.
    returns, mask = T([[0, 2, 4, 50]]), M([[1, 1, 1, 0]])
    assert_close(ob.explained_variance(T([[0, 2, 1, 0]]), returns, mask), 0.25)
    assert_close(ob.explained_variance(returns + 5, returns, mask), 1.0)
    assert_close(ob.explained_variance(torch.ones(1, 4), returns, mask), 0.0)
    assert_close(ob.explained_variance(-returns, returns, mask), -3.0)  # errors 0, 4, 8: 1 - 4
    assert ob.explained_variance(returns, torch.ones(1, 4), mask).isnan()
    with pytest.raises(ValueError, match="no token is real"):
        ob.explained_variance(returns, returns, M([[0, 0, 0, 0]]))


# --- properties of all of them


@pytest.mark.parametrize("name", MASKED)
@examples
@given(seeds, garbage)
def test_padding_never_leaks(name, seed, value):
    function, arity = MASKED[name]
    mask = prefix_mask(seed, 3, 5)
    inputs = [randn(seed + i, 3, 5) for i in range(arity)]
    clean, clean_grad = gradient(function, *inputs, mask)
    dirty, dirty_grad = gradient(function, *(at_padding(x, mask, value) for x in inputs), mask)
    assert clean.isfinite().all() and clean_grad.isfinite().all()
    assert_close(dirty, clean, atol=0)
    assert_close(dirty_grad, clean_grad, atol=0)
    assert (clean_grad[~mask] == 0).all()
    if clean.ndim == 2:
        assert (clean[~mask] == 0).all()


@pytest.mark.parametrize("name", MASKED)
@examples
@given(seeds)
def test_the_width_of_padding_changes_nothing(name, seed):
    function, arity = MASKED[name]
    mask = prefix_mask(seed, 3, 4)
    inputs = [randn(seed + i, 3, 4) for i in range(arity)]
    pad = torch.nn.functional.pad
    narrow, wide = (
        function(*inputs, mask),
        function(*(pad(x, (0, 2), value=math.nan) for x in inputs), pad(mask, (0, 2))),
    )
    assert_close(wide[:, :4] if wide.ndim == 2 else wide, narrow, atol=1e-12)


@pytest.mark.parametrize("name", FRACTIONS)
@examples
@given(seeds, garbage)
def test_padding_never_leaks_into_clip_fractions(name, seed, value):
    mask = prefix_mask(seed, 3, 5)
    inputs = [randn(seed + i, 3, 5) for i in range(3)]
    dirty = FRACTIONS[name](*(at_padding(x, mask, value) for x in inputs), mask)
    assert_close(dirty, FRACTIONS[name](*inputs, mask), atol=0)


@examples
@given(seeds, garbage, st.sampled_from(["k1", "k2", "k3"]))
def test_kl_at_padding_stays_at_padding(seed, value, kind):
    mask = prefix_mask(seed, 3, 5)
    logp, ref = randn(seed, 3, 5), randn(seed + 1, 3, 5)
    kl, dirty = ob.kl_penalty(logp, ref, kind), ob.kl_penalty(at_padding(logp, mask, value), ref, kind)
    assert_close(dirty[mask], kl[mask], atol=0)
    assert_close(ob.masked_mean(dirty, mask), ob.masked_mean(kl, mask), atol=0)


@pytest.mark.parametrize("name", SPLITTABLE)
@examples
@given(seeds, st.integers(2, 4))
def test_splits_agree(name, seed, batch):
    """Micro-batches of one, with the count of the whole, add up to the whole: batch 4x1 is 1x4, whatever the lengths."""
    function, arity = SPLITTABLE[name]
    mask = prefix_mask(seed, batch, 5, shortest=0)
    inputs = [randn(seed + i, batch, 5) for i in range(arity)]
    whole, grad = gradient(function, *inputs, mask)
    parts = [
        gradient(function, *(x[i : i + 1] for x in inputs), mask[i : i + 1], count=mask.sum()) for i in range(batch)
    ]
    assert_close(sum(value for value, _ in parts), whole, atol=1e-12)
    assert_close(torch.cat([g for _, g in parts]), grad, atol=1e-12)


@pytest.mark.parametrize("name", MASKED)
def test_low_precision_computes_in_float32_and_float64_stays(name):
    function, arity = MASKED[name]
    mask = M([[1, 1, 1, 0], [1, 1, 0, 0]])
    low = [randn(i, 2, 4).to(torch.bfloat16) for i in range(arity)]
    result = function(*low, mask)
    assert result.dtype == torch.float32
    assert_close(result, function(*(x.float() for x in low), mask), atol=0)
    assert function(*(x.double() for x in low), mask).dtype == torch.float64


def test_low_precision_of_the_functions_without_a_mask():
    logits, tokens = randn(0, 2, 3, 5).to(torch.bfloat16), torch.zeros(2, 3, dtype=torch.long)
    ranks, prompts, mask = torch.arange(15), torch.zeros(15, dtype=torch.long), torch.ones(15, dtype=torch.bool)
    low, other = logits.flatten(1)
    calls = [
        lambda cast: ob.token_logprobs(cast(logits), tokens, 0.7),
        lambda cast: ob.entropy(cast(logits), 0.7),
        lambda cast: ob.ranking_loss(cast(low), ranks, prompts),
        *(lambda cast, kind=kind: ob.kl_penalty(cast(low), cast(other), kind) for kind in ("k1", "k2", "k3")),
        lambda cast: ob.policy_clip_fraction(cast(low), cast(other), cast(low), mask),
        lambda cast: ob.value_clip_fraction(cast(low), cast(other), cast(low), mask),
    ]
    for call in calls:
        result = call(lambda x: x)
        assert result.dtype == torch.float32
        assert_close(result, call(torch.Tensor.float), atol=0)
    for call in calls[:-2]:
        assert call(torch.Tensor.double).dtype == torch.float64


@pytest.mark.parametrize("name", [n for n in MASKED if n != "ratio_max"])
def test_gradcheck(name):
    function, arity = MASKED[name]
    mask = M([[1, 1, 1, 0], [1, 1, 0, 0]])
    x, *rest = (randn(10 + i, 2, 4) for i in range(arity))
    assert torch.autograd.gradcheck(lambda x: function(x, *rest, mask), x.requires_grad_())


def test_gradcheck_of_the_functions_without_a_mask():
    logits, tokens = randn(0, 2, 3, 4).requires_grad_(), torch.tensor([[0, 1, 3], [2, 2, 0]])
    assert torch.autograd.gradcheck(lambda z: ob.token_logprobs(z, tokens, 0.7), logits)
    assert torch.autograd.gradcheck(lambda z: ob.entropy(z, 0.7), logits)
    rewards, ranks, prompts = ranking_batch(3)
    assert torch.autograd.gradcheck(lambda r: ob.ranking_loss(r, ranks, prompts), rewards.requires_grad_())
    logp, ref = randn(1, 2, 3).requires_grad_(), randn(2, 2, 3).requires_grad_()
    for kind in ("k1", "k2", "k3"):
        assert torch.autograd.gradcheck(lambda p, q, kind=kind: ob.kl_penalty(p, q, kind), (logp, ref))


def test_one_ppo_update_reads_like_the_paper():
    """All of it in a row: before the first update the losses are known, and padding that is NaN changes nothing."""
    logp, values, scores = randn(0, 4, 6), randn(1, 4, 6), randn(2, 4)
    mask = prefix_mask(3, 4, 6)
    logp, values = at_padding(logp, mask, math.nan), at_padding(values, mask, math.nan)
    kl = ob.kl_penalty(logp, logp)
    rewards = ob.shaped_rewards(scores, kl, mask, 0.02)
    advantages, returns = ob.gae(rewards, values, mask, lam=1.0)
    assert_close(
        returns, torch.where(mask, scores[:, None].expand(4, 6), torch.zeros(4, 6, dtype=scores.dtype)), atol=1e-12
    )
    advantages = ob.masked_whiten(advantages, mask)
    assert_close(ob.clipped_policy_loss(logp, logp, advantages, mask), 0.0, atol=1e-12)
    expected = 0.5 * (scores[:, None] - values).square()[mask].mean()
    assert_close(ob.clipped_value_loss(values, values, returns, mask), expected, atol=1e-12)
