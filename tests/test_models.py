"""Tokenizers, policies and scalar heads: what plain transformers computes, whatever the padding."""

import math
import shutil

import pytest
import torch
from conftest import byte_level, configuration, random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BloomConfig,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.activations import GELUTanh, NewGELUActivation

from rlhf.data.encode import pad
from rlhf.models import (
    PAD_TOKEN,
    PLAIN_UNEMBEDDING,
    ModelError,
    add_reward_bias,
    banned_ids,
    context_length,
    fit_vocabulary,
    load_policy,
    load_scalar_model,
    load_tokenizer,
    logits_at,
    scalar_scores,
    values_at,
)

EXACT = {"rtol": 0, "atol": 1e-5}
NAMES = ["gpt2", "opt", "opt-350m"]
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "max_position_embeddings": 64}
OTHERS = {
    "llama": LlamaConfig(**SMALL, intermediate_size=48, num_key_value_heads=2),
    "mistral": MistralConfig(**SMALL, intermediate_size=48, num_key_value_heads=2),
    "qwen2": Qwen2Config(**SMALL, intermediate_size=48, num_key_value_heads=2),
    "qwen3": Qwen3Config(**SMALL, intermediate_size=48, num_key_value_heads=2, head_dim=8),
    "phi": PhiConfig(**SMALL, intermediate_size=48),
    "gpt_neox": GPTNeoXConfig(**SMALL, intermediate_size=48),
    "gpt_neo": GPTNeoConfig(
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=64,
    ),
    "gptj": GPTJConfig(n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64),
    "bloom": BloomConfig(hidden_size=32, n_layer=2, n_head=4),
}


def new_model(kind, name, rows=260):
    """A random model of any architecture, PAD's id 1."""
    config = OTHERS[name] if name in OTHERS else configuration(name, rows)
    config.vocab_size, config.pad_token_id, config.num_labels = rows, 1, 1
    return random_model(kind, config, scale=0.05)


