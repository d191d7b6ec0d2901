"""Prompts to rollouts: sampling, scoring, and the frozen tensors that PPO learns from.

Sampling is a loop over the model's own forward with its cache, in which sequences that have ended leave the batch. Each sequence
draws from its own stream of uniform numbers, so that what is sampled does not depend on the batch or on how many processes
share the work. Log-probabilities come from one forward over prompt and response, the same that the update uses, so that the
first ratio is 1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm

from rlhf import RLHFError
from rlhf.data.encode import batches, decode_completions, pad
from rlhf.decoding import Decoder, can_preallocate, growing_cache, select_rows
from rlhf.engine import together
from rlhf.models import accepts, eagerly, logprobs_at, values_at
from rlhf.rewards import Episodes, Reward, weighted


class NotFinite(RLHFError, ValueError):
    """A model gave numbers of a rollout that are infinite or not a number."""


@dataclass(frozen=True)
class Rollout:
    """B episodes. Prompts are padded on the left, responses on the right; True in a mask is a real token.

    prompts, prompt_mask [B, P]; responses, mask [B, T]; ended [B]: an EOS came within the limit.
    logp, logp_ref [B, T]: log-probability (nats, at the sampling temperature) of each response token under policy and reference.
    values [B, T]: the critic before each token, that is at position P - 1 + t. scores [B]: the weighted sum of rewards [B, M]
    (default: the one reward).
    """

    prompts: Tensor
    prompt_mask: Tensor
    responses: Tensor
    mask: Tensor
    ended: Tensor
    logp: Tensor
    logp_ref: Tensor
    values: Tensor
    scores: Tensor
    rewards: Tensor | None = None

    def __post_init__(self) -> None:
        if self.rewards is None:
            object.__setattr__(self, "rewards", self.scores[:, None])
        if not self.mask.any(dim=1).all() or (self.mask[:, 1:] & ~self.mask[:, :-1]).any():
            raise ValueError("mask: each row must be a non-empty prefix of True")
        if not self.prompt_mask.any(dim=1).all() or (self.prompt_mask[:, :-1] & ~self.prompt_mask[:, 1:]).any():
            raise ValueError("prompt_mask: each row must be a non-empty suffix of True")
        expected: dict[str, tuple[int, ...]] = dict.fromkeys(
            ("responses", "logp", "logp_ref", "values"), self.mask.shape
        )
        expected |= {"prompts": self.prompt_mask.shape, "prompt_mask": (len(self.mask), self.prompts.shape[1])}
        expected |= dict.fromkeys(("ended", "scores"), self.mask.shape[:1])
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name}: shape {tuple(getattr(self, name).shape)}, expected {tuple(shape)}")
        for name, model in (("logp", "policy"), ("logp_ref", "reference"), ("values", "critic")):
            if not torch.isfinite(getattr(self, name)[self.mask]).all():
                raise NotFinite(
                    f"{name}: not finite on a real token, so that nothing can be learned from this rollout: the {model}'s "
                    "weights or their dtype are out of range. Try dtype float32, a lower learning rate, or an earlier checkpoint"
                )
        if not torch.isfinite(self.scores).all():
            raise NotFinite("scores: not finite, so that nothing can be learned from this rollout; look at the rewards")

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def lengths(self) -> Tensor:
        """Real tokens [B] of prompt and response together: what an episode costs in the update."""
        return self.prompt_mask.sum(dim=1) + self.mask.sum(dim=1)

    @property
    def kl(self) -> Tensor:
        """log pi(y|x) - log pi_ref(y|x) of each response [B], in nats: its mean estimates KL(pi || ref)."""
        return torch.where(self.mask, self.logp - self.logp_ref, 0.0).sum(dim=1)


@dataclass(frozen=True)
class Rows:
    """Prompt and response of each episode as one row, padded on the right.

    ids, attention [B, L]. where [B, L]: the positions whose state comes before a response token. tokens [N]: these response
    tokens, in the order in which `where` enumerates its positions, which is that of `mask` [B, T]. place [N]: these positions
    in the flattened rows: known before the rows are on a GPU, which would be waited for to count them.
    """

    ids: Tensor
    attention: Tensor
    where: Tensor
    tokens: Tensor
    mask: Tensor
    place: Tensor

    def to(self, device: Any) -> Rows:
        return Rows(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})

    def fill(self, flat: Tensor) -> Tensor:
        """Values [N] of the real response tokens as [B, T], 0 on padding; differentiable."""
        return torch.zeros(self.mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(self.mask, flat)


def join(prompts: Tensor, prompt_mask: Tensor, responses: Tensor, mask: Tensor, pad_token_id: int) -> Rows:
    """Rows of prompts [B, P] padded on the left and responses [B, T] padded on the right, at the least width."""
    before, after = prompt_mask.sum(dim=1), mask.sum(dim=1)
    ids = torch.cat([prompts, responses], dim=1)
    real = torch.cat([prompt_mask, mask], dim=1)
    width = int((before + after).max())
    # Real tokens of a row are contiguous, so that a stable sort by "is padding" moves them to the front in order.
    order = real.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
    position = torch.arange(width, device=ids.device)
    attention = position < (before + after)[:, None]
    where = (position >= before[:, None] - 1) & (position < (before + after)[:, None] - 1)
    return Rows(
        ids=ids.gather(1, order).masked_fill(~attention, pad_token_id),
        attention=attention,
        where=where,
        tokens=responses[mask],
        mask=mask,
        place=where.flatten().nonzero().squeeze(-1),
    )


def rows_of(rollout: Rollout, index: Tensor, pad_token_id: int) -> Rows:
    """Rows of some episodes [b] of a rollout; `mask` keeps the rollout's width T."""
    return join(
        rollout.prompts[index], rollout.prompt_mask[index], rollout.responses[index], rollout.mask[index], pad_token_id
    )


