"""Stage 1: labels, loss, what is published, and that answers end."""

import dataclasses
import math

import pytest
import tiny
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoTokenizer
from trl import SFTTrainer

from rlhf import models, sft
from rlhf.data import load
from rlhf.registry import MissingStage, Registry
from rlhf.training import TrainingError


def tokens_by_hand(tokenizer, record):
    """Prompt and completion apart, then EOS: a GPT-2 tokenizer puts nothing before them."""
    return tokenizer(record["prompt"])["input_ids"], [
        *tokenizer(record["completion"])["input_ids"],
        tokenizer.eos_token_id,
    ]


@torch.no_grad()
def loss_by_hand(artifact, records):
    """Negative log-likelihood of all completion tokens over their number, a row at a time without padding."""
    model, tokenizer = tiny.load_causal(artifact)
    total, count = 0.0, 0
    for record in records:
        prompt, completion = tokens_by_hand(tokenizer, record)
        logp = model(input_ids=torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
        for t, token in enumerate(completion, start=len(prompt)):
            total -= logp[t - 1, token].item()
            count += 1
    return total / count


@pytest.fixture
def trainers(monkeypatch):
    """Every trainer that a stage makes."""
    made = []

    class Kept(sft.CompletionTrainer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            made.append(self)

    monkeypatch.setattr(sft, "CompletionTrainer", Kept)
    return made


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_labels_are_the_completion_and_its_eos(tmp_path, architecture):
    registry = tiny.published(tmp_path, "base", architecture=architecture)
    args = tiny.sft_args(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(registry.require("base", "tiny").path)
    encoded = sft.encode(args, tokenizer, load("demonstrations", args.dataset_name), 64)
    for row, record in zip(encoded, tiny.demonstrations(), strict=True):
        prompt, completion = tokens_by_hand(tokenizer, record)
        assert row["input_ids"] == prompt + completion
        assert row["labels"] == [-100] * len(prompt) + completion
        assert row["labels"][-1] == tokenizer.eos_token_id
        assert tokenizer.pad_token_id not in row["input_ids"]


def test_the_seam_is_tokenised_as_at_inference(tmp_path):
    """The tokenizer knows " river"; in "Say ri" + "ver" it must not be found."""
    registry = tiny.published(tmp_path, "base")
    tokenizer = AutoTokenizer.from_pretrained(registry.require("base", "tiny").path)
    record = {"prompt": "Say ri", "completion": "ver"}
    apart = [*tokenizer("Say ri")["input_ids"], *tokenizer("ver")["input_ids"]]
    assert tokenizer("Say river")["input_ids"] != apart
    args = tiny.sft_args(tmp_path, [record])
    (row,) = sft.encode(args, tokenizer, load("demonstrations", args.dataset_name), 64)
    prompt, completion = tokens_by_hand(tokenizer, record)
    assert row["input_ids"] == prompt + completion


def test_a_conversation_is_learned_turn_by_turn_or_at_its_end(tmp_path):
    registry = tiny.published(tmp_path, "base")
    tokenizer = AutoTokenizer.from_pretrained(registry.require("base", "tiny").path)
    says = [("user", "the river"), ("assistant", "runs"), ("user", "and"), ("assistant", "feed geese")]
    turns = [{"role": role, "content": content} for role, content in says]
    args = tiny.sft_args(tmp_path, [{"messages": turns}])
    for train_on, wanted in (("every_turn", ["runs", "feed geese"]), ("completion", ["feed geese"])):
        chosen = dataclasses.replace(args, train_on=train_on)
        (row,) = sft.encode(chosen, tokenizer, load("demonstrations", args.dataset_name), 64)
        learned = [token for token in row["labels"] if token != -100]
        assert learned == [
            token for answer in wanted for token in (*tokenizer(answer)["input_ids"], tokenizer.eos_token_id)
        ]
    assert sft.run(args).manifest["metrics"]["training_examples"] == 1


@pytest.mark.parametrize("packing", [False, True])
def test_the_first_loss_is_that_of_completions_alone(tmp_path, packing):
    """Also where examples share a row, which they must not notice."""
    registry = tiny.published(tmp_path, "base")
    records = tiny.demonstrations(4)
    artifact = sft.run(tiny.sft_args(tmp_path, records, resid_pdrop=None, max_steps=1, packing=packing))
    by_hand = loss_by_hand(registry.require("base", "tiny"), records)
    assert tiny.history(artifact)[0]["loss"] == pytest.approx(by_hand, abs=2e-6)


def test_held_out_loss_and_perplexity(tmp_path):
    tiny.published(tmp_path, "base")
    records = tiny.demonstrations(12)
    args = tiny.sft_args(tmp_path, records, eval_fraction=0.4)
    artifact = sft.run(args)
    _, held_out = sft.load_splits(args, "demonstrations")
    assert 0 < len(held_out) < 12
    metrics = artifact.manifest["metrics"]
    assert metrics["demonstrations"] == 12 - len(held_out)
    # Trainer takes the mean over batches, so that its figure and ours agree only where one batch holds everything.
    assert len(held_out) <= args.per_device_eval_batch_size
    assert metrics["eval_loss"] == pytest.approx(loss_by_hand(artifact, held_out), abs=2e-6)
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]), rel=1e-6)
    assert next(line["epoch"] for line in tiny.history(artifact) if "eval_loss" in line) == 1.0