def sequences(lengths=(5, 1, 9, 3), seed=0):
    """Rows of random ids from 10 up: none is a special token."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(10, 250, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(scope="module")
def rewards(tmp_path_factory, checkpoints):
    """Folders of reward models with a new head, by name."""
    folders = {}
    for name in NAMES:
        own = load_tokenizer(checkpoints[name])
        torch.manual_seed(0)
        folders[name] = tmp_path_factory.mktemp(f"{name}-rm")
        load_scalar_model(checkpoints[name], own, new_head=True).save_pretrained(folders[name])
        own.save_pretrained(folders[name])
    return folders


def loaded(folder, **options):
    own = load_tokenizer(folder)
    return load_scalar_model(folder, own, **options).eval(), own


# ----------------------------------------------------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize("roles", [{}, {"pad_token": "<|endoftext|>"}], ids=["no PAD", "PAD = EOS"])
def test_pad_is_a_token_of_its_own(tmp_path, roles):
    byte_level(eos_token="<|endoftext|>", **roles).save_pretrained(tmp_path)
    before = len(AutoTokenizer.from_pretrained(tmp_path))
    own = load_tokenizer(tmp_path)
    assert (own.pad_token, own.pad_token_id, len(own)) == (PAD_TOKEN, before, before + 1)
    assert own.pad_token_id != own.eos_token_id
    own.save_pretrained(tmp_path / "again")
    assert len(load_tokenizer(tmp_path / "again")) == before + 1


def test_a_pad_that_is_there_stays(checkpoints):
    own = load_tokenizer(checkpoints["opt"])
    assert (own.pad_token, own.pad_token_id) == ("<pad>", 1)


def test_wordpiece_ends_with_sep(bert_tokenizer):
    own = load_tokenizer(bert_tokenizer)
    assert own.eos_token_id == own.sep_token_id == 3 and own.pad_token_id == 0


def test_a_tokenizer_without_an_end_is_refused_in_one_line(tmp_path):
    byte_level(pad_token="<|endoftext|>").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="neither EOS nor SEP") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "load", [load_tokenizer, lambda path: load_policy(path, None), lambda path: load_scalar_model(path, None)]
)
def test_what_cannot_be_loaded_is_named_in_one_line(tmp_path, load):
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ModelError) as error:
            load(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_damaged_weights_are_named_in_one_line(tmp_path, checkpoints, tokenizer):
    AutoConfig.from_pretrained(checkpoints["gpt2"]).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelError, match="cannot load") as error:
        load_policy(tmp_path, tokenizer)
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------------------------------- vocabulary


@pytest.mark.parametrize("name", [*NAMES, "llama"])
def test_embeddings_grow_by_rows_of_the_mean(name):
    own = byte_level(eos_token="<|endoftext|>")
    model = new_model(AutoModelForCausalLM, name, len(own))
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    before = [table.weight.detach().clone() for table in tables]
    own.add_special_tokens({"pad_token": PAD_TOKEN, "extra_special_tokens": ["<a>", "<b>"]})
    fit_vocabulary(model, own)
    for table, old in zip([model.get_input_embeddings(), model.get_output_embeddings()], before):
        assert_close(table.weight[: len(old)], old, rtol=0, atol=0)
        assert_close(table.weight[len(old) :], old.mean(dim=0).expand(3, -1), rtol=0, atol=1e-6)
    assert model.config.vocab_size == len(own)
    assert model.config.pad_token_id == model.generation_config.pad_token_id == own.pad_token_id
    assert model.config.eos_token_id == model.generation_config.eos_token_id == own.eos_token_id


def test_surplus_rows_are_kept_and_banned(checkpoints):
    own = load_tokenizer(checkpoints["opt"])
    model = load_policy(checkpoints["opt"], own)
    rows = model.get_input_embeddings().weight.shape[0]
    assert rows == len(own) + 7
    assert banned_ids(model, own).tolist() == [own.pad_token_id, *range(len(own), rows)]


def test_ids_with_holes_keep_their_rows():
    """Some tokenizers skip ids, so that the largest id is not below their length."""
    own = byte_level(["<|endoftext|>", PAD_TOKEN], eos_token="<|endoftext|>", pad_token=PAD_TOKEN)
    vocabulary = own.get_vocab()
    last = len(own)
    own.get_vocab = lambda: {**{t: i for t, i in vocabulary.items() if i not in (7, 8)}, "<far>": last + 3}
    model = new_model(AutoModelForCausalLM, "gpt2", last)
    fit_vocabulary(model, own)
    assert model.get_input_embeddings().weight.shape[0] == last + 4
    assert banned_ids(model, own).tolist() == [1, 7, 8, last, last + 1, last + 2]


def test_gpt2_bans_pad_alone(checkpoints, tokenizer):
    assert banned_ids(load_policy(checkpoints["gpt2"], tokenizer), tokenizer).tolist() == [tokenizer.pad_token_id]


def test_gpt2_s_activation_is_one_kernel_and_the_config_keeps_its_name(checkpoints, tokenizer):
    model = load_policy(checkpoints["gpt2"], tokenizer).eval()
    assert model.config.activation_function == "gelu_new"
    assert {type(block.mlp.act) for block in model.transformer.h} == {GELUTanh}
    plain = AutoModelForCausalLM.from_pretrained(checkpoints["gpt2"]).eval()
    assert {type(block.mlp.act) for block in plain.transformer.h} == {NewGELUActivation}
    ids = torch.arange(3, 40)[None]
    rows = plain.config.vocab_size
    assert_close(model(input_ids=ids).logits[..., :rows], plain(input_ids=ids).logits, rtol=0, atol=1e-5)


def test_dropout_is_what_is_asked_for(checkpoints, tokenizer, opt_tokenizer):
    assert load_policy(checkpoints["gpt2"], tokenizer, resid_pdrop=0.25).transformer.h[0].mlp.dropout.p == 0.25
    assert load_policy(checkpoints["opt"], opt_tokenizer, resid_pdrop=0.25).model.decoder.layers[0].dropout == 0.25
    assert load_policy(checkpoints["gpt2"], tokenizer).transformer.h[0].mlp.dropout.p == 0.1


def test_gpt_neox_has_its_residual_dropout_too(tmp_path, tokenizer):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    AutoModelForCausalLM.from_config(GPTNeoXConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path)
    layer = load_policy(tmp_path, tokenizer, resid_pdrop=0.25).gpt_neox.layers[0]
    assert (layer.post_attention_dropout.p, layer.post_mlp_dropout.p) == (0.25, 0.25)


@pytest.mark.parametrize("name", NAMES)
def test_rewards_have_no_dropout_even_in_training_mode(name, rewards):
    model, own = loaded(rewards[name])
    ids, mask = pad(sequences(), own.pad_token_id)
    with torch.no_grad():
        quiet, training = scalar_scores(model.eval(), ids, mask), scalar_scores(model.train(), ids, mask)
    assert_close(training, quiet, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_context_length(name, checkpoints, opt_tokenizer):
    assert context_length(AutoModelForCausalLM.from_pretrained(checkpoints[name])) == 64


# ---------------------------------------------------------------------------------------------------------------- scalar heads


def test_a_new_head_is_normal_with_variance_one_over_d_plus_one(tmp_path, tokenizer):
    """At a width of 4, 1/sqrt(d) would be 12 % too large; the sample's deviation from 600 draws is 1/sqrt(1200) = 2.9 %."""
    config = configuration("gpt2", len(tokenizer))
    config.n_embd, config.n_layer, config.n_head = 4, 1, 1
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    torch.manual_seed(0)
    heads = [load_scalar_model(tmp_path, tokenizer, new_head=True).score.weight[0] for _ in range(150)]
    draws = torch.stack(heads).detach().flatten() * math.sqrt(4 + 1)
    assert draws.std().item() == pytest.approx(1, abs=2 / math.sqrt(1200))
    assert draws.mean().item() == pytest.approx(0, abs=3 / math.sqrt(600))
    assert (draws.abs() < 0.6745).float().mean().item() == pytest.approx(0.5, abs=3 * 0.5 / math.sqrt(600))  # quartiles


