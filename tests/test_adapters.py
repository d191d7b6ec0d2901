"""Parameter-efficient training through the stages: adapters, quantised bases, 8-bit optimisers, and one base for four models."""

import dataclasses
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import tiny
import torch
from conftest import EOS, byte_level, configuration, random_model
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from safetensors import SafetensorError
from safetensors.torch import load_file
from test_ppo import RULE, gradient_of_update, interrupt_after, ppo_args, stages
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    MixtralConfig,
)

from rlhf import RLHFError, adapters, bases, cli, hub, merging, models, ppo, reward, sft
from rlhf.actors import load_models, reward_sources
from rlhf.config import ConfigError
from rlhf.data.encode import encode_completions, encode_prompts
from rlhf.decoding import can_preallocate
from rlhf.planning.advice import job_of, memory_advice, setup_of
from rlhf.registry import HashMismatch, Registry
from rlhf.training import resolve

LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 16, "lora_dropout": 0.1}
QUANTISED = {"4-bit": {"load_in_4bit": True}, "8-bit": {"load_in_8bit": True}}
ARCHITECTURES = ["gpt2", "opt"]
ROWS = [[5, 9, 30, 41, 7], [8, 8, 100, 3], [60, 61, 62, 63, 64, 65, 66]]


def chain(tmp_path, architecture="gpt2", **changes):
    """A registry with tiny/sft and tiny/rm, adapters on tiny/base, as their stages train them."""
    registry = tiny.published(tmp_path, "base", architecture=architecture)
    sft.run(tiny.sft_args(tmp_path, **LORA | changes))
    reward.run(tiny.reward_args(tmp_path, **LORA | changes))
    return registry


def published_chain(tmp_path, chains, architecture="gpt2"):
    """A copy of the chain that this session has trained."""
    shutil.copytree(chains[architecture].root, tmp_path / "runs")
    return Registry(tmp_path / "runs")


@pytest.fixture(scope="module")
def chains(tmp_path_factory):
    """A trained chain of each architecture, for the tests that only read it."""
    return {name: chain(tmp_path_factory.mktemp(name), name) for name in ARCHITECTURES}


def trainer_of(args):
    """PPO's loop with all its parts, as `run` makes it, whatever the stages published."""
    registry = Registry(args.output_dir)
    path, _ = resolve(registry, args.sft_model_path, "tiny", "sft")
    sources = reward_sources(args, registry)
    make_optimizer = ppo.optimizer_factory(args)
    accelerator = ppo.make_accelerator(args, registry.root)
    tokenizer = models.load_tokenizer(path)
    model, actors = load_models(args, accelerator, tokenizer, path, sources, args.critic_path or sources[0][0])
    prompts, _, data = ppo.load_prompts(args, tokenizer, actors)
    pretraining = ppo.load_pretraining(args, tokenizer, actors.policy, data)
    return ppo.PPO(args, accelerator, model, make_optimizer(model), actors, prompts, pretraining)


@torch.no_grad()
def logits(model):
    return torch.cat([model(input_ids=torch.tensor([row])).logits[0] for row in ROWS])


def scores(model):
    return tiny.scores(model, ROWS)


def words(tokenizer, values):
    """Logits of the ids that are words: a PAD that plain loaders add has a row of its own."""
    return values[:, : tokenizer.pad_token_id]


# ------------------------------------------------------------------------------------------------ what stages publish


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_adapters_of_a_run_stand_on_one_base(tmp_path, chains, architecture):
    registry = published_chain(tmp_path, chains, architecture)
    base = registry.require("base", "tiny")
    artifacts = [registry.require(stage, "tiny") for stage in ("sft", "rm")]
    artifacts.append(ppo.run(ppo_args(tmp_path, ema_decay=1.0, **LORA)))  # the average stays where it started
    for artifact in artifacts:
        for part, recorded in artifact.adapters.items():
            assert (recorded["kind"], recorded["ref"]) == ("artifact", "tiny/base/v1")
            assert recorded["sha256"] == base.weights_sha256 and recorded["revision"] is None
            saved = load_file(artifact.path / part / "adapter_model.safetensors")
            assert not any("wte" in name or "embed_tokens" in name for name in saved)
            config = json.loads((artifact.path / part / "adapter_config.json").read_text())
            assert Path(config["base_model_name_or_path"]).is_dir() and config["base_model_name_or_path"].endswith(
                "tiny/base/v1"
            )
        assert not list(artifact.path.rglob("model.safetensors")) and not list(artifact.path.rglob("config.json"))
        registry.verify(artifact)
        card = (artifact.path / "README.md").read_text()
        assert "library_name: peft" in card and "With `peft` installed" in card and base.weights_sha256 in card
        assert list(artifact.path.rglob("README.md")) == [artifact.path / "README.md"]
    assert set(artifacts[2].adapters) == {".", "critic", "ema"}
    start, last, average = (
        load_file(path / "adapter_model.safetensors")
        for path in (artifacts[0].path, artifacts[2].path, artifacts[2].path / "ema")
    )
    assert start.keys() == last.keys() == average.keys()
    assert all(torch.equal(start[name], average[name]) for name in start)
    assert any(not torch.equal(start[name], last[name]) for name in start)
    assert {p["ref"] for p in artifacts[2].parents} == {"tiny/sft/v1", "tiny/rm/v1"}
    assert registry.prunable(keep=1) == []  # the base is an ancestor of them all


def test_what_is_trained_is_the_adapter_and_the_base_stays(tmp_path, chains):
    registry = published_chain(tmp_path, chains)
    before = tiny.weights(registry.require("base", "tiny"))
    args = ppo_args(tmp_path, **LORA)
    trainer = trainer_of(args)
    names = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert names and all("lora_" in name or "modules_to_save" in name for name in names)
    critic = {name for name in names if "modules_to_save" in name}
    assert critic and all(name.startswith("critic.") and (".score." in name or ".ln_f." in name) for name in critic)
    kept = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.step()
    for name, p in trainer.model.named_parameters():
        if name not in names:
            assert torch.equal(p, kept[name]), name
    assert any(not torch.equal(p, kept[name]) for name, p in trainer.model.named_parameters() if name in names)
    inner = trainer.model.policy.get_base_model()
    layer = inner.transformer.h[0].attn.c_attn
    assert torch.equal(layer.base_layer.weight, before["transformer.h.0.attn.c_attn.weight"])
    assert layer.base_layer.weight.shape[0] == layer.lora_A["default"].in_features  # Conv1D: [in, out]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_plain_peft_and_transformers_load_what_is_published(tmp_path, chains, architecture):
    registry = chains[architecture]
    artifact = registry.require("sft", "tiny")
    tokenizer = AutoTokenizer.from_pretrained(artifact.path)
    ours = words(tokenizer, logits(models.load_policy(artifact.path, tokenizer).eval()))
    for kind in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
        assert_close(words(tokenizer, logits(kind.from_pretrained(artifact.path).eval())), ours, rtol=0, atol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(registry.require("base", "tiny").path).eval()
    assert (words(tokenizer, logits(base)) - ours).abs().max() > 1e-4  # the adapter does something

    by_card = by_its_card(artifact)
    assert not any(module.training for module in by_card["model"].modules())  # dropout is off
    assert_close(words(tokenizer, logits(by_card["model"])), ours, rtol=0, atol=1e-5)

    artifact = registry.require("rm", "tiny")
    scorer = models.load_scalar_model(artifact.path, tokenizer).eval()
    own = scores(scorer)
    by_card = by_its_card(artifact, prompt="Feed 1:", answer=" geese")
    row = tokenizer("Feed 1: geese" + tokenizer.eos_token)["input_ids"]
    assert by_card["reward"].item() == pytest.approx(tiny.scores(scorer, [row]).item(), abs=1e-5)
    for kind in (AutoPeftModelForSequenceClassification, AutoModelForSequenceClassification):
        assert_close(scores(kind.from_pretrained(artifact.path, num_labels=1).eval()), own, rtol=0, atol=1e-5)


def by_its_card(artifact, **names):
    """What the lines of a version's card make, from its own folder."""
    for code in re.findall(r"```python\n(.*?)\n```", (artifact.path / "README.md").read_text(), re.S):
        exec(code.replace("user/name", str(artifact.path)), names)
    return names


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_demonstrations_score_zero_by_plain_peft(tmp_path, architecture):
    """The constant is in the last norm, which is saved beside the adapter."""
    registry = tiny.published(tmp_path, "base", "sft", architecture=architecture)
    records = tiny.comparisons(6)
    artifact = reward.run(tiny.reward_args(tmp_path, records, learning_rate=5e-3, **LORA))
    assert artifact.manifest["metrics"]["bias_kept_in"] == "the last norm's bias"
    assert abs(artifact.manifest["metrics"]["bias"]) > 1e-3
    assert artifact.adapters["."]["ref"] == "tiny/sft/v1" and registry.require("rm", "tiny") == artifact
    tokenizer = AutoTokenizer.from_pretrained(artifact.path)
    best = [r["completions"][r["ranks"].index(1)] for r in records]
    pairs = zip(encode_prompts(tokenizer, [r["prompt"] for r in records]), encode_completions(tokenizer, best))
    model = AutoPeftModelForSequenceClassification.from_pretrained(artifact.path, num_labels=1).eval()
    assert tiny.scores(model, [p + c for p, c in pairs]).mean().item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "near"),
    [
        ({}, 1e-5),
        (QUANTISED["4-bit"], 1e-5),
        (QUANTISED["8-bit"], 0.05),  # its products are rounded, activations and all
        ({"use_dora": True, "lora_target_modules": ["all-linear"]}, 1e-5),
        (QUANTISED["4-bit"] | {"use_dora": True, "lora_target_modules": ["all-linear"]}, 1e-5),
    ],
    ids=["plain", "4-bit", "8-bit", "dora", "4-bit-dora"],
)
def test_demonstrations_score_zero_where_the_head_reads_a_projection(tmp_path, checkpoints, changes, near):
    """OPT-350m's shape: what is added to the last norm's bias goes through a projection, quantised or adapted."""
    args = tiny.reward_args(
        tmp_path,
        tiny.comparisons(6),
        model_name_or_path=str(checkpoints["opt-350m"]),
        learning_rate=1e-2,
        **LORA | {"lora_dropout": 0.0} | changes,
    )
    metrics = reward.run(args).manifest["metrics"]
    assert metrics["bias_kept_in"] == "the last norm's bias" and abs(metrics["bias"]) > 0.1
    assert metrics["demonstrations_mean"] == pytest.approx(0, abs=near)


