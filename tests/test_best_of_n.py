"""`rlhf best-of-n` on a real PPO version: the points of its plane, and what it cannot be asked."""

import json

import pytest
import tiny
import torch
from test_ppo import ppo_args, stages

from rlhf import cli, ppo
from rlhf.evaluation import answer, best_of_n_kl, response_logps, score_answers
from rlhf.models import load_policy, load_scalar_model, load_tokenizer
from rlhf.registry import Registry


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    """A PPO version that has moved, with prompts held out."""
    folder = tmp_path_factory.mktemp("best_of_n")
    stages(folder)
    ppo.run(ppo_args(folder, eval_fraction=0.4, learning_rate=1e-2, ema_decay=0.5, temperature=0.8))
    return Registry(folder / "runs")


def command(registry, *words, capsys):
    status = cli.main(["best-of-n", *map(str, words), "--root", str(registry.root)])
    return status, capsys.readouterr()


def test_ppo_is_placed_beside_best_of_n(registry, capsys):
    status, told = command(registry, "tiny/ppo", "--n", 4, 2, capsys=capsys)
    assert status == 0, told.err
    artifact = registry.require("ppo", "tiny")
    folder = registry.evals_dir(artifact)
    assert sorted(path.name for path in folder.iterdir()) == ["best_of_n.json", "best_of_n.png"]
    report = json.loads((folder / "best_of_n.json").read_text())
    assert (report["version"], report["sft"], report["reward"]) == ("tiny/ppo/v1", "tiny/sft/v1", "tiny/rm/v1")
    points = {each["name"]: each for each in report["points"]}
    assert list(points) == ["sft", "best of 2", "best of 4", "ppo", "ppo, average"]
    assert [points[name]["kl"] for name in ("sft", "best of 2", "best of 4")] == [0, best_of_n_kl(2), best_of_n_kl(4)]
    assert points["sft"]["reward"] < points["best of 2"]["reward"] < points["best of 4"]["reward"]

    # The point of PPO by the parts themselves.
    args = ppo_args(registry.root.parent, eval_fraction=0.4)
    held_out = ppo.load_splits(args, "prompts")[1]["prompt"][:]
    assert report["prompts"] == len(held_out) > 0
    tokenizer = load_tokenizer(artifact.path)
    policy, reference = (load_policy(registry.require(s, "tiny").path, tokenizer).eval() for s in ("ppo", "sft"))
    answers = answer(policy, tokenizer, held_out, response_length=6, temperature=0.8)
    gap = [response_logps(model, tokenizer, answers, temperature=0.8) for model in (policy, reference)]
    assert points["ppo"]["kl"] == pytest.approx(float((gap[0] - gap[1]).mean()), abs=1e-4)
    reward = load_scalar_model(registry.require("rm", "tiny").path, tokenizer).eval()
    scores = score_answers(reward, tokenizer, [p + t for p, t in zip(answers.prompts, answers.tokens)])
    assert points["ppo"]["reward"] == pytest.approx(float(scores.mean()), abs=1e-4)
    assert points["ppo"]["kl"] != points["ppo, average"]["kl"]
    assert (
        "best of 4" in told.out and "nats" in told.out and str(folder / "best_of_n.json") in told.out.replace("\n", "")
    )
    page = registry.root / "page.html"
    assert cli.main(["report", "tiny", "--root", str(registry.root), "--out", str(page)]) == 0
    assert "best_of_n" in page.read_text(encoding="utf-8")


def test_an_sft_version_on_prompts_that_are_given(registry, tmp_path, capsys):
    data = tiny.write_lines(tmp_path / "prompts.jsonl", [{"prompt": f"Feed {i}:"} for i in range(5)])
    words = ("tiny/sft", "--data", data, "--n", 3, "--response-length", 4, "--max-prompts", 4)
    # The version of these tests was not trained here, and holds no arguments: they are the defaults.
    status, told = command(registry, *words, capsys=capsys)
    assert status == 0, told.err
    report = json.loads((registry.evals_dir(registry.require("sft", "tiny")) / "best_of_n.json").read_text())
    assert [each["name"] for each in report["points"]] == ["sft", "best of 3"] and report["prompts"] == 4


def test_what_it_cannot_be_asked_is_one_line(registry, tmp_path, capsys):
    long = tiny.write_lines(tmp_path / "long.jsonl", [{"prompt": "geese " * 80}])
    for words, says in (
        (("tiny/rm",), "tiny/rm/v1 is of stage rm; give a policy"),
        (("tiny/sft", "--data", tmp_path / "nowhere.jsonl"), "nowhere.jsonl"),
        (("tiny/ppo", "--data", long), "all 1 prompts are over 58 tokens"),
        (("tiny/ppo", "--reward", "tiny/sft"), "has no scalar head"),
    ):
        status, told = command(registry, *words, capsys=capsys)
        errors = [line for line in told.err.splitlines() if line.startswith("error: ")]
        assert status == 2 and len(errors) == 1 and says in errors[0]


def test_samples_do_not_change_with_what_is_asked(registry, capsys):
    """The same tries for each n: more of them add, and move nothing."""
    found = []
    for n in (2, 3):
        command(registry, "tiny/ppo", "--n", n, capsys=capsys)
        report = json.loads((registry.evals_dir(registry.require("ppo", "tiny")) / "best_of_n.json").read_text())
        found.append({each["name"]: each["reward"] for each in report["points"]})
    assert found[0]["ppo"] == found[1]["ppo"]
    assert torch.tensor([each["sft"] for each in found]).isfinite().all()
