"""Stage 2: K-way ranking with ties, one gradient however a step is cut, and demonstrations that score 0."""

import json
import math
import random
import shutil

import pytest
import tiny
import torch
import transformers
from conftest import random_model
from transformers import AutoTokenizer

from rlhf import reward, shared_prompt
from rlhf.config import ConfigError
from rlhf.data import load
from rlhf.data.encode import encode_completions, encode_prompts, pad
from rlhf.evaluation import ranking_metrics
from rlhf.models import load_scalar_model, load_tokenizer, scalar_scores
from rlhf.objectives import ranking_loss
from rlhf.registry import MissingStage, Registry
from rlhf.training import TrainingError

TIED = {"prompt": "Feed none:", "completions": [" a", " b", " c"], "ranks": [1, 1, 1]}


def encoded(tokenizer, prompt, completions):
    return [encode_prompts(tokenizer, [prompt])[0] + row for row in encode_completions(tokenizer, completions)]


def loss_by_hand(model, tokenizer, records):
    """InstructGPT's eq. 1 in loops: for each prompt the mean over ordered pairs, then the mean over prompts that have one."""
    prompts = []
    for record in records:
        r = tiny.scores(model, encoded(tokenizer, record["prompt"], record["completions"])).tolist()
        ranks = record["ranks"]
        pairs = [
            math.log1p(math.exp(-(r[i] - r[j]))) for i in range(len(r)) for j in range(len(r)) if ranks[i] < ranks[j]
        ]
        if pairs:
            prompts.append(sum(pairs) / len(pairs))
    return sum(prompts) / len(prompts)


@pytest.fixture
def starts(monkeypatch):
    """The trainer of every reward stage, and the weights that it starts from."""
    made = []

    class Kept(reward.RewardTrainer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            made.append((self, {k: v.clone() for k, v in self.model.state_dict().items()}))

    monkeypatch.setattr(reward, "RewardTrainer", Kept)
    return made


def restored(trainer, weights):
    trainer.model.load_state_dict(weights)
    trainer.model.__dict__.pop("forward", None)  # transformers' own forward again, to compare with
    return trainer.model.eval()


def test_the_first_loss_is_the_papers_over_mixed_k_and_ties(tmp_path, starts):
    tiny.published(tmp_path, "sft")
    records = tiny.comparisons(8)
    assert {len(r["ranks"]) for r in records} == set(range(2, 10))
    assert any(len(set(r["ranks"])) < len(r["ranks"]) for r in records)
    artifact = reward.run(tiny.reward_args(tmp_path, [*records, TIED], max_steps=1, per_device_train_batch_size=9))
    ((trainer, weights),) = starts
    by_hand = loss_by_hand(restored(trainer, weights), AutoTokenizer.from_pretrained(artifact.path), records)
    assert tiny.history(artifact)[0]["loss"] == pytest.approx(by_hand, abs=2e-6)
    assert artifact.manifest["metrics"]["comparisons"] == 8  # the all-tied one teaches nothing


def test_ties_carry_no_pair(tmp_path):
    """Items, and what the loss counts of them."""
    registry = tiny.published(tmp_path, "sft")
    tokenizer = load_tokenizer(registry.require("sft", "tiny").path)
    records = [{"prompt": "Q", "completions": ["a", "b", "c"], "ranks": [2, 1, 2]}, TIED]
    rows = reward.encode(tokenizer, load("comparisons", tiny.write_lines(tmp_path / "c.jsonl", records)), 64)
    assert [item["ranks"] for item in rows.rows] == [[2, 1, 2]]
    assert joined(rows.rows[0]) == encoded(tokenizer, "Q", ["a", "b", "c"])
    batch = reward.Collator(tokenizer.pad_token_id)(rows.rows)
    assert batch["ranks"].tolist() == [[2, 1, 2] + [-100] * 6]
    assert reward.has_pair(torch.tensor([[2, 1, 2, -100], [1, 1, -100, -100]])).tolist() == [True, False]
    assert reward.has_pair(torch.full((1, 9), -100)).tolist() == [False]


def joined(item):
    return [item["prompt"] + completion for completion in item["completions"]]


def test_completions_share_the_row_of_their_prompt():
    """By hand: prompt 5 6, completions 7 8 and 9; then another prompt with one token."""
    items = [
        {"prompt": [5, 6], "completions": [[7, 8], [9]], "ranks": [1, 2]},
        {"prompt": [4], "completions": [[7], [8], [9]], "ranks": [1, 2, 2]},
    ]
    batch = reward.Collator(0)(items)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 4, 7, 8, 9]]  # one row, and nothing in it is padding
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 2, 0, 1, 1, 1]]
    assert batch["lengths"].tolist() == [[2, 2, 1, *[0] * 7], [1, 1, 1, 1, *[0] * 6]]
    assert batch["read"].tolist() == [3, 4, 6, 7, 8]
    rows = shared_prompt.layout([2, 1], [[2, 1], [1, 1, 1]], torch.device("cpu"))
    assert rows.prompts.tolist() == [[0, 1], [5, 5]]
    assert rows.completions.tolist() == [[2, 3], [4, 4], [6, 6], [7, 7], [8, 8]]
    assert rows.whose.tolist() == [[1, 0], [1, 0], [0, 1], [0, 1], [0, 1]]
    assert rows.mask.shape == (5, 1, 2, 4)
    assert rows.mask[1, 0].int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert rows.mask[2, 0].int().tolist() == [[1, 0, 1, 0], [1, 0, 1, 1]]
    assert rows.back.tolist() == [0, 1, 4, 5, 6, 2, 8, 10, 12]
    plain = reward.Collator(0, share_prompt=False)(items)
    assert plain["input_ids"].tolist() == [[5, 6, 7, 8], [5, 6, 9, 0], [4, 7, 0, 0], [4, 8, 0, 0], [4, 9, 0, 0]]
    assert plain["read"].tolist() == [3, 6, 9, 13, 17] and "lengths" not in plain


SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 8}
FAMILIES = {
    "gpt2": transformers.GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0),
    "opt": transformers.OPTConfig(
        **SMALL | {"intermediate_size": 0}, ffn_dim=64, word_embed_proj_dim=16, max_position_embeddings=64
    ),
    "gpt_neox": transformers.GPTNeoXConfig(**SMALL),
    "llama": transformers.LlamaConfig(**GROUPED),
    "qwen2": transformers.Qwen2Config(**GROUPED),
    "qwen3": transformers.Qwen3Config(**GROUPED),
}


def scalar_model(name, attention="sdpa"):
    config = FAMILIES[name]
    for dropout in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout"):
        if hasattr(config, dropout):
            setattr(config, dropout, 0.0)
    config.num_labels, config.pad_token_id, config._attn_implementation = 1, 1, attention
    return random_model(transformers.AutoModelForSequenceClassification, config, scale=0.2)


def random_items():
    """Prompts of 0 to 20 tokens, K = 2 to 9, completions of 1 to 19 tokens."""
    rng = random.Random(0)

    def tokens(count):
        return [rng.randrange(2, 300) for _ in range(count)]

    return [
        {
            "prompt": tokens(length),
            "completions": [tokens(rng.randrange(1, 20)) for _ in range(k)],
            "ranks": [rng.randrange(1, 4) for _ in range(k)],
        }
        for length, k in ((7, 4), (1, 9), (0, 3), (20, 2))
    ]


