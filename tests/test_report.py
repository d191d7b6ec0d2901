"""`rlhf report`: a page of a whole tiny run, made by the real stages; and what those put on their cards."""

import base64
import json
import re
from html.parser import HTMLParser

import pytest
import test_ppo
import tiny

from rlhf import card, cli, curves, ppo, reward, sft

VOID = {"meta", "img", "br"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Registry with base, sft, rm and ppo of a run, each trained for some steps with held-out data."""
    folder = tmp_path_factory.mktemp("run")
    registry = tiny.published(folder, "base")
    sft.run(tiny.sft_args(folder, tiny.demonstrations(20), max_steps=6, eval_fraction=0.3, response_length=6))
    reward.run(tiny.reward_args(folder, tiny.comparisons(20), max_steps=6, eval_fraction=0.3))
    ppo.run(test_ppo.ppo_args(folder, total_episodes=48, sample_steps=3, kl_budget=1e-9, early_stop=False))
    return registry


class Page(HTMLParser):
    """Balanced tags, and what the page refers to."""

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.images = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.links += [values[name] for name in ("href", "src") if name in values]
        self.images += [values["src"]] if tag == "img" else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            while self.open.pop() != tag:
                pass


def written(run, *arguments):
    assert cli.main(["report", "tiny", "--root", str(run.root), *arguments]) == 0
    return (run.root / "tiny" / "report.html").read_text(encoding="utf-8")


def test_the_page_shows_the_run_and_needs_nothing_beside_it(run, capsys):
    text = written(run)
    assert capsys.readouterr().out == f"{run.root}/tiny/report.html\n"
    page = Page(text)
    assert (
        set(page.open) <= {"html"}
        and page.links
        and all(link.startswith("data:image/png;base64,") for link in page.links)
    )
    assert all(base64.b64decode(image.partition(",")[2]).startswith(b"\x89PNG") for image in page.images)
    assert (
        len(page.images) == 3 + 5
    )  # training curves of three stages, and the five figures of the reward model's report
    for stage, artifact in ((stage, run.require(stage, "tiny")) for stage in ("base", "sft", "rm", "ppo")):
        assert f"{artifact.ref}: {card.TITLES[stage].split(' (')[0]}" in text and artifact.weights_sha256 in text
    metrics = run.require("ppo", "tiny").manifest["metrics"]
    assert f">{metrics['kl']:.4g}<" in text if "kl" in metrics else "episodes" in text
    low, high = run.require("rm", "tiny").manifest["metrics"]["accuracy_ci95"]
    assert f"{low:.4g} – {high:.4g}" in text
    assert "Evaluation rm" in text and "└── " in text and "over the budget" in text
    assert str(run.root) not in text  # no folder of one person's machine


def test_a_prompt_that_looks_like_html_is_text(run, monkeypatch):
    artifact = run.require("ppo", "tiny")
    sample = {"prompt": "<script>alert(1)</script>", "completion": "{}", "score": 0.5}
    manifest = {
        **artifact.manifest,
        "extra": {"samples": [sample]},
        "config": {"training_arguments": {"x_token": "secret"}},
    }
    monkeypatch.setitem(artifact.manifest, "extra", manifest["extra"])
    from rlhf import report

    text = report._stage(run, type(artifact)(artifact.root, artifact.run, artifact.stage, artifact.version, manifest))
    assert "<script>" not in text and "&lt;script&gt;" in text and "secret" not in text and "score 0.5" in text


def test_out_and_errors_are_one_line(run, tmp_path, capsys):
    out = tmp_path / "pages" / "page.html"
    assert cli.main(["report", "tiny", "--root", str(run.root), "--out", str(out)]) == 0 and out.stat().st_size > 10_000
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]
    capsys.readouterr()
    for words, says in (
        (["nobody"], "no versions in run 'nobody'"),
        (["tiny", "--out", str(out / "x.html")], f"cannot write {out}/x.html"),
    ):
        assert cli.main(["report", *words, "--root", str(run.root)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("error: ") and says in error


def test_cards_have_figures_and_samples(run):
    """Figures of the training, answers to held-out prompts, and the answers that a reward model likes most and least."""
    sft_, rm, ppo_ = (run.require(stage, "tiny") for stage in ("sft", "rm", "ppo"))
    texts = [(artifact.path / "README.md").read_text(encoding="utf-8") for artifact in (sft_, rm, ppo_)]
    for artifact, text in zip((sft_, rm, ppo_), texts):
        assert "![figures/training.png](figures/training.png)" in text and "## Samples" in text
        assert (artifact.path / "figures" / "training.png").read_bytes().startswith(b"\x89PNG")
    assert "![evaluation/rm-reliability.png]" in texts[1]
    held_out = [sample["prompt"] for sample in sft_.manifest["extra"]["samples"]]
    prompts = [record["prompt"] for record in tiny.demonstrations(20)]
    assert 1 <= len(held_out) <= 4 and set(held_out) <= set(prompts)
    samples = rm.manifest["extra"]["samples"]
    assert samples[0]["prompt"] == samples[1]["prompt"] and samples[0]["score"] >= samples[1]["score"]
    assert re.search(r"score: -?[\d.]+, rank: \d", texts[1])


def test_curves_are_those_of_the_lines():
    history = [{"step": n, "loss": 1 / (n + 1), "grad_norm": 1.0} for n in range(6)] + [{"step": 5, "eval_loss": 0.5}]
    (loss, axis, (training, held_out)), norm = curves.panels(history)
    assert (loss, axis, norm[0]) == ("loss", "step", "norm of the gradient")
    assert training == ("training", [0.0, 1, 2, 3, 4, 5], [1 / (n + 1) for n in range(6)])
    assert held_out == ("held out", [5.0], [0.5])
    rollouts = [{"rollout": n, "objective/scores": n, "reward/rm": n, "reward/length": 2} for n in range(1, 6)]
    assert [title for title, _, _ in curves.panels(rollouts)] == ["each reward", "reward model's score"]
    assert curves.panels(rollouts[:4]) == curves.panels([]) == []  # too few points
    assert curves.panels([{**line, "objective/scores": None} for line in rollouts][:1]) == []


def test_a_history_without_a_curve_draws_nothing(tmp_path):
    assert not curves.draw([json.loads("{}")], tmp_path / "figures" / "x.png") and not (tmp_path / "figures").exists()