@pytest.mark.parametrize("changes", [{"use_dora": True}, {}], ids=["dora", "lora"])
def test_a_card_loads_an_adapter_whose_base_pads_with_eos(tmp_path, changes):
    """transformers takes PAD from the base's config, and DoRA's magnitudes not at all."""
    tokenizer = byte_level([EOS], eos_token=EOS, bos_token=EOS, pad_token=EOS)
    config = configuration("gpt2", len(tokenizer))
    config.pad_token_id = config.eos_token_id
    random_model(AutoModelForCausalLM, config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    lora = LORA | changes | {"learning_rate": 1e-2, "model_name_or_path": str(tmp_path / "base")}
    trained = sft.run(tiny.sft_args(tmp_path, **lora))
    own = models.load_tokenizer(trained.path)
    ours = logits(models.load_policy(trained.path, own).eval())
    assert_close(words(own, logits(by_its_card(trained)["model"])), words(own, ours), rtol=0, atol=1e-5)
    artifact = reward.run(tiny.reward_args(tmp_path, **lora))
    scorer = models.load_scalar_model(artifact.path, own).eval()
    row = own("Feed 1: geese" + own.eos_token)["input_ids"]
    by_card = by_its_card(artifact, prompt="Feed 1:", answer=" geese")
    assert by_card["reward"].item() == pytest.approx(tiny.scores(scorer, [row]).item(), abs=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_reward_model_starts_from_the_sft_adapter(chains, architecture):
    registry = chains[architecture]
    artifact = registry.require("sft", "tiny")
    args = tiny.reward_args(registry.root.parent, **LORA)
    tokenizer = models.load_tokenizer(artifact.path)
    start = models.load_scalar_model(artifact.path, tokenizer, new_head=True, peft=args).eval()
    policy = models.load_policy(artifact.path, tokenizer).eval()
    ids = torch.tensor([ROWS[2]])
    with torch.no_grad():
        ours, theirs = (models.hidden_states(m, ids, torch.ones_like(ids)) for m in (start, policy))
    assert_close(ours, theirs, rtol=0, atol=1e-5)
    full = dataclasses.replace(args, use_peft=False)
    whole = models.load_scalar_model(artifact.path, tokenizer, new_head=True, peft=full).eval()
    with torch.no_grad():
        assert_close(models.hidden_states(whole, ids, torch.ones_like(ids)), theirs, rtol=0, atol=1e-5)
    assert all(p.requires_grad for p in whole.parameters())


@pytest.mark.parametrize("lora", [LORA, {}], ids=["adapter", "whole"])
def test_a_reward_model_starts_from_an_sft_adapter_that_brings_an_unembedding(tmp_path, opt_tokenizer, lora, caplog):
    """Trained whole beside the adapter; it goes, as the unembedding of whole weights does."""
    config = configuration("opt", len(opt_tokenizer))
    config.tie_word_embeddings = False
    random_model(AutoModelForCausalLM, config).save_pretrained(tmp_path / "base")
    opt_tokenizer.save_pretrained(tmp_path / "base")
    saved = {"lora_modules_to_save": ["lm_head"], "model_name_or_path": str(tmp_path / "base")}
    trained = sft.run(tiny.sft_args(tmp_path, **LORA | saved))
    assert any("lm_head" in name for name in load_file(trained.path / "adapter_model.safetensors"))
    caplog.clear()
    artifact = reward.run(tiny.reward_args(tmp_path, **lora, **({"lora_modules_to_save": ["lm_head"]} if lora else {})))
    assert "trained further as it was made" not in caplog.text
    assert bool(artifact.adapters) == bool(lora)
    assert not any("lm_head" in name for file in artifact.path.glob("*.safetensors") for name in load_file(file))


@pytest.mark.parametrize(
    ("architecture", "module"), [("gpt2", "wpe"), ("opt", "embed_positions"), ("opt", "embed_tokens")]
)
def test_embeddings_are_trained_whole_beside_an_adapter_on_a_16_bit_base(tmp_path, checkpoints, architecture, module):
    base = shutil.copytree(checkpoints[architecture], tmp_path / "base")
    if module == "embed_tokens":  # a tied one is refused
        config = json.loads((base / "config.json").read_text()) | {"tie_word_embeddings": False}
        (base / "config.json").write_text(json.dumps(config))
        model = AutoModelForCausalLM.from_pretrained(checkpoints[architecture])
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model.config.tie_word_embeddings = False
        model.save_pretrained(base)
    changes = LORA | {"dtype": "bfloat16", "lora_modules_to_save": [module], "model_name_or_path": str(base)}
    artifact = sft.run(tiny.sft_args(tmp_path, **changes | {"learning_rate": 1e-2}))
    (name,) = [n for n in load_file(artifact.path / "adapter_model.safetensors") if module in n]
    found = load_file(artifact.path / "adapter_model.safetensors")[name]
    start = load_file(base / "model.safetensors")[name.removeprefix("base_model.model.")]
    assert found.dtype == torch.float32 and 1e-4 < (found - start).abs().max() < 0.5


def test_options_for_a_new_adapter_that_are_not_used_are_told(tmp_path, chains, caplog):
    published_chain(tmp_path, chains)
    reward.run(tiny.reward_args(tmp_path, **LORA))
    assert "is trained further as it was made" not in caplog.text
    other = {"use_dora": True, "lora_r": 8, "lora_target_modules": ["c_fc"], "lora_modules_to_save": ["wpe"]}
    reward.run(tiny.reward_args(tmp_path, **LORA | other))
    said = "trained further as it was made, without lora_r, lora_target_modules, lora_modules_to_save, use_dora"
    assert said in caplog.text
    caplog.clear()
    reward.run(tiny.reward_args(tmp_path, **LORA | {"lora_target_modules": ["all-linear"]}))
    assert "trained further as it was made, without lora_target_modules\n" in caplog.text


def test_a_run_from_an_average_knows_the_version_that_it_is_of(tmp_path, chains):
    registry = published_chain(tmp_path, chains)
    first = ppo.run(ppo_args(tmp_path, ema_decay=0.5, **LORA))
    args = ppo_args(tmp_path, sft_model_path=str(first.path / "ema"), total_episodes=40, save_steps=2, **LORA)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo.PPO, "collect", interrupt_after(ppo.PPO.collect, 3))
        with pytest.raises(KeyboardInterrupt):
            ppo.run(args)
    args = dataclasses.replace(args, resume_from_checkpoint="latest")
    with pytest.raises(RLHFError, match=r"sft_model_path \(tiny/ppo/v1 \w+ ema -> tiny/ppo/v1 \w+\)"):
        ppo.run(dataclasses.replace(args, sft_model_path=str(first.path)))
    second = ppo.run(args)
    assert [parent["ref"] for parent in second.parents] == [first.ref, "tiny/rm/v1"]
    start = load_file(first.path / "ema" / "adapter_model.safetensors")
    assert start.keys() == load_file(second.path / "adapter_model.safetensors").keys()
    assert registry.lineage(second).parents[0].artifact == first
    copy = shutil.copytree(first.path, tmp_path / "copy")
    assert resolve(registry, str(copy / "ema"), "tiny", "sft") == (str(copy / "ema"), None)  # which is in no registry


def test_rlhf_eval_reads_an_adapter_that_early_stopping_chose(tmp_path, chains, capsys):
    """Its scores, from the files, are those that training saw: adapter, head, norm and the attention of shared prompts."""
    registry = published_chain(tmp_path, chains)
    settings = {"eval_fraction": 0.3, "early_stopping_patience": 1, "num_train_epochs": 3, "max_steps": -1, **LORA}
    artifact = reward.run(tiny.reward_args(tmp_path, tiny.comparisons(30), **settings))
    said = registry.evals_dir(artifact) / "rm.json"
    trained = json.loads(said.read_text())
    seen = [line["eval_accuracy"] for line in tiny.history(artifact) if "eval_accuracy" in line]
    assert artifact.adapters and artifact.manifest["metrics"]["accuracy"] == pytest.approx(max(seen), abs=1e-6)
    said.unlink()
    assert cli.main(["eval", "tiny/rm", "--root", str(registry.root)]) == 0
    opened = json.loads(said.read_text())
    assert opened["accuracy"] == trained["accuracy"]
    for name, found in trained["scores"].items():
        assert opened["scores"][name] == pytest.approx(found, abs=1e-5), name


def test_deepspeed_may_make_whole_trained_modules_16_bit(chains):
    """Head and norm stand in float32 on a 16-bit base; DeepSpeed makes them 16-bit, with a float32 copy in its optimiser."""
    artifact = chains["gpt2"].require("sft", "tiny")
    tokenizer = models.load_tokenizer(artifact.path)
    args = tiny.reward_args(chains["gpt2"].root.parent, **LORA)
    model = models.load_scalar_model(artifact.path, tokenizer, new_head=True, peft=args, dtype="bfloat16").eval()
    head = adapters.trained(adapters.plain(model).score)
    ids = torch.tensor([ROWS[2]])
    everything = torch.ones_like(ids, dtype=torch.bool)
    assert head.weight.dtype == torch.float32
    with torch.no_grad():
        before = models.values_at(model, ids, everything, everything)
        torch.nn.Module.to(model, torch.bfloat16)
        assert head.weight.dtype == torch.bfloat16
        assert_close(models.values_at(model, ids, everything, everything), before, rtol=0, atol=0.05)


def test_stages_without_use_peft_train_the_merged_weights(tmp_path, chains):
    registry = published_chain(tmp_path, chains)
    rm = reward.run(tiny.reward_args(tmp_path))
    artifact = ppo.run(ppo_args(tmp_path))
    assert not rm.adapters and not artifact.adapters and (artifact.path / "model.safetensors").is_file()
    assert tiny.history(artifact)[0]["objective/kl"] == pytest.approx(0, abs=1e-6)
    assert [p["ref"] for p in artifact.parents] == ["tiny/sft/v1", "tiny/rm/v2"]
    registry.verify(artifact)


def test_the_best_epoch_of_an_adapter_is_what_is_published(tmp_path, monkeypatch):
    tiny.published(tmp_path, "base", "sft")
    reward.run(tiny.reward_args(tmp_path, **LORA))
    more = {"reward_model_path": "tiny/rm", "eval_fraction": 0.3, "response_length": 6, "max_steps": -1}
    args = tiny.sft_args(tmp_path, num_train_epochs=3.0, **more, **LORA)
    kept = {}
    load_best = sft.ChooseByReward.load_best

    def spy(self, model):
        kept.update(load_file(self.folder / "adapter_model.safetensors"))
        return load_best(self, model)

    monkeypatch.setattr(sft.ChooseByReward, "load_best", spy)
    # The first epoch is the best one, so that the weights at the end are not what is published.
    found = iter([torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([0.0])])
    monkeypatch.setattr(sft, "score_answers", lambda *args: next(found))
    artifact = sft.run(args)
    assert artifact.manifest["metrics"]["chosen_epoch"] == 1.0
    published = load_file(artifact.path / "adapter_model.safetensors")
    assert published.keys() == kept.keys()
    assert all(torch.equal(published[name], kept[name]) for name in kept)


def test_rewards_that_are_functions_train_a_critic_with_a_new_head(tmp_path, chains):
    published_chain(tmp_path, chains)
    more = {"reward_model_path": [], "reward_functions": ["test_ppo:count_the"]}
    artifact = ppo.run(ppo_args(tmp_path, **more, **LORA))
    assert {base["ref"] for base in artifact.adapters.values()} == {"tiny/base/v1"}
    saved = load_file(artifact.path / "critic" / "adapter_model.safetensors")
    assert saved["base_model.model.score.weight"].abs().max() > 0


def test_a_later_round_trains_the_published_adapters_further(tmp_path, chains):
    registry = published_chain(tmp_path, chains)
    first = ppo.run(ppo_args(tmp_path, **LORA))
    args = ppo_args(tmp_path, sft_model_path="tiny/ppo/v1", critic_path="tiny/ppo/v1", **LORA)
    again = ppo.run(args)
    assert {base["ref"] for base in again.adapters.values()} == {"tiny/base/v1"}
    assert tiny.history(again)[0]["objective/kl"] == 0  # to the policy that it started from
    name = "base_model.model.score.weight"
    head = load_file(first.path / "critic" / "adapter_model.safetensors")[name]
    tokenizer = models.load_tokenizer(first.path)
    critic = models.load_scalar_model(first.path / "critic", tokenizer, peft=args)
    assert torch.equal(adapters.trained(critic.score).weight, head)
    registry.verify(again)


def test_rank_stabilised_dora_and_chosen_modules(tmp_path):
    tiny.published(tmp_path, "base", architecture="opt")
    more = {"lora_target_modules": ["q_proj", "fc1"], "use_rslora": True, "use_dora": True}
    artifact = sft.run(tiny.sft_args(tmp_path, **LORA | more))
    config = json.loads((artifact.path / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == {"q_proj", "fc1"} and config["use_rslora"] and config["use_dora"]
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 16, 0.1)
    tokenizer = AutoTokenizer.from_pretrained(artifact.path)
    ours = logits(models.load_policy(artifact.path, tokenizer).eval())
    assert_close(logits(AutoPeftModelForCausalLM.from_pretrained(artifact.path).eval()), ours, rtol=0, atol=1e-5)


def mixture(tmp_path, tokenizer):
    """A folder with a small Mixtral, whose experts' weights are stacks of matrices outside linear modules."""
    config = MixtralConfig(
        **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_local_experts": 2},
        **{
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 64,
        },
        **{name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    random_model(AutoModelForCausalLM, config).save_pretrained(tmp_path / "mixture")
    tokenizer.save_pretrained(tmp_path / "mixture")
    return str(tmp_path / "mixture")


def test_every_stage_adapts_the_experts_of_a_mixture(tmp_path, tokenizer, capsys):
    """The weights of experts are no linear modules: they are named as parameters, beside modules or alone."""
    experts = ["experts.gate_up_proj", "experts.down_proj"]
    lora = LORA | {"lora_dropout": 0.0, "lora_target_parameters": experts}
    base = mixture(tmp_path, tokenizer)
    trained = sft.run(tiny.sft_args(tmp_path, model_name_or_path=base, **lora | {"lora_target_modules": ["q_proj"]}))
    names = load_file(trained.path / "adapter_model.safetensors").keys()
    assert any("q_proj" in name for name in names) and any("experts" in name for name in names)
    config = json.loads((trained.path / "adapter_config.json").read_text())
    assert set(config["target_parameters"]) == set(experts)
    reward.run(tiny.reward_args(tmp_path, **lora))
    capsys.readouterr()
    policy = ppo.run(ppo_args(tmp_path, **lora))
    assert "LoRA of rank 4 on q_proj, experts.down_proj, experts.gate_up_proj of" in capsys.readouterr().err
    start, last = (load_file(a.path / "adapter_model.safetensors") for a in (trained, policy))
    assert all(not torch.equal(start[name], last[name]) for name in start if "lora_B" in name)
    ours = logits(models.load_policy(policy.path, models.load_tokenizer(policy.path)).eval())
    assert_close(logits(AutoPeftModelForCausalLM.from_pretrained(policy.path).eval()), ours, rtol=0, atol=1e-5)
    merging.merge(Registry(tmp_path / "runs"), "tiny/ppo")
    whole = Registry(tmp_path / "runs").require("ppo", "tiny")
    assert_close(logits(AutoModelForCausalLM.from_pretrained(whole.path).eval()), ours, rtol=0, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_merged_weights_are_the_adapters(tmp_path, chains, architecture, capsys):
    registry = published_chain(tmp_path, chains, architecture)
    ppo.run(ppo_args(tmp_path, **LORA))
    for stage, parts in (("sft", ["."]), ("rm", ["."]), ("ppo", [".", "ema", "critic"])):
        adapter = registry.require(stage, "tiny")
        assert cli.main(["registry", "merge", f"tiny/{stage}", "--root", str(registry.root)]) == 0
        whole = registry.require(stage, "tiny")
        assert f"{whole.ref}  {whole.path}" in capsys.readouterr().out
        assert (whole.version, [p["ref"] for p in whole.parents]) == (2, [adapter.ref]) and not whole.adapters
        registry.verify(whole)
        for part in parts:
            if stage == "rm" or part == "critic":
                plain = AutoModelForSequenceClassification.from_pretrained(whole.path / part).eval()
                apart = AutoPeftModelForSequenceClassification.from_pretrained(adapter.path / part, num_labels=1).eval()
                assert_close(scores(plain), scores(apart), rtol=0, atol=1e-5)
            else:
                plain = AutoModelForCausalLM.from_pretrained(whole.path / part).eval()
                apart = AutoPeftModelForCausalLM.from_pretrained(adapter.path / part).eval()
                assert_close(logits(plain), words_of(plain, logits(apart)), rtol=0, atol=1e-5)
    assert "library_name: transformers" in (whole.path / "README.md").read_text()
    assert (whole.path / "metrics.jsonl").is_file() and whole.manifest["metrics"] == adapter.manifest["metrics"]


def test_adapters_on_a_16_bit_base_are_merged_in_float32(tmp_path, checkpoints):
    """Rounded to bfloat16 small shares of an adapter would be lost."""
    changes = {"model_name_or_path": str(checkpoints["opt"]), "dtype": "bfloat16", "hub_model_id": "alice/lora"}
    sft.run(tiny.sft_args(tmp_path, **changes, **LORA))
    registry = Registry(tmp_path / "runs")
    adapter, whole = registry.get("tiny/sft"), merging.merge(registry, "tiny/sft")
    assert (
        adapter.manifest["config"]["hub_model_id"] == "alice/lora"
        and "alice/lora" in (adapter.path / "README.md").read_text()
    )
    assert (
        whole.manifest["config"]["hub_model_id"] is None and "alice/lora" not in (whole.path / "README.md").read_text()
    )
    config = json.loads((adapter.path / "adapter_config.json").read_text())
    base = load_file(checkpoints["opt"] / "model.safetensors")
    saved = load_file(adapter.path / "adapter_model.safetensors")
    found = load_file(whole.path / "model.safetensors")
    name = "model.decoder.layers.0.self_attn.q_proj"
    down, up = (saved[f"base_model.model.{name}.lora_{which}.weight"] for which in "AB")
    share = up @ down * config["lora_alpha"] / config["r"]
    assert_close(found[f"{name}.weight"], base[f"{name}.weight"].bfloat16().float() + share, rtol=0, atol=1e-7)
    assert not torch.equal(found[f"{name}.weight"], found[f"{name}.weight"].bfloat16().float())


def test_a_folder_that_plain_peft_names_from_here_is_found_from_anywhere(tmp_path, checkpoints, monkeypatch):
    shutil.copytree(checkpoints["gpt2"], tmp_path / "base")
    first = sft.run(tiny.sft_args(tmp_path, model_name_or_path=str(tmp_path / "base"), **LORA))
    plain = shutil.copytree(first.path, tmp_path / "plain", ignore=lambda *_: ["stage.json"])
    config = json.loads((plain / "adapter_config.json").read_text()) | {"base_model_name_or_path": "base"}
    (plain / "adapter_config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    second = sft.run(tiny.sft_args(tmp_path, model_name_or_path="plain", **LORA))
    assert second.adapters["."]["ref"] == str(tmp_path / "base")
    monkeypatch.chdir(tmp_path.parent)
    Registry(second.root).verify(second)
    noisy(tmp_path / "base")
    with pytest.raises(HashMismatch, match="on other weights than"):
        Registry(second.root).verify(second)


def test_an_adapter_on_a_tied_embedding_is_kept_apart(tmp_path, checkpoints, tokenizer):
    """Of plain peft. Added to the one weight it would change the unembedding too."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_pretrained(checkpoints["gpt2"])
    plain = get_peft_model(plain, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["c_attn", "wte"])).eval()
    with torch.no_grad():
        for weight in (p for p in plain.parameters() if p.requires_grad):
            weight += 0.05 * torch.randn(weight.shape)
    plain.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    ours = models.load_policy(tmp_path / "plain", models.load_tokenizer(tmp_path / "plain")).eval()
    assert_close(words(tokenizer, logits(ours)), words(tokenizer, logits(plain)), rtol=0, atol=1e-5)
    start = {"model_name_or_path": str(tmp_path / "plain")}
    with pytest.raises(RLHFError, match="cannot be merged to be trained: it is on an embedding that is tied"):
        sft.run(tiny.sft_args(tmp_path, **start))
    sft.run(tiny.sft_args(tmp_path, **start, **LORA))
    with pytest.raises(RLHFError, match="tiny/sft/v1 cannot be merged: it is on an embedding that is tied"):
        merging.merge(Registry(tmp_path / "runs"), "tiny/sft")


def words_of(model, values):
    return values[:, : model.config.vocab_size]


def test_later_stages_take_merged_versions(tmp_path, chains, capsys):
    registry = published_chain(tmp_path, chains)
    merging.merge(registry, "tiny/sft")
    artifact = ppo.run(ppo_args(tmp_path, **LORA))
    told = capsys.readouterr().err
    assert {part: base["ref"] for part, base in artifact.adapters.items()} == {
        ".": "tiny/sft/v2",
        "ema": "tiny/sft/v2",
        "critic": "tiny/base/v1",
    }
    assert "two bases are held: the critic's, tiny/base/v1, has other weights than the policy's, tiny/sft/v2" in told
    assert tiny.history(artifact)[0]["objective/kl"] == 0


# ------------------------------------------------------------------------------------------------------ memory modes


def loaded(args):
    """Policy, critic, reference and reward models of a run."""
    trainer = trainer_of(args)
    module = trainer.accelerator.unwrap_model(trainer.model)
    return trainer, (module.policy, trainer.actors.reference, module.critic)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("bits", [None, "4-bit", "8-bit"])
def test_one_base_learns_what_four_models_learn(tmp_path, chains, architecture, bits):
    published_chain(tmp_path, chains, architecture)
    lines = {}
    for share in (True, False):
        args = ppo_args(tmp_path, share_base=share, **LORA | QUANTISED.get(bits, {}))
        trainer = trainer_of(args)
        lines[share] = [trainer.step()[1] for _ in range(2)]
        assert lines[share][0]["objective/kl"] == 0
        assert lines[share][0]["policy/first_ratio"] == pytest.approx(1, abs=1e-5)
    for one, four in zip(lines[True], lines[False]):
        assert one["loss/policy"] == pytest.approx(four["loss/policy"], abs=1e-6)
        assert one["loss/value"] == pytest.approx(four["loss/value"], abs=1e-6)
        assert one["objective/scores"] == pytest.approx(four["objective/scores"], abs=1e-6)
    assert lines[True][1]["objective/kl_k3"] > 0


def test_adapters_learn_what_a_rule_rewards(tmp_path, checkpoints):
    args = ppo_args(
        tmp_path,
        sft_model_path=str(checkpoints["gpt2"]),
        learning_rate=1e-2,
        use_peft=True,
        lora_target_modules=["all-linear"],
        **RULE
        | {"total_episodes": 64 * 24},  # an adapter takes longer to find the letter, and how long depends on the CPU
    )
    history = tiny.history(ppo.run(args))
    start, end = history[0]["objective/scores"], history[-1]["objective/scores"]
    assert end > start + 0.5, f"{start} -> {end}"


def test_a_whole_reward_model_is_critic_and_reward_with_the_adapter_off(tmp_path):
    registry = tiny.published(tmp_path, "base", "sft")
    reward.run(tiny.reward_args(tmp_path))
    args = ppo_args(tmp_path, **LORA)
    trainer, (policy, reference, critic) = loaded(args)
    tokenizer = trainer.actors.tokenizer
    rm = models.load_scalar_model(registry.require("rm", "tiny").path, tokenizer).eval()
    rows, mask = torch.tensor([ROWS[2]]), torch.ones(1, 7, dtype=torch.bool)
    assert_close(models.scalar_scores(critic, rows, mask), models.scalar_scores(rm, rows, mask), rtol=0, atol=1e-6)
    assert policy.started_from.artifact.ref == "tiny/sft/v1" and critic.started_from.artifact.ref == "tiny/rm/v1"
    trainer.step()
    after = models.scalar_scores(critic, rows, mask)
    assert (after - models.scalar_scores(rm, rows, mask)).abs().max() > 1e-6  # the critic learned, the reward did not
    sft_model = models.load_policy(registry.require("sft", "tiny").path, tokenizer).eval()
    assert_close(logits(reference), logits(sft_model), rtol=0, atol=1e-6)
    again = loaded(dataclasses.replace(args, share_base=False))[1]
    one, four = adapters.weight_bytes((policy, reference, critic)), adapters.weight_bytes(again)
    assert one < 0.75 * four


def test_the_bytes_of_weights_are_told(tmp_path, chains, capsys):
    published_chain(tmp_path, chains)
    loaded(ppo_args(tmp_path, **LORA))
    told = capsys.readouterr().err
    assert "weights in memory: " in told and "LoRA of rank 4 on c_attn of tiny/base/v1" in told
    assert "two bases" not in told


def test_weights_in_several_models_are_counted_once():
    model = torch.nn.Linear(10, 10, bias=False)
    assert adapters.weight_bytes([model]) == 400
    other = adapters.twin(model)
    assert other is not model and other.weight is model.weight
    assert adapters.weight_bytes([model, other]) == 400
    assert adapters.weight_bytes([model, torch.nn.Linear(10, 10, bias=False)]) == 800


def test_gradient_checkpointing_gives_the_same_gradients(tmp_path, chains):
    published_chain(tmp_path, chains)
    found = []
    for checkpointing in (False, True):
        args = ppo_args(tmp_path, ptx_coef=0.0, gradient_checkpointing=checkpointing, **LORA)
        found.append(gradient_of_update(args, trainer_of(args))[0])
    assert found[0].keys() == found[1].keys() and found[0]
    for name, gradient in found[0].items():
        assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-8, msg=name)


@pytest.mark.slow
def test_one_base_takes_a_quarter_of_four_models_memory():
    """25 M weights, adapters of rank 16; the losses of a whole PPO step are those of four models."""
    program = [sys.executable, "benchmarks/memory_modes.py", "--json", "--modes", "four_models", "one_base"]
    done = tiny.launch(program, PYTHONPATH=os.pathsep.join(sys.path))
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])  # libraries write above it
    one, four = found["modes"]["one_base"], found["modes"]["four_models"]
    assert found["parameters"] > 25e6
    assert four["weights_bytes"] > 4 * 4 * found["parameters"]  # the measure is not blind: four copies in float32
    assert one["weights_bytes"] <= 0.4 * four["weights_bytes"]
    for name in ("policy_loss", "value_loss", "score"):
        assert one[name] == pytest.approx(four[name], abs=1e-4)
    assert abs(four["policy_loss"]) > 1e-5


@pytest.mark.parametrize("bits", [None, "4-bit", "8-bit"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_bfloat16_base_has_float32_adapters(tmp_path, bits, autocast):
    registry = tiny.published(tmp_path, "base", architecture="opt")
    changes = LORA | QUANTISED.get(bits, {}) | {"dtype": "bfloat16", "bf16": autocast}
    # transformers refuses bf16 where it finds no GPU, unless told that none is wanted.
    on_the_cpu = {} if torch.cuda.is_available() else {"training_arguments": {"use_cpu": True}}
    sft.run(tiny.sft_args(tmp_path, **changes | on_the_cpu))
    reward.run(tiny.reward_args(tmp_path, **changes | on_the_cpu))
    line = tiny.history(ppo.run(ppo_args(tmp_path, **changes)))[0]
    near = 2e-2 if torch.cuda.is_available() else 1e-5
    assert line["objective/kl"] == 0 and line["policy/first_ratio"] == pytest.approx(1, abs=near)
    for part in (".", "critic"):
        saved = load_file(registry.require("ppo", "tiny").path / part / "adapter_model.safetensors")
        assert {w.dtype for w in saved.values()} == {torch.float32}


# -------------------------------------------------------------------------------------------------------- quantised


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("bits", list(QUANTISED))
def test_a_quantised_base_is_trained_through(tmp_path, architecture, bits):
    registry = chain(tmp_path, architecture, **QUANTISED[bits])
    artifact = ppo.run(ppo_args(tmp_path, **LORA | QUANTISED[bits]))
    assert tiny.history(artifact)[0]["objective/kl"] == 0
    for stage in ("sft", "rm", "ppo"):
        artifact = registry.require(stage, "tiny")
        assert all(f"load_in_{bits[0]}bit" in base["quantization"] for base in artifact.adapters.values())
        assert "quantised to" in (artifact.path / "README.md").read_text()
        with pytest.raises(RLHFError, match=f"quantised to {bits[0]} bits"):
            merging.merge(registry, f"tiny/{stage}")
        assert not [p for p in artifact.path.parent.iterdir() if p.name.startswith(".draft")]
    model = models.load_policy(artifact.path, models.load_tokenizer(artifact.path))
    layers = [type(m).__name__ for m in model.modules() if type(m).__name__ in ("Linear4bit", "Linear8bitLt")]
    assert layers and all(("4" in name) == (bits == "4-bit") for name in layers)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("bits", list(QUANTISED))
def test_quantised_layers_answer_in_16_bits_under_autocast(tmp_path, architecture, bits):
    """As linear layers do: else what follows them, keys and values too, is float32, and twice as large."""
    registry = tiny.published(tmp_path, "base", architecture=architecture)
    tokenizer = models.load_tokenizer(registry.require("base", "tiny").path)
    args = tiny.sft_args(tmp_path, **LORA | QUANTISED[bits])
    model = models.load_policy(registry.require("base", "tiny").path, tokenizer, peft=args).eval()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids = torch.tensor([tokenizer("The river runs north")["input_ids"]], device=device)
    seen = []
    for module in model.modules():
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt"):
            module.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    exact = model(input_ids=ids).logits
    assert set(seen) == {exact.dtype}
    seen.clear()
    with torch.autocast(device, dtype=torch.bfloat16):
        output = model(input_ids=ids, use_cache=True)
    assert set(seen) == {torch.bfloat16}
    assert {layer.keys.dtype for layer in output.past_key_values.layers} == {torch.bfloat16}
    assert (output.logits.float() - exact).abs().max() < 0.1 * exact.std()


@pytest.mark.parametrize("bits", list(QUANTISED))
def test_steps_of_4_bit_layers_alone_can_be_recorded(tmp_path, bits):
    """8-bit ones look for columns of large values, and wait for the answer."""
    base = tiny.published(tmp_path, "base").require("base", "tiny").path
    args = tiny.sft_args(tmp_path, **LORA | QUANTISED[bits])
    assert can_preallocate(models.load_policy(base, models.load_tokenizer(base), peft=args)) == (bits == "4-bit")


def test_adapters_on_a_quantised_base_stay_in_float32(tmp_path):
    tiny.published(tmp_path, "base")
    artifact = sft.run(tiny.sft_args(tmp_path, **LORA | QUANTISED["4-bit"]))
    saved = load_file(artifact.path / "adapter_model.safetensors")
    assert {w.dtype for w in saved.values()} == {torch.float32}
    assert any((w != w.bfloat16().float()).any() for w in saved.values())


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit", "adamw_bnb_8bit"])
def test_8_bit_optimisers_step_in_ppo(tmp_path, chains, optim):
    published_chain(tmp_path, chains)
    args = ppo_args(tmp_path, optim=optim, **LORA | {"lora_target_modules": ["c_fc"]})
    trainer = trainer_of(dataclasses.replace(args, use_peft=False))
    trainer.step()
    module = trainer.accelerator.unwrap_model(trainer.model)
    states = trainer.optimizer.state
    large = module.policy.transformer.h[0].mlp.c_fc.weight
    assert states[large]["state1"].dtype == torch.uint8
    assert states[module.policy.transformer.wte.weight]["state1"].dtype == torch.float32


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_8_bit_optimisers_step_in_the_trainers(tmp_path, stage):
    registry = tiny.published(tmp_path, "base", "sft")
    before = tiny.weights(registry.require("sft", "tiny"))["transformer.h.0.mlp.c_fc.weight"]
    make, module = {"sft": (tiny.sft_args, sft), "reward": (tiny.reward_args, reward)}[stage]
    artifact = module.run(make(tmp_path, optim="adamw_8bit"))
    assert (tiny.weights(artifact)["transformer.h.0.mlp.c_fc.weight"] - before).abs().max() > 1e-4


# ---------------------------------------------------------------------------------------------------------- launches


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_launches_that_plans_print_are_real(tmp_path, method):
    """Their options, as `rlhf plan` prints them, through the stages; sizes and the CPU's precision are ours."""
    from rlhf.config import parse
    from rlhf.planning.memory import Job, Setup
    from rlhf.planning.search import launch_command
    from rlhf.planning.shapes import BUILT_IN

    tiny.published(tmp_path, "base")
    job = Job(BUILT_IN["gpt2"], BUILT_IN["gpt2"], gpus=1, ptx=False)
    mine = {"sft": tiny.sft_args, "rm": tiny.reward_args, "ppo": ppo_args}
    for stage, run in (("sft", sft.run), ("rm", reward.run), ("ppo", ppo.run)):
        words = launch_command(stage, job, Setup("single", method, checkpointing=True, micro=2), 2).split()
        options = words[words.index("RECIPE.yaml") + 1 :]
        assert {"--use_peft", "--lora_r"} <= set(options) and ("--load_in_4bit" in options) == (method == "qlora")
        config = tiny.write_config(tmp_path / f"{stage}.json", mine[stage](tmp_path))
        parsed = parse({"rm": "reward"}.get(stage, stage), ["--config", config, *options])
        sizes = {"max_length": 64} if stage != "ppo" else {"max_prompt_length": 16, "response_length": 6}
        if stage == "ppo":
            sizes |= {"batch_size": 8, "num_mini_batches": 2}
        else:
            sizes |= {"training_arguments": {"use_cpu": True}}
        artifact = run(dataclasses.replace(parsed, **sizes))
        assert artifact.adapters["."]["ref"] == "tiny/base/v1"


# ----------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize(
    "changes", [{}, QUANTISED["4-bit"], {"optim": "adamw_8bit"}], ids=["plain", "4-bit", "8-bit-adam"]
)
def test_a_resumed_ppo_run_is_bit_equal(tmp_path, chains, monkeypatch, changes):
    published_chain(tmp_path, chains)
    args = ppo_args(tmp_path, total_episodes=40, save_steps=2, eval_fraction=0.2, **LORA | changes)
    whole = ppo.run(args)
    monkeypatch.setattr(ppo.PPO, "collect", interrupt_after(ppo.PPO.collect, 3))
    with pytest.raises(KeyboardInterrupt):
        ppo.run(args)
    monkeypatch.undo()
    (checkpoint,) = Registry(args.output_dir).work_dir("tiny", "ppo").glob("*/checkpoint-2")
    assert not list(checkpoint.glob("model*.safetensors"))  # the base is not in it
    resumed = ppo.run(dataclasses.replace(args, resume_from_checkpoint="latest"))
    assert resumed.weights_sha256 == whole.weights_sha256
    whole_history, resumed_history = tiny.history(whole), tiny.history(resumed)
    assert [line["loss/policy"] for line in whole_history] == [line["loss/policy"] for line in resumed_history]


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_a_resumed_trainer_is_bit_equal(tmp_path, chains, stage):
    from transformers import Trainer

    published_chain(tmp_path, chains)
    make, module = {"sft": (tiny.sft_args, sft), "reward": (tiny.reward_args, reward)}[stage]
    args = make(tmp_path, max_steps=6, save_steps=2, **LORA)
    whole = module.run(args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "training_step", interrupt_after(Trainer.training_step, 5))
        with pytest.raises(KeyboardInterrupt):
            module.run(args)
    with pytest.raises(RLHFError, match=r"lora_r \(4 -> 8\)"):
        module.run(dataclasses.replace(args, lora_r=8, resume_from_checkpoint="latest"))
    resumed = module.run(dataclasses.replace(args, resume_from_checkpoint="latest"))
    assert resumed.weights_sha256 == whole.weights_sha256


def noisy(folder, seed=3):
    """Adds noise to the weights in a folder, in place."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn(weight.shape)
    model.save_pretrained(folder)


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_resuming_over_a_folder_that_holds_other_weights_now_is_refused(tmp_path, checkpoints, stage):
    """No checkpoint holds the base of adapters, nor PPO's reference; the folder's name says nothing of its weights."""
    from transformers import Trainer

    start = stages(tmp_path).get("tiny/sft").path if stage == "ppo" else checkpoints["gpt2"]
    base = shutil.copytree(start, tmp_path / "base", ignore=lambda *_: ["stage.json"])
    lora = {} if stage == "ppo" else LORA
    make, module, name, owner, step = {
        "sft": (tiny.sft_args, sft, "model_name_or_path", Trainer, "training_step"),
        "reward": (tiny.reward_args, reward, "model_name_or_path", Trainer, "training_step"),
        "ppo": (ppo_args, ppo, "sft_model_path", ppo.PPO, "collect"),
    }[stage]
    length = {"total_episodes": 40} if stage == "ppo" else {"max_steps": 6}
    args = make(tmp_path, save_steps=2, **length, **lora, **{name: str(base)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, step, interrupt_after(getattr(owner, step), 3))
        with pytest.raises(KeyboardInterrupt):
            module.run(args)
    kept = shutil.copytree(base, tmp_path / "kept")
    noisy(base)
    resume = dataclasses.replace(args, resume_from_checkpoint="latest")
    with pytest.raises(RLHFError, match=rf"trained from something else: {name} \(\S+base \w+ -> \S+base \w+\)"):
        module.run(resume)
    shutil.rmtree(base)
    kept.rename(base)
    assert module.run(resume).version == 1


def test_resuming_over_other_adapters_is_refused(tmp_path, chains, monkeypatch):
    """A newer sft version in between: the checkpoint's adapters would stand on weights that they were not trained on."""
    registry = published_chain(tmp_path, chains)
    args = ppo_args(tmp_path, total_episodes=40, save_steps=2, **LORA)
    monkeypatch.setattr(ppo.PPO, "collect", interrupt_after(ppo.PPO.collect, 3))
    with pytest.raises(KeyboardInterrupt):
        ppo.run(args)
    monkeypatch.undo()
    merging.merge(registry, "tiny/sft")
    resume = dataclasses.replace(args, resume_from_checkpoint="latest")
    with pytest.raises(RLHFError, match=r"sft_model_path \(tiny/sft/v1 \w+ -> tiny/sft/v2 "):
        ppo.run(resume)
    (inputs,) = registry.work_dir("tiny", "ppo").glob("*/inputs.json")
    inputs.unlink()  # as an older checkpoint, which says nothing of versions: its adapters still know their base
    with pytest.raises(RLHFError, match="was trained with other base weights"):
        ppo.run(resume)


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"lora_target_modules": ["q_proj"]}, "no linear module 'q_proj'; its linear modules are c_attn, c_fc, c_proj"),
        ({"lora_target_modules": ["ln_f"]}, "no linear module 'ln_f'"),
        ({"lora_target_modules": ["lm_head"]}, "lm_head is the head and takes no adapter here"),
        (
            {"lora_target_parameters": ["c_fc.weight"], "lora_dropout": 0.0},
            "no weight 'c_fc.weight' outside linear modules; it has none; modules go to lora_target_modules",
        ),
        ({"lora_target_parameters": ["experts.down_proj"]}, "set lora_dropout: 0"),
        ({"lora_modules_to_save": ["norm_f"]}, "has no module 'norm_f'"),
        ({"lora_modules_to_save": ["wte"]}, "wte is tied to the other embedding"),
        *(({"lora_modules_to_save": ["c_fc"]} | bits, "c_fc is quantised") for bits in QUANTISED.values()),
    ],
)
def test_modules_that_the_model_does_not_have_are_named(tmp_path, changes, told):
    registry = tiny.published(tmp_path, "base")
    with pytest.raises(RLHFError) as caught:
        sft.run(tiny.sft_args(tmp_path, **LORA | changes))
    assert told in str(caught.value) and "\n" not in str(caught.value)
    assert tiny.left_over(registry, "sft") == []


def test_a_base_that_was_a_folder_is_checked(tmp_path, checkpoints, capsys):
    base = shutil.copytree(checkpoints["gpt2"], tmp_path / "base")
    artifact = sft.run(tiny.sft_args(tmp_path, model_name_or_path=str(base), **LORA))
    verify = ["registry", "verify", artifact.ref, "--root", str(artifact.root)]
    assert cli.main(verify) == 0
    noisy(base)
    assert cli.main(verify) == 2
    assert f"is an adapter on other weights than {base} holds now" in "".join(capsys.readouterr())
    shutil.rmtree(base)
    assert cli.main(verify) == 2
    assert f"is an adapter on {base}, which is not there" in "".join(capsys.readouterr())
    base.mkdir()
    (base / "model.safetensors.index.json").write_text("{")  # torn
    assert cli.main(verify) == 2
    assert f"is an adapter on {base}, which is not there (no index of weights)" in "".join(capsys.readouterr())
    shutil.rmtree(base)
    with pytest.raises(RLHFError, match=f"is an adapter on {base}, which is not there; restore that folder"):
        models.load_policy(artifact.path, models.load_tokenizer(artifact.path))


@pytest.mark.parametrize("make", [tiny.sft_args, tiny.reward_args, ppo_args])
def test_quantisation_needs_adapters(tmp_path, make):
    with pytest.raises(ConfigError, match="load_in_4bit: quantised weights cannot be trained themselves; add use_peft"):
        make(tmp_path, load_in_4bit=True)
    with pytest.raises(ConfigError, match="exclude each other"):
        make(tmp_path, use_peft=True, load_in_4bit=True, load_in_8bit=True)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"lora_target_modules": []}, "lora_target_modules: name modules, or write all-linear alone"),
        (
            {"lora_target_modules": ["all-linear", "c_attn"]},
            "lora_target_modules: name modules, or write all-linear alone",
        ),
        ({"load_in_8bit": True, "use_dora": True}, "use_dora: peft cannot read the size of 8-bit weights"),
    ],
)
def test_settings_that_peft_cannot_follow(tmp_path, changes, says):
    with pytest.raises(ConfigError, match=says):
        tiny.sft_args(tmp_path, **LORA | changes)


