"""Perturbations, what counts as a flip and a gain, and the commands on a published version."""

import json
import random

import pytest
import tiny
import torch

from rlhf import probe, reward
from rlhf.cli import main
from rlhf.config import RewardArgs
from rlhf.probe import PERTURBATIONS, Case
from rlhf.registry import Registry

ANSWER = " It is important to begin early. Many people buy small gifts, but most of them ask for help. Choose well."


def changed(name, answer=ANSWER, prompt="How do I choose presents for my family?", seed=0):
    return PERTURBATIONS[name].change(answer, prompt, random.Random(seed))


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_a_perturbation_changes_an_answer_and_nothing_of_its_kind_breaks_it(name):
    assert changed(name) != ANSWER and changed(name) == changed(name)
    for answer in ("7", " ", "好的。没有问题。", "a\n\nb", "..."):
        assert isinstance(changed(name, answer), str)
    assert PERTURBATIONS[name].effect in ("same", "worse") and PERTURBATIONS[name].level in (
        "character",
        "word",
        "sentence",
    )


def test_what_they_do():
    words = ANSWER.split()
    assert changed("truncation").split() == words[: len(words) // 2]
    assert sorted(changed("word order").split()) == sorted(words) and changed("word order").startswith(" ")
    assert 0 < len(words) - len(changed("dropped words").split()) < 0.4 * len(words)
    assert changed("repetition") == ANSWER + " Choose well." * 2
    assert changed("synonyms").startswith(" It is significant to start early. Numerous persons purchase little gifts,")
    assert changed("keyword stuffing") == ANSWER + " choose presents family choose presents family"
    typed = changed("typos").split()
    assert [sorted(word) for word in typed] == [sorted(word) for word in words] and typed != words
    assert len(changed("dropped letters")) == len(ANSWER) - 1  # of 14 words with four letters or more
    assert changed("spaces").split() == words
    assert changed("capitals") == ANSWER.upper()
    assert "important" not in changed("empty praise")


def case(before, after, other):
    return Case("Q", "a", "b", "c", before, after, other)


def test_texts_of_cases_are_no_markup(capsys):
    """Prompts of other models hold [INST] and [/INST], which a terminal's markup would take for its own."""
    kind = {"level": "word", "effect": "worse", "cases": 1, "gains": 1.0, "gains_ci95": [0.5, 1.0], "mean_change": 2.0}
    worst = {"prompt": "[INST] Q [/INST]", "preferred": "a", "perturbed": "[/a] b", "reward": 0.0}
    kind["worst"] = [{**worst, "reward_perturbed": 2.0, "other": "c", "reward_other": 0.0, "flips": False}]
    probe.print_probe({"version": "r/rm/v1", "data": "[bold].jsonl", "perturbations": {"word order": kind}}, 5)
    told = capsys.readouterr().out
    assert "[INST] Q [/INST]" in told and "[/a] b" in told and "[bold].jsonl" in told


def test_flips_and_gains_by_hand():
    cases = [
        case(2.0, 1.0, 0.0),  # lower, still ahead
        case(2.0, 0.0, 1.0),  # lower, and behind: a flip
        case(1.0, 3.0, 0.0),  # higher: a gain
        case(0.0, 1.0, 2.0),  # a pair that was not in order: a gain, and no flip
    ]
    found = probe.rates(cases)
    assert found["cases"] == 4 and found["pairs_in_order"] == 3
    assert found["gains"] == 0.5 and found["flips"] == pytest.approx(1 / 3)
    assert found["mean_change"] == pytest.approx((-1 - 2 + 2 + 1) / 4)
    assert [w["reward_perturbed"] for w in probe.worst_of(cases, "worse", 1)] == [3.0]
    assert [w["flips"] for w in probe.worst_of(cases, "same", 9)] == [True]
    assert probe.rates([]) == {"cases": 0, "pairs_in_order": 0}


def test_the_best_answer_is_perturbed_and_compared_with_the_next(tokenizer):
    record = {"prompt": "Q", "completions": [" low", " best one here", " middle"], "ranks": [3, 1, 2], "ended": None}
    seen = []

    def score(items):
        seen.extend(items)
        return [[1.0, 0.5, 0.7] for _ in items]

    (found,) = probe.cases_of(score, tokenizer, [record], PERTURBATIONS["capitals"], 0, 64)
    assert (found.preferred, found.perturbed, found.other) == (" best one here", " BEST ONE HERE", " middle")
    assert found.flips and found.gain == -0.5
    assert tokenizer.decode(seen[0]["completions"][1][:-1]) == " BEST ONE HERE"
    assert seen[0]["completions"][0][-1] == tokenizer.eos_token_id
    assert probe.cases_of(score, tokenizer, [record], PERTURBATIONS["capitals"], 0, 4) == []  # too long


# The commands


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run whose reward model counts geese, with an ensemble of three heads and labelers, and held-out comparisons."""
    folder = tmp_path_factory.mktemp("rm")
    tiny.published(folder, "sft")
    records = tiny.comparisons(60)
    records = [{**r, "labeler": f"labeler-{i % 3}", "use_case": f"case {i % 2}"} for i, r in enumerate(records)]
    records += [{**r, "labeler": "labeler-9"} for r in records[:30]]
    args = tiny.reward_args(
        folder, records, max_steps=40, learning_rate=3e-3, eval_fraction=0.3, logging_steps=40, heads=3
    )
    reward.run(args)
    return folder


def run(folder, *words):
    """The command in this process, with the registry of the fixture."""
    return main([*words[:2], "--root", str(folder / "runs"), *words[2:]])


def test_eval_says_what_training_said(trained, capsys):
    registry = Registry(trained / "runs")
    artifact = registry.require("rm", "tiny")
    folder = registry.evals_dir(artifact)
    at_the_end = json.loads((folder / "rm.json").read_text())
    metrics = artifact.manifest["metrics"]
    assert metrics["accuracy"] == at_the_end["accuracy"] > 0.8
    assert metrics["labeler_agreement"] == 1.0  # labeler-9 repeats what the others said
    assert (artifact.path / "evaluation" / "rm-reliability.png").is_file()
    assert "evaluation/rm-reliability.png" in (artifact.path / "README.md").read_text()
    (folder / "rm.json").unlink()

    assert run(trained, "eval", "tiny/rm") == 0
    told = capsys.readouterr().out
    again = json.loads((folder / "rm.json").read_text())
    for name in ("accuracy", "pairs", "longer_is_better"):
        assert again[name] == pytest.approx(at_the_end[name], abs=1e-6), name
    assert again["calibration"]["ece"] == pytest.approx(at_the_end["calibration"]["ece"], abs=1e-4)
    assert again["ensemble"]["members"] == 3
    assert again["ensemble"]["std_of_margin"] == pytest.approx(at_the_end["ensemble"]["std_of_margin"], abs=1e-4)
    assert set(again["by_use_case"]) == {"case 0", "case 1"} and "labeler-9" in again["by_labeler"]
    assert abs(again["scores"]["demonstrations"]["mean"]) < 0.5
    assert "use case case 0" in told and str(folder / "rm.json") in told
    registry.verify(artifact)  # nothing of it changed


def test_the_published_head_is_the_mean_of_the_ensemble(trained):
    from safetensors.torch import load_file

    artifact = Registry(trained / "runs").require("rm", "tiny")
    heads = load_file(artifact.path / reward.HEADS)
    weights = tiny.weights(artifact)
    assert heads["weight"].shape == (3, 32) and heads["bias"].shape == (3,)
    torch.testing.assert_close(weights["score.weight"], heads["weight"].mean(0, keepdim=True))
    assert heads["weight"].std(0).mean() > 0.01  # they are three
    model, _ = tiny.load_reward(artifact)  # plain transformers has one label
    assert model.config.num_labels == 1


def test_demonstrations_score_zero_by_every_head(trained):
    from safetensors.torch import load_file

    from rlhf.reward_eval import comparisons_of, open_version

    version = open_version(Registry(trained / "runs").require("rm", "tiny"))
    _, train = comparisons_of(version, None)
    rows = reward.demonstration_rows(version.args, version.tokenizer, train, version.limit)
    heads = load_file(version.artifact.path / reward.HEADS)
    with reward.all_heads(version.model, heads["weight"]):
        by_head = reward.score_rows(version.score, rows) + heads["bias"]
    torch.testing.assert_close(by_head.mean(dim=0), torch.zeros(3), rtol=0, atol=1e-4)
    one = reward.score_rows(version.score, rows)  # and the published reward is the mean of theirs
    torch.testing.assert_close(one, by_head.mean(dim=1), rtol=0, atol=1e-4)


def test_probe_writes_rates_and_worst_cases(trained, capsys):
    assert run(trained, "probe", "tiny/rm", "--kinds", "truncation", "repetition", "synonyms") == 0
    told = " ".join(capsys.readouterr().out.split())
    registry = Registry(trained / "runs")
    found = json.loads((registry.evals_dir(registry.require("rm", "tiny")) / "probe.json").read_text())
    kinds = found["perturbations"]
    assert list(kinds) == ["truncation", "repetition", "synonyms"] and found["version"] == "tiny/rm/v1"
    assert kinds["truncation"]["mean_change"] < 0  # half of the geese are gone
    low, high = kinds["truncation"]["flips_ci95"]
    assert 0 <= low <= kinds["truncation"]["flips"] <= high <= 1
    assert kinds["synonyms"]["cases"] == 0  # geese have none
    assert "scores higher" in told and "truncation" in told
    for kind in kinds.values():
        for worst in kind["worst"]:
            assert worst["reward_perturbed"] > worst["reward"] and worst["perturbed"] != worst["preferred"]


def test_another_file_has_its_own_name(trained, capsys):
    data = tiny.write_lines(trained / "other set.jsonl", tiny.comparisons(6, seed=5))
    assert run(trained, "eval", "tiny/rm/v1", "--data", data, "--max-prompts", "4", "--members", "tiny/rm/v1") == 0
    registry = Registry(trained / "runs")
    found = json.loads((registry.evals_dir(registry.require("rm", "tiny")) / "rm-other-set.jsonl.json").read_text())
    assert found["prompts"] == 4 and found["ensemble"]["std_of_margin"] == pytest.approx(0.0, abs=1e-6)


def test_versions_of_other_seeds_are_an_ensemble(trained, capsys, monkeypatch):
    """Trained alike but for the seed: the mean of their rewards, how far apart they are, and each one's accuracy."""
    monkeypatch.setenv("COLUMNS", "160")
    settings = {"max_steps": 20, "learning_rate": 3e-3, "eval_fraction": 0.3, "logging_steps": 40}
    records = [json.loads(line) for line in (trained / "comparisons.jsonl").read_text().splitlines()]
    for seed in (7, 8):
        reward.run(tiny.reward_args(trained, records, run_name="tiny", seed=seed, **settings))
    registry = Registry(trained / "runs")
    one, other = (registry.get(f"tiny/rm/v{version}") for version in (2, 3))
    assert run(trained, "eval", one.ref, "--members", other.ref) == 0
    told = " ".join(capsys.readouterr().out.split())
    found = json.loads((registry.evals_dir(one) / "rm.json").read_text())["ensemble"]
    assert found["versions"] == [one.ref, other.ref] and found["members"] == 2
    assert found["member_accuracy"] == pytest.approx(
        [v.manifest["metrics"]["accuracy"] for v in (one, other)], abs=1e-6
    )
    assert found["std_of_margin"] > 0.01 and "ensemble of 2" in told and "their mean reward" in told
    for version in (one, other):
        registry.remove(version)


def test_cross_validation_by_labelers(trained, capsys, monkeypatch):
    trained_on = []
    new_trainer = reward.new_trainer
    monkeypatch.setattr(reward, "new_trainer", lambda *a: trained_on.append(len(a[4])) or new_trainer(*a))
    assert run(trained, "eval", "tiny/rm", "--cross-validate", "3") == 0
    registry = Registry(trained / "runs")
    artifact = registry.require("rm", "tiny")
    found = json.loads((registry.evals_dir(artifact) / "rm.json").read_text())["held_out_labelers"]
    groups = [fold["labelers"] for fold in found["folds"]]
    assert groups == [["labeler-0", "labeler-9"], ["labeler-1"], ["labeler-2"]]

    args = RewardArgs(**artifact.manifest["config"])
    train, held_out = (list(records) for records in reward.load_splits(args, "comparisons"))
    for fold, names, count in zip(found["folds"], groups, trained_on):
        assert count == sum(record["labeler"] not in names for record in train)  # none of the group's
        for title, inside in (("held_out_labelers", True), ("training_labelers", False)):
            prompts = {record["prompt"] for record in held_out if (record["labeler"] in names) == inside}
            assert fold[title]["prompts"] == len(prompts)
    values = torch.tensor([fold["held_out_labelers"]["accuracy"] for fold in found["folds"]])
    assert found["mean"] == pytest.approx(values.mean().item()) and found["mean"] > 0.7
    assert found["standard_error"] == pytest.approx(values.std().item() / 3**0.5)
    assert "held-out labelers" in capsys.readouterr().out
    assert tiny.left_over(registry, "rm") == ["evals"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["eval", "tiny/rm/v7"], "tiny/rm"),
        (["eval", "tiny/sft"], "tiny/sft/v1 is of stage sft; give a reward model: RUN/rm"),
        (["eval", "nonsense"], "nonsense"),
        (["eval", "tiny/rm", "--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["eval", "tiny/rm", "--demonstrations", "nowhere.jsonl"], "nowhere.jsonl"),
        (["eval", "tiny/rm", "--members", "tiny/sft"], "stage sft"),
        (["probe", "tiny/rm", "--kinds", "typoes"], "no perturbation 'typoes'; there are: typos,"),
        (["probe", "tiny/rm", "--kinds", "synonyms"], "no perturbation of synonyms changes an answer"),
        (["probe", "tiny/sft"], "is of stage sft"),
        (["eval", "tiny/rm", "--data", "comparisons.jsonl", "--format", "hhh"], "format is 'hhh'"),
    ],
)
def test_bad_input_is_one_line_and_status_2(trained, capsys, words, told):
    before = sorted(p.name for p in (trained / "runs").rglob("*"))
    assert run(trained, *words) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("error: ") and told in error[0], error
    assert sorted(p.name for p in (trained / "runs").rglob("*")) == before  # nothing half-written


def test_ties_alone_and_no_labelers_are_told(trained, capsys):
    ties = tiny.write_lines(trained / "ties.jsonl", [{"prompt": "Q", "completions": ["a", "b"], "ranks": [1, 1]}])
    for command in ("eval", "probe"):
        assert run(trained, command, "tiny/rm", "--data", ties) == 2
        assert "every held-out comparison is a tie" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--max-prompts", "0"], ["--batch-size", "x"], ["--cross-validate", "-1"]])
def test_wrong_numbers_are_refused(trained, capsys, words):
    with pytest.raises(SystemExit) as stop:
        run(trained, "eval", "tiny/rm", *words)
    assert stop.value.code == 2 and words[0] in capsys.readouterr().err


def test_a_model_without_held_out_comparisons_asks_for_some(tmp_path, capsys):
    tiny.published(tmp_path, "sft")
    reward.run(tiny.reward_args(tmp_path))
    capsys.readouterr()
    for command in ("eval", "probe"):
        assert run(tmp_path, command, "tiny/rm") == 2
        assert "trained without holding comparisons out; give some" in capsys.readouterr().err