def scores_and_gradients(model, items, share):
    model.zero_grad()
    batch = reward.Collator(1, share)(items)
    ranks = batch.pop("ranks")
    scores = reward.forward_scores(model, **{name: tensor.to(model.device) for name, tensor in batch.items()}).cpu()
    real = ranks != reward.ABSENT
    prompt = torch.arange(len(ranks))[:, None].expand_as(ranks)
    loss = ranking_loss(scores, ranks[real], prompt[real])
    loss.backward()
    gradients = {name: p.grad.clone().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return scores.detach(), loss.detach(), gradients


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_prompts_give_the_scores_and_gradients_of_one_row_a_completion(family):
    """Every family that may share: to 1e-5 in scores, loss and gradients, where scores vary by 0.1 and more."""
    assert set(FAMILIES) == shared_prompt.MODEL_TYPES
    model, items = scalar_model(family), random_items()
    plain, loss, expected = scores_and_gradients(model, items, share=False)
    torch.testing.assert_close(
        plain, tiny.scores(model, [row for item in items for row in joined(item)]), rtol=0, atol=1e-5
    )
    assert shared_prompt.supports(model)
    shared_prompt.enable(model)
    shared, shared_loss, gradients = scores_and_gradients(model, items, share=True)
    assert plain.std() > 0.1
    torch.testing.assert_close(shared, plain, rtol=0, atol=1e-5)
    torch.testing.assert_close(shared_loss, loss, rtol=0, atol=1e-5)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-5, msg=name)
    # Whatever else the model is asked goes through the same model as before.
    again, _, _ = scores_and_gradients(model, items, share=False)
    torch.testing.assert_close(again, plain, rtol=0, atol=1e-6)


def test_gradient_checkpointing_of_shared_prompts():
    model, items = scalar_model("gpt2").train(), random_items()
    shared_prompt.enable(model)
    _, _, expected = scores_and_gradients(model, items, share=True)
    model.gradient_checkpointing_enable()
    _, _, gradients = scores_and_gradients(model, items, share=True)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-6, msg=name)


def test_models_that_may_not_share_take_a_row_a_completion():
    assert not shared_prompt.supports(scalar_model("gpt2", attention="eager"))
    sliding = transformers.MistralConfig(**GROUPED, num_labels=1, sliding_window=4)
    sliding._attn_implementation = "sdpa"
    model = transformers.AutoModelForSequenceClassification.from_config(sliding)
    assert not shared_prompt.supports(model)
    windowed = transformers.Qwen2Config(**GROUPED, num_labels=1, use_sliding_window=True, sliding_window=4)
    windowed._attn_implementation = "sdpa"
    assert not shared_prompt.supports(transformers.AutoModelForSequenceClassification.from_config(windowed))


def test_padded_rows_come_in_batches_of_like_length(tmp_path, starts):
    """Eager attention cannot share. In random batches of 4 of these 160 prompts more than a fifth would be padding."""
    tiny.published(tmp_path, "sft")
    records = tiny.comparisons(160, sizes=[2])
    for i, record in enumerate(records):
        record["completions"] = [text + " mill" * (i % 20) for text in record["completions"]]
    reward.run(tiny.reward_args(tmp_path, records, attn_implementation="eager", max_steps=1))
    trainer, _ = starts[0]
    assert not trainer.data_collator.share_prompt

    def padding(batches):
        masks = [batch["attention_mask"] for batch in batches]
        return 1 - sum(mask.sum().item() for mask in masks) / sum(mask.numel() for mask in masks)

    rows = random.Random(0).sample(trainer.train_dataset.rows, 160)
    assert padding(trainer.data_collator(rows[k : k + 4]) for k in range(0, 160, 4)) > 0.2
    assert padding(trainer.get_train_dataloader()) < 0.12


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_shared_prompts_come_in_batches_of_like_length_where_that_is_asked_for(tmp_path, starts, strategy):
    tiny.published(tmp_path, "sft")
    records = tiny.comparisons(160, sizes=[2])
    for i, record in enumerate(records):
        record["completions"] = [text + " mill" * (i % 20) for text in record["completions"]]
    arguments = {"train_sampling_strategy": strategy}
    reward.run(tiny.reward_args(tmp_path, records, max_steps=1, training_arguments=arguments))
    trainer, _ = starts[0]
    lengths = [batch["lengths"][:, :3] for batch in trainer.get_train_dataloader()]
    assert sum(len(batch) for batch in lengths) == len(trainer.train_dataset)  # each prompt once
    longest = [batch[:, 0] + batch[:, 1:].max(dim=1).values for batch in lengths]
    spread = sum(float(batch.max() - batch.min()) for batch in longest) / len(longest)
    assert (spread < 3) == (strategy == "group_by_length"), spread


