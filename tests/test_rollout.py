"""Rollouts: aligned, sampled from the right distribution, and the same however the work is cut."""

import contextlib
import dataclasses
import io
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import configuration, random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.data.encode import encode_prompts, pad
from rlhf.models import banned_ids, load_policy, load_tokenizer
from rlhf.objectives import clipped_policy_loss, pretraining_loss
from rlhf.rewards import Reward, model_reward
from rlhf.rollout import (
    Actors,
    Prompts,
    Rollout,
    batches,
    collect,
    evaluate_responses,
    gather,
    generate,
    interleave,
    join,
    response_logp,
    rows_of,
    sample,
    sample_responses,
    uniforms,
    unscored,
)

EXACT = {"rtol": 0, "atol": 1e-5}
NAMES = ["gpt2", "opt", "opt-350m"]
PROMPTS = ["hello", "a", "the river runs", "hey ho"]
LIMIT = 24
NONE = torch.tensor([], dtype=torch.long)
T, F = True, False


@dataclasses.dataclass
class Setup:
    policy: object
    tokenizer: object
    prompts: list
    banned: torch.Tensor


@pytest.fixture(scope="module", params=NAMES)
def setup(request, checkpoints):
    """A policy that hardly ever ends an answer, its tokenizer, and prompts of unequal length."""
    own = load_tokenizer(checkpoints[request.param])
    policy = load_policy(checkpoints[request.param], own).eval()
    prompts = encode_prompts(own, PROMPTS)
    assert len({len(p) for p in prompts}) == 4
    return Setup(policy, own, prompts, banned_ids(policy, own))


def run(setup, prompts=None, draws=None, temperature=1.0, limit=LIMIT):
    prompts = setup.prompts if prompts is None else prompts
    draws = torch.stack([uniforms(0, 0, i, limit) for i in range(len(prompts))]) if draws is None else draws
    return generate(
        setup.policy,
        prompts,
        draws,
        temperature=temperature,
        eos_token_id=setup.tokenizer.eos_token_id,
        pad_token_id=setup.tokenizer.pad_token_id,
        banned=setup.banned,
    )


def ending_often(setup, bonus):
    """Adds a constant to EOS's logit."""

    def raise_eos(module, inputs, output):
        output = output.clone()
        output[..., setup.tokenizer.eos_token_id] += bonus
        return output

    return setup.policy.get_output_embeddings().register_forward_hook(raise_eos)


@pytest.fixture
def mortal(setup):
    """The setup while EOS is frequent, so that answers end at different lengths, and some are cut."""
    hook = ending_often(setup, 3.0)
    yield setup
    hook.remove()


def rollout(**changes):
    """Two episodes: a prompt of 2 and a response of 3, a prompt of 1 and a response of 1."""
    values = {
        "prompts": torch.tensor([[5, 6], [0, 7]]),
        "prompt_mask": torch.tensor([[T, T], [F, T]]),
        "responses": torch.tensor([[8, 9, 2], [3, 0, 0]]),
        "mask": torch.tensor([[T, T, T], [T, F, F]]),
        "ended": torch.tensor([T, F]),
        "logp": torch.tensor([[-1.0, -2.0, -3.0], [-4.0, 0.0, 0.0]]),
        "logp_ref": torch.tensor([[-1.5, -1.0, -3.0], [-5.0, 0.0, 0.0]]),
        "values": torch.zeros(2, 3),
        "scores": torch.tensor([1.0, 2.0]),
    }
    return Rollout(**values | changes)


# -------------------------------------------------------------------------------------------------------------- the dataclass


def test_a_rollout_is_frozen_and_knows_its_sizes():
    whole = rollout()
    assert len(whole) == 2 and whole.lengths.tolist() == [5, 2]
    with pytest.raises(dataclasses.FrozenInstanceError):
        whole.scores = torch.zeros(2)


def test_kl_by_hand():  # row 0: 0.5 - 1 + 0, row 1: 1
    assert rollout().kl.tolist() == [-0.5, 1.0]


