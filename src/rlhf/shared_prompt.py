"""Attention in which the completions of a prompt share its computation, without a padded token.

All prompts of a batch lie in one row, each followed by its completions: every token passes the layers once, a prompt once for
its K completions, and nothing is padding. Attention is what tells sequences apart: a prompt sees itself, a completion sees
its prompt and itself. It runs prompt by prompt, so that no [L, L] mask of the row is ever made.

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


def layout(prompts: Sequence[int], completions: Sequence[Sequence[int]], device: torch.device) -> list[Group]:
    """Where everything is in a row of prompts (their lengths), each with its completions (theirs) behind it."""
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
    rankings: Sequence[Group] | None = None,
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