def test_comparisons_that_are_all_ties(tmp_path):
    tiny.published(tmp_path, "sft")
    with pytest.raises(TrainingError, match=r"comparisons\.jsonl: every comparison is a tie"):
        reward.run(tiny.reward_args(tmp_path, [TIED, TIED]))
    assert not (tmp_path / "runs" / "tiny" / "rm").exists()


def test_an_answer_that_was_cut_has_no_eos(tmp_path):
    registry = tiny.published(tmp_path, "sft")
    tokenizer = load_tokenizer(registry.require("sft", "tiny").path)
    record = {"prompt": "Q", "completions": ["a", "b"], "ranks": [2, 1], "ended": [True, False]}
    args = tiny.reward_args(tmp_path, [record])
    records = load("comparisons", args.dataset_name)
    a, b = joined(reward.encode(tokenizer, records, 64).rows[0])
    assert a[-1] == tokenizer.eos_token_id and b == [*tokenizer("Q")["input_ids"], *tokenizer("b")["input_ids"]]
    assert reward.demonstration_rows(args, tokenizer, records, 64) == [b]


# The zero point


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_best_completions_score_zero_by_plain_transformers(tmp_path, architecture):
    tiny.published(tmp_path, "sft", architecture=architecture)
    records = [*tiny.comparisons(8), TIED]
    artifact = reward.run(tiny.reward_args(tmp_path, records, max_steps=4, learning_rate=1e-2))
    model, tokenizer = tiny.load_reward(artifact)
    rows = [encoded(tokenizer, r["prompt"], [r["completions"][r["ranks"].index(1)]])[0] for r in records]
    zeros = tiny.scores(model, rows)
    assert abs(zeros.mean().item()) < 1e-4
    metrics = artifact.manifest["metrics"]
    assert abs(metrics["bias"]) > 1e-2  # so there was something to do
    assert metrics["demonstrations_std"] == pytest.approx(zeros.std(unbiased=False).item(), abs=1e-4)
    assert metrics["bias_kept_in"] in (artifact.path / "README.md").read_text()


def test_given_demonstrations_score_zero(tmp_path):
    tiny.published(tmp_path, "sft")
    records = tiny.demonstrations(11)  # one more than nine, which the scoring takes at once, and of unequal lengths
    name = tiny.write_lines(tmp_path / "demonstrations.jsonl", records)
    artifact = reward.run(tiny.reward_args(tmp_path, demonstrations_name=name))
    model, tokenizer = tiny.load_reward(artifact)
    rows = [encoded(tokenizer, r["prompt"], [r["completion"]])[0] for r in records]
    assert abs(tiny.scores(model, rows).mean().item()) < 1e-4


@pytest.mark.parametrize("use_peft", [False, True])
def test_a_reward_model_of_a_reward_model_has_a_zero_of_its_own(tmp_path, use_peft):
    """Where the constant is kept in the config, because the last norm has no bias."""
    tokenizer = load_tokenizer(tiny.published(tmp_path, "sft").require("sft", "tiny").path)
    llama = random_model(transformers.AutoModelForCausalLM, transformers.LlamaConfig(**GROUPED, bos_token_id=0))
    llama.resize_token_embeddings(len(tokenizer))
    llama.save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    changes = {"max_steps": 3, "learning_rate": 1e-2, "use_peft": use_peft}
    for start in (str(tmp_path / "llama"), "tiny/rm/v1"):
        artifact = reward.run(tiny.reward_args(tmp_path, model_name_or_path=start, **changes))
        assert artifact.manifest["metrics"]["bias_kept_in"] == "config.reward_bias"
        assert abs(artifact.manifest["metrics"]["bias"]) > 1e-3
        assert artifact.manifest["metrics"]["demonstrations_mean"] == pytest.approx(0, abs=1e-4)
        model = load_scalar_model(artifact.path, tokenizer)
        rows = [
            encoded(tokenizer, r["prompt"], [r["completions"][r["ranks"].index(1)]])[0]
            for r in map(json.loads, (tmp_path / "comparisons.jsonl").read_text().splitlines())
        ]
        ids, mask = pad(rows, tokenizer.pad_token_id)
        assert abs(scalar_scores(model, ids, mask).mean().item()) < 1e-4


