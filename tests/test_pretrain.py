"""Stage 0: what is published, its tokenizer, and that it learns."""

import json
import math

import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from rlhf import pretrain
from rlhf.registry import Registry
from rlhf.training import TrainingError

STRANGE = "Tab\there, naïve café, 你好, 🪿🏽, \x00\x7f, trailing  spaces  \n\n and <|pad|"


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_publishes_a_base_that_plain_transformers_loads(tmp_path, architecture):
    artifact = pretrain.run(tiny.pretrain_args(tmp_path, architecture=architecture, embd_pdrop=0.2))
    assert artifact.ref == "tiny/base/v1"
    names = {"config.json", "model.safetensors", "tokenizer.json", "README.md", "stage.json", "metrics.jsonl"}
    assert names <= {path.name for path in artifact.path.iterdir()}
    Registry(tmp_path / "runs").verify(artifact)
    assert tiny.left_over(Registry(tmp_path / "runs"), "base") == []

    model, tokenizer = tiny.load_causal(artifact)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "User: Hi\n\n"
    config = AutoConfig.from_pretrained(artifact.path)
    assert config.model_type == architecture
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (32, 2, 4)
    assert config.max_position_embeddings == tiny.CONTEXT
    assert (config.resid_pdrop if architecture == "gpt2" else config.dropout) == 0.2
    assert config.vocab_size == len(tokenizer) == model.get_input_embeddings().weight.shape[0]
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    ids = tokenizer("the river", return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert ids.shape[1] < out.shape[1] <= ids.shape[1] + 4


def test_the_card_and_the_manifest_tell_where_it_comes_from(tmp_path):
    args = tiny.pretrain_args(tmp_path)
    artifact = pretrain.run(args)
    card = (artifact.path / "README.md").read_text()
    assert card.startswith("---\n") and "AutoModelForCausalLM" in card and "perplexity" in card
    (data,) = artifact.manifest["data"]
    assert (data["kind"], data["records"]) == ("text", 60) and data["sha256"] in card
    assert artifact.manifest["config"]["block_size"] == 16
    assert artifact.parents == () and artifact.manifest["base_model"] is None


def test_loss_falls_and_perplexity_is_that_of_held_out_blocks(tmp_path):
    artifact = pretrain.run(
        tiny.pretrain_args(tmp_path, max_steps=60, per_device_train_batch_size=16, learning_rate=3e-3)
    )
    losses = [line["loss"] for line in tiny.history(artifact) if "loss" in line]
    assert losses[0] > 5.5  # ln(300) = 5.7: nothing known yet
    assert losses[-1] < 0.7 * losses[0]

    # The last tenth of the stream, each block on its own, by plain transformers.
    model, tokenizer = tiny.load_causal(artifact)
    stream = [i for t in tiny.text() for i in [*tokenizer(t)["input_ids"], tokenizer.eos_token_id]]
    blocks = torch.tensor(stream[: len(stream) // 16 * 16]).view(-1, 16)
    held_out = blocks[len(blocks) - round(0.1 * len(blocks)) :]
    with torch.no_grad():
        logp = model(input_ids=held_out).logits[:, :-1].log_softmax(-1).gather(-1, held_out[:, 1:, None])
    metrics = artifact.manifest["metrics"]
    assert metrics["eval_loss"] == pytest.approx(-logp.mean().item(), abs=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]), rel=1e-6)
    assert metrics["train_tokens"] == 16 * (len(blocks) - len(held_out))
    assert metrics["parameters"] == model.num_parameters()


def test_one_seed_gives_one_model_and_another_gives_another(tmp_path):
    hashes = [
        pretrain.run(tiny.pretrain_args(tmp_path / str(i), seed=seed, embd_pdrop=0.1)).weights_sha256
        for i, seed in enumerate((7, 7, 8))
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_tokenizer_trained_on_the_text_roundtrips_any_text(tmp_path):
    tokenizer = pretrain.make_tokenizer(tiny.pretrain_args(tmp_path), tiny.text())
    assert len(tokenizer) == 300
    assert tokenizer.decode(tokenizer(STRANGE)["input_ids"]) == STRANGE
    assert len(tokenizer(" river river")["input_ids"]) < len(" river river") / 2  # it learned words of the text
    every_byte = "".join(map(chr, range(256)))
    assert tokenizer.decode(tokenizer(every_byte)["input_ids"]) == every_byte


def test_a_given_vocabulary_with_its_merges(tmp_path):
    made = pretrain.make_tokenizer(tiny.pretrain_args(tmp_path, vocab_size=280), tiny.text())
    vocab, merges = (tmp_path / name for name in ("vocab.json", "merges.txt"))
    model = json.loads(made.backend_tokenizer.to_str())["model"]
    tokens = [token for token in sorted(model["vocab"], key=model["vocab"].get) if token != "<|pad|>"]
    vocab.write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    merges.write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]))
    args = tiny.pretrain_args(tmp_path, tokenizer_vocab_file=str(vocab), tokenizer_merges_file=str(merges))
    artifact = pretrain.run(args)
    tokenizer = AutoTokenizer.from_pretrained(artifact.path)
    for text in (tiny.text(1)[0], STRANGE):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert tokenizer.convert_ids_to_tokens(ids) == made.convert_ids_to_tokens(made(text)["input_ids"])
    assert tokenizer.pad_token_id != tokenizer.eos_token_id == tokens.index("<|endoftext|>")


