"""Every equation of the pipeline, one pure function each, on tensors.

B sequences, T response positions, V vocabulary, N completions in a ranking batch. `mask` is bool, True on real tokens
(the EOS that ends a response is real). Log-probabilities are natural, so KL and entropy are in nats. Everything takes
float64, float32 and lower precisions, and computes in float32 at least.

Losses are sums over real items divided by `count`, the number of real items in the whole optimiser minibatch (over all
micro-batches and processes), so that any split of a batch has the same gradient. `count=None` means that this tensor is
all of it. A tensor without a real item adds 0 and a gradient of 0. A count of 0 beside real items, a negative count,
shapes that differ and a mask that is not bool raise ValueError.

NaN or inf at padding never reaches a result or a gradient: padding is filled before any arithmetic, as 0 * NaN is NaN.
"""

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

Count: TypeAlias = int | float | Tensor | None


def _check_shapes(**tensors: Tensor) -> None:
    if len({x.shape for x in tensors.values()}) > 1:
        raise ValueError("shapes differ: " + ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items()))


def _upcast(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _real(mask: Tensor, **tensors: Tensor) -> list[Tensor]:
    """Each tensor in float32 at least, with 0 at padding."""
    _check_shapes(**tensors, mask=mask)
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, True on real tokens, and is {mask.dtype}")
    return [_upcast(x).masked_fill(~mask, 0) for x in tensors.values()]


def _check_prefix(mask: Tensor) -> None:
    if mask.ndim != 2:
        raise ValueError(f"mask must be [B, T] and is {tuple(mask.shape)}")
    if (mask[:, 1:] & ~mask[:, :-1]).any():
        raise ValueError("mask must be a prefix in each row: real tokens first, then padding (responses padded right)")


def _over(total: Tensor, items: Tensor, count: Count) -> Tensor:
    """total / count, where `items` (0-d) is how many real items `total` sums."""
    if count is None:
        return total / items.clamp(min=1)
    count = float(count)
    if not count >= 0 or (count == 0 and items > 0):
        raise ValueError(f"count is {count:g} for {int(items)} real items here; count the whole minibatch")
    return total / (count or 1.0)


# --- log-probabilities, means and moments


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0 and is {temperature}")
    # The rollout sampled at this temperature, so every log-probability that enters a ratio needs it too.
    return _upcast(logits) if temperature == 1.0 else _upcast(logits) / temperature


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """log pi(token_t | before t) = z_t[token_t] - logsumexp_v z_t[v] with z = logits / temperature.

    logits: [B, T, V], the outputs at the positions *before* the tokens; -inf excludes a token.
    tokens: [B, T] int64, ids in [0, V) at padding too (there is no mask here: keep logits finite at padding).
    Returns [B, T] in nats. The [B, T, V] log-softmax is never stored.
    Raises ValueError when logits and tokens disagree in shape or temperature is not above 0.
    Source: the definition; temperature in every pass as in Ziegler et al. 2019.
    """
    if logits.shape[:-1] != tokens.shape:
        raise ValueError(f"logits must be [B, T, V] and tokens [B, T], not {(*logits.shape,)} and {(*tokens.shape,)}")
    z = _tempered(logits, temperature)
    return z.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - z.logsumexp(-1)


def masked_mean(x: Tensor, mask: Tensor, count: Count = None) -> Tensor:
    """Sum of x over real tokens, over count: sum_{real} x / count.

    x, mask: the same shape; x in any unit, which is the result's. Returns a scalar, 0 when no token is real.
    Raises ValueError as the module says.
    """
    (x,) = _real(mask, x=x)
    return _over(x.sum(), mask.sum(), count)


class Moments(NamedTuple):
    """count, mean and m2 = sum (x - mean)^2 of real tokens: 0-d tensors of one dtype, ready to stack and gather."""

    count: Tensor  # type: ignore[assignment]  # hides tuple.count, for the field's own word
    mean: Tensor
    m2: Tensor

    @property
    def variance(self) -> Tensor:
        """m2 / count, the biased variance."""
        return self.m2 / self.count


def moments(x: Tensor, mask: Tensor) -> Moments:
    """Count, mean and m2 = sum (x - mean)^2 over real tokens, in two passes.

    x, mask: the same shape. The mean has the unit of x, m2 its square.
    Raises ValueError when no token is real.
    """
    (x,) = _real(mask, x=x)
    if not mask.any():
        raise ValueError("no token is real, so there are no moments")
    count = mask.sum().to(x.dtype)
    mean = x.sum() / count
    return Moments(count, mean, (x - mean).masked_fill(~mask, 0).square().sum())


def merge_moments(parts: Iterable[Moments]) -> Moments:
    """Moments of the union of disjoint parts (processes, micro-batches); parts of count 0 are skipped.

    With d = mean_b - mean_a and n = n_a + n_b: mean = mean_a + d n_b / n, m2 = m2_a + m2_b + d^2 n_a n_b / n.
    Raises ValueError when no part has a real token.
    Source: Chan, Golub and LeVeque 1979, the pairwise update.
    """
    parts = [part for part in parts if part.count > 0]
    if not parts:
        raise ValueError("no part has a real token, so there are no moments to merge")
    merged = parts[0]
    for part in parts[1:]:
        count = merged.count + part.count
        delta = part.mean - merged.mean
        mean = merged.mean + delta * (part.count / count)
        merged = Moments(count, mean, merged.m2 + part.m2 + delta**2 * (merged.count * part.count / count))
    return merged


def masked_whiten(x: Tensor, mask: Tensor, moments: Moments | None = None) -> Tensor:
    """Zero mean and unit variance over real tokens, (x - mu) * rsqrt(var + 1e-8); padding becomes 0.

    x, mask: [B, T]; var is biased; the result has no unit.
    moments: those of the whole rollout on all processes; None takes them from x.
    Raises ValueError when moments are needed and no token is real.
    Source: Ziegler et al. 2019 (code, `whiten`), for advantages.
    """
    moments = _moments(x, mask) if moments is None else moments
    (x,) = _real(mask, x=x)
    return ((x - moments.mean) * (moments.variance + 1e-8) ** -0.5).masked_fill(~mask, 0)


def masked_scale(x: Tensor, mask: Tensor, moments: Moments | None = None) -> Tensor:
    """Unit variance over real tokens around an unchanged mean, (x - mu) * rsqrt(var + 1e-8) + mu; padding becomes 0.

    x, mask: [B, T]; var is biased.
    moments: those of the whole rollout on all processes; None takes them from x.
    Raises ValueError when moments are needed and no token is real.
    Source: Ziegler et al. 2019, reward whitening without shifting the mean.
    """
    moments = _moments(x, mask) if moments is None else moments
    return (masked_whiten(x, mask, moments) + moments.mean).masked_fill(~mask, 0)


_moments = moments  # the functions above have an argument of that name


# --- the reward model


def ranking_loss(rewards: Tensor, ranks: Tensor, prompt_index: Tensor, count: Count = None) -> Tensor:
    """sum over prompts of (the mean over its pairs of -log sigmoid(r_better - r_worse)) / count.

    rewards:      [N], any K of them a prompt, in any order.
    ranks:        [N], 1 is best. Equal ranks are ties and carry no pair, so the divisor of a prompt is C(K, 2) less its
                  ties. A negative rank (-100) is padding: a completion that is not there.
    prompt_index: [N], equal for the completions of one prompt.
    count:        prompts that have a strictly ordered pair, in the whole minibatch.
    Returns a scalar in nats; 0 with gradient 0 when there is no pair. O(N^2) memory.
    Raises ValueError when the shapes are not one [N], and for a wrong count as the module says.
    Source: InstructGPT (Ouyang et al. 2022), eq. 1; ties dropped as in its appendix C.
    """
    _check_shapes(rewards=rewards, ranks=ranks, prompt_index=prompt_index)
    return pairwise_ranking_loss(rewards, ordered_pairs(ranks, prompt_index), prompt_index, count=count)


def ordered_pairs(ranks: Tensor, prompt_index: Tensor) -> Tensor:
    """t_ij = 1 where i and j answer one prompt and i is ranked better, else 0: ties carry no pair.

    ranks, prompt_index: [N], as in `ranking_loss` (a negative rank is padding).
    Returns targets [N, N] float32 for `pairwise_ranking_loss`.
    Raises ValueError when the shapes are not one [N].
    Source: InstructGPT (Ouyang et al. 2022), eq. 1.
    """
    return ((ranks[:, None] < ranks[None, :]) & _comparable(ranks, prompt_index)).float()


def ordered_and_tied_pairs(ranks: Tensor, prompt_index: Tensor) -> Tensor:
    """t_ij = 1 where i is ranked better than j, 1/2 where they tie (both ways, i != j), else 0.

    A tie is then a pair whose labels are half and half: its loss is least, log 2, at equal rewards.
    ranks, prompt_index: [N], as in `ranking_loss`. Returns targets [N, N] float32.
    Raises ValueError when the shapes are not one [N].
    Source: the Bradley-Terry model with a tie as half a win each; Elo (1978) counts draws so.
    """
    tied = (ranks[:, None] == ranks[None, :]) & _comparable(ranks, prompt_index)
    itself = torch.eye(len(ranks), dtype=torch.bool, device=ranks.device)
    return ordered_pairs(ranks, prompt_index) + 0.5 * (tied & ~itself)


def smoothed_pairs(targets: Tensor, smoothing: float) -> Tensor:
    """(1 - eps) t_ij + eps t_ji: each label is wrong with probability eps. Sums over a pair stay what they were.

    targets: [N, N]. smoothing: eps in [0, 0.5). Returns [N, N].
    Raises ValueError for eps outside [0, 0.5), where the better answer would no longer be the one to score higher.
    Source: label smoothing (Szegedy et al. 2016) on pairs; the conservative loss of Mitchell 2023, "A note on DPO with noisy
    preferences".
    """
    if not 0 <= smoothing < 0.5:
        raise ValueError(f"smoothing must be in [0, 0.5) and is {smoothing}")
    return (1 - smoothing) * targets + smoothing * targets.T


def rating_margins(ratings: Tensor, scale: float) -> Tensor:
    """m_ij = scale * (g_i - g_j): by how much i should beat j, from the grades of both.

    ratings: [N], grades g, higher is better, comparable within a prompt. scale: reward units per grade.
    Returns [N, N], antisymmetric, for `pairwise_ranking_loss`.
    Source: Touvron et al. 2023 (Llama 2), section 3.2.2, where the margin is a function of the preference's strength.
    """
    ratings = _upcast(ratings)
    return scale * (ratings[:, None] - ratings[None, :])


def pairwise_ranking_loss(
    rewards: Tensor, targets: Tensor, prompt_index: Tensor, margins: Tensor | None = None, count: Count = None
) -> Tensor:
    """sum over prompts of (sum_ij t_ij * -log sigmoid(r_i - r_j - m_ij) / sum_ij t_ij) / count.

    With `ordered_pairs` and no margins it is `ranking_loss`.
    rewards:      [N].
    targets:      [N, N], t_ij >= 0, the weight of "i is better than j"; 0 between prompts.
    prompt_index: [N], equal for the completions of one prompt.
    margins:      [N, N], antisymmetric, reward units; None: 0.
    count:        prompts that have a pair, in the whole minibatch.
    Returns a scalar in nats; 0 with gradient 0 when there is no pair. O(N^2) memory.
    Raises ValueError for shapes that do not fit, and for a wrong count as the module says.
    Source: InstructGPT, eq. 1; with margins Touvron et al. 2023 (Llama 2), eq. 2.
    """
    rewards = _upcast(rewards)
    gaps = rewards[:, None] - rewards[None, :]
    if margins is not None:
        _check_shapes(margins=margins, gaps=gaps)
        gaps = gaps - margins
    return _mean_over_pairs(gaps, targets, prompt_index, count, lambda gap: -torch.nn.functional.logsigmoid(gap))


def centring_penalty(rewards: Tensor, targets: Tensor, prompt_index: Tensor, count: Count = None) -> Tensor:
    """sum over prompts of (sum_ij t_ij (r_i + r_j)^2 / sum_ij t_ij) / count: it draws rewards to 0 and leaves gaps alone.

    rewards, targets, prompt_index, count: as in `pairwise_ranking_loss`. Returns a scalar, reward units squared.
    Raises ValueError as there.
    Source: Eisenstein et al. 2023, "Helping or herding?", the regulariser that centres the rewards of a pair.
    """
    rewards = _upcast(rewards)
    return _mean_over_pairs(rewards[:, None] + rewards[None, :], targets, prompt_index, count, torch.square)


def _same_prompt(values: Tensor, prompt_index: Tensor) -> Tensor:
    """[N, N]: whether two completions answer one prompt."""
    _check_shapes(values=values, prompt_index=prompt_index)
    if values.ndim != 1:
        raise ValueError(f"rewards must be [N] and are {tuple(values.shape)}; flatten the [B, K] batch first")
    return prompt_index[:, None] == prompt_index[None, :]


def _comparable(ranks: Tensor, prompt_index: Tensor) -> Tensor:
    """[N, N]: whether two completions are there and answer one prompt."""
    real = ranks >= 0
    return _same_prompt(ranks, prompt_index) & real[:, None] & real[None, :]


def _mean_over_pairs(
    pairs: Tensor, targets: Tensor, prompt_index: Tensor, count: Count, of: Callable[[Tensor], Tensor]
) -> Tensor:
    """sum over prompts of (sum_ij t_ij of(pairs_ij) / sum_ij t_ij) / count; what has no weight is not looked at."""
    same_prompt = _same_prompt(prompt_index, prompt_index)
    _check_shapes(targets=targets, pairs=pairs, prompts=same_prompt)
    targets = targets.to(pairs)
    weight_of_prompt = (same_prompt * targets.sum(1)).sum(1)
    has_pair = weight_of_prompt > 0
    first_of_prompt = ~same_prompt.tril(-1).any(1)
    losses = of(pairs.masked_fill(targets == 0, 0)) * targets / weight_of_prompt.masked_fill(~has_pair, 1)[:, None]
    return _over(losses.sum(), (first_of_prompt & has_pair).sum(), count)


# --- rewards and advantages


def kl_penalty(logp: Tensor, logp_ref: Tensor, kind: Literal["k1", "k2", "k3"] = "k1") -> Tensor:
    """Per-token estimators of KL(pi || ref) from samples of pi, with lr = logp - logp_ref.

    k1 = lr (unbiased, either sign), k2 = lr^2 / 2 (biased, low variance), k3 = exp(-lr) - 1 + lr (unbiased, >= 0).

    logp, logp_ref: [B, T] in nats. Returns [B, T] in nats. Nothing is clamped.
    There is no mask: what padding holds stays at padding, where `shaped_rewards` and `masked_mean` drop it. To take its
    gradient, give it inputs that are finite at padding.
    Raises ValueError for another kind and for shapes that differ.
    Source: Schulman 2020, "Approximating KL divergence".
    """
    _check_shapes(logp=logp, logp_ref=logp_ref)
    log_ratio = _upcast(logp) - _upcast(logp_ref)
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return 0.5 * log_ratio.square()
    if kind == "k3":
        return torch.expm1(-log_ratio) + log_ratio
    raise ValueError(f"kind must be 'k1', 'k2' or 'k3', not {kind!r}")


def shaped_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float | Tensor) -> Tensor:
    """r_t = -kl_coef * kl_t + [t is the last real token] * score; 0 on padding.

    scores: [B], reward units, one a sequence.
    kl:     [B, T], nats (`kl_penalty`).
    mask:   [B, T], a non-empty prefix of True in each row.
    kl_coef: reward units per nat. Returns [B, T] in reward units; a row sums to score - kl_coef * sum kl.
    Raises ValueError for a row with no real token, for a mask with holes, and for shapes that do not fit.
    Source: Ziegler et al. 2019, eq. 2, per token; InstructGPT, eq. 2.
    """
    (kl,) = _real(mask, kl=kl)
    _check_prefix(mask)
    if scores.shape != mask.shape[:1]:
        raise ValueError(f"scores must be [B] = ({mask.shape[0]},) and are {tuple(scores.shape)}")
    lengths = mask.sum(1, keepdim=True)
    if (lengths == 0).any():
        raise ValueError("a row of mask has no real token, so its score has no place; drop empty responses")
    is_last = torch.arange(mask.shape[1], device=mask.device) == lengths - 1
    return torch.where(is_last, _upcast(scores)[:, None], 0.0) - kl_coef * kl


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and the returns that the critic learns.

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1};  return_t = A_t + V_t.
    V and A after the last real token are 0: EOS and a cut at the length limit are both terminal.

    rewards, values: [B, T], reward units; values[:, t] comes from the state before token t.
    mask:            [B, T], a prefix of True in each row, empty rows allowed.
    Returns (advantages, returns), [B, T] each, not whitened, 0 on padding.
    Raises ValueError for a mask with holes and for shapes that differ.
    Source: Schulman et al. 2016, eq. 16.
    """
    rewards, values = _real(mask, rewards=rewards, values=values)
    _check_prefix(mask)
    advantages = torch.zeros_like(rewards + values)
    next_value = next_advantage = values.new_zeros(mask.shape[0])
    for t in reversed(range(mask.shape[1])):  # padding needs no case of its own: rewards and values are 0 there
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = delta + gamma * lam * next_advantage
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, advantages + values


# --- losses of PPO-ptx


def _policy_losses(
    logp: Tensor, logp_old: Tensor, advantages: Tensor, mask: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """-ratio A and -clip(ratio) A, [B, T] each, 0 on padding."""
    _check_clip(clip)
    logp, logp_old, advantages = _real(mask, logp=logp, logp_old=logp_old.detach(), advantages=advantages.detach())
    ratio = torch.exp(logp - logp_old)
    return -ratio * advantages, -ratio.clamp(1 - clip, 1 + clip) * advantages


def _value_losses(
    values: Tensor, values_old: Tensor, returns: Tensor, mask: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """The squared errors of the values and of the clipped values, [B, T] each, 0 on padding."""
    _check_clip(clip)
    values, values_old, returns = _real(mask, values=values, values_old=values_old.detach(), returns=returns.detach())
    # V itself where the clip does not bind: V_old + (V - V_old) rounds, and would count as clipped.
    clipped = values.clamp(values_old - clip, values_old + clip)
    return (values - returns).square(), (clipped - returns).square()


def _check_clip(clip: float) -> None:
    if not clip >= 0:
        raise ValueError(f"clip must be at least 0 and is {clip}")


def clipped_policy_loss(
    logp: Tensor, logp_old: Tensor, advantages: Tensor, mask: Tensor, clip: float = 0.2, count: Count = None
) -> Tensor:
    """PPO's surrogate, negated: sum_{real} max(-ratio A, -clip(ratio, 1 - clip, 1 + clip) A) / count.

    logp, logp_old: [B, T] in nats; ratio = exp(logp - logp_old).
    advantages:     [B, T], no unit where whitened. Gradients reach logp alone.
    Returns a scalar.
    Raises ValueError for a negative clip, and as the module says.
    Source: Schulman et al. 2017, eq. 7.
    """
    unclipped, clipped = _policy_losses(logp, logp_old, advantages, mask, clip)
    return _over(torch.maximum(unclipped, clipped).sum(), mask.sum(), count)


def clipped_value_loss(
    values: Tensor, values_old: Tensor, returns: Tensor, mask: Tensor, clip: float = 0.2, count: Count = None
) -> Tensor:
    """0.5 * sum_{real} max((V - R)^2, (V_old + clip(V - V_old, -clip, clip) - R)^2) / count.

    values, values_old, returns: [B, T], reward units. Gradients reach values alone.
    clip: reward units. Returns a scalar, reward units squared.
    Raises ValueError for a negative clip, and as the module says.
    Source: Ziegler et al. 2019 (code), after OpenAI baselines' ppo2.
    """
    unclipped, clipped = _value_losses(values, values_old, returns, mask, clip)
    return _over(0.5 * torch.maximum(unclipped, clipped).sum(), mask.sum(), count)


def pretraining_loss(logp: Tensor, mask: Tensor, count: Count = None) -> Tensor:
    """Mean negative log-likelihood of pretraining text, -sum_{real} logp / count; ptx_coef times it is added to PPO's.

    logp, mask: [B, T]. Returns a scalar in nats per token.
    Raises ValueError as the module says.
    Source: InstructGPT, eq. 2, the term of gamma.
    """
    return -masked_mean(logp, mask, count)


# --- controllers


@torch.no_grad()
def ema_update(average: Iterable[Tensor], weights: Iterable[Tensor], decay: float) -> None:
    """average <- decay * average + (1 - decay) * weights, in place, once an optimiser step.

    average, weights: floating tensors of equal shapes in equal order. Each update is computed in the dtype and on the
    device of `average`: keep that in float32, as bfloat16 rounds steps of 1 - decay = 0.008 away.
    Raises ValueError for unequal numbers or shapes and for a decay outside [0, 1], before anything is changed.
    Source: InstructGPT, appendix C (0.992).
    """
    average, weights = list(average), list(weights)
    if not 0 <= decay <= 1:
        raise ValueError(f"decay must be in [0, 1] and is {decay}")
    if len(average) != len(weights):
        raise ValueError(f"average has {len(average)} tensors and weights has {len(weights)}")
    for mean, weight in zip(average, weights):
        _check_shapes(average=mean, weights=weight)
    for mean, weight in zip(average, weights):
        mean.lerp_(weight.to(mean), 1 - decay)


def next_kl_coef(kl_coef: float, observed_kl: float, target: float, horizon: float, n: float) -> float:
    """Proportional controller in log space: kl_coef * (1 + clip(observed_kl / target - 1, -0.2, 0.2) * n / horizon).

    observed_kl, target: nats per sequence. horizon, n: episodes, n of them since the last update.
    Raises ValueError for a NaN KL, a target or horizon not above 0, and n of 5 horizons or more (the sign could turn).
    Source: Ziegler et al. 2019, section 2.2.
    """
    observed_kl = float(observed_kl)
    if observed_kl != observed_kl or not target > 0 or not horizon > 0:
        raise ValueError(f"needs a number and target, horizon > 0: {observed_kl=}, {target=}, {horizon=}")
    if not 0 <= n < 5 * horizon:
        raise ValueError(f"n must be in [0, 5 * horizon), {n=}, {horizon=}; update more often or lengthen the horizon")
    error = max(-0.2, min(observed_kl / target - 1, 0.2))
    return float(kl_coef * (1 + error * n / horizon))


# --- statistics: shapes, counts and errors are those of the losses above


def policy_clip_fraction(
    logp: Tensor, logp_old: Tensor, advantages: Tensor, mask: Tensor, clip: float = 0.2, count: Count = None
) -> Tensor:
    """Share of real tokens where the clip sets the policy loss, clipped > unclipped: those give no gradient.

    Source: Ziegler et al. 2019 (code).
    """
    unclipped, clipped = _policy_losses(logp, logp_old, advantages, mask, clip)
    return masked_mean(clipped > unclipped, mask, count)


def value_clip_fraction(
    values: Tensor, values_old: Tensor, returns: Tensor, mask: Tensor, clip: float = 0.2, count: Count = None
) -> Tensor:
    """Share of real tokens where the clip sets the value loss, clipped > unclipped: those give no gradient.

    Source: Ziegler et al. 2019 (code).
    """
    unclipped, clipped = _value_losses(values, values_old, returns, mask, clip)
    return masked_mean(clipped > unclipped, mask, count)


def approx_kl(logp: Tensor, logp_old: Tensor, mask: Tensor, count: Count = None) -> Tensor:
    """0.5 * mean over real tokens of (logp - logp_old)^2, nats per token: k2, how far the update has moved the policy.

    Source: Ziegler et al. 2019 (code); the other estimators are `masked_mean(kl_penalty(...), mask)`.
    """
    logp, logp_old = _real(mask, logp=logp, logp_old=logp_old)
    return masked_mean(kl_penalty(logp, logp_old, "k2"), mask, count)


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """-sum_v p_v log p_v with p = softmax(logits / temperature), nats per token; 0 log 0 = 0.

    logits: [B, T, V]; -inf excludes a token. Returns [B, T].
    Raises ValueError when temperature is not above 0.
    """
    logp = _tempered(logits, temperature).log_softmax(-1)
    p = logp.exp()
    return -(p * logp.masked_fill(p == 0, 0)).sum(-1)


def ratio_moments(logp: Tensor, logp_old: Tensor, mask: Tensor) -> Moments:
    """Moments of exp(logp - logp_old) over real tokens (mean, variance; mergeable); 1 and 0 before the first update.

    Raises ValueError when no token is real.
    """
    logp, logp_old = _real(mask, logp=logp, logp_old=logp_old)
    return moments(torch.exp(logp - logp_old), mask)


def ratio_max(logp: Tensor, logp_old: Tensor, mask: Tensor) -> Tensor:
    """The largest exp(logp - logp_old) over real tokens; the maximum of parts merges them.

    Raises ValueError when no token is real.
    """
    logp, logp_old = _real(mask, logp=logp, logp_old=logp_old)
    if not mask.any():
        raise ValueError("no token is real, so there is no largest ratio")
    return torch.exp(logp - logp_old)[mask].max()


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over real tokens: 1 is perfect, 0 no better than a constant.

    NaN where the returns are constant.

    Raises ValueError when no token is real.
    Source: OpenAI baselines, `explained_variance`.
    """
    values, returns = _real(mask, values=values, returns=returns)
    total = moments(returns, mask).m2
    return torch.where(total > 0, 1 - moments(returns - values, mask).m2 / total, float("nan"))
