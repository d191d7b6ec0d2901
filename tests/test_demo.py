"""`make demo`, small: every stage runs, every figure is there, and one seed gives one summary."""

import json
import random
import sys
from pathlib import Path

import pytest
import tiny

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))

from demo_world import best_answers, render, sample
from demo_world.curve import draw, watched_run
from demo_world.demo import Demo, run
from demo_world.evaluate import BagOfWords, true_ranks

from rlhf.registry import Registry

SMALL = {
    "base": ["--max_steps", "30"],
    "sft": ["--max_steps", "20"],
    "rm": ["--max_steps", "5"],
    "ppo": ["--total_episodes", "64", "--batch_size", "32", "--num_mini_batches", "2", "--eval_episodes", "8"],
}
GROUPS = {"familiar": 80, "held_out_fact": 20, "held_out_phrasing": 20}
FIGURES = {
    "rm_accuracy",
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
    monkeypatch.setattr("demo_world.evaluate.RM_PROMPTS", 40)

    demo = Demo(tmp_path, "demo", 3, scale=0.02, overrides=SMALL)
    summary = run(demo)
    assert json.loads((tmp_path / "demo" / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert summary.keys() >= FIGURES
    assert {g: v["prompts"] for g, v in summary["win_rate_by_group"].items()} == GROUPS
    assert summary["scores"]["best"]["utility"] == pytest.approx(1)
    registry = Registry(tmp_path)
    tree = registry.lineage(registry.require("ppo", "demo"))
    assert {node.ref for node in tree.parents} == {"demo/sft/v1", "demo/rm/v1"}
    for artifact in registry.list("demo"):
        registry.verify(artifact)
    show(demo, summary)
    shown = capfd.readouterr().out
    assert "win rate" in shown and "lineage" in shown and "PPO − SFT" in shown
    rows, recipe = watched_run(demo, rollouts=2, every=1, count=20, more=SMALL["ppo"])
    assert [row["rollouts"] for row in rows] == [0, 1, 2] and recipe.kl_budget is not None
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-4) and rows[0]["win_rate"] == 0.5 and rows[2]["kl"] != rows[0]["kl"]
    draw(rows, recipe.kl_budget, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    again = run(Demo(tmp_path / "again", "demo", 3, scale=0.02, overrides=SMALL))
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in summary.items() if k != "seconds"}


def test_the_true_order_has_ties_where_the_judge_sees_none_better():
    prompt = render(sample(random.Random(0), "open_qa"), "")
    assert true_ranks(prompt, [" qwerty", best_answers(prompt)[0], " asdf"]) == [2, 1, 2]


def test_the_bag_of_words_learns_a_word():
    comparisons = [{"completions": [f" good a{i}", f" bad a{i}"], "ranks": [1, 2]} for i in range(20)]
    good, bad = BagOfWords(comparisons).scores([" good", " bad"])
    assert good > bad


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
