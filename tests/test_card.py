"""Cards: every figure from the manifest, nothing else, in metadata that huggingface_hub's own classes read back."""

import re

import pytest
from huggingface_hub import ModelCard

from rlhf import card
from rlhf.manifest import RegistryError
from rlhf.registry import Registry

HH = {"name": "Anthropic/hh-rlhf", "kind": "comparisons", "records": 1800, "sha256": "ab" * 32}


@pytest.fixture
def registry(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # local data and models are looked for from here
    return Registry(tmp_path / "runs")


def publish(registry, ref, prepare=lambda folder: None, extra=None, **facts):
    """A version with its card; returns both, the card as the Hub's class reads it from the file."""
    run, stage = ref.split("/")
    facts = {"parents": [], "base_model": None, "config": {}, "data": [], "metrics": {}, **facts}
    with registry.draft(run, stage) as draft:
        (draft.path / "model.safetensors").write_bytes(ref.encode())
        prepare(draft.path)
        card.write(draft.path, run, stage, **facts, extra=extra)
        artifact = draft.publish(**facts, extra=extra)
    return artifact, ModelCard.load(artifact.path / "README.md")


def section(text, title):
    match = re.search(rf"^## {title}\n\n(.*?)(?=\n\n## |\Z)", text, re.S | re.M)
    return match[1] if match else None


def test_the_metadata_is_what_the_hub_reads(registry):
    metrics = {"accuracy": 0.725, "accuracy_ci95": [0.7, 0.75], "pairs": 900, "prompts": 180, "margin": 1.5}
    _, read = publish(
        *(registry, "demo/rm"),
        base_model="facebook/opt-125m",
        config={"dataset_name": HH["name"], "dataset_config": "harmless", "dataset_test_split": "test"},
        data=[HH, {"name": "Salesforce/wikitext", "kind": "text", "records": 3, "sha256": "c"}],
        metrics=metrics,
        extra={"license": "apache-2.0"},
    )
    data = read.data.to_dict()
    assert {key: data[key] for key in data if key != "model-index"} == {
        "base_model": "facebook/opt-125m",
        "base_model_relation": "finetune",
        "datasets": ["Anthropic/hh-rlhf", "Salesforce/wikitext"],
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-classification",
        "tags": ["rlhf", "rm", "reward-model"],
    }
    (result,) = read.data.eval_results  # parsed by huggingface_hub from the model-index
    assert (result.task_type, result.dataset_type) == ("text-classification", "Anthropic/hh-rlhf")
    assert (result.dataset_config, result.dataset_split) == ("harmless", "test")
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.725)
    assert result.metric_name == "Pair accuracy (95 % CI 0.7 – 0.75)" and read.data.model_name == "demo/rm"
    assert ModelCard(str(read)).data.to_dict() == data


def test_nothing_that_is_not_recorded_is_claimed(registry):
    _, read = publish(registry, "demo/sft")
    assert set(read.data.to_dict()) == {"library_name", "pipeline_tag", "tags"}
    assert "No licence is recorded" in read.text and "No held-out evaluation is recorded." in read.text
    for title in ("Where it comes from", "Data", "Metrics", "Figures", "Samples", "Hyperparameters"):
        assert section(read.text, title) is None


def test_only_what_is_on_the_hub_is_named_in_the_metadata(registry, tmp_path):
    (tmp_path / "data" / "mine").mkdir(parents=True)
    (tmp_path / "models" / "gpt2").mkdir(parents=True)
    local = [{"name": name, "records": 1, "sha256": "x"} for name in ("data/mine", "data/x.jsonl", "in memory", "hh")]
    _, read = publish(registry, "demo/sft", data=local, base_model="models/gpt2", metrics={"eval_loss": 2.0})
    assert "datasets" not in read.data.to_dict() and "base_model" not in read.data.to_dict()
    assert read.data.eval_results[0].dataset_type == "data-mine"  # a name, and no id of the Hub
    _, read = publish(registry, "demo/sft", base_model=str(tmp_path / "models" / "gpt2"))
    assert str(tmp_path) not in read.content and "- `gpt2` (a checkpoint from outside)" in read.text
    assert publish(registry, "demo/sft", base_model="gpt2")[1].data.base_model == "gpt2"


def test_a_licence_that_the_hub_has_no_id_for_goes_by_its_name(registry):
    _, read = publish(registry, "demo/sft", extra={"license": "OPT 175B Licence"})
    assert (read.data.license, read.data.license_name) == ("other", "opt-175b-licence")
    assert "No licence is recorded" not in read.text


def test_lineage_goes_down_to_the_base_with_full_hashes(registry):
    base, _ = publish(registry, "demo/base", data=[{"name": "Salesforce/wikitext", "records": 1, "sha256": "c"}])
    sft, _ = publish(registry, "demo/sft", parents=[base], data=[HH])
    rm, _ = publish(registry, "demo/rm", parents=[sft], data=[HH])
    outside, _ = publish(registry, "far/sft", base_model="facebook/opt-125m")
    _, read = publish(registry, "demo/ppo", parents=[sft, rm])
    assert section(read.text, "Where it comes from").splitlines() == [
        f"- `demo/sft/v1`, weights sha256 `{sft.weights_sha256}`",
        f"  - `demo/base/v1`, weights sha256 `{base.weights_sha256}`",
        f"- `demo/rm/v1`, weights sha256 `{rm.weights_sha256}`",
        f"  - `demo/sft/v1`, weights sha256 `{sft.weights_sha256}`",
        f"    - `demo/base/v1`, weights sha256 `{base.weights_sha256}`",
    ]
    assert read.data.datasets == ["Anthropic/hh-rlhf", "Salesforce/wikitext"]  # those of its ancestors
    assert "base_model" not in read.data.to_dict()  # trained from scratch
    _, read = publish(registry, "far/rm", parents=[outside])
    assert read.data.base_model == "facebook/opt-125m"
    assert section(read.text, "Where it comes from").endswith("\n  - `facebook/opt-125m` (a checkpoint from outside)")