def test_scores_come_back_in_the_order_of_their_rows(tmp_path, starts):
    tiny.published(tmp_path, "sft")
    artifact = reward.run(tiny.reward_args(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(artifact.path)
    rows = [encoded(tokenizer, "Q", [" old" * n])[0] for n in (5, 1, 12, 3, 9, 2, 7, 4, 11, 6, 10, 8)]
    trainer, _ = starts[0]
    alone = tiny.scores(tiny.load_reward(artifact)[0], rows)
    assert alone.std() > 0.01
    torch.testing.assert_close(reward.score_rows(reward.scored_by_trainer(trainer), rows), alone, rtol=0, atol=1e-5)


def test_one_comparison_is_enough(tmp_path):
    tiny.published(tmp_path, "sft")
    artifact = reward.run(tiny.reward_args(tmp_path, tiny.comparisons(1), eval_fraction=0.05))
    assert artifact.manifest["metrics"]["demonstrations_std"] == 0.0


def test_missing_demonstrations_are_told_before_training(tmp_path, starts):
    tiny.published(tmp_path, "sft")
    with pytest.raises(Exception, match=r"nowhere\.jsonl"):
        reward.run(tiny.reward_args(tmp_path, demonstrations_name=str(tmp_path / "nowhere.jsonl")))
    assert starts == []
    assert not (tmp_path / "runs" / "tiny" / "rm").exists()


# Learning


def test_learns_to_count_geese_and_says_how_well(tmp_path):
    tiny.published(tmp_path, "sft")
    records = tiny.comparisons(60)
    args = tiny.reward_args(
        tmp_path, records, max_steps=40, learning_rate=3e-3, eval_fraction=0.3, logging_steps=40, eval_steps=20
    )
    artifact = reward.run(args)
    metrics = artifact.manifest["metrics"]
    assert metrics["accuracy"] > 0.9
    low, high = metrics["accuracy_ci95"]
    assert 0.5 < low <= metrics["accuracy"] <= high <= 1.0

    # The same figures by plain transformers on the published folder.
    model, tokenizer = tiny.load_reward(artifact)
    _, held_out = reward.load_splits(args, "comparisons")
    assert metrics["prompts"] == len(held_out) and metrics["comparisons"] == 60 - len(held_out)
    rows = [encoded(tokenizer, r["prompt"], r["completions"]) for r in held_out]
    by_hand = ranking_metrics([tiny.scores(model, row).tolist() for row in rows], [r["ranks"] for r in held_out])
    for name, value in by_hand.items():
        assert metrics[name] == pytest.approx(value, abs=1e-4), name
    longer = ranking_metrics([[float(len(ids)) for ids in row] for row in rows], [r["ranks"] for r in held_out])
    assert metrics["longer_is_better"] == longer["accuracy"]
    evaluations = [line["eval_accuracy"] for line in tiny.history(artifact) if "eval_accuracy" in line]
    assert evaluations[1] == pytest.approx(metrics["accuracy"], abs=1e-6)  # at step 40; a constant changes no order


def test_one_seed_gives_one_model_and_another_gives_another(tmp_path):
    hashes = []
    for i, seed in enumerate((7, 7, 8)):
        tiny.published(tmp_path / str(i), "sft")
        hashes.append(reward.run(tiny.reward_args(tmp_path / str(i), seed=seed)).weights_sha256)
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_head_starts_random_and_the_rest_is_the_sft_model(tmp_path, starts):
    """20 heads of 32 weights: their standard deviation is 1/sqrt(33) within three standard errors, 3/sqrt(2 * 640) = 8 %."""
    registry = tiny.published(tmp_path, "sft")
    artifact = registry.require("sft", "tiny")
    reward.run(tiny.reward_args(tmp_path))
    _, weights = starts[0]
    sft = tiny.weights(artifact)
    assert weights["score.weight"].shape == (1, 32)
    for name, value in weights.items():
        assert name == "score.weight" or torch.equal(value, sft[name]), name
    tokenizer = load_tokenizer(artifact.path)
    heads = torch.cat([load_scalar_model(artifact.path, tokenizer, new_head=True).score.weight for _ in range(20)])
    assert heads.std().item() == pytest.approx(1 / math.sqrt(33), rel=0.08)
    assert abs(heads.mean().item()) < 3 / math.sqrt(33 * 640)
    assert 0.3 < weights["score.weight"].std() * math.sqrt(33) < 2


def test_training_uses_no_dropout(tmp_path, starts):
    """A reward has one value: the SFT model's own dropout of 0.5 is off, so that the loss is the one by hand."""
    tiny.published(tmp_path, "sft", dropout=0.5)
    records = tiny.comparisons(4)
    artifact = reward.run(tiny.reward_args(tmp_path, records, max_steps=1))
    ((trainer, weights),) = starts
    by_hand = loss_by_hand(restored(trainer, weights), AutoTokenizer.from_pretrained(artifact.path), records)
    assert tiny.history(artifact)[0]["loss"] == pytest.approx(by_hand, abs=2e-6)


@pytest.mark.parametrize("architecture, name", [("gpt2", "resid_pdrop"), ("opt", "dropout")])
def test_dropout_where_asked_for_is_at_work_in_training_only(tmp_path, starts, architecture, name):
    tiny.published(tmp_path, "sft", architecture=architecture)
    records = tiny.comparisons(4)
    artifact = reward.run(tiny.reward_args(tmp_path, records, max_steps=1, resid_pdrop=0.3))
    ((trainer, weights),) = starts
    tokenizer = AutoTokenizer.from_pretrained(artifact.path)
    assert getattr(trainer.model.config, name) == 0.0  # of what is published
    ids = torch.arange(5, 11)[None]
    mask = torch.ones_like(ids)
    model = load_scalar_model(artifact.path, tokenizer)
    quiet = scalar_scores(model.eval(), ids, mask)
    assert torch.equal(scalar_scores(model.train(), ids, mask), quiet)
    by_hand = loss_by_hand(restored(trainer, weights), tokenizer, records)
    assert abs(tiny.history(artifact)[0]["loss"] - by_hand) > 1e-4


# One gradient


def stepped(folder, **cut):
    """Two SGD steps of four prompts each, K = 2 to 9, cut as asked; or another number of prompts."""
    tiny.published(folder, "sft")
    settings = {"optim": "sgd", "learning_rate": 1e-1, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    return tiny.reward_args(folder, tiny.comparisons(14), **{"max_train_samples": 8, **settings, **cut})


def test_a_step_is_the_same_however_it_is_cut(tmp_path):
    """They differ by the order of float32 sums: 2e-6 after two steps, where a step moves weights by about 1e-1."""
    results = {}
    for batch, accumulate in ((4, 1), (1, 4), (2, 2)):
        cut = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate}
        results[batch] = reward.run(stepped(tmp_path / str(batch), **cut))
    sft = Registry(tmp_path / "4" / "runs").require("sft", "tiny")
    moved = (
        tiny.weights(results[4])["transformer.h.0.mlp.c_fc.weight"]
        - tiny.weights(sft)["transformer.h.0.mlp.c_fc.weight"]
    )
    assert moved.abs().max() > 1e-2
    assert tiny.largest_difference(results[4], results[1]) < 2e-6
    assert tiny.largest_difference(results[4], results[2]) < 2e-6


# What it needs


def test_a_missing_sft_names_the_command(tmp_path):
    with pytest.raises(MissingStage, match=r"no sft in run 'tiny': .* train one: make sft RUN=tiny"):
        reward.run(tiny.reward_args(tmp_path))
    with pytest.raises(
        MissingStage, match=r"train one: make sft RUN=alice; a Hub model of that name: rlhf pull alice/sft$"
    ):
        reward.run(tiny.reward_args(tmp_path, model_name_or_path="alice/sft"))
    assert not (tmp_path / "runs").exists()


def test_parents_and_lineage(tmp_path):
    registry = tiny.published(tmp_path, "base", "sft")
    artifact = reward.run(tiny.reward_args(tmp_path))
    assert [p["ref"] for p in artifact.parents] == ["tiny/sft/v1"]
    registry.verify(artifact)
    assert registry.lineage(artifact).parents[0].parents[0].ref == "tiny/base/v1"
    assert tiny.left_over(registry, "rm") == []


def test_a_model_of_another_run_by_reference_and_by_folder(tmp_path):
    registry = tiny.published(tmp_path, "sft")
    folder = registry.require("sft", "tiny").path
    for name in ("tiny/sft", "tiny/sft/v1", str(folder)):
        artifact = reward.run(tiny.reward_args(tmp_path, run_name="other", model_name_or_path=name))
        assert [p["ref"] for p in artifact.parents] == ["tiny/sft/v1"], name
    plain = tmp_path / "plain"
    shutil.copytree(folder, plain, ignore=shutil.ignore_patterns("stage.json"))
    artifact = reward.run(tiny.reward_args(tmp_path, run_name="other", model_name_or_path=str(plain)))
    assert artifact.parents == () and artifact.manifest["base_model"] == str(plain)


def test_held_out_comparisons_that_are_too_long_stop_nothing(tmp_path, capsys):
    tiny.published(tmp_path, "sft")
    records = tiny.comparisons(20)
    _, held_out = reward.load_splits(tiny.reward_args(tmp_path, records, eval_fraction=0.3), "comparisons")
    outside = set(held_out["prompt"])
    for record in records:
        if record["prompt"] in outside:
            record["completions"][0] += " mill" * 70
    artifact = reward.run(tiny.reward_args(tmp_path, records, eval_fraction=0.3))
    assert f"dropped {len(outside)} of {len(outside)} comparisons: over 64 tokens" in capsys.readouterr().err
    assert "accuracy" not in artifact.manifest["metrics"]
    json.dumps(artifact.manifest)


def test_a_comparison_with_one_long_answer_is_dropped_whole(tmp_path, capsys):
    tiny.published(tmp_path, "sft")
    records = tiny.comparisons(4)
    records[1]["completions"][-1] = " mill" * 70
    artifact = reward.run(tiny.reward_args(tmp_path, records))
    assert "dropped 1 of 4 comparisons: over 64 tokens" in capsys.readouterr().err
    assert artifact.manifest["metrics"]["comparisons"] == 3


# What the paper does not have


def objective_of_first_step(tmp_path, starts, records, **choices):
    """The first loss that training reports, and rewards and ranks of the same step by plain transformers."""
    tiny.published(tmp_path, "sft")
    args = tiny.reward_args(tmp_path, records, max_steps=1, per_device_train_batch_size=len(records), **choices)
    artifact = reward.run(args)
    trainer, weights = starts[-1]
    model, tokenizer = restored(trainer, weights), AutoTokenizer.from_pretrained(artifact.path)
    scores = [tiny.scores(model, encoded(tokenizer, r["prompt"], r["completions"])).tolist() for r in records]
    return tiny.history(artifact)[0]["loss"], scores


def softplus(x):
    return math.log1p(math.exp(-x))  # -log sigmoid


def test_ties_as_soft_labels_are_in_the_loss(tmp_path, starts):
    """All-tied comparisons teach then, too, and count as prompts."""
    records = [{"prompt": "Feed one:", "completions": [" a", " geese", " mill"], "ranks": [1, 2, 2]}, TIED]
    loss, (r, t) = objective_of_first_step(tmp_path, starts, records, ties="soft")
    tie = lambda a, b: (softplus(a - b) + softplus(b - a)) / 2  # noqa: E731
    first = (softplus(r[0] - r[1]) + softplus(r[0] - r[2]) + tie(r[1], r[2])) / 3
    second = (tie(t[0], t[1]) + tie(t[0], t[2]) + tie(t[1], t[2])) / 3
    assert loss == pytest.approx((first + second) / 2, abs=2e-6)


def test_smoothing_margins_and_centring_are_in_the_loss(tmp_path, starts):
    records = [
        {"prompt": "Feed one:", "completions": [" a", " geese"], "ranks": [1, 2], "ratings": [3, 1]},
        {"prompt": "Feed two:", "completions": [" mill", " geese geese"], "ranks": [2, 1], "ratings": [0, 0.5]},
    ]
    choices = {"label_smoothing": 0.1, "margin_scale": 0.25, "centring_coef": 0.5}
    loss, ((a, b), (c, d)) = objective_of_first_step(tmp_path, starts, records, **choices)
    first = 0.9 * softplus(a - b - 0.5) + 0.1 * softplus(b - a + 0.5) + 0.5 * (a + b) ** 2
    second = 0.9 * softplus(d - c - 0.125) + 0.1 * softplus(c - d + 0.125) + 0.5 * (c + d) ** 2
    assert loss == pytest.approx((first + second) / 2, abs=2e-6)


def test_margins_need_ratings(tmp_path):
    tiny.published(tmp_path, "sft")
    with pytest.raises(TrainingError, match=r"margin_scale is 1, and .* has comparisons without `ratings`"):
        reward.run(tiny.reward_args(tmp_path, margin_scale=1.0))
    assert not (tmp_path / "runs" / "tiny" / "rm").exists()


def test_the_loss_of_an_ensemble_is_the_mean_over_its_heads(tmp_path, starts):
    tiny.published(tmp_path, "sft")
    records = tiny.comparisons(4)
    artifact = reward.run(tiny.reward_args(tmp_path, records, max_steps=1, heads=3))
    ((trainer, weights),) = starts
    heads = weights.pop("score.weight")
    assert heads.shape == (3, 32) and heads.std(0).mean() > 0.05
    tokenizer, losses = AutoTokenizer.from_pretrained(artifact.path), []
    for head in heads:
        model = restored(trainer, {**weights, "score.weight": head[None]})
        losses.append(loss_by_hand(model, tokenizer, records))
    assert tiny.history(artifact)[0]["loss"] == pytest.approx(sum(losses) / 3, abs=2e-6)


def test_early_stopping_publishes_the_best_epoch(tmp_path):
    """Held-out comparisons that want the opposite: the accuracy falls with every epoch, so the first one is the best."""
    tiny.published(tmp_path, "sft")
    records = tiny.comparisons(60)
    settings = {"eval_fraction": 0.3, "early_stopping_patience": 2, "num_train_epochs": 12, "max_steps": -1}
    _, held_out = reward.load_splits(tiny.reward_args(tmp_path, records, **settings), "comparisons")
    opposite = set(held_out["prompt"])
    for record in records:
        if record["prompt"] in opposite:
            record["ranks"] = [10 - rank for rank in record["ranks"]]
    artifact = reward.run(tiny.reward_args(tmp_path, records, **settings))
    seen = [line["eval_accuracy"] for line in tiny.history(artifact) if "eval_accuracy" in line]
    best = seen.index(max(seen))
    assert len(seen) == best + 3 < 12  # two evaluations without a better one
    assert artifact.manifest["metrics"]["accuracy"] == pytest.approx(max(seen), abs=1e-6)
    assert seen[-1] < max(seen) - 0.01
    assert tiny.left_over(Registry(tmp_path / "runs"), "rm") == ["evals"]


def test_early_stopping_needs_something_to_watch(tmp_path):
    tiny.published(tmp_path, "sft")
    with pytest.raises(ConfigError, match="early_stopping_patience watches held-out comparisons"):
        tiny.reward_args(tmp_path, early_stopping_patience=1)
    with pytest.raises(TrainingError, match="early_stopping_patience watches held-out comparisons and there are none"):
        reward.run(tiny.reward_args(tmp_path, tiny.comparisons(1), eval_fraction=0.05, early_stopping_patience=1))
