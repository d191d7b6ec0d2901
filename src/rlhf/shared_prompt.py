"""Attention in which the completions of a prompt share its computation, without a padded token.

All prompts of a batch lie in one row, each followed by its completions: every token passes the layers once, a prompt once for
its K completions, and nothing is padding. Attention is what tells sequences apart: a prompt sees itself, a completion sees
its prompt and itself. No [L, L] mask of the row is ever made: all prompts of the row are attended to in one call, padded to the
longest, and all completions in another. Calls of their own for each prompt take longer to start than to run.

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
class Layout:
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


def layout(prompts: Sequence[int], completions: Sequence[Sequence[int]], device: torch.device) -> Layout:
    """Where everything is in a row of prompts (their lengths), each with its completions (theirs) behind it."""
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
    return Layout(*(tensor.to(device) for tensor in (p_place, c_place, one_hot, mask, back)))


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
    whole = (query, repeat_kv(key, repeats), repeat_kv(value, repeats))
    tensors = [tensor[0].transpose(0, 1) for tensor in whole]  # [L, H, D]

    def at(places: Tensor) -> list[Tensor]:
        """3 x [rows, H, width, D]; gradients of what is repeated are 0, never added up."""
        return [t.index_select(0, places.flatten()).unflatten(0, places.shape).transpose(1, 2) for t in tensors]

    q, *before = at(rankings.prompts)
    of_prompts = scaled_dot_product_attention(q, before[0], before[1], is_causal=True, scale=scaling)
    q, *own = at(rankings.completions)
    # A prompt's keys for each of its completions, by a product whose backward pass adds them up in float32.
    spread = [(rankings.whose.to(b.dtype) @ b.flatten(1)).unflatten(1, b.shape[1:]) for b in before]
    k, v = (torch.cat(pair, dim=2) for pair in zip(spread, own))
    of_completions = scaled_dot_product_attention(q, k, v, attn_mask=rankings.mask, scale=scaling)
    found = torch.cat([part.transpose(1, 2).flatten(0, 1) for part in (of_prompts, of_completions)])
    return found.index_select(0, rankings.back)[None], None


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