def test_a_few_demonstrations_without_any_held_out(tmp_path):
    tiny.published(tmp_path, "base")
    artifact = sft.run(tiny.sft_args(tmp_path, tiny.demonstrations(2), eval_fraction=0.05))
    assert artifact.manifest["metrics"]["demonstrations"] == 2
    assert "eval_loss" not in artifact.manifest["metrics"]


def test_answers_are_learned_to_their_end(tmp_path):
    tiny.published(tmp_path, "base")
    records = tiny.demonstrations(4)
    args = tiny.sft_args(tmp_path, records, max_steps=90, learning_rate=1e-2, resid_pdrop=0.0, logging_steps=30)
    model, tokenizer = tiny.load_causal(sft.run(args))
    for record in records:
        prompt, completion = tokens_by_hand(tokenizer, record)
        out = model.generate(torch.tensor([prompt]), max_new_tokens=len(completion) + 8, do_sample=False)
        assert out[0, len(prompt) :].tolist() == completion  # generation stopped by itself at EOS


def test_publishes_what_it_was_made_from(tmp_path):
    registry = tiny.published(tmp_path, "base")
    artifact = sft.run(tiny.sft_args(tmp_path))
    base = registry.require("base", "tiny")
    assert artifact.ref == "tiny/sft/v1"
    assert [(p["ref"], p["sha256"]) for p in artifact.parents] == [("tiny/base/v1", base.weights_sha256)]
    registry.verify(artifact)
    assert tiny.left_over(registry, "sft") == []
    assert base.weights_sha256 in (artifact.path / "README.md").read_text()
    assert artifact.manifest["data"][0]["records"] == 8
    assert artifact.manifest["config"]["learning_rate"] == 1e-3
    assert artifact.weights_sha256 != base.weights_sha256


def test_a_checkpoint_outside_the_registry(tmp_path):
    """As from the Hub: a plain folder whose tokenizer has no PAD, and a revision that the manifest keeps."""
    registry = tiny.published(tmp_path, "base")
    model, tokenizer = tiny.load_causal(registry.require("base", "tiny"))
    tokenizer.pad_token = tokenizer.eos_token
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "hub")
    args = tiny.sft_args(tmp_path, model_name_or_path=str(tmp_path / "hub"), model_revision="main")
    artifact = sft.run(args)
    assert artifact.parents == ()
    assert artifact.manifest["base_model"] == str(tmp_path / "hub")
    assert artifact.manifest["base_revision"] == "main"
    assert "base_model" not in ModelCard.load(artifact.path / "README.md").data.to_dict()  # the Hub would refuse a path
    published = AutoTokenizer.from_pretrained(artifact.path)
    assert published.pad_token_id != published.eos_token_id


@pytest.mark.parametrize("architecture, name", [("gpt2", "resid_pdrop"), ("opt", "dropout")])
@pytest.mark.parametrize("asked", [None, 0.3])
def test_dropout_while_training_and_after(tmp_path, trainers, architecture, name, asked):
    registry = tiny.published(tmp_path, "base", architecture=architecture, dropout=0.1)
    artifact = sft.run(tiny.sft_args(tmp_path, resid_pdrop=asked))
    (trainer,) = trainers
    used = [
        module.resid_dropout.p if architecture == "gpt2" else module.dropout
        for module in trainer.model.modules()
        if hasattr(module, "resid_dropout") or type(module).__name__ == "OPTDecoderLayer"
    ]
    assert used == [0.1 if asked is None else asked] * 2
    base, published = (AutoConfig.from_pretrained(a.path) for a in (registry.require("base", "tiny"), artifact))
    assert getattr(published, name) == getattr(base, name) == 0.1