def test_a_given_tokenizer_folder(tmp_path):
    made = pretrain.make_tokenizer(tiny.pretrain_args(tmp_path, vocab_size=290), tiny.text())
    made.save_pretrained(tmp_path / "tokenizer")
    artifact = pretrain.run(tiny.pretrain_args(tmp_path, tokenizer_name=str(tmp_path / "tokenizer")))
    assert AutoTokenizer.from_pretrained(artifact.path).get_vocab() == made.get_vocab()
    assert AutoConfig.from_pretrained(artifact.path).vocab_size == 290


@pytest.mark.parametrize(
    "vocab, merges, words",
    [
        ("{}", None, r"no tokenizer file .*m\.txt"),
        ("not json", "#version: 0.2\n", r"cannot read a byte-level BPE from .*v\.json"),
        ('{"a": 0, "b": 1}', "#version: 0.2\na c\n", r"cannot read a byte-level BPE from .*v\.json"),
        ('{"a": 0, "b": 1}', "#version: 0.2\n", r"v\.json lacks 254 of the 256 bytes"),
        (
            json.dumps({c: 2 * i for i, c in enumerate(sorted(pretrain.pre_tokenizers.ByteLevel.alphabet()))}),
            "",
            "ids 0 to 255",
        ),
    ],
)
def test_tokenizer_files_that_cannot_be_used(tmp_path, vocab, merges, words):
    (tmp_path / "v.json").write_text(vocab)
    if merges is not None:
        (tmp_path / "m.txt").write_text(merges)
    files = {"tokenizer_vocab_file": str(tmp_path / "v.json"), "tokenizer_merges_file": str(tmp_path / "m.txt")}
    with pytest.raises(TrainingError, match=words):
        pretrain.run(tiny.pretrain_args(tmp_path, **files))
    assert not (tmp_path / "runs").exists()


def test_text_shorter_than_a_block(tmp_path):
    with pytest.raises(TrainingError, match=r"text\.jsonl: the text has \d+ tokens, fewer than one block of 16"):
        pretrain.run(tiny.pretrain_args(tmp_path, texts=["ox"]))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.9])
def test_a_single_block_is_trained_on_and_nothing_is_held_out(tmp_path, fraction):
    # 258: the bytes, EOS and PAD; without merges twenty letters and EOS are 21 tokens.
    args = tiny.pretrain_args(tmp_path, texts=["abcdefghij" * 2], vocab_size=258, eval_fraction=fraction)
    artifact = pretrain.run(args)
    assert artifact.manifest["metrics"]["train_tokens"] == 16
    assert "perplexity" not in artifact.manifest["metrics"]