@pytest.mark.parametrize(
    "name, value, complaint",
    [
        ("mask", [[T, F, T], [T, F, F]], "non-empty prefix"),
        ("mask", [[F, T, T], [T, F, F]], "non-empty prefix"),
        ("mask", [[T, T, T], [F, F, F]], "non-empty prefix"),
        ("prompt_mask", [[T, T], [T, F]], "non-empty suffix"),
        ("prompt_mask", [[T, T], [F, F]], "non-empty suffix"),
        ("logp", [[-1.0, -2.0], [-4.0, 0.0]], "logp: shape"),
        ("values", [[0.0, 0.0, 0.0]], "values: shape"),
        ("responses", [[8, 9], [3, 0]], "responses: shape"),
        ("prompts", [[5], [7]], "prompt"),
        ("ended", [T], "ended: shape"),
        ("scores", [1.0], "scores: shape"),
        ("logp", [[-1.0, float("nan"), -3.0], [-4.0, 0.0, 0.0]], "logp: not finite"),
        ("logp_ref", [[-1.0, -1.0, -3.0], [float("-inf"), 0.0, 0.0]], "logp_ref: not finite"),
        ("values", [[0.0, 0.0, float("inf")], [0.0, 0.0, 0.0]], "values: not finite"),
        ("scores", [float("nan"), 0.0], "scores: not finite"),
    ],
)
def test_what_is_no_rollout_is_refused(name, value, complaint):
    with pytest.raises(ValueError, match=complaint):
        rollout(**{name: torch.tensor(value)})


