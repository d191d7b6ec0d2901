"""Log-probabilities of models in low precision: those of float32 logits, in value and gradient, and never whole."""

import pytest
import torch
from torch.testing import assert_close

from rlhf import unembed
from rlhf.models import load_policy, load_scalar_model, load_tokenizer, logprobs_at, scalar_head
from rlhf.objectives import token_logprobs

BANNED = torch.tensor([0, 7])


def inputs(rows=11, width=6, vocabulary=13, scale=1.0):
    """Numbers that bfloat16 holds exactly, so that rounding is not what is compared."""
    generator = torch.Generator().manual_seed(0)
    hidden = (scale * torch.randn(rows, width, generator=generator)).bfloat16().float().requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).bfloat16().float().requires_grad_()
    tokens = torch.randint(8, vocabulary, (rows,), generator=generator)
    return hidden, weight, tokens


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [4, 64])
def test_values_and_gradients_are_those_of_whole_float32_logits(monkeypatch, temperature, chunk):
    monkeypatch.setattr(unembed, "CHUNK", chunk)
    hidden, weight, tokens = inputs()
    upstream = torch.linspace(-1, 1, len(tokens))
    found = unembed.logprobs(hidden, weight, tokens, temperature, BANNED, torch.bfloat16)
    logits = (hidden @ weight.t()).index_fill(-1, BANNED, float("-inf"))
    expected = token_logprobs(logits[None], tokens[None], temperature)[0]
    assert found.dtype == torch.float32
    assert_close(found, expected, rtol=0, atol=1e-5)
    ours = torch.autograd.grad(found @ upstream, (hidden, weight))
    theirs = torch.autograd.grad(expected @ upstream, (hidden, weight))
    for one, other in zip(ours, theirs):  # the gradient of the logits is rounded to 8 bits
        assert_close(one, other, rtol=0, atol=0.02 * float(other.abs().max()))
    assert ours[1][BANNED].abs().max() == 0


def test_large_logits_keep_their_digits():
    """GPT-2's logits are about -100, where bfloat16 has steps of 0.5."""
    hidden, weight, tokens = inputs(scale=40.0)
    found = unembed.logprobs(hidden, weight, tokens, 1.0, BANNED, torch.bfloat16)
    logits = (hidden @ weight.t()).index_fill(-1, BANNED, float("-inf"))
    assert logits[:, 1:7].abs().max() > 100
    exact = token_logprobs(logits[None], tokens[None])[0]
    rounded = token_logprobs(logits.bfloat16()[None], tokens[None])[0]
    assert (found - exact).abs().max() < 1e-3 < 0.05 < (rounded - exact).abs().max()


def test_a_frozen_unembedding_gets_no_gradient():
    hidden, weight, tokens = inputs()
    logp = unembed.logprobs(hidden, weight.detach(), tokens, 1.0, BANNED, torch.bfloat16)
    logp.sum().backward()
    assert hidden.grad.abs().sum() > 0 and weight.grad is None


def test_no_token_is_no_work():
    hidden, weight, tokens = inputs()
    assert unembed.logprobs(hidden[:0], weight, tokens[:0], 1.0, BANNED, torch.bfloat16).shape == (0,)


@pytest.mark.parametrize("name", ["gpt2", "opt", "opt-350m"])
def test_under_autocast_a_policy_takes_this_way_and_in_float32_the_other(checkpoints, name, monkeypatch):
    calls = []
    real = unembed._LogProbs.apply
    monkeypatch.setattr(unembed._LogProbs, "apply", lambda *args: calls.append(1) or real(*args))
    tokenizer = load_tokenizer(checkpoints[name])
    policy = load_policy(checkpoints[name], tokenizer).eval()
    ids = torch.randint(8, 200, (3, 9), generator=torch.Generator().manual_seed(0))
    where = torch.zeros(3, 9, dtype=torch.bool)
    where[:, 2:-1] = True
    given = (
        policy,
        ids,
        torch.ones_like(ids),
        where,
        ids[:, 3:].flatten(),
        0.8,
        torch.tensor([tokenizer.pad_token_id]),
    )
    full = logprobs_at(*given)
    assert not calls
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = logprobs_at(*given)
    assert len(calls) == 1 and low.dtype == torch.float32
    assert_close(low, full, rtol=0, atol=0.3)  # the layers below run in bfloat16
    assert (low - full).abs().mean() < 0.03
    (gradient,) = torch.autograd.grad(low.mean(), policy.get_input_embeddings().weight)
    (expected,) = torch.autograd.grad(full.mean(), policy.get_input_embeddings().weight)
    assert torch.nn.functional.cosine_similarity(gradient.flatten(), expected.flatten(), dim=0) > 0.99


def test_an_unembedding_that_is_no_plain_matrix_keeps_its_module():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert unembed.low_precision_of(torch.nn.Linear(4, 9, bias=False)) == torch.bfloat16
        assert unembed.low_precision_of(torch.nn.Linear(4, 9)) is None
        assert unembed.low_precision_of(torch.nn.Sequential()) is None
    assert unembed.low_precision_of(torch.nn.Linear(4, 9, bias=False)) is None
    assert unembed.low_precision_of(torch.nn.Linear(4, 9, bias=False).half()) == torch.float16


def test_scores_are_not_rounded_under_autocast(checkpoints):
    tokenizer = load_tokenizer(checkpoints["gpt2"])
    model = load_scalar_model(checkpoints["gpt2"], tokenizer, new_head=True)
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).mul(30)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = scalar_head(model, hidden)
    assert torch.equal(values, model.score(hidden)[:, 0])
    assert not torch.equal(values, values.bfloat16().float())