def test_held_out_blocks_are_not_trained_on(tmp_path):
    args = tiny.pretrain_args(tmp_path, eval_fraction=0.25)
    tokenizer = pretrain.make_tokenizer(args, tiny.text())
    train, held_out = pretrain.token_blocks(args, tokenizer, tiny.text())
    everything = torch.stack([row["input_ids"] for row in [*train.rows, *held_out.rows]])
    stream = [i for t in tiny.text() for i in [*tokenizer(t)["input_ids"], tokenizer.eos_token_id]]
    assert everything.flatten().tolist() == stream[: len(stream) // 16 * 16]
    assert len(held_out) == round(0.25 * len(everything))


def test_packed_documents_are_learned_without_their_padding(tmp_path, monkeypatch):
    args = tiny.pretrain_args(tmp_path, eval_fraction=0.25, packing_strategy="bfd_split", max_steps=2)
    tokenizer = pretrain.make_tokenizer(args, tiny.text())
    train, held_out = pretrain.token_blocks(args, tokenizer, tiny.text())
    rows = [*train.rows, *held_out.rows]
    assert len(held_out) == round(0.25 * len(rows))
    for row in rows:
        padding = row["input_ids"] == tokenizer.pad_token_id
        assert (row["labels"][padding] == -100).all() and (row["labels"] == row["input_ids"])[~padding].all()
    assert any((row["labels"] == -100).any() for row in rows)
    real = [int((row["labels"] != -100).sum()) for row in rows]
    assert sum(real) == sum(len(tokenizer(t)["input_ids"]) + 1 for t in tiny.text())
    again, _ = pretrain.token_blocks(args, tokenizer, tiny.text())
    assert torch.equal(again.rows[0]["input_ids"], train.rows[0]["input_ids"])
    masks = []  # without one transformers warns of PAD, once a process
    monkeypatch.setattr(
        PreTrainedModel, "warn_if_padding_and_no_attention_mask", lambda self, ids, mask: masks.append(mask)
    )
    artifact = pretrain.run(args)
    assert masks and all(mask is not None and mask.all() for mask in masks)
    assert artifact.manifest["metrics"]["train_tokens"] == sum(real[: len(train)])
    model, tokenizer = tiny.load_causal(artifact)
    ids, labels = (torch.stack([row[name] for row in held_out.rows]) for name in ("input_ids", "labels"))
    with torch.no_grad():
        loss = model(input_ids=ids, labels=labels).loss
    assert artifact.manifest["metrics"]["eval_loss"] == pytest.approx(float(loss), rel=1e-4)


def test_opt_and_gpt2_are_made_at_the_size_asked_for(tmp_path):
    for architecture in ("gpt2", "opt"):
        args = tiny.pretrain_args(tmp_path, architecture=architecture, hidden_size=48, num_hidden_layers=3)
        model = AutoModelForCausalLM.from_config(
            pretrain.model_config(args, pretrain.make_tokenizer(args, tiny.text()))
        )
        widths = {p.shape[-1] for name, p in model.named_parameters() if "emb" in name or "wt" in name or "wpe" in name}
        assert widths == {48}
        assert model.config.num_hidden_layers == 3


@pytest.mark.parametrize("architecture, name", [("gpt2", "c_fc"), ("opt", "fc1")])
@pytest.mark.parametrize("asked, width", [(None, 128), (40, 40)])
def test_mlps_are_as_wide_as_asked_for(tmp_path, architecture, name, asked, width):
    args = tiny.pretrain_args(tmp_path, architecture=architecture, hidden_size=32, intermediate_size=asked)
    model = AutoModelForCausalLM.from_config(pretrain.model_config(args, pretrain.make_tokenizer(args, tiny.text())))
    biases = [p for key, p in model.named_parameters() if f"{name}.bias" in key]
    assert [len(p) for p in biases] == [width] * 2