def test_tables_hold_values_intervals_and_licences(registry):
    metrics = {
        "score_difference": 1.23456,
        "score_difference_ci95": [1.0, 1.5],
        "test": {"win_rate": 0.5, "win_rate_ci95": [0.25, 0.75]},
        "stopped": "budget | of 6\nnats",
    }
    _, read = publish(registry, "demo/ppo", metrics=metrics, data=[{**HH, "license": "mit"}, {"name": "b"}])
    assert section(read.text, "Metrics").splitlines()[2:] == [
        "| score_difference | 1.235 | 1 – 1.5 |",
        "| test.win_rate | 0.5 | 0.25 – 0.75 |",
        r"| stopped | budget \| of 6 nats |  |",
    ]
    rows = section(read.text, "Data").splitlines()[2:]
    assert rows[0] == f"| Anthropic/hh-rlhf | comparisons | 1800 | `{'ab' * 32}` | mit |"
    assert rows[1] == "| b | not recorded | not recorded | not recorded | not recorded |"
    assert [(result.metric_value, result.metric_name) for result in read.data.eval_results] == [
        (1.23456, "Reward over the SFT model's (95 % CI 1 – 1.5)"),
        (0.5, "Win rate, test (95 % CI 0.25 – 0.75)"),
    ]


def test_an_accuracy_over_no_pair_was_not_measured(registry):
    _, read = publish(
        registry, "demo/rm", data=[HH], metrics={"accuracy": 0.5, "accuracy_ci95": [0.0, 1.0], "pairs": 0}
    )
    assert read.data.eval_results is None
    assert "No held-out evaluation is recorded." in read.text


def test_samples_and_figures(registry):
    def draw(folder):
        (folder / "figures").mkdir()
        (folder / "figures" / "reward by step.png").write_bytes(b"PNG")

    samples = [{"prompt": "Write code", "completion": "```\n---\n## No section\n```", "score": 0.5, "ended": True}]
    _, read = publish(registry, "demo/ppo", draw, extra={"samples": samples})
    assert section(read.text, "Figures") == "![figures/reward by step.png](figures/reward%20by%20step.png)"
    assert "````text\n```\n---\n## No section\n```\n````\n\nscore: 0.5, ended: True" in read.text
    assert len(re.findall("````", read.text)) == 2  # the fence is longer than the sample's own


@pytest.mark.parametrize("stage", ["base", "sft", "rm", "ppo"])
def test_it_is_loaded_in_three_lines(registry, stage):
    _, read = publish(registry, f"demo/{stage}", config={"hub_model_id": "alice/demo"})
    code = re.search(r"```python\n(.*?)\n```", section(read.text, "How to load it"), re.S)[1].splitlines()
    auto = "AutoModelForSequenceClassification" if stage == "rm" else "AutoModelForCausalLM"
    assert code == [
        f"from transformers import {auto}, AutoTokenizer",
        'tokenizer = AutoTokenizer.from_pretrained("alice/demo")',
        f'model = {auto}.from_pretrained("alice/demo")',
    ]
    for line in re.findall(r"```python\n(.*?)\n```", read.text, re.S):
        compile(line, "card", "exec")


def test_a_bias_that_plain_transformers_cannot_keep_is_told(registry):
    _, read = publish(registry, "demo/rm", metrics={"bias": 0.5, "bias_kept_in": "config.reward_bias"})
    assert ".logits[0, 0] + model.config.reward_bias\n" in read.text
    _, read = publish(registry, "demo/rm", metrics={"bias": 0.5, "bias_kept_in": "the last norm's bias"})
    assert ".logits[0, 0]\n" in read.text


def test_adapters_are_said_to_be_adapters(registry):
    def adapt(folder):
        (folder / "adapter_config.json").write_text("{}")

    _, read = publish(registry, "demo/sft", adapt, base_model="gpt2")
    assert (read.data.library_name, read.data["base_model_relation"]) == ("peft", "adapter")


def test_an_adapters_score_has_the_bias_of_its_record(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    facts = {"parents": [], "base_model": None, "config": {}, "data": [], "metrics": {}, "extra": None}
    card.write(
        *(tmp_path, "demo", "rm"), **facts, adapters={".": {"ref": "some/llama", "sha256": "c", "reward_bias": -0.25}}
    )
    assert ".logits[0, 0] + -0.25\n" in (tmp_path / "README.md").read_text()


def test_the_config_is_shown_without_tokens_and_without_peoples_folders(registry):
    token = "hf_oauth_" + "a1_B-2." * 8
    config = {
        "learning_rate": 1e-5,
        "dataset_name": "/home/somebody/answers.jsonl",
        "save_steps": None,
        "training_arguments": {"hub_token": "secret", "run_name": f"x {token}"},
    }
    _, read = publish(registry, "demo/sft", config=config)
    shown = section(read.text, "Hyperparameters")
    assert "learning_rate: 1.0e-05" in shown and "dataset_name: answers.jsonl" in shown and "save_steps" not in shown
    assert "hub_token: <hidden>" in shown and "run_name: <hidden>" in shown
    assert not any(word in read.content for word in (token, "secret", "somebody"))


def test_what_is_no_number_stops_the_card_as_it_stops_the_manifest(registry):
    with pytest.raises(RegistryError, match=r"metrics\.eval_loss is nan"):
        publish(registry, "demo/sft", metrics={"eval_loss": float("nan")})