def test_a_module_that_is_adapted_and_trained_whole_is_one_line(tmp_path):
    tiny.published(tmp_path, "base")
    with pytest.raises(RLHFError, match=r"^no such adapter can be put on GPT2LMHeadModel: ") as error:
        sft.run(tiny.sft_args(tmp_path, **LORA, lora_modules_to_save=["c_attn"]))
    assert "\n" not in str(error.value)


def test_what_is_trained_whole_is_not_rounded_by_a_16_bit_base(tmp_path, chains):
    """Head and last norm of an adapter come back as they were saved."""
    artifact = published_chain(tmp_path, chains).require("rm", "tiny")
    tokenizer = models.load_tokenizer(artifact.path)
    args = tiny.reward_args(tmp_path, **LORA, dtype="bfloat16")
    model = models.load_scalar_model(artifact.path, tokenizer, dtype="bfloat16", peft=args)
    saved = load_file(artifact.path / "adapter_model.safetensors")
    head = next(w for name, w in saved.items() if name.endswith("score.weight"))
    assert (head.bfloat16() != head).any()
    assert torch.equal(adapters.trained(adapters.plain(model).score).weight.cpu(), head)


def test_an_adapter_of_a_reward_model_is_no_policy(tmp_path, chains):
    artifact = published_chain(tmp_path, chains).require("rm", "tiny")
    with pytest.raises(
        RLHFError, match="is a reward model, which answers with a number and not with text; give a base,"
    ):
        models.load_policy(artifact.path, models.load_tokenizer(artifact.path))