# ------------------------------------------------------------------------------------------------------------ sampling


def uniforms(seed: int, step: int, index: int, count: int) -> Tensor:
    """The stream [count] of uniform numbers that episode `index` of rollout `step` samples with."""
    digest = hashlib.sha256(f"{seed}/{step}/{index}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.rand(count, generator=generator, dtype=torch.float64)


def sample(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """One token [B] a row of logits [B, V], by inversion of the distribution function at `uniform` [B] in [0, 1).

    Temperature 0 takes the most probable token. The sum runs in float64: in float32 a vocabulary of 50,000 loses digits.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    target = uniform[:, None] * cumulative[:, -1:]
    # `right`: a token of probability 0 spans an empty interval and is never taken.
    token = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    return token.clamp(max=logits.shape[-1] - 1)


def distinct_prompts(prompts: Sequence[Sequence[int]]) -> tuple[list[Sequence[int]], list[int]]:
    """Each prompt once, and for each of `prompts` its place among these."""
    places: dict[tuple[int, ...], int] = {}
    of = [places.setdefault(tuple(prompt), len(places)) for prompt in prompts]
    return list(places), of


KEPT = 0.8  # the share of a batch above which sequences that have ended stay in it: to go on without them is a copy of the rest


@torch.no_grad()
def generate(
    policy: Any,
    prompts: Sequence[Sequence[int]],
    draws: Tensor,
    *,
    temperature: float,
    eos_token_id: int,
    pad_token_id: int,
    banned: Tensor,
) -> tuple[list[list[int]], list[bool]]:
    """One response for each prompt: token ids with their EOS, and whether they ended within the limit.

    draws [B, T]: a uniform number for each response position; T is the limit. banned: ids that are never sampled.
    Sequences that have ended leave the batch and its cache when they are a fifth of it. A prompt that is there several times is
    read once.
    """
    device = policy.device
    distinct, of = distinct_prompts(prompts)
    ids, mask = (tensor.to(device) for tensor in pad(distinct, pad_token_id, side="left"))
    draws, banned = draws.to(device), banned.to(device)
    responses: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    alive = torch.arange(len(prompts), device=device)
    going_on = torch.ones_like(alive, dtype=torch.bool)
    extra: dict[str, Any] = {"logits_to_keep": 1} if accepts(policy, "logits_to_keep") else {}
    with_positions, cache = accepts(policy, "position_ids"), growing_cache(policy)
    position = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    for t in range(draws.shape[1]):
        if with_positions:
            extra["position_ids"] = position
        output = policy(input_ids=ids, attention_mask=mask.long(), past_key_values=cache, use_cache=True, **extra)
        logits = output.logits[:, -1].index_fill(-1, banned, float("-inf"))
        if t == 0 and len(distinct) < len(prompts):
            rows = torch.tensor(of, device=device)
            select_rows(cache, rows)
            logits, mask, position = logits[rows], mask[rows], position[rows]
        token = sample(logits, draws[alive, t], temperature)
        for row, value in zip(alive.tolist(), token.tolist()):
            if not ended[row]:
                responses[row].append(value)
                ended[row] = value == eos_token_id
        going_on &= token != eos_token_id
        left = int(going_on.sum())
        if not left:
            break
        position = position[:, -1:] + 1
        if left <= KEPT * len(alive):
            keep = going_on.nonzero().squeeze(-1)
            select_rows(cache, keep)
            alive, going_on, mask = alive[keep], going_on[keep], mask[keep]
            position, token = position[keep], token[keep]
        ids, mask = token[:, None], torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
    return responses, ended


CHECK_EVERY = 16  # tokens between two looks at which sequences have ended, each of which waits for the GPU


@torch.no_grad()
def generate_in_place(
    policy: Any,
    prompts: Sequence[Sequence[int]],
    draws: Tensor,
    *,
    temperature: float,
    eos_token_id: int,
    pad_token_id: int,
    banned: Tensor,
) -> tuple[list[list[int]], list[bool]]:
    """`generate` with a cache of its final size, sampling on the device, and a look at the host every few tokens only.

    Sequences that have ended go on as PAD until half of the batch has: then the others go on without them.
    """
    device, (count, limit) = policy.device, draws.shape
    distinct, of = distinct_prompts(prompts)
    ids, mask = (tensor.to(device) for tensor in pad(distinct, pad_token_id, side="left"))
    draws, banned = draws.to(device), banned.to(device)
    answers = torch.full((count, limit), pad_token_id, device=device)
    rows, alive = torch.arange(count, device=device), torch.ones(count, dtype=torch.bool, device=device)
    decoder = Decoder(policy, ids, mask, limit)
    if len(distinct) < count:
        decoder.keep(torch.tensor(of, device=device))
    for t in range(limit):
        logits = decoder.logits.index_fill(-1, banned, float("-inf"))
        token = sample(logits, draws[rows, t], temperature).where(alive, pad_token_id)
        answers[:, t].index_copy_(0, rows, token)
        alive = alive & (token != eos_token_id)
        if t + 1 == limit:
            break
        if (t + 1) % CHECK_EVERY == 0:
            left = int(alive.sum())
            if left == 0:
                break
            if 2 * left <= len(rows):
                keep = alive.nonzero().squeeze(-1)
                rows, alive, token = rows[keep], alive[keep], token[keep]
                decoder.keep(keep)
        decoder.step(token)
    responses = [row[: row.index(eos_token_id) + 1] if eos_token_id in row else row for row in answers.tolist()]
    return responses, [row[-1] == eos_token_id for row in responses]


def sample_responses(
    policy: Any,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[tuple[int, int, int]],
    *,
    response_length: int,
    temperature: float,
    batch_size: int,
    tokenizer: Any,
    banned: Tensor,
    shown_as: str | None = None,
) -> tuple[list[list[int]], list[bool]]:
    """`generate` in batches of like prompt length, on a GPU in place where the model can.

    keys:     (seed, step, index) of each prompt's stream.
    shown_as: the name of a progress bar, on a terminal; None shows none.
    """
    decode = generate_in_place if policy.device.type == "cuda" and can_preallocate(policy) else generate
    responses: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    off = True if shown_as is None else None  # None: off where there is no terminal
    with tqdm(total=len(prompts), desc=shown_as, unit=" answers", leave=False, disable=off) as bar:
        for batch in batches([len(p) for p in prompts], batch_size):
            with eagerly(policy):
                found, stopped = decode(
                    policy,
                    [prompts[i] for i in batch],
                    torch.stack([uniforms(*keys[i], response_length) for i in batch]),
                    temperature=temperature,
                    eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id,
                    banned=banned,
                )
            for i, response, stop in zip(batch, found, stopped):
                responses[i], ended[i] = response, stop
            bar.update(len(batch))
    return responses, ended


# ---------------------------------------------------------------------------------------------- log-probabilities and rewards


def response_logp(model: Any, rows: Rows, temperature: float, banned: Tensor) -> Tensor:
    """Log-probability [N] of each response token, among the ids that can be sampled, at the sampling temperature."""
    return logprobs_at(model, rows.ids, rows.attention, rows.place, rows.tokens, temperature, banned)


@dataclass(frozen=True)
class Actors:
    """The models of a rollout, unwrapped, and what sampling needs. In `whole(model)` a model has all of its weights here."""

    policy: Any
    reference: Any
    critic: Any
    rewards: Sequence[Reward]
    tokenizer: Any
    banned: Tensor
    temperature: float
    response_length: int
    batch_size: int
    whole: Callable[[Any], AbstractContextManager[Any]] = lambda model: nullcontext()


@dataclass(frozen=True)
class Prompts:
    """Prompts of a data set: token ids, the prompt as written, and the further columns that reward functions may want."""

    ids: Sequence[Sequence[int]]
    texts: Sequence[Any]
    columns: dict[str, list[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, indices: Sequence[int]) -> Prompts:
        columns = {name: [values[i] for i in indices] for name, values in self.columns.items()}
        return Prompts([self.ids[i] for i in indices], [self.texts[i] for i in indices], columns)


@torch.no_grad()
def collect(
    actors: Actors,
    prompts: Prompts,
    keys: Sequence[tuple[int, int, int]],
    lap: Callable[[str], None] = lambda phase: None,
) -> Rollout:
    """Samples a response to each of this process's prompts, and runs policy, rewards, reference and critic over them.

    lap is told the name of each phase at its end. One model is whole at a time, the policy from its first token to its
    log-probabilities: weights that are spread over the processes are gathered once a rollout.
    """

    def sampled() -> tuple[list[list[int]], Rollout]:
        with actors.whole(actors.policy):
            responses, ended = sample_responses(
                actors.policy,
                prompts.ids,
                keys,
                response_length=actors.response_length,
                temperature=actors.temperature,
                batch_size=actors.batch_size,
                tokenizer=actors.tokenizer,
                banned=actors.banned,
            )
            lap("generation")
            return responses, evaluate_responses(actors, unscored(actors, prompts, responses, ended), ("logp",))

    def scored(reward: Reward) -> Tensor:
        with actors.whole(reward.model):
            return reward.score(episodes)

    def evaluated(model: Any, name: str) -> Rollout:
        with actors.whole(model):
            return evaluate_responses(actors, rollout, (name,))

    responses, rollout = together(sampled)
    lap("forwards")
    completions = decode_completions(actors.tokenizer, responses)
    episodes = Episodes(prompts.ids, responses, prompts.texts, completions, prompts.columns)
    rewards = torch.stack([together(partial(scored, reward)) for reward in actors.rewards], dim=1)
    rollout = replace(rollout, rewards=rewards, scores=weighted(actors.rewards, rewards))
    lap("rewards")
    rollout = together(partial(evaluated, actors.reference, "logp_ref"))
    rollout = together(partial(evaluated, actors.critic, "values"))
    lap("forwards")
    return rollout


def unscored(actors: Actors, prompts: Prompts, responses: Sequence[Sequence[int]], ended: Sequence[bool]) -> Rollout:
    """The rollout before any model has looked at it."""
    prompt_ids, prompt_mask = pad(prompts.ids, actors.tokenizer.pad_token_id, side="left")
    response_ids, mask = pad(responses, actors.tokenizer.pad_token_id)
    return Rollout(
        prompts=prompt_ids,
        prompt_mask=prompt_mask,
        responses=response_ids,
        mask=mask,
        ended=torch.tensor(ended, dtype=torch.bool),
        logp=torch.zeros(mask.shape),
        logp_ref=torch.zeros(mask.shape),
        values=torch.zeros(mask.shape),
        scores=torch.zeros(len(mask)),
    )


@torch.no_grad()
def evaluate_responses(
    actors: Actors, rollout: Rollout, names: Sequence[str] = ("logp", "logp_ref", "values")
) -> Rollout:
    """The rollout with log-probabilities under policy and reference, and values, each from one forward over whole rows."""
    device, pad_id = actors.policy.device, actors.tokenizer.pad_token_id
    banned = actors.banned.to(device)
    passes: dict[str, Callable[[Rows], Tensor]] = {
        "logp": lambda rows: response_logp(actors.policy, rows, actors.temperature, banned),
        "logp_ref": lambda rows: response_logp(actors.reference, rows, actors.temperature, banned),
        "values": lambda rows: values_at(actors.critic, rows.ids, rows.attention, rows.place),
    }
    found = {name: torch.zeros(rollout.mask.shape) for name in names}
    for batch in batches(rollout.lengths.tolist(), actors.batch_size):
        index = torch.tensor(batch)
        rows = rows_of(rollout, index, pad_id).to(device)
        for name in names:
            found[name][index] = rows.fill(passes[name](rows)).to(found[name])
    return replace(rollout, **found)


def gather(rollout: Rollout, processes: int) -> Rollout:
    """The rollouts of all processes as one, in the order of the prompts, which were dealt out in turn."""
    if processes == 1:
        return rollout
    return interleave(gather_object([rollout]))


def interleave(parts: Sequence[Rollout]) -> Rollout:
    """Rollouts of prompts r, r + W, r + 2W … (r = 0 … W-1) as one rollout of prompts 0, 1, 2 …"""
    order = torch.cat([torch.arange(len(part)) * len(parts) + r for r, part in enumerate(parts)]).argsort()
    merged = {}
    for spec in fields(Rollout):
        tensors = [getattr(part, spec.name) for part in parts]
        if tensors[0].dim() == 2 and spec.name != "rewards":
            width = max(tensor.shape[1] for tensor in tensors)
            side = 0 if spec.name in ("prompts", "prompt_mask") else 1
            tensors = [_widen(tensor, width, side) for tensor in tensors]
        merged[spec.name] = torch.cat(tensors)[order]
    return Rollout(**merged)


def _widen(tensor: Tensor, width: int, side: int) -> Tensor:
    missing = width - tensor.shape[1]
    return torch.nn.functional.pad(tensor, (missing, 0) if side == 0 else (0, missing))
