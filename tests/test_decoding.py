"""Decoding as on a GPU, on the CPU: a cache of its final size gives the answers of one that grows."""

from types import SimpleNamespace

import pytest
import torch
from conftest import random_model
from test_rollout import (  # noqa: F401  (fixtures)
    LIMIT,
    NAMES,
    ending_often,
    mortal,
    setup,
)
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, BloomConfig, LlamaConfig, MistralConfig
from transformers.cache_utils import DynamicCache, DynamicLayer

from rlhf import rollout
from rlhf.data.encode import encode_prompts, pad
from rlhf.decoding import ROOM, Decoder, Growing, can_preallocate, growing_cache
from rlhf.models import banned_ids
from rlhf.rollout import generate, generate_in_place, uniforms


def both(setup, prompts, temperature=1.0, limit=LIMIT):  # noqa: F811
    draws = torch.stack([uniforms(3, 0, i, limit) for i in range(len(prompts))])
    ends = {"eos_token_id": setup.tokenizer.eos_token_id, "pad_token_id": setup.tokenizer.pad_token_id}
    given = {"temperature": temperature, "banned": setup.banned, **ends}
    return [decode(setup.policy, prompts, draws, **given) for decode in (generate, generate_in_place)]


def test_a_growing_layer_holds_what_transformers_own_does():
    """A prompt, single tokens until its room is used up twice, several that do not fit; rows leave and come twice."""
    generator = torch.Generator().manual_seed(0)
    layers, rows, buffers = (Growing(), DynamicLayer()), 3, {}
    for t, width in enumerate([5] + [1] * (3 * ROOM + 1) + [4, 1]):
        new = [torch.randn(rows, 2, width, 8, generator=generator) for _ in range(2)]
        for ours, theirs in zip(*(layer.update(*new) for layer in layers)):
            assert torch.equal(ours, theirs)
        assert layers[0].get_seq_length() == layers[1].get_seq_length()
        buffers[id(layers[0].buffers[0])] = layers[0].buffers[0]  # kept, so that no other gets its id
        chosen = {3: [2, 0, 0, 1], 20: [3, 1]}.get(t)
        if chosen:
            layers[0].select(torch.tensor(chosen))
            layers[1].batch_select_indices(torch.tensor(chosen))
            rows = len(chosen)
    # 5 + 16 columns, and the first choice's rows; when these are full 21 + 1 + 16, and the second's; 38 + 1 + 16; 54 + 4 + 16
    assert [buffer.shape[-2] for buffer in buffers.values()] == [21, 21, 38, 38, 55, 74]


def test_sequences_that_have_ended_leave_when_they_are_a_fifth_of_the_batch(mortal):  # noqa: F811
    prompts, seen = mortal.prompts * 5, []
    draws = torch.stack([uniforms(3, 0, i, LIMIT) for i in range(len(prompts))])
    hook = mortal.policy.register_forward_pre_hook(
        lambda *given: seen.append(len(given[2]["input_ids"])), with_kwargs=True
    )
    try:
        ends = {"eos_token_id": mortal.tokenizer.eos_token_id, "pad_token_id": mortal.tokenizer.pad_token_id}
        answers, _ = generate(mortal.policy, prompts, draws, temperature=1.0, banned=mortal.banned, **ends)
    finally:
        hook.remove()
    size, expected, stayed = len(prompts), [len(mortal.prompts)], False
    for t in range(1, max(map(len, answers))):
        going_on = sum(len(answer) > t for answer in answers)
        size = going_on if going_on <= 0.8 * size else size
        stayed |= going_on < size
        expected.append(size)
    assert seen == expected and stayed and len(set(seen[1:])) >= 3


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("every", [1, 4])
def test_answers_are_those_of_a_growing_cache(mortal, monkeypatch, temperature, every):  # noqa: F811
    """With sequences that end early, and with the batch cut each time half of it has ended."""
    monkeypatch.setattr(rollout, "CHECK_EVERY", every)
    kept = []
    real = Decoder.keep
    monkeypatch.setattr(Decoder, "keep", lambda self, rows: kept.append(len(rows)) or real(self, rows))
    growing, fixed = both(mortal, mortal.prompts * 10, temperature)
    assert growing == fixed
    if temperature:
        assert len({len(answer) for answer in fixed[0]}) > 4 and kept and kept == sorted(kept, reverse=True)


def test_a_prompt_that_is_there_several_times_is_read_once(mortal, monkeypatch):  # noqa: F811
    """Its answers are those that it has alone, whatever lies between."""
    prompts = [mortal.prompts[i] for i in (0, 1, 0, 2, 1, 0, 0, 3)]
    draws = torch.stack([uniforms(3, 0, i, LIMIT) for i in range(len(prompts))])
    ends = {"eos_token_id": mortal.tokenizer.eos_token_id, "pad_token_id": mortal.tokenizer.pad_token_id}
    given = {"temperature": 1.0, "banned": mortal.banned, **ends}
    alone = [generate(mortal.policy, [p], draws[i : i + 1], **given) for i, p in enumerate(prompts)]
    assert len({tuple(tokens) for (tokens,), _ in alone}) > 4  # its draws are its own
    read = []
    hook = mortal.policy.register_forward_pre_hook(
        lambda *given: read.append(given[2]["input_ids"].shape), with_kwargs=True
    )
    try:
        for decode in (generate, generate_in_place):
            answers, ended = decode(mortal.policy, prompts, draws, **given)
            assert list(zip(answers, ended)) == [(tokens, end) for (tokens,), (end,) in alone]
    finally:
        hook.remove()
    assert [shape[0] for shape in read if shape[1] > 1] == [4, 4]