@pytest.mark.parametrize("spread", ["ZeRO 3", "FSDP"])
def test_quantised_weights_are_not_spread(tmp_path, monkeypatch, spread):
    tiny.published(tmp_path, "base")
    if spread == "FSDP":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    else:
        monkeypatch.setattr(bases, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(
        RLHFError, match=r"load_in_4bit and load_in_8bit: quantised weights are not spread .*zero2.yaml"
    ):
        sft.run(tiny.sft_args(tmp_path, **LORA, load_in_4bit=True))


def test_where_memory_ends_the_plan_of_adapters_is_counted(tmp_path, chains):
    """The shapes are those of the bases, since an adapter's folder has no config of a model."""
    published_chain(tmp_path, chains)
    whole = job_of("ppo", ppo_args(tmp_path))
    assert whole.model.name.endswith("tiny/base/v1") and whole.reward.name == whole.model.name
    methods = ({}, LORA, LORA | QUANTISED["4-bit"])
    assert [setup_of(ppo_args(tmp_path, **more)).method for more in methods] == ["full", "lora", "qlora"]
    assert job_of("ppo", ppo_args(tmp_path, **LORA)).lora_r == 4
    assert job_of("ppo", ppo_args(tmp_path, dtype="float32")).dtype == "float32"
    assert job_of("ppo", ppo_args(tmp_path, dtype="bfloat16")).dtype == "bfloat16"
    steps = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    assert job_of("sft", tiny.sft_args(tmp_path, **steps)).sft_batch == 6
    assert job_of("reward", tiny.reward_args(tmp_path, **steps)).rm_batch == 6
    for more, spread in zip(methods, (True, True, False)):
        line = memory_advice("ppo", ppo_args(tmp_path, **more))
        assert "`rlhf plan` counts" in line and ("or spread the model" in line) == spread


def test_an_ensemble_of_heads_takes_no_adapters(tmp_path, capsys):
    told = "heads: an ensemble of heads is trained without adapters; set heads to 1, or use_peft off"
    with pytest.raises(ConfigError, match=told):
        tiny.reward_args(tmp_path, use_peft=True, heads=2)
    with pytest.raises(SystemExit) as stop:
        cli.run_stage("reward", ["--heads", "2", "--use_peft", "true", "--output_dir", str(tmp_path / "runs")])
    assert stop.value.code == 2 and capsys.readouterr().err == f"error: {told}\n"
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("changes", [LORA | QUANTISED["8-bit"], {"optim": "paged_adamw_8bit"}])
def test_without_bitsandbytes_there_is_one_line(tmp_path, monkeypatch, changes):
    tiny.published(tmp_path, "base", "sft")
    find = bases.importlib.util.find_spec
    monkeypatch.setattr(
        bases.importlib.util, "find_spec", lambda name, *more: None if name == "bitsandbytes" else find(name, *more)
    )
    with pytest.raises(RLHFError, match=r"bitsandbytes; pip install 'rlhf\[quant\]'"):
        sft.run(tiny.sft_args(tmp_path, **changes))


def test_an_adapter_whose_base_is_missing_or_differs(tmp_path, chains):
    registry = published_chain(tmp_path, chains)
    artifact, base = registry.require("sft", "tiny"), registry.require("base", "tiny")
    moved = base.path.rename(base.path.with_name("gone"))
    with pytest.raises(RLHFError, match="is an adapter on tiny/base/v1, which is not here"):
        reward.run(tiny.reward_args(tmp_path, **LORA))
    moved.rename(base.path)
    manifest = json.loads((artifact.path / "stage.json").read_text())
    manifest["adapters"]["."]["sha256"] = "0" * 64
    (artifact.path / "stage.json").write_text(json.dumps(manifest))
    with pytest.raises(RLHFError, match="is an adapter on other weights than tiny/base/v1 holds now"):
        reward.run(tiny.reward_args(tmp_path, **LORA))
    with pytest.raises(HashMismatch, match="is an adapter on other weights"):
        registry.verify("tiny/sft")


def test_an_adapter_that_does_not_fit_its_base_is_refused(tmp_path, chains):
    """Of another width, and of another architecture: as plain peft folders, which record no hash."""
    registry = published_chain(tmp_path, chains)
    outside = tmp_path / "adapter"
    shutil.copytree(registry.require("sft", "tiny").path, outside)
    (outside / "stage.json").unlink()
    config = json.loads((outside / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(chains["opt"].require("base", "tiny").path)
    (outside / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(RLHFError, match="does not fit"):
        models.load_policy(outside, models.load_tokenizer(outside))
    (outside / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(RLHFError, match="cannot load the adapter in"):
        models.load_policy(outside, models.load_tokenizer(outside))


def test_what_is_no_adapter_is_not_merged(tmp_path, capsys):
    registry = tiny.published(tmp_path, "base", "sft")
    assert cli.main(["registry", "merge", "tiny/sft", "--root", str(registry.root)]) == 2
    assert "tiny/sft/v1 is no adapter: its weights are whole" in capsys.readouterr().err
    assert tiny.left_over(registry, "sft") == []


def test_a_version_of_another_registry_is_not_merged_into_this_one(tmp_path, chains, capsys):
    registry, other = published_chain(tmp_path, chains), tmp_path / "other"
    path = registry.require("sft", "tiny").path
    assert cli.main(["registry", "merge", str(path), "--root", str(other)]) == 2
    assert f"{path} is in another registry; name it with --root {registry.root}" in capsys.readouterr().err
    assert not other.exists()


@pytest.mark.parametrize("step", ["shutil.copytree", "transformers.PreTrainedModel.save_pretrained", "rlhf.card.write"])
def test_a_full_disk_ends_a_merge_in_one_line(tmp_path, chains, capsys, monkeypatch, step):
    registry = published_chain(tmp_path, chains)
    full = OSError(28, "No space left on device")
    errors = {
        "shutil.copytree": shutil.Error([("a", "b", str(full)), ("c", "d", str(full))]),
        "transformers.PreTrainedModel.save_pretrained": SafetensorError(f"I/O error: {full.strerror} (os error 28)"),
        "rlhf.card.write": full,
    }

    def fail(*_, **__):
        raise errors[step]

    monkeypatch.setattr(step, fail)
    assert cli.main(["registry", "merge", "tiny/sft", "--root", str(registry.root)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: cannot write to {registry.root}/tiny/sft: ") and err.count("\n") == 1
    assert "No space left on device" in err and tiny.left_over(registry, "sft") == []


def test_an_adapter_on_local_weights_is_merged_before_it_is_pushed(tmp_path, chains):
    registry = published_chain(tmp_path, chains)
    with pytest.raises(
        hub.HubError, match="on this machine only: publish whole weights with `rlhf registry merge tiny/sft/v1`"
    ):
        hub.refuse_local_bases(registry.require("sft", "tiny"))
    hub.refuse_local_bases(merging.merge(registry, "tiny/sft"))


def test_a_version_from_elsewhere_finds_its_base_by_its_weights(tmp_path, chains):
    """As `rlhf pull` brings one: here the base has another name."""
    source = published_chain(tmp_path / "there", chains).require("sft", "tiny")
    registry = Registry(tmp_path / "runs")
    base = chains["gpt2"].require("base", "tiny")
    with registry.draft("other", "base") as draft:
        shutil.copytree(base.path, draft.path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("stage.json"))
        draft.publish()
    shutil.move(source.path, tmp_path / "runs" / ".pulled")
    adopted = registry.adopt(tmp_path / "runs" / ".pulled", origin="user/name")
    assert adopted.adapters["."]["ref"] == "other/base/v1"
    registry.verify(adopted)
    models.load_policy(adopted.path, models.load_tokenizer(adopted.path))


# ------------------------------------------------------------------------------------------- bases outside the registry


@pytest.mark.slow
def test_a_base_on_the_hub_is_recorded_with_its_commit(tmp_path):
    """A Hub cache as a download leaves it; the stage runs offline over it, in a process of its own."""
    registry = tiny.published(tmp_path, "base")
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--user--name"
    snapshot = repository / "snapshots" / commit
    shutil.copytree(registry.require("base", "tiny").path, snapshot, ignore=shutil.ignore_patterns("stage.json"))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    config = tiny.write_config(tmp_path / "sft.json", tiny.sft_args(tmp_path, model_name_or_path="user/name", **LORA))
    program = (
        "import sys; from rlhf.cli import run_stage; run_stage('sft', ['--config', sys.argv[1]]);"
        "from peft import AutoPeftModelForCausalLM as Plain; Plain.from_pretrained(sys.argv[2]); print('loaded by peft')"
    )
    command = [sys.executable, "-c", program, config, str(tmp_path / "runs" / "tiny" / "sft" / "v1")]
    done = tiny.launch(command, HF_HUB_CACHE=str(tmp_path / "hub"), PYTHONPATH=os.pathsep.join(sys.path))
    assert "loaded by peft" in done.stdout, done.stderr[-2000:]
    artifact = registry.require("sft", "tiny")
    recorded = artifact.adapters["."]
    assert (recorded["kind"], recorded["ref"], recorded["revision"]) == ("model", "user/name", commit)
    assert recorded["sha256"] == registry.require("base", "tiny").weights_sha256
    written = json.loads((artifact.path / "adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["revision"]) == ("user/name", commit)
    header = (artifact.path / "README.md").read_text().split("---")[1]
    assert "base_model: user/name" in header and "base_model_relation: adapter" in header
    hub.refuse_local_bases(artifact)


def test_a_base_outside_the_registry_is_recorded_by_its_files(tmp_path):
    registry = tiny.published(tmp_path, "base")
    outside = tmp_path / "checkpoint"
    shutil.copytree(registry.require("base", "tiny").path, outside)
    (outside / "stage.json").unlink()
    artifact = sft.run(tiny.sft_args(tmp_path, model_name_or_path=str(outside), **LORA))
    recorded = artifact.adapters["."]
    assert (recorded["kind"], recorded["ref"]) == ("model", str(outside))
    assert recorded["sha256"] == registry.require("base", "tiny").weights_sha256
    tokenizer = models.load_tokenizer(artifact.path)
    models.load_policy(artifact.path, tokenizer)
    model = AutoModelForCausalLM.from_pretrained(outside)
    model.transformer.wte.weight.data += 1
    model.save_pretrained(outside)
    with pytest.raises(RLHFError, match="is an adapter on other weights than"):
        models.load_policy(artifact.path, tokenizer)


def test_an_adapter_of_plain_peft_is_taken(tmp_path, chains):
    registry = published_chain(tmp_path, chains)
    artifact = registry.require("sft", "tiny")
    outside = tmp_path / "adapter"
    shutil.copytree(artifact.path, outside)
    (outside / "stage.json").unlink()
    tokenizer = models.load_tokenizer(artifact.path)
    ours, theirs = (logits(models.load_policy(p, tokenizer).eval()) for p in (artifact.path, outside))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["nobody/nothing", 5, None])
def test_an_adapter_of_plain_peft_without_its_base_names_it(tmp_path, chains, name):
    artifact = chains["gpt2"].require("sft", "tiny")
    outside = shutil.copytree(artifact.path, tmp_path / "adapter", ignore=shutil.ignore_patterns("stage.json"))
    config = json.loads((outside / "adapter_config.json").read_text())
    (outside / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": name}))
    told = (
        "cannot load nobody/nothing, the base of .*/adapter" if name == "nobody/nothing" else "names no base model; set"
    )
    with pytest.raises(RLHFError, match=told):
        models.load_policy(outside, models.load_tokenizer(outside))


def test_a_tokenizer_without_pad_gets_one_and_the_base_keeps_its_size(tmp_path, checkpoints):
    """GPT-2's own tokenizer has no PAD: the row that is added is made anew at each load, and is not in the adapter."""
    folder = tmp_path / "no_pad"
    shutil.copytree(checkpoints["gpt2"], folder)
    bare = byte_level(eos_token=EOS, bos_token=EOS)
    bare.save_pretrained(folder)
    configuration = AutoConfig.from_pretrained(folder)
    configuration.vocab_size, configuration.pad_token_id = len(bare), None
    random_model(AutoModelForCausalLM, configuration).save_pretrained(folder)
    artifact = sft.run(tiny.sft_args(tmp_path, model_name_or_path=str(folder), **LORA))
    ours = models.load_policy(artifact.path, models.load_tokenizer(artifact.path)).eval()
    plain = AutoPeftModelForCausalLM.from_pretrained(artifact.path).eval()
    rows = AutoModelForCausalLM.from_pretrained(folder).config.vocab_size
    assert ours.config.vocab_size == rows + 1
    assert_close(logits(plain)[:, :rows], logits(ours)[:, :rows], rtol=0, atol=1e-5)
