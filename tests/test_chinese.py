"""Chinese from data to PPO: a GPT-2 model with a WordPiece vocabulary, as GPT2-Chinese checkpoints have, and byte-level BPE."""

import json

import pytest
import tiny
import torch
from conftest import configuration, random_model
from test_ppo import ppo_args
from transformers import AutoModelForCausalLM, BertTokenizer, GPT2Tokenizer

from rlhf import models, ppo, reward, sft
from rlhf.data import load
from rlhf.data.encode import decode_completions, encode_completions, encode_prompts
from rlhf.evaluation import answer
from rlhf.registry import Registry


@pytest.fixture(scope="module")
def records(shared_data):
    """Short instructions with short answers."""
    with open(shared_data / "sft" / "alpaca_zh_4k.jsonl", encoding="utf-8") as stream:
        found = [json.loads(line) for line in stream]
    found = [r for r in found if not r["input"] and len(r["instruction"]) < 16 and 1 < len(r["output"]) < 12]
    return [{"prompt": r["instruction"], "completion": r["output"]} for r in found[:48]]


@pytest.fixture(scope="module")
def checkpoint(records, tmp_path_factory):
    """A random GPT-2 whose vocabulary is the characters of these records, less the ten rarest, which become [UNK]."""
    text = "".join(record["prompt"] + record["completion"] for record in records).lower()
    characters = sorted(set(text) - {" ", "\n"}, key=lambda c: (-text.count(c), c))[:-10]
    folder = tmp_path_factory.mktemp("gpt2-chinese")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = configuration("gpt2", len(vocabulary))
    config.bos_token_id = config.eos_token_id = None
    random_model(AutoModelForCausalLM, config, scale=0.02).save_pretrained(folder)
    return folder


def test_a_wordpiece_model_goes_through_all_stages(records, checkpoint, tmp_path):
    rivals = [record["completion"] for record in records[1:] + records[:1]]
    rankings = [
        {"prompt": r["prompt"], "completions": [r["completion"], rival, rival[::-1]], "ranks": [1, 2, 2]}
        for r, rival in zip(records, rivals)
        if rival not in (r["completion"], rival[::-1])
    ]
    registry = Registry(tmp_path / "runs")
    args = tiny.sft_args(tmp_path, records, model_name_or_path=str(checkpoint), max_steps=60, learning_rate=5e-3)
    sft.run(args)
    tuned = registry.require("sft", "tiny")
    losses = [line["loss"] for line in tiny.history(tuned) if "loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    reward.run(tiny.reward_args(tmp_path, rankings, max_steps=20))
    prompts = tiny.write_lines(tmp_path / "prompts.jsonl", [{"prompt": r["prompt"]} for r in records])
    poems = tiny.write_lines(tmp_path / "poems.jsonl", [{"text": r["completion"] * 3} for r in records])
    ppo.run(ppo_args(tmp_path, dataset_name=prompts, ptx_dataset_name=poems))
    policy = registry.require("ppo", "tiny")
    model, tokenizer = tiny.load_causal(policy)
    assert tokenizer.eos_token == tokenizer.sep_token == "[SEP]" and len(tokenizer) == model.config.vocab_size
    # What ends an answer is [SEP], in training and in sampling.
    (prompt,), (completion,) = encode_prompts(tokenizer, ["你好"]), encode_completions(tokenizer, ["你好"])
    assert prompt[0] == tokenizer.cls_token_id and completion[-1] == tokenizer.sep_token_id
    answers = answer(model, tokenizer, [r["prompt"] for r in records], response_length=12, seed=0)
    assert any(answers.ended) and all(
        t[-1] == tokenizer.sep_token_id for t, end in zip(answers.tokens, answers.ended) if end
    )
    assert "".join(answers.texts) and " " not in "".join(answers.texts).replace("\n", "")
    generated = model.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False)  # plain transformers
    assert generated.shape[1] > len(prompt)


def test_wordpiece_texts_come_back_without_spaces(shared_data):
    tokenizer = BertTokenizer(str(shared_data / "tokenizer" / "bert_base_chinese_vocab.txt"))
    tokenizer.eos_token = tokenizer.sep_token
    poems = load("text", shared_data / "corpus" / "songci_4k.jsonl")["text"][:200]
    texts = [poem.replace("\n", "") for poem in poems]
    rows = encode_completions(tokenizer, texts)
    known = [i for i, row in enumerate(rows) if tokenizer.unk_token_id not in row]
    assert len(known) > 100
    assert [decode_completions(tokenizer, [rows[i]])[0] for i in known] == [texts[i] for i in known]
    answers = load("demonstrations", shared_data / "sft" / "alpaca_zh_4k.jsonl", on_error="skip")["completion"][:500]
    mixed = encode_completions(tokenizer, answers)  # with Latin letters, numbers and marks of both scripts
    mixed = [row for row in mixed if tokenizer.unk_token_id not in row]
    assert encode_completions(tokenizer, decode_completions(tokenizer, mixed)) == mixed


def test_byte_level_bpe_gives_any_text_back(shared_data):
    folder = shared_data / "tokenizer"
    tokenizer = GPT2Tokenizer(str(folder / "gpt2_encoder.json"), str(folder / "gpt2_vocab.bpe"))
    texts = [*load("text", shared_data / "corpus" / "songci_4k.jsonl")["text"][:50], "Größe 한국어 😀 ไทย"]
    rows = encode_completions(tokenizer, texts)
    assert decode_completions(tokenizer, rows) == texts


@pytest.mark.parametrize("name", ["bert_base_chinese_vocab.txt", "gpt2_chinese_vocab_small.txt"])
def test_vocabularies_of_gpt2_chinese_end_with_sep(shared_data, tmp_path, name):
    (tmp_path / "vocab.txt").write_bytes((shared_data / "tokenizer" / name).read_bytes())
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    tokenizer = models.load_tokenizer(tmp_path)
    (row,) = encode_completions(tokenizer, ["春天来了"])
    assert tokenizer.convert_ids_to_tokens(row) == ["春", "天", "来", "了", "[SEP]"]
    assert tokenizer.pad_token == "[PAD]" and tokenizer.pad_token_id != tokenizer.eos_token_id