def test_dropout_is_at_work_while_training(tmp_path):
    registry = tiny.published(tmp_path, "base")
    records = tiny.demonstrations(4)
    artifact = sft.run(tiny.sft_args(tmp_path, records, resid_pdrop=0.3, max_steps=1))
    by_hand = loss_by_hand(registry.require("base", "tiny"), records)
    assert abs(tiny.history(artifact)[0]["loss"] - by_hand) > 1e-4


def test_accumulated_batches_are_one_batch(tmp_path):
    """4 x 1 and 1 x 4 differ by the order of float32 sums: 1e-6, where a step moves weights by about 1e-2.

    Completions have 2 to 9 tokens, so that a mean of means would differ.
    """
    steps = {}
    for name, batch, accumulate in (("4x1", 4, 1), ("1x4", 1, 4), ("2x2", 2, 2)):
        folder = tmp_path / name
        tiny.published(folder, "base")
        args = tiny.sft_args(
            folder,
            tiny.demonstrations(4),
            max_steps=1,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
            resid_pdrop=0.0,
            optim="sgd",
            learning_rate=1e-1,
            max_grad_norm=0.0,
        )
        steps[name] = sft.run(args)
    base = Registry(tmp_path / "4x1" / "runs").require("base", "tiny")
    assert tiny.largest_difference(base, steps["4x1"]) > 5e-3
    assert tiny.largest_difference(steps["4x1"], steps["1x4"]) < 1e-6
    assert tiny.largest_difference(steps["4x1"], steps["2x2"]) < 1e-6


def test_one_seed_gives_one_model_and_another_gives_another(tmp_path):
    """With dropout and shuffling, which the seed decides."""
    hashes = []
    for i, seed in enumerate((7, 7, 8)):
        tiny.published(tmp_path / str(i), "base")
        hashes.append(sft.run(tiny.sft_args(tmp_path / str(i), seed=seed, resid_pdrop=0.2)).weights_sha256)
    assert hashes[0] == hashes[1] != hashes[2]


# Lengths


def test_too_long_demonstrations_are_dropped_and_counted(tmp_path, trainers, capsys):
    tiny.published(tmp_path, "base")
    records = tiny.demonstrations(4)
    records[1]["prompt"] = "north " * 20  # 21 tokens or more, but with its completion within the context
    records[2]["completion"] = " mill" * 70
    sft.run(tiny.sft_args(tmp_path, records, max_prompt_length=18))
    lines = capsys.readouterr().err.splitlines()
    assert "dropped 1 of 4 prompts of demonstrations: over 18 tokens" in lines
    assert f"dropped 1 of 3 demonstrations: over {tiny.CONTEXT} tokens" in lines
    assert len(trainers[0].train_dataset) == 2


def test_max_length_counts_prompt_completion_and_eos(tmp_path):
    registry = tiny.published(tmp_path, "base")
    tokenizer = AutoTokenizer.from_pretrained(registry.require("base", "tiny").path)
    args = tiny.sft_args(tmp_path, tiny.demonstrations(1))
    records = load("demonstrations", args.dataset_name)
    prompt, completion = tokens_by_hand(tokenizer, records[0])
    exact = len(prompt) + len(completion)
    assert len(sft.encode(args, tokenizer, records, exact)) == 1
    assert len(sft.encode(dataclasses.replace(args, max_prompt_length=len(prompt)), tokenizer, records, exact)) == 1
    with pytest.raises(TrainingError, match=f"all 1 demonstrations are over {exact - 1} tokens"):
        sft.encode(args, tokenizer, records, exact - 1)
    with pytest.raises(TrainingError, match=f"all 1 prompts of demonstrations are over {len(prompt) - 1} tokens"):
        sft.encode(dataclasses.replace(args, max_prompt_length=len(prompt) - 1), tokenizer, records, exact)