@pytest.mark.parametrize("name", ["logp", "logp_ref", "values"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_stands_in_padding_is_not_looked_at(name, value):
    changed = getattr(rollout(), name).clone()
    changed[1, 1:] = value
    assert torch.equal(rollout(**{name: changed}).kl, rollout().kl)


# ------------------------------------------------------------------------------------------------------------------ alignment


def test_rows_by_hand():
    rows = rows_of(rollout(), torch.tensor([0, 1]), pad_token_id=4)
    assert rows.ids.tolist() == [[5, 6, 8, 9, 2], [7, 3, 4, 4, 4]]
    assert rows.attention.tolist() == [[T] * 5, [T, T, F, F, F]]
    assert rows.where.tolist() == [[F, T, T, T, F], [T, F, F, F, F]]  # the state before each response token
    assert rows.tokens.tolist() == [8, 9, 2, 3]
    assert rows.fill(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [[1, 2, 3], [4, 0, 0]]


def test_rows_of_some_episodes_are_no_wider_than_these():
    rows = rows_of(rollout(), torch.tensor([1]), pad_token_id=4)
    assert rows.ids.tolist() == [[7, 3]] and rows.mask.tolist() == [[T, F, F]]
    assert rows.fill(torch.tensor([4.0])).tolist() == [[4, 0, 0]]


def test_fill_passes_gradients_to_real_tokens_only():
    flat = torch.arange(4.0, requires_grad=True)
    rows_of(rollout(), torch.tensor([1, 0]), 4).fill(flat).mul(torch.tensor([[1.0, 9, 9], [2, 3, 4]])).sum().backward()
    assert flat.grad.tolist() == [1, 2, 3, 4]


ids = st.integers(10, 99)
episodes = st.lists(
    st.tuples(st.lists(ids, min_size=1, max_size=5), st.lists(ids, min_size=1, max_size=5)), min_size=1, max_size=5
)


@settings(max_examples=60, deadline=None)
@given(episodes=episodes)
def test_rows_are_prompt_and_response_and_where_is_before_each_token(episodes):
    prompts, responses = zip(*episodes)
    rows = join(*pad(prompts, 0, side="left"), *pad(responses, 0), pad_token_id=1)
    assert [row[real].tolist() for row, real in zip(rows.ids, rows.attention)] == [p + r for p, r in episodes]
    assert rows.ids[~rows.attention].eq(1).all()
    following = rows.ids.roll(-1, dims=1)
    assert following[rows.where].tolist() == rows.tokens.tolist() == [t for r in responses for t in r]
    assert torch.equal(rows.fill(rows.tokens), pad(responses, 0)[0])


# ------------------------------------------------------------------------------------------------------------------- sampling


def frequencies(logits, temperature=1.0, count=20_000):
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens = sample(logits.expand(count, -1), uniform, temperature)
    return torch.bincount(tokens, minlength=len(logits)).double()


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_samples_follow_the_softmax_at_their_temperature(temperature):
    logits = torch.randn(12, generator=torch.Generator().manual_seed(1))
    expected = 20_000 * torch.softmax(logits.double() / temperature, -1)
    chi_square = ((frequencies(logits, temperature) - expected) ** 2 / expected).sum()
    assert chi_square < 31.3  # the 0.999 quantile for 11 degrees of freedom


def test_inversion_by_hand():  # probabilities 1/2, 1/4, 1/4: the edges of the intervals are 0, 1/2, 3/4
    logits = torch.tensor([2.0, 1.0, 1.0]).log().expand(5, -1)
    uniform = torch.tensor([0.0, 0.4999, 0.5001, 0.7499, 0.7501], dtype=torch.float64)
    assert sample(logits, uniform, 1.0).tolist() == [0, 0, 1, 1, 2]


def test_excluded_tokens_are_never_taken_not_even_at_the_edges():
    logits = torch.tensor([float("-inf"), 0.0, float("-inf"), 0.0, float("-inf"), float("-inf")])
    edges = torch.tensor([0.0, 0.5, 1 - 2**-53, torch.finfo(torch.float64).tiny], dtype=torch.float64)
    assert sample(logits.expand(4, -1), edges, 1.0).tolist() == [1, 3, 3, 1]
    assert frequencies(logits)[[0, 2, 4, 5]].sum() == 0


def test_temperature_zero_is_the_argmax():
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample(logits, torch.rand(50), 0), logits.argmax(-1))


def test_in_a_large_vocabulary_each_token_has_its_own_interval():
    """Uniform numbers just inside the edges: a sum rounded to float32 is off by more than a thousandth of an interval."""
    tokens = torch.arange(0, 50_257, 100)
    logits = torch.zeros(50_257).expand(len(tokens), -1)
    assert torch.equal(sample(logits, (tokens.double() + 0.0005) / 50_257, 1.0), tokens)
    assert torch.equal(sample(logits, (tokens.double() + 0.9995) / 50_257, 1.0), tokens)


def test_low_precision_logits_are_sampled_in_full_precision():
    logits = torch.randn(1, 1000, generator=torch.Generator().manual_seed(0)).bfloat16().expand(500, -1)
    uniform = uniforms(0, 0, 0, 500)
    assert torch.equal(sample(logits, uniform, 0.7), sample(logits.float(), uniform, 0.7))


def test_streams_are_uniform_reproducible_and_of_their_key():
    stream = uniforms(1, 2, 3, 4000)
    assert stream.dtype == torch.float64 and stream.min() >= 0 and stream.max() < 1
    assert stream.mean().item() == pytest.approx(0.5, abs=4 / (12 * 4000) ** 0.5)
    assert torch.equal(stream[:7], uniforms(1, 2, 3, 7))
    others = [uniforms(*key, 4000) for key in [(0, 2, 3), (1, 1, 3), (1, 2, 2), (1, 2, 4), (1, -1, 3)]]
    assert not torch.equal(uniforms(1, 2, 34, 9), uniforms(12, 3, 4, 9))
    assert max(abs(torch.corrcoef(torch.stack([stream, other]))[0, 1].item()) for other in others) < 4 / 4000**0.5


def test_batches_hold_each_index_once_and_like_lengths():
    lengths = [5, 1, 9, 1, 5, 2, 7]
    cut = list(batches(lengths, 3))
    assert cut == [[1, 3, 5], [0, 4, 6], [2]]
    assert list(batches([], 3)) == []


# ------------------------------------------------------------------------------------------------------------------- decoding


def test_greedy_answers_are_those_of_transformers(setup):
    answers, _ = run(setup, temperature=0)
    ids, mask = pad(setup.prompts, setup.tokenizer.pad_token_id, side="left")
    whole = setup.policy.generate(
        ids, attention_mask=mask.long(), do_sample=False, max_new_tokens=LIMIT, suppress_tokens=setup.banned.tolist()
    )
    assert (
        len({tuple(answer) for answer in answers}) > 1 and len(set(answers[2])) > 2
    )  # no stock answer that hides a shift
    for answer, row in zip(answers, whole[:, ids.shape[1] :].tolist()):
        assert row[: len(answer)] == answer
        assert set(row[len(answer) :]) <= {setup.tokenizer.pad_token_id}


def test_greedy_answers_that_end_are_those_of_transformers(mortal):
    answers, ended = run(mortal, temperature=0)
    ids, mask = pad(mortal.prompts, mortal.tokenizer.pad_token_id, side="left")
    whole = mortal.policy.generate(
        ids, attention_mask=mask.long(), do_sample=False, max_new_tokens=LIMIT, suppress_tokens=mortal.banned.tolist()
    )
    assert any(ended)
    for answer, row in zip(answers, whole[:, ids.shape[1] :].tolist()):
        assert row[: len(answer)] == answer and set(row[len(answer) :]) <= {mortal.tokenizer.pad_token_id}


def test_answers_do_not_depend_on_who_else_is_in_the_batch(mortal):
    """Sequences leave at different steps; each must go on as if it had been alone."""
    prompts = mortal.prompts * 4
    draws = torch.stack([uniforms(3, 0, i, LIMIT) for i in range(len(prompts))])
    together = run(mortal, prompts, draws)
    alone = [run(mortal, [prompt], draws[i : i + 1]) for i, prompt in enumerate(prompts)]
    assert len({len(answer) for answer in together[0]}) > 4 and len(set(together[1])) == 2
    assert together == ([answer for (answer,), _ in alone], [ended for _, (ended,) in alone])


def test_answers_do_not_depend_on_batch_size_order_or_processes(mortal):
    prompts = mortal.prompts * 4
    keys = [(0, 5, i) for i in range(len(prompts))]

    def answers(order, size):
        found = sample_responses(
            mortal.policy,
            [prompts[i] for i in order],
            [keys[i] for i in order],
            response_length=LIMIT,
            temperature=1.0,
            batch_size=size,
            tokenizer=mortal.tokenizer,
            banned=mortal.banned,
        )
        return {i: (answer, ended) for i, answer, ended in zip(order, *found)}

    whole = answers(range(16), 16)
    at_once = run(mortal, prompts, torch.stack([uniforms(*key, LIMIT) for key in keys]))
    assert whole == dict(enumerate(zip(*at_once)))
    assert answers(range(16), 3) == answers(range(15, -1, -1), 5) == whole
    assert answers(range(0, 16, 2), 4) | answers(range(1, 16, 2), 4) == whole  # two processes
    assert len({str(answer) for answer in whole.values()}) > 12  # the same prompt with another key has another answer


def test_banned_ids_are_never_sampled(setup):
    fond_of_pad = setup.policy.get_output_embeddings().register_forward_hook(
        lambda module, inputs, output: output.index_fill(-1, setup.banned, 50.0)
    )
    try:
        answers, _ = run(setup)
        greedy, _ = run(setup, temperature=0)
    finally:
        fond_of_pad.remove()
    assert not set(setup.banned.tolist()) & {token for answer in answers + greedy for token in answer}


def test_an_answer_ends_with_its_only_eos_or_at_the_limit(mortal):
    eos = mortal.tokenizer.eos_token_id
    answers, ended = run(mortal, mortal.prompts * 8)
    assert set(ended) == {True, False}
    for answer, stopped in zip(answers, ended):
        assert answer.count(eos) == stopped and (answer[-1] == eos) == stopped
        assert len(answer) == LIMIT or stopped


def test_an_eos_as_the_last_token_that_fits_has_ended(setup):
    hook = ending_often(setup, 1000.0)
    try:
        answers, ended = run(setup, limit=1)
    finally:
        hook.remove()
    assert answers == [[setup.tokenizer.eos_token_id]] * 4 and ended == [True] * 4


def test_an_eos_in_the_prompt_is_no_end(setup):
    eos = setup.tokenizer.eos_token_id
    answers, _ = run(setup, [[eos, 20, 21], [20, eos], [eos]])
    assert min(map(len, answers)) > 1


@torch.no_grad()
def test_decoding_with_the_cache_gives_the_log_probabilities_of_the_full_forward(mortal):
    """The distribution that each token was drawn from, recorded while decoding, is the one that the update sees."""
    seen = []
    keep = mortal.policy.register_forward_hook(lambda module, inputs, output: seen.append(output.logits[:, -1]))
    try:
        answers = [run(mortal, [prompt])[0][0] for prompt in mortal.prompts]
    finally:
        keep.remove()
    decoded = torch.cat(seen).index_fill(-1, mortal.banned, float("-inf")).log_softmax(-1)
    tokens = torch.tensor([token for answer in answers for token in answer])
    pad_id = mortal.tokenizer.pad_token_id
    rows = join(*pad(mortal.prompts, pad_id, side="left"), *pad(answers, pad_id), pad_id)
    full = response_logp(mortal.policy, rows, 1.0, mortal.banned)
    assert torch.equal(rows.tokens, tokens)
    assert_close(full, decoded.gather(-1, tokens[:, None])[:, 0], **EXACT)


# -------------------------------------------------------------------------------------------------------------------- collect


def scalar_model(setup, seed):
    config = configuration("gpt2", 270)
    config.num_labels, config.pad_token_id = 1, setup.tokenizer.pad_token_id
    return random_model(AutoModelForSequenceClassification, config, seed=seed)


@pytest.fixture(scope="module")
def reward(setup):
    return scalar_model(setup, seed=1)


@pytest.fixture(scope="module")
def actors(setup, reward):
    """The policy is its own reference."""
    return Actors(
        policy=setup.policy,
        reference=setup.policy,
        critic=scalar_model(setup, seed=2),
        rewards=[model_reward("rm", 1.0, reward, setup.tokenizer.pad_token_id, batch_size=3)],
        tokenizer=setup.tokenizer,
        banned=setup.banned,
        temperature=0.7,
        response_length=LIMIT,
        batch_size=3,
    )


@pytest.mark.parametrize(("terminal", "name"), [(True, "sampling"), (True, None), (False, "sampling")])
def test_a_bar_is_shown_where_it_is_named_and_there_is_a_terminal(setup, monkeypatch, terminal, name):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stream)
    how = {
        "response_length": 4,
        "temperature": 1.0,
        "batch_size": 3,
        "tokenizer": setup.tokenizer,
        "banned": setup.banned,
    }
    found = sample_responses(setup.policy, setup.prompts, KEYS, **how, shown_as=name)
    assert found == sample_responses(setup.policy, setup.prompts, KEYS, **how)
    shown = stream.getvalue()
    assert (shown != "") == (terminal and name is not None)
    assert not shown or ("sampling" in shown and "/4" in shown)


KEYS = [(0, 1, i) for i in range(4)]


def collected(actors, ids, keys=KEYS):
    return collect(actors, Prompts(ids, [actors.tokenizer.decode(row) for row in ids]), keys)


def test_a_rollout_is_of_its_prompts_in_order(actors, setup):
    hook = ending_often(setup, 3.0)
    try:
        found = collected(actors, setup.prompts)
    finally:
        hook.remove()
    answers, ended = [r[m].tolist() for r, m in zip(found.responses, found.mask)], found.ended.tolist()
    assert [p[m].tolist() for p, m in zip(found.prompts, found.prompt_mask)] == setup.prompts
    assert ended == [answer[-1] == setup.tokenizer.eos_token_id for answer in answers]
    assert len(set(map(len, answers))) > 1


@pytest.mark.parametrize(("limit", "batch_size"), [(3, 1), (LIMIT, 4)])
def test_each_model_is_gathered_once_a_rollout_and_one_at_a_time(actors, setup, limit, batch_size):
    """Weights that are spread over processes come together for a rollout, not for a token or a batch."""
    reference = load_policy(setup.policy.name_or_path, setup.tokenizer).eval()
    gathered, whole = [], []

    @contextlib.contextmanager
    def gather(model):
        assert not whole
        gathered.append(model)
        whole.append(model)
        yield
        whole.clear()

    counting = dataclasses.replace(
        actors, reference=reference, response_length=limit, batch_size=batch_size, whole=gather
    )
    collected(counting, setup.prompts)
    wanted = [actors.policy, actors.rewards[0].model, reference, actors.critic]
    assert [id(model) for model in gathered] == [id(model) for model in wanted]


def test_a_score_is_the_weighted_sum_of_rewards_and_those_that_watch_stay_out(actors, setup):
    """Functions see the texts, the response's without its EOS, and the data set's columns of the same prompt."""
    seen = []

    def length(episodes):
        seen.append(episodes)
        return torch.tensor([float(len(response)) for response in episodes.responses])

    two = dataclasses.replace(
        actors,
        rewards=[Reward("rm", 2.0, actors.rewards[0].score), Reward("n", -0.5, length), Reward("w", 0.0, length)],
    )
    prompts = Prompts(setup.prompts, PROMPTS, {"source": list("abcd")})
    hook = ending_often(setup, 3.0)
    try:
        found, plain = collect(two, prompts, KEYS), collect(actors, prompts, KEYS)
    finally:
        hook.remove()
    lengths = found.mask.sum(dim=1).float()
    assert_close(found.rewards, torch.stack([plain.scores, lengths, lengths], dim=1), **EXACT)
    assert_close(found.scores, 2 * plain.scores - 0.5 * lengths, **EXACT)
    responses = [setup.tokenizer.decode(r[m], skip_special_tokens=True) for r, m in zip(found.responses, found.mask)]
    assert (seen[0].prompt_texts, seen[0].columns, seen[0].completions) == (
        PROMPTS,
        {"source": list("abcd")},
        responses,
    )
    assert setup.tokenizer.eos_token not in "".join(responses)


def test_selected_prompts_keep_texts_and_columns_together():
    some = Prompts([[1], [2], [3]], ["a", "b", "c"], {"k": [4, 5, 6]}).select([2, 0])
    assert (some.ids, some.texts, some.columns, len(some)) == ([[3], [1]], ["c", "a"], {"k": [6, 4]}, 2)


@torch.no_grad()
def test_each_number_of_a_rollout_is_that_of_its_episode_alone(actors, setup, reward):
    found = collected(actors, setup.prompts)
    for i, prompt in enumerate(setup.prompts):
        answer = found.responses[i][found.mask[i]].tolist()
        row, n, last = torch.tensor([prompt + answer]), len(answer), len(prompt) - 1
        logits = setup.policy(row).logits[0, last:-1].index_fill(-1, setup.banned, float("-inf")) / 0.7
        assert_close(found.logp[i, :n], logits.log_softmax(-1)[range(n), answer], **EXACT)
        states = actors.critic.transformer(row).last_hidden_state[0]
        assert_close(found.values[i, :n], actors.critic.score(states[last:-1])[:, 0], **EXACT)  # before each token
        assert_close(found.scores[i], reward(row).logits[0, 0], **EXACT)


def test_a_policy_that_is_its_reference_has_no_kl_at_all(actors, setup):
    found = collected(actors, setup.prompts)
    assert torch.equal(found.logp, found.logp_ref) and found.kl.tolist() == [0.0] * 4
    assert found.logp[found.mask].lt(0).all()


def test_rollouts_in_parts_are_the_whole(actors, setup):
    """Two processes with prompts dealt in turn give the rollout of one."""
    prompts, keys = [*setup.prompts, setup.prompts[0]], [(0, 2, i) for i in range(5)]
    whole = collected(actors, prompts, keys)
    merged = interleave([collected(actors, prompts[rank::2], keys[rank::2]) for rank in range(2)])
    for name in ("prompt_mask", "mask", "ended"):
        assert torch.equal(getattr(merged, name), getattr(whole, name))
    assert torch.equal(merged.responses[merged.mask], whole.responses[whole.mask])
    for name in ("logp", "logp_ref", "values", "scores"):
        assert_close(getattr(merged, name), getattr(whole, name), **EXACT)


def test_no_prompts_give_an_empty_rollout(actors):
    assert len(collected(actors, [], [])) == 0


def widened(rollout, by):
    """More padding: ids of 0, and NaN where there are numbers."""
    changed = {}
    for spec in dataclasses.fields(Rollout):
        value = getattr(rollout, spec.name)
        if value.dim() == 2:
            places = (by, 0) if spec.name.startswith("prompt") else (0, by)
            filler = float("nan") if value.is_floating_point() else 0
            value = torch.nn.functional.pad(value, places, value=filler)
        changed[spec.name] = value
    return Rollout(**changed)


@torch.no_grad()
def test_log_probabilities_do_not_depend_on_pad_width(actors, setup):
    narrow = collected(actors, setup.prompts)
    wide, index, pad_id = widened(narrow, 7), torch.arange(4), setup.tokenizer.pad_token_id
    logp = [response_logp(setup.policy, rows_of(r, index, pad_id), 0.7, setup.banned) for r in (narrow, wide)]
    assert torch.equal(*logp)
    assert torch.equal(wide.kl, narrow.kl) and torch.equal(wide.lengths, narrow.lengths)


def test_losses_and_gradients_do_not_depend_on_pad_width(actors, setup):
    """The PPO loss over a rollout with NaN in wider padding is that over the narrow one, gradient and all."""
    narrow = collected(actors, setup.prompts)
    results = []
    for r in (narrow, widened(narrow, 7)):
        rows = rows_of(r, torch.arange(4), setup.tokenizer.pad_token_id)
        logp = rows.fill(response_logp(setup.policy, rows, 0.7, setup.banned))
        advantages = (r.values - 1).where(r.mask, float("nan"))
        loss = clipped_policy_loss(logp, r.logp, advantages, r.mask) + pretraining_loss(logp, r.mask)
        weight = setup.policy.get_input_embeddings().weight
        results.append((loss.detach(), *torch.autograd.grad(loss, weight)))
    assert results[0][0].isfinite() and results[0][1].isfinite().all() and results[0][1].abs().sum() > 0
    assert_close(results[1], results[0], rtol=1e-6, atol=1e-6)


def test_a_rollout_s_numbers_can_be_taken_again(actors, setup):
    """After an update of policy or critic, from the tokens alone."""
    found = collected(actors, setup.prompts)
    zeros = torch.zeros_like(found.logp)
    again = evaluate_responses(actors, dataclasses.replace(found, logp=zeros, logp_ref=zeros, values=zeros))
    for name in ("logp", "logp_ref", "values"):
        assert torch.equal(getattr(again, name), getattr(found, name)) and getattr(found, name).any()


# ----------------------------------------------------------------------------------------------------------------- processes


def numbered(indices, width):
    """A rollout of prompts with these numbers, padded to a width of its own."""
    prompts, prompt_mask = pad([[n] * (1 + n % width) for n in indices], 0, side="left")
    responses, mask = pad([[100 + n] * (1 + n % (width + 1)) for n in indices], 0)
    floats = mask * torch.tensor(indices)[:, None].float()
    scores = torch.tensor(indices).float()
    return Rollout(prompts, prompt_mask, responses, mask, scores > 2, floats, 2 * floats, 3 * floats, scores)


@pytest.mark.parametrize("count, processes", [(7, 3), (6, 2), (5, 4), (3, 1), (2, 3)])
def test_interleave_restores_the_order_of_prompts_dealt_in_turn(count, processes):
    parts = [numbered(list(range(rank, count, processes)), width=2 + rank) for rank in range(processes)]
    if any(len(part) == 0 for part in parts):
        parts = [part if len(part) else parts[0].__class__(*(v[:0] for v in vars(parts[0]).values())) for part in parts]
    merged = interleave(parts)
    assert merged.scores.tolist() == list(range(count))
    for n in range(count):
        rank = n % processes
        assert merged.prompts[n][merged.prompt_mask[n]].tolist() == [n] * (1 + n % (2 + rank))
        assert merged.responses[n][merged.mask[n]].tolist() == [100 + n] * (1 + n % (3 + rank))
        for k, name in enumerate(("logp", "logp_ref", "values"), start=1):
            assert getattr(merged, name)[n][merged.mask[n]].eq(k * n).all()


def test_one_process_gathers_nothing():
    whole = rollout()
    assert gather(whole, 1) is whole


def test_a_policy_without_position_ids_is_exact_too(tokenizer):
    """BLOOM's forward takes none: its positions come from the mask."""
    from transformers import BloomConfig

    config = BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=4, pad_token_id=1)
    policy = random_model(AutoModelForCausalLM, config)
    bloom = Setup(policy, tokenizer, encode_prompts(tokenizer, PROMPTS), banned_ids(policy, tokenizer))
    together = run(bloom)[0]
    assert together == [run(bloom, [p], uniforms(0, 0, i, LIMIT)[None])[0][0] for i, p in enumerate(bloom.prompts)]


def test_a_process_without_a_prompt_has_a_rollout_of_the_same_kinds():
    """What the processes have is put together: a float beside others' booleans would make them floats."""
    actors = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=1))
    none = unscored(actors, Prompts([], []), [], [])
    assert none.ended.dtype == none.mask.dtype == torch.bool and len(none) == 0
