"""`make demo`, small: every stage runs, every figure is there, and one seed gives one summary."""

import json
import random
import sys
from pathlib import Path

import pytest
import tiny

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))

from demo_world import best_answers, judge, render, sample
from demo_world.curve import draw, watched_run
from demo_world.demo import Demo, make_labelers, read, run
from demo_world.evaluate import BagOfWords, true_ranks
from demo_world.templates import KINDS

from rlhf.registry import Registry

SMALL = {
    "base": {"max_steps": 30},
    "sft": {"max_steps": 20},
    "rm": {"max_steps": 5},
    "ppo": {"total_episodes": 64, "batch_size": 32, "num_mini_batches": 2, "eval_episodes": 8},
}


def words(options):
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


OVERRIDES = {stage: words(options) for stage, options in SMALL.items()}
GROUPS = {"familiar": 80, "held_out_fact": 20, "held_out_phrasing": 20}
CANONICAL = {"prompt", "completions", "ranks", "ended", "labeler", "user", "use_case"}
FIGURES = {
    "rm_accuracy",
    "rm_accuracy_exact",
    "rm_ece",
    "rm_demonstrations_mean",
    "peak_memory_gib",
    "length_accuracy",
    "bag_of_words_accuracy",
    "cleaning",
    "labeler_agreement",
    "win_rate",
    "win_rate_ci95",
    "win_rate_permuted",
    "win_rate_by_group",
    "scores",
    "ppo_minus_sft",
    "sft_share_of_best",
    "kl",
    "length",
    "eos_rate",
    "perplexity",
    "seconds",
    "seed",
    "versions",
}