def test_held_out_demonstrations_that_are_too_long_stop_nothing(tmp_path, capsys):
    tiny.published(tmp_path, "base")
    args = tiny.sft_args(tmp_path, tiny.demonstrations(12), eval_fraction=0.4)
    _, held_out = sft.load_splits(args, "demonstrations")
    outside = set(held_out["prompt"])
    records = [r | {"completion": " mill" * 70} if r["prompt"] in outside else r for r in tiny.demonstrations(12)]
    artifact = sft.run(tiny.sft_args(tmp_path, records, eval_fraction=0.4))
    assert f"dropped {len(outside)} of {len(outside)} demonstrations" in capsys.readouterr().err
    assert artifact.manifest["metrics"]["demonstrations"] == 12 - len(outside)
    assert "eval_loss" not in artifact.manifest["metrics"]


# Packing


def test_packing_puts_examples_into_one_row(tmp_path, trainers):
    tiny.published(tmp_path, "base")
    sft.run(tiny.sft_args(tmp_path, packing=True, resid_pdrop=0.0))
    assert len(trainers[0].train_dataset) == 1
    assert len(trainers[0].train_dataset[0]["seq_lengths"]) == 8


def test_packing_is_refused_where_examples_would_see_each_other(tmp_path):
    registry = tiny.published(tmp_path, "base", architecture="opt")
    with pytest.raises(
        TrainingError, match=r"^packing: examples would see each other in OPTForCausalLM .* set it to false$"
    ):
        sft.run(tiny.sft_args(tmp_path, packing=True))
    assert not (registry.root / "tiny" / "sft").exists()


def test_a_missing_base_names_the_command(tmp_path):
    with pytest.raises(
        MissingStage, match=r"no base in run 'tiny': .* train one: .*scripts/pretrain\.py --run_name tiny"
    ):
        sft.run(tiny.sft_args(tmp_path))
    assert not (tmp_path / "runs").exists()


def test_raw_text_is_a_tenth_of_the_examples(tmp_path):
    tiny.published(tmp_path, "base")
    text = tiny.write_lines(tmp_path / "text.jsonl", [{"text": t} for t in tiny.text()])
    args = tiny.sft_args(tmp_path, tiny.demonstrations(18), ptx_dataset_name=text, ptx_block_size=16)
    artifact = sft.run(args)
    assert artifact.manifest["metrics"]["training_examples"] == 20
    assert [d["kind"] for d in artifact.manifest["data"]] == ["demonstrations", "text"]


def test_raw_text_of_whole_documents_has_no_padding_among_the_examples(tmp_path):
    path = tiny.published(tmp_path, "base").require("base", "tiny").path
    text = tiny.write_lines(tmp_path / "text.jsonl", [{"text": "1234"}, {"text": "5678"}])
    args = tiny.sft_args(
        tmp_path, ptx_dataset_name=text, ptx_block_size=8, ptx_packing_strategy="bfd_split", ptx_fraction=0.5
    )
    tokenizer = models.load_tokenizer(path)
    mixed = sft.with_pretraining_mix(args, tokenizer, Dataset.from_dict({"input_ids": [[1]], "labels": [[1]]}), 64, [])
    (row,) = [row for row in mixed if row["input_ids"] != [1]]
    assert row["input_ids"] == row["labels"] and len(row["input_ids"]) == 5
    assert tokenizer.decode(row["input_ids"]) in ("1234<|endoftext|>", "5678<|endoftext|>")


@pytest.fixture
def judged(tmp_path):
    """A registry with a reward model, and arguments that choose among three epochs by it."""
    registry = tiny.published(tmp_path, "base", "sft")
    source = registry.require("sft", "tiny").path
    tokenizer = models.load_tokenizer(source)
    reward = models.load_scalar_model(source, tokenizer, new_head=True)
    with registry.draft("tiny", "rm") as draft:
        reward.save_pretrained(draft.path)
        tokenizer.save_pretrained(draft.path)
        draft.publish(parents=[registry.require("sft", "tiny")])
    args = tiny.sft_args(
        tmp_path, max_steps=-1, num_train_epochs=3, eval_fraction=0.3, reward_model_path="tiny/rm", response_length=4
    )
    return registry, args