def test_the_head_of_opt_350m_is_as_wide_as_what_it_reads(rewards):
    model, _ = loaded(rewards["opt-350m"])
    assert model.score.weight.shape == (1, 16) and model.config.hidden_size == 32


def test_a_new_head_replaces_the_checkpoint_s(rewards):
    torch.manual_seed(1)
    assert not torch.equal(
        loaded(rewards["gpt2"])[0].score.weight, loaded(rewards["gpt2"], new_head=True)[0].score.weight
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_without_a_head_is_refused_in_one_line(name, checkpoints):
    with pytest.raises(ModelError, match="has no scalar head") as error:
        load_scalar_model(checkpoints[name], load_tokenizer(checkpoints[name]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("load", [load_policy, load_scalar_model])
def test_weights_that_a_checkpoint_lacks_are_not_drawn_at_random(tmp_path, checkpoints, rewards, load):
    shutil.copytree((checkpoints if load is load_policy else rewards)["gpt2"], tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    gone = sorted(name for name in weights if "h.0.mlp.c_fc" in name)
    save_file(
        {k: w for k, w in weights.items() if k not in gone}, tmp_path / "model" / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(
        ModelError, match=rf"model lacks 2 weights of GPT2\w+ \(the first: {gone[0]}\); restore"
    ) as error:
        load(tmp_path / "model", load_tokenizer(checkpoints["gpt2"]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_reward_model_is_no_policy(name, rewards):
    with pytest.raises(ModelError, match=r"is a reward model, which answers with a number .* or a policy$"):
        load_policy(rewards[name], load_tokenizer(rewards[name]))


def test_a_classifier_of_two_labels_is_refused_in_one_line(tmp_path, checkpoints, tokenizer):
    config = AutoConfig.from_pretrained(checkpoints["gpt2"], num_labels=2, pad_token_id=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="cannot load") as error:
        load_scalar_model(tmp_path, tokenizer)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_rewards_are_those_of_plain_transformers(name, rewards):
    model, own = loaded(rewards[name])
    plain = AutoModelForSequenceClassification.from_pretrained(rewards[name]).eval()
    ids, mask = pad(sequences(), own.pad_token_id)
    scores = scalar_scores(model, ids, mask)
    assert scores.std() > 0.01
    assert_close(scores, plain(input_ids=ids, attention_mask=mask.long()).logits[:, 0], **EXACT)


@pytest.mark.parametrize("name", [*NAMES, *OTHERS])
@torch.no_grad()
def test_padding_changes_no_reward(name):
    model = new_model(AutoModelForSequenceClassification, name)
    rows = sequences()
    alone = torch.cat(
        [scalar_scores(model, torch.tensor([row]), torch.ones(1, len(row), dtype=torch.bool)) for row in rows]
    )
    ids, mask = pad(rows, 1)
    wide, wide_mask = pad([*rows, [9] * 40], 1)
    assert_close(scalar_scores(model, ids, mask), alone, **EXACT)
    assert_close(scalar_scores(model, wide, wide_mask)[:-1], alone, **EXACT)
    # What stands in padding is not looked at, be it PAD or not.
    assert_close(scalar_scores(model, ids.masked_fill(~mask, 77), mask), alone, **EXACT)


@torch.no_grad()
def test_the_reward_is_read_at_the_last_real_token_even_if_it_is_pad_or_eos(rewards):
    model, own = loaded(rewards["gpt2"])
    for last in (own.pad_token_id, own.eos_token_id):
        ids = torch.tensor([[20, 21, last, own.pad_token_id]])
        expected = model.score(model.transformer(ids[:, :3]).last_hidden_state[:, -1])[:, 0]
        assert_close(scalar_scores(model, ids, torch.tensor([[True, True, True, False]])), expected, **EXACT)


# ------------------------------------------------------------------------------------------------------------------ reward bias


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_reward_bias_is_exact_and_survives_plain_transformers(name, rewards, tmp_path):
    model, own = loaded(rewards[name])
    ids, mask = pad(sequences(), own.pad_token_id)
    before = scalar_scores(model, ids, mask)
    assert add_reward_bias(model, -3.25) == "the last norm's bias"
    assert_close(scalar_scores(model, ids, mask), before - 3.25, **EXACT)
    model.save_pretrained(tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert_close(plain(input_ids=ids, attention_mask=mask.long()).logits[:, 0], before - 3.25, **EXACT)
    assert not hasattr(plain.config, "reward_bias")


@settings(max_examples=10, deadline=None)
@given(first=st.floats(-20, 20), second=st.floats(-20, 20))
@torch.no_grad()
def test_biases_add_up(first, second, rewards):
    model, own = loaded(rewards["opt-350m"])
    ids, mask = pad(sequences(), own.pad_token_id)
    before = scalar_scores(model, ids, mask)
    add_reward_bias(model, first)
    add_reward_bias(model, second)
    assert_close(scalar_scores(model, ids, mask), before + first + second, rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_every_architecture_has_a_place_for_the_bias(name, tmp_path):
    model = new_model(AutoModelForSequenceClassification, name)
    ids, mask = pad(sequences(), 1)
    before = scalar_scores(model, ids, mask)
    place = add_reward_bias(model, 1.5)
    add_reward_bias(model, 1.0)
    assert_close(scalar_scores(model, ids, mask), before + 2.5, **EXACT)
    in_config = name in ("llama", "mistral", "qwen2", "qwen3")  # RMSNorm has no bias
    assert place == ("config.reward_bias" if in_config else "the last norm's bias")
    model.save_pretrained(tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert_close(scalar_scores(plain, ids, mask), before + 2.5, **EXACT)
    assert plain.config.to_dict().get("reward_bias") == (2.5 if in_config else None)


@torch.no_grad()
def test_opt_without_a_final_norm_keeps_its_bias_in_the_config():
    """The last layer's own norm comes before its feed-forward there: a shift of it is no shift of the reward."""
    config = configuration("opt", 260)
    config._remove_final_layer_norm, config.num_labels = True, 1
    model = random_model(AutoModelForSequenceClassification, config)
    ids, mask = pad(sequences(), 1)
    before = scalar_scores(model, ids, mask)
    assert add_reward_bias(model, 1.5) == "config.reward_bias"
    assert_close(scalar_scores(model, ids, mask), before + 1.5, **EXACT)


@torch.no_grad()
def test_a_head_of_zeros_takes_a_bias(rewards):
    model, own = loaded(rewards["gpt2"])
    model.score.weight.zero_()
    add_reward_bias(model, 2.0)
    ids, mask = pad(sequences(), own.pad_token_id)
    assert_close(scalar_scores(model, ids, mask), torch.full((4,), 2.0), **EXACT)


# ------------------------------------------------------------------------------------------------------- logits, values, padding


def test_each_plain_unembedding_is_tested():
    assert {*OTHERS, "gpt2", "opt"} == PLAIN_UNEMBEDDING


@pytest.mark.parametrize("name", [*NAMES, *OTHERS])
@torch.no_grad()
def test_logits_at_positions_are_the_full_forward_s(name):
    model = new_model(AutoModelForCausalLM, name)
    ids, mask = pad(sequences(), 1)
    where = mask & (torch.arange(ids.shape[1]) % 2 == 0)
    expected = model(input_ids=ids, attention_mask=mask.long()).logits[where]
    assert expected.shape[0] == where.sum() and expected.std() > 0.01
    assert_close(logits_at(model, ids, mask, where), expected, **EXACT)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_values_at_positions_are_the_head_s_over_all_states(name, rewards):
    model, own = loaded(rewards[name])
    ids, mask = pad(sequences(), own.pad_token_id)
    backbone = getattr(model, model.base_model_prefix)
    states = backbone(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    assert_close(values_at(model, ids, mask, mask), model.score(states)[..., 0][mask], **EXACT)


def test_other_unembeddings_go_through_the_model_s_own_forward(checkpoints, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(checkpoints["gpt2"]).eval()
    ids, mask = pad(sequences(), 1)
    with torch.no_grad():
        expected = logits_at(model, ids, mask, mask)
        monkeypatch.setattr(model.config, "model_type", "another")
        assert_close(logits_at(model, ids, mask, mask), expected, **EXACT)


@pytest.mark.parametrize("name", [*NAMES, *OTHERS])
@torch.no_grad()
def test_log_probabilities_of_padded_rows_are_those_of_each_row_alone(name):
    model = new_model(AutoModelForCausalLM, name)
    rows = sequences()
    ids, mask = pad(rows, 1)
    together = logits_at(model, ids, mask, mask).log_softmax(-1)
    alone = torch.cat([model(torch.tensor([row])).logits[0] for row in rows]).log_softmax(-1)
    assert_close(together, alone, **EXACT)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_left_padding_is_exact_with_positions_as_the_rollout_passes_them(name, checkpoints):
    model = AutoModelForCausalLM.from_pretrained(checkpoints[name]).eval()
    rows = sequences()
    ids, mask = pad(rows, 1, side="left")
    position = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    together = model(ids, attention_mask=mask.long(), position_ids=position).logits[mask]
    alone = torch.cat([model(torch.tensor([row])).logits[0] for row in rows])
    assert_close(together, alone, **EXACT)
