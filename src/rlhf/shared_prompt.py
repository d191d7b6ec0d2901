"""Attention in which the completions of a prompt share its computation, without a padded token.

All prompts of a batch lie in one row, each followed by its completions: every token passes the layers once, a prompt once for
its K completions, and nothing is padding. Attention is what tells sequences apart: a prompt sees itself, a completion sees
its prompt and itself. No [L, L] mask of the row is ever made. On a CPU attention runs prompt by prompt, without a padded key; on
a GPU, where starting so many small kernels would take longer than they run, all prompts of the row are attended to in one padded
call, and all completions in another.

It is an implementation of transformers' attention interface, by the name `rlhf_shared_prompt`. Without a layout it is `sdpa`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "rlhf_shared_prompt"

# Their attention is plain causal attention of the tokens that it is given, with positions told by `position_ids`; each is held
# by a test to the scores of one row a completion. Others (ALiBi, sliding windows, soft caps) take one row a completion.
MODEL_TYPES = {"gpt2", "opt", "gpt_neox", "llama", "qwen2", "qwen3"}


@dataclass(frozen=True)
class Group:
    """`prompt` tokens of the row, and behind them the `tokens` that the K completions have together.

    own [K, T]: the places of each completion's tokens among those, padded with its last one.
    real [tokens]: where they are in the flattened [K, T]; by number, since a mask would make a GPU wait in every layer.
    mask [T, prompt + T]: what the t-th token of a completion sees of the prompt and of its own tokens.
    """

    prompt: int
    tokens: int
    own: Tensor
    real: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Block:
    """All B prompts of the row and their N completions, padded to the longest; padding repeats a last token, and is never seen.

    prompts [B, P], completions [N, T]: places in the row. whose [N, B]: 1 where a completion answers a prompt.
    mask [N, 1, T, P + T]: what each token of a completion sees of its prompt and of its own tokens.
    back [tokens]: where the row's tokens are among the flattened prompts, and the flattened completions behind them.
    """

    prompts: Tensor
    completions: Tensor
    whose: Tensor
    mask: Tensor
    back: Tensor


Layout = list[Group] | Block


def layout(prompts: Sequence[int], completions: Sequence[Sequence[int]], device: torch.device) -> Layout:
    """Where everything is in a row of prompts (their lengths), each with its completions (theirs) behind it."""
    if device.type == "cuda":
        return block(prompts, completions, device)
    return groups_of(prompts, completions, device)


def block(prompts: Sequence[int], completions: Sequence[Sequence[int]], device: torch.device) -> Block:
    """The layout for one call for all prompts, and one for all completions."""
    whose = torch.tensor([i for i, lengths in enumerate(completions) for _ in lengths])
    p, c = torch.tensor(prompts), torch.tensor([length for lengths in completions for length in lengths])
    # In the row each prompt is followed by its completions: lengths in that order, and from them where each part begins.
    order = torch.cat([torch.arange(len(p)) * (len(c) + 1), whose * (len(c) + 1) + 1 + torch.arange(len(c))]).argsort()
    lengths = torch.cat([p, c])
    starts = torch.empty_like(lengths)
    starts[order] = lengths[order].cumsum(0) - lengths[order]
    p_step, c_step = torch.arange(max(1, int(p.max()))), torch.arange(int(c.max()))
    p_real, c_real = p_step < p[:, None], c_step < c[:, None]
    last = int(lengths.sum()) - 1  # an empty prompt has no token to repeat: any place in the row will do
    p_place = (starts[: len(p), None] + torch.minimum(p_step, (p[:, None] - 1).clamp(min=0))).clamp(max=last)
    c_place = starts[len(p) :, None] + torch.minimum(c_step, c[:, None] - 1)
    own = torch.ones(len(c_step), len(c_step), dtype=torch.bool).tril()
    shape = (len(c), 1, len(c_step), -1)
    mask = torch.cat([p_real[whose][:, None, None].expand(shape), own.expand(shape)], dim=-1)
    back = torch.cat([p_place[p_real], c_place[c_real]]).argsort()
    back = torch.cat([p_real.flatten(), c_real.flatten()]).nonzero().squeeze(1)[back]
    one_hot = torch.nn.functional.one_hot(whose, len(p)).float()
    return Block(*(tensor.to(device) for tensor in (p_place, c_place, one_hot, mask, back)))


def groups_of(prompts: Sequence[int], completions: Sequence[Sequence[int]], device: torch.device) -> list[Group]:
    """The layout for a call for each prompt, and one for its completions."""
    groups = []
    for prompt, lengths in zip(prompts, completions):
        length = torch.tensor(lengths)
        step = torch.arange(int(length.max()))
        own = (length.cumsum(0) - length)[:, None] + torch.minimum(step, length[:, None] - 1)
        real = (step < length[:, None]).flatten().nonzero().squeeze(1)
        mask = torch.ones(len(step), prompt + len(step), dtype=torch.bool).tril(prompt)
        groups.append(Group(prompt, sum(lengths), own.to(device), real.to(device), mask.to(device)))
    return groups


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    rankings: Layout | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query, key, value [1, H, L, D] of a row with the layout `rankings` -> [1, L, H, D]."""
    if rankings is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    repeats = getattr(module, "num_key_value_groups", 1)
    key, value = repeat_kv(key, repeats), repeat_kv(value, repeats)
    if isinstance(rankings, Block):
        return _attend_at_once(query, key, value, rankings, scaling), None
    # Split once: the backward of a slice would fill a tensor of the whole row for each prompt.
    sizes = [size for group in rankings for size in (group.prompt, group.tokens)]
    pieces = list(zip(*(tensor[0].transpose(0, 1).split(sizes) for tensor in (query, key, value))))
    parts = []
    for group, prompt, completions in zip(rankings, pieces[::2], pieces[1::2]):
        q, *before = (tensor.transpose(0, 1)[None] for tensor in prompt)  # [1, H, P, D]
        if group.prompt:
            seen = scaled_dot_product_attention(q, before[0], before[1], is_causal=True, scale=scaling)
            parts.append(seen[0].transpose(0, 1))
        q, k, v = (tensor[group.own].transpose(1, 2) for tensor in completions)  # [K, H, T, D]
        k, v = (torch.cat([b.expand(len(own), -1, -1, -1), own], dim=2) for b, own in zip(before, (k, v)))
        seen = scaled_dot_product_attention(q, k, v, attn_mask=group.mask, scale=scaling)
        parts.append(seen.transpose(1, 2).flatten(0, 1)[group.real])
    return torch.cat(parts)[None], None