def test_the_epoch_that_the_reward_model_likes_best_is_published(judged, monkeypatch):
    _, args = judged
    scores = iter([0.5, 2.0, 1.0])
    monkeypatch.setattr(sft, "score_answers", lambda *_: torch.tensor([next(scores)]))
    seen = []
    keep = sft.ChooseByReward.on_epoch_end

    def look(self, args, state, control, model=None, **kwargs):
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return keep(self, args, state, control, model=model, **kwargs)

    monkeypatch.setattr(sft.ChooseByReward, "on_epoch_end", look)
    artifact = sft.run(args)
    assert artifact.manifest["metrics"]["chosen_eval_reward"] == 2.0
    assert artifact.manifest["metrics"]["chosen_epoch"] == 2.0
    published = tiny.weights(artifact)
    assert all(torch.equal(published[name], seen[1][name]) for name in published)
    assert any(not torch.equal(published[name], seen[2][name]) for name in published)


def test_an_epoch_that_was_saved_and_not_yet_scored_is_scored_on_resume(judged, monkeypatch):
    _, args = judged
    args = dataclasses.replace(args, save_steps=1)
    whole = sft.run(args)
    chosen = whole.manifest["metrics"]["chosen_epoch"]
    keep, epochs = sft.ChooseByReward.on_epoch_end, []

    def stop(self, *arguments, **kwargs):
        epochs.append(1)
        if len(epochs) == chosen:
            raise KeyboardInterrupt
        return keep(self, *arguments, **kwargs)

    monkeypatch.setattr(sft.ChooseByReward, "on_epoch_end", stop)
    with pytest.raises(KeyboardInterrupt):
        sft.run(args)
    monkeypatch.setattr(sft.ChooseByReward, "on_epoch_end", keep)
    resumed = sft.run(dataclasses.replace(args, resume_from_checkpoint="latest"))
    assert resumed.weights_sha256 == whole.weights_sha256
    assert resumed.manifest["metrics"]["chosen_epoch"] == chosen


def test_a_choice_without_held_out_prompts_or_with_another_tokenizer_is_refused(judged, tmp_path):
    registry, args = judged
    few = dataclasses.replace(args, eval_fraction=0.01)
    with pytest.raises(TrainingError, match="chooses by held-out prompts and there are none; raise eval_fraction"):
        sft.run(few)
    tokenizer = models.load_tokenizer(registry.require("rm", "tiny").path)
    tokenizer.add_tokens(["<another>"])
    model = models.load_scalar_model(registry.require("rm", "tiny").path, tokenizer)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "rm")
    with pytest.raises(TrainingError, match="has another tokenizer than the model; it cannot choose"):
        sft.run(dataclasses.replace(args, reward_model_path=str(tmp_path / "rm")))


def test_the_head_of_a_gpu_has_the_loss_of_a_cpu_s(tmp_path, monkeypatch):
    """SFTTrainer's tiled head, by the call that a GPU makes: losses and norms of three steps of two batches, and evaluation."""
    changes = {"max_steps": 3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "eval_fraction": 0.2}
    found = []
    for place in ("cpu", "gpu"):
        tiny.published(tmp_path / place, "base")
        if place == "gpu":
            monkeypatch.setattr(
                sft.CompletionTrainer,
                "compute_loss",
                lambda self, model, inputs, return_outputs=False, num_items_in_batch=None: SFTTrainer.compute_loss(
                    self, self.unmasked(model), inputs, num_items_in_batch=num_items_in_batch
                ),
            )
        artifact = sft.run(tiny.sft_args(tmp_path / place, tiny.demonstrations(20), resid_pdrop=0.0, **changes))
        lines = tiny.history(artifact)
        found.append([line[name] for line in lines for name in ("loss", "grad_norm", "eval_loss") if name in line])
    assert len(found[0]) >= 7 and found[1] == pytest.approx(found[0], rel=1e-3)


def test_only_positions_before_a_trained_token_are_unembedded(tmp_path, monkeypatch):
    tiny.published(tmp_path, "base")
    kept = []
    forward = sft.CompletionTrainer.compute_loss

    def look(self, model, inputs, *args, **kwargs):
        hook = self.model.lm_head.register_forward_hook(
            lambda *call: kept.append((call[-1].shape[1], inputs["labels"]))
        )
        try:
            return forward(self, model, inputs, *args, **kwargs)
        finally:
            hook.remove()

    monkeypatch.setattr(sft.CompletionTrainer, "compute_loss", look)
    on_the_cpu = {"use_cpu": True}  # on a GPU it is SFTTrainer's own head, which unembeds no others either
    sft.run(tiny.sft_args(tmp_path, max_steps=1, training_arguments=on_the_cpu))
    ((positions, labels),) = kept
    assert positions == int((labels[:, 1:] != -100).any(dim=0).sum()) < labels.shape[1] - 1
