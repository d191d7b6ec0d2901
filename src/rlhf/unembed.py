"""The last step from hidden states to log-probabilities, where models run in bfloat16 (autocast, or weights of that type).

bfloat16 has 8 bits: a logit of 100, which GPT-2 has, is known to 0.5 only, and so would be the log-ratio of two passes. Here
the product has bfloat16 factors and a float32 result, and is taken some thousand tokens at a time: neither the logits [N, V] nor
their gradient ever exist as a whole. The backward pass takes the product again (a third more work in the unembedding).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

CHUNK = 4096  # tokens whose logits exist at once
MULTIPLE = 8  # rows of the low-precision weight: matrix units read whole lines of 16 bytes
LOW = (torch.bfloat16, torch.float16)


def low_precision_of(head: Any) -> torch.dtype | None:
    """The low precision in which this unembedding would run now, None for full precision or for no plain matrix.

    A matrix that is adapted, has a bias, or is sharded (its rows are elsewhere) is left to its own module; also while it is
    gathered for a rollout, which must round as the update does.
    """
    if hasattr(getattr(head, "weight", None), "ds_id"):
        return None
    if type(head) is not nn.Linear or head.bias is not None or head.weight.dim() != 2 or head.weight.numel() == 0:
        return None
    if head.weight.dtype in LOW:
        return head.weight.dtype
    kind = head.weight.device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) in LOW:
        return torch.get_autocast_dtype(kind)
    return None


def lowered(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight [V, H] in low precision, with rows of 0 up to a multiple of eight."""
    rows = -(-len(weight) // MULTIPLE) * MULTIPLE
    low = torch.zeros(rows, weight.shape[1], dtype=dtype, device=weight.device)
    low[: len(weight)] = weight.detach()
    return low


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in float32, of two low-precision matrices."""
    with torch.autocast(left.device.type, enabled=False):
        if left.is_cuda and _has_float32_result():
            return torch.mm(left, right, out_dtype=torch.float32)
        if left.is_cuda:
            return torch.mm(left, right).float()
        return left.float() @ right.float()


@functools.cache
def _has_float32_result() -> bool:
    """Whether this PyTorch multiplies bfloat16 into float32 on CUDA (2.8 and later)."""
    one = torch.ones(8, 8, dtype=torch.bfloat16, device="cuda")
    try:
        torch.mm(one, one, out_dtype=torch.float32)
    except (TypeError, RuntimeError):
        return False
    return True


def logprobs(
    hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float, banned: Tensor, dtype: torch.dtype
) -> Tensor:
    """log pi(token) [N] in nats of tokens [N] after hidden states [N, H], with the unembedding [V, H] in `dtype`.

    banned: ids that the distribution leaves out. Differentiable, once, in `hidden` and `weight`.
    """
    return _LogProbs.apply(hidden, weight, tokens, temperature, banned, dtype)


class _LogProbs(torch.autograd.Function):
    """z = h Wᵀ / temperature; logp = z[token] - logsumexp z; d logp / d z = onehot(token) - softmax z."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float, banned: Tensor, dtype: Any
    ):
        ctx.temperature, ctx.dtype = temperature, dtype
        low, out = lowered(weight, dtype), _outside(banned, len(weight))
        logp = torch.empty(len(hidden), device=hidden.device)
        total = torch.empty_like(logp)
        for part in _parts(len(hidden)):
            z = _logits(hidden[part].to(dtype), low, temperature, out)
            chosen = z.gather(-1, tokens[part, None])[:, 0]
            top = z.amax(-1, keepdim=True)  # log-sum-exp in place: torch's own takes another tensor of this size
            total[part] = z.sub_(top).exp_().sum(-1).log_().add_(top[:, 0])
            logp[part] = chosen - total[part]
            del z  # before the next one is made
        ctx.save_for_backward(hidden, weight, tokens, total, banned)
        return logp

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        hidden, weight, tokens, total, banned = ctx.saved_tensors
        low, out = lowered(weight, ctx.dtype), _outside(banned, len(weight))
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        of_weight = torch.zeros(low.shape, device=low.device) if ctx.needs_input_grad[1] else None
        for part in _parts(len(hidden)):
            states = hidden[part].to(ctx.dtype)
            z = _logits(states, low, ctx.temperature, out)
            z.sub_(total[part, None]).exp_().neg_()
            z.scatter_add_(-1, tokens[part, None], torch.ones_like(total[part, None]))
            z.mul_(gradient[part, None].float() / ctx.temperature)
            of_logits = z.to(ctx.dtype)
            if of_hidden is not None:
                of_hidden[part] = product(of_logits, low).to(hidden.dtype)
            if of_weight is not None:
                of_weight += product(of_logits.t(), states)
            del z, of_logits
        of_weight = None if of_weight is None else of_weight[: len(weight)].to(weight.dtype)
        return of_hidden, of_weight, None, None, None, None


def _logits(states: Tensor, low: Tensor, temperature: float, out: Tensor) -> Tensor:
    z = product(states, low.t())
    if temperature != 1.0:
        z.div_(temperature)
    return z.index_fill_(-1, out, float("-inf"))


def _outside(banned: Tensor, rows: int) -> Tensor:
    """The banned ids and the rows that `lowered` has added."""
    added = torch.arange(rows, -(-rows // MULTIPLE) * MULTIPLE, device=banned.device)
    return torch.cat([banned, added])


def _parts(count: int) -> list[slice]:
    return [slice(start, start + CHUNK) for start in range(0, count, CHUNK)]