@pytest.mark.slow
def test_the_demo_runs_from_nothing_to_a_summary(tmp_path, capfd, monkeypatch):
    from demo_world.terminal import show

    monkeypatch.setattr("demo_world.generate.EVAL_SIZES", GROUPS)  # models that know nothing answer at length

    demo = Demo(tmp_path, "demo", 3, scale=0.02, overrides=OVERRIDES)
    summary = run(demo)
    assert json.loads((tmp_path / "demo" / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert summary.keys() >= FIGURES
    assert {g: v["prompts"] for g, v in summary["win_rate_by_group"].items()} == GROUPS
    assert summary["rm_accuracy_prompts"] == GROUPS["familiar"]
    assert summary["scores"]["best"]["utility"] == pytest.approx(1)
    registry = Registry(tmp_path)
    tree = registry.lineage(registry.require("ppo", "demo"))
    assert {node.ref for node in tree.parents} == {"demo/sft/v1", "demo/rm/v1"}
    for artifact in registry.list("demo"):
        registry.verify(artifact)
    show(demo, summary)
    shown = capfd.readouterr().out
    assert "win rate" in shown and "lineage" in shown and "PPO − SFT" in shown and "next      rlhf registry ls" in shown
    for stage in (*summary["seconds"], "base/v1", "summary.json"):
        assert stage in shown.replace("\n", "")  # a long path is broken at the terminal's width
    examples = json.loads((tmp_path / "demo" / "examples.json").read_text())
    assert len(examples) == 3 and all(example["answers"].keys() == {"base", "sft", "ppo"} for example in examples)
    for example in examples:
        asked, *_ = example["prompt"].removeprefix("User: ").split("\n")
        assert "".join(asked.split()) in "".join(shown.split())
    assert summary["peak_memory_gib"] < 4 and abs(summary["rm_demonstrations_mean"]) < 0.01
    compared = read(tmp_path / "demo" / "data" / "comparisons.jsonl")
    assert all(c.keys() <= CANONICAL for c in compared)  # nothing of the judge but the labelers' ranks
    by_use_case = json.loads((registry.evals_dir(registry.require("rm", "demo")) / "rm.json").read_text())[
        "by_use_case"
    ]
    assert by_use_case and set(by_use_case) <= set(KINDS)
    long = SMALL["ppo"] | {
        "total_episodes": 128,
        "learning_rate": 0.05,
        "kl_budget": 0.001,
    }  # passed in the second rollout
    rows, stop = watched_run(demo, rollouts=3, every=1, count=20, more=words(long))
    assert [row["rollouts"] for row in rows] == [0, 1, 2, 3] and stop == 2
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-4) and rows[0]["win_rate"] == 0.5 and rows[2]["kl"] != rows[0]["kl"]
    draw(rows, stop, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    again = run(Demo(tmp_path / "again", "demo", 3, scale=0.02, overrides=OVERRIDES))
    for one in (again, summary):
        del one["seconds"], one["peak_memory_gib"]
    assert again == summary


def test_the_true_order_has_ties_where_the_judge_sees_none_better():
    prompt = render(sample(random.Random(0), "open_qa"), "")
    assert true_ranks(prompt, [" qwerty", best_answers(prompt)[0], " asdf"]) == [2, 1, 2]
    answers = [best_answers(prompt)[0] + more for more in ("", " Tobo eats nuts.", " Tobo eats nuts. Mira is a cat.")]
    utilities = [judge(prompt, text).utility for text in answers]
    assert utilities[0] > utilities[1] > utilities[2] and round(utilities[1]) == round(utilities[2]) == 0
    assert true_ranks(prompt, answers, steps=None) == [1, 2, 3] and true_ranks(prompt, answers, steps=2) == [1, 2, 2]


def test_an_answer_that_looks_like_markup_is_shown_as_it_is(capsys):
    from demo_world.terminal import side_by_side
    from rich.console import Console

    score = dict.fromkeys(("helpful", "truthful", "harmless", "utility"), 1.0)
    answers = {"sft": {"text": " a [/b] c", **score}, "ppo": {"text": " [red]d", **score}}
    Console().print(side_by_side({"prompt": "User: [/i] what?\nAssistant:", "answers": answers}))
    shown = capsys.readouterr().out
    assert "a [/b] c" in shown and "[red]d" in shown and "[/i] what?" in shown


def test_random_labelers_are_asked_for_by_name(tmp_path):
    names = make_labelers(Demo(tmp_path, "demo", 3, labelers="random")).names
    assert names and all(name.startswith("random") for name in names)
    assert not any(name.startswith("random") for name in make_labelers(Demo(tmp_path, "demo", 3)).names)


def test_the_bag_of_words_learns_a_word():
    comparisons = [{"completions": [f" good a{i}", f" bad a{i}"], "ranks": [1, 2]} for i in range(20)]
    good, bad = BagOfWords(comparisons).scores([" good", " bad"])
    assert good > bad


def test_the_bag_of_words_counts_words_and_takes_each_prompt_s_own_answers():
    """ "b" wins over "a" and "d" over "c"; were the second prompt's pair taken from the first's answers, "d" would stay at 0."""
    comparisons = [
        {"completions": [" a", " b", " a"], "ranks": [2, 1, 2]},
        {"completions": [" c", " d"], "ranks": [2, 1]},
    ]
    model = BagOfWords(comparisons)
    assert model.bags([" a a d", " z", ""]).tolist() == [[2, 0, 0, 1], [0] * 4, [0] * 4]
    a, b, c, d, none = model.scores([" a", " b", " c", " d", " z"])
    assert min(b, d) > 1 and max(a, c) < -1 and none == 0
    assert BagOfWords([{"completions": [" a", " b"], "ranks": [1, 1]}]).scores([" a", " b"]) == [0, 0]


@pytest.mark.slow
def test_a_script_without_arguments_runs_the_demo_s_recipe(tmp_path):
    """From nothing: the world is written first, and the stage publishes what its recipe says."""
    done = tiny.launch([sys.executable, "-c", START.format(stage="pretrain")], RLHF_TEST_FOLDER=str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "writing the demo world" in done.stderr
    assert Registry(tmp_path / "runs").require("base", "demo").manifest["config"]["vocab_size"] == 1024


START = """
import os
from rlhf import cli, config
read = config.read_yaml
config.read_yaml = lambda *args: read(*args) | {{"max_steps": 2}}  # the recipe itself takes minutes
os.chdir(os.environ["RLHF_TEST_FOLDER"])
cli.run_stage("{stage}", [])
"""