def test_answers_that_are_cut_are_whole(setup):  # noqa: F811
    growing, fixed = both(setup, setup.prompts)
    assert growing == fixed and max(map(len, fixed[0])) == LIMIT and not all(fixed[1])


def test_an_answer_may_be_one_token_long(setup):  # noqa: F811
    hook = ending_often(setup, 1000.0)
    try:
        growing, fixed = both(setup, setup.prompts, limit=1)
        later, _ = both(setup, setup.prompts)
    finally:
        hook.remove()
    assert growing == fixed == ([[setup.tokenizer.eos_token_id]] * 4, [True] * 4) == later


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_logits_are_those_of_the_whole_row(setup, implementation):  # noqa: F811
    setup.policy.set_attn_implementation(implementation)
    try:
        ids, mask = pad(setup.prompts, setup.tokenizer.pad_token_id, side="left")
        assert can_preallocate(setup.policy) and not mask.all()
        more = torch.randint(10, 200, (len(ids), 6), generator=torch.Generator().manual_seed(0))
        decoder = Decoder(setup.policy, ids, mask, 7)
        found = [decoder.logits.clone(), *(decoder.step(token).clone() for token in more.T)]
        for i, prompt in enumerate(setup.prompts):
            row = torch.tensor([prompt + more[i].tolist()])
            expected = setup.policy(row).logits[0, len(prompt) - 1 :]
            assert_close(torch.stack([logits[i] for logits in found]), expected, rtol=0, atol=2e-5)
    finally:
        setup.policy.set_attn_implementation("sdpa")


@torch.no_grad()
def test_a_step_can_run_again_before_the_next(setup):  # noqa: F811
    """What recording a graph needs: the step's own column is written, and nothing else changes."""
    ids, mask = pad(setup.prompts, setup.tokenizer.pad_token_id, side="left")
    plain, repeated = (Decoder(setup.policy, ids, mask, 4) for _ in range(2))
    once = repeated._once
    repeated._once = lambda: [once() for _ in range(3)][-1]
    for token in torch.randint(10, 200, (3, len(ids)), generator=torch.Generator().manual_seed(0)):
        assert torch.equal(plain.step(token), repeated.step(token))


@torch.no_grad()
def test_under_autocast_logits_are_not_rounded(setup):  # noqa: F811
    ids, mask = pad(setup.prompts, setup.tokenizer.pad_token_id, side="left")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        decoder = Decoder(setup.policy, ids, mask, 2)
        logits = decoder.step(ids[:, -1])
    assert logits.dtype == torch.float32 and not torch.equal(logits, logits.bfloat16().float())
    exact = Decoder(setup.policy, ids, mask, 2).step(ids[:, -1])
    assert logits.shape == exact.shape and (logits - exact).abs().mean() < 0.05


def configured(kind, tokenizer, **changes):
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    sizes |= {"num_hidden_layers": 2, "max_position_embeddings": 64}
    return kind(vocab_size=len(tokenizer), pad_token_id=1, eos_token_id=0, bos_token_id=0, **sizes | changes)


def test_cudnn_s_attention_is_on_for_a_step_alone(setup):  # noqa: F811
    before, seen = torch.backends.cuda.cudnn_sdp_enabled(), []
    hook = setup.policy.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cuda.cudnn_sdp_enabled()))
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        decoder = Decoder(setup.policy, *pad(setup.prompts, 1, side="left"), 2)
        decoder.step(torch.full((len(setup.prompts),), 5))
        assert seen == [True, True] and not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        hook.remove()
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_rotary_positions_and_grouped_heads_too(tokenizer):
    from test_rollout import PROMPTS, Setup

    policy = random_model(AutoModelForCausalLM, configured(LlamaConfig, tokenizer), scale=0.1)
    llama = Setup(policy, tokenizer, encode_prompts(tokenizer, PROMPTS), banned_ids(policy, tokenizer))
    assert can_preallocate(policy)
    growing, fixed = both(llama, llama.prompts * 2)
    assert growing == fixed


def test_what_does_not_fit_keeps_the_growing_cache(tokenizer):
    sliding = random_model(AutoModelForCausalLM, configured(MistralConfig, tokenizer, sliding_window=8))
    assert not can_preallocate(sliding)
    kinds = {type(layer) for layer in growing_cache(sliding).layers}
    assert Growing not in kinds and kinds == {type(layer) for layer in DynamicCache(config=sliding.config).layers}
    bloom = BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=1, n_head=4, pad_token_id=1)
    assert not can_preallocate(random_model(AutoModelForCausalLM, bloom))
    sharded = random_model(AutoModelForCausalLM, configured(LlamaConfig, tokenizer))
    assert can_preallocate(sharded)
    weight = next(sharded.parameters())
    weight.ds_id = 0  # as DeepSpeed marks the weights that ZeRO 3 has taken apart
    for status, whole in (("NOT_AVAILABLE", False), ("INFLIGHT", False), ("AVAILABLE", True)):
        weight.ds_status = SimpleNamespace(name=status)
        assert can_preallocate(sharded) == whole


assert NAMES  # the fixtures above run for each of these