def _attend_at_once(query: Tensor, key: Tensor, value: Tensor, rows: Block, scaling: float | None) -> Tensor:
    """query, key, value [1, H, L, D] -> [1, L, H, D]."""
    tensors = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]  # [L, H, D]

    def at(places: Tensor) -> list[Tensor]:
        """3 x [rows, H, width, D]; gradients of what is repeated are 0, never added up."""
        return [t.index_select(0, places.flatten()).unflatten(0, places.shape).transpose(1, 2) for t in tensors]

    q, *before = at(rows.prompts)
    of_prompts = scaled_dot_product_attention(q, before[0], before[1], is_causal=True, scale=scaling)
    q, *own = at(rows.completions)
    # A prompt's keys for each of its completions, by a product whose backward pass adds them up in float32.
    spread = [(rows.whose.to(b.dtype) @ b.flatten(1)).unflatten(1, b.shape[1:]) for b in before]
    k, v = (torch.cat(pair, dim=2) for pair in zip(spread, own))
    of_completions = scaled_dot_product_attention(q, k, v, attn_mask=rows.mask, scale=scaling)
    found = torch.cat([part.transpose(1, 2).flatten(0, 1) for part in (of_prompts, of_completions)])
    return found.index_select(0, rows.back)[None]


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


def supports(model: Any) -> bool:
    """Whether the completions of a prompt can share its computation in this model."""
    config = model.config.get_text_config()
    whole = getattr(config, "sliding_window", None) is None
    return config.model_type in MODEL_TYPES and whole and config._attn_implementation in ("sdpa", NAME)


def enable(model: Any) -> None:
    """Gives the model this attention; everything else that it is asked goes through sdpa, as before."""
    model.set_attn_implementation(NAME)
