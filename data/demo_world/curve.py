"""PPO that goes on too long, watched by the judge: reward, judge and KL over the rollouts, as a figure and a table.

    PYTHONPATH=data python -m demo_world.curve --run_name demo --rollouts 60

Starts from the SFT and reward model of a demo that has run, with its recipe, but does not stop at the KL budget: every few
rollouts the policy answers held-out prompts, the reward model and the judge score these answers, and training never hears of it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from .demo import Demo, data_arguments, read
from .judge import judge


def watched_run(
    demo: Demo, rollouts: int, every: int, count: int, more: list[str]
) -> tuple[list[dict[str, float]], int]:
    """One row for each look at the policy: rollouts done, KL, the reward model's score, the judge's utility; and after how many
    rollouts the recipe stops, by the KL of its rollouts or their number."""
    from rlhf import config
    from rlhf.data.encode import encode_prompts
    from rlhf.rollout import Prompts

    argv = ["--config", str(config.demo_config("ppo")), "--output_dir", str(demo.root), "--run_name", demo.run]
    argv += ["--seed", str(demo.seed), *data_arguments("ppo", demo.data), *more]
    recipe = config.parse("ppo", argv)
    trainer = new_trainer(replace(recipe, total_episodes=rollouts * recipe.batch_size, early_stop=False))
    texts = [record["prompt"] for record in read(demo.data / "eval_prompts.jsonl")[:count]]
    held_out = Prompts(encode_prompts(trainer.actors.tokenizer, texts), texts)
    rows: list[dict[str, float]] = []
    before: list[float] = []
    stop = recipe.num_rollouts
    while True:
        if trainer.state.rollouts % every == 0:
            row, utility = look(trainer, held_out, before)
            before = before or utility
            rows.append(row)
            print("  ".join(f"{name} {value:.3f}" for name, value in row.items()), flush=True)
        if trainer.state.rollouts >= rollouts:
            return rows, stop
        _, line = trainer.step()
        trainer.state.rollouts += 1
        if recipe.early_stop and recipe.kl_budget is not None and line["objective/kl"] > recipe.kl_budget:
            stop = min(stop, trainer.state.rollouts)


def new_trainer(args: Any) -> Any:
    """PPO from the run's SFT and reward model, at its first rollout."""
    from rlhf import ppo
    from rlhf.actors import load_models, reward_sources
    from rlhf.models import load_tokenizer
    from rlhf.registry import Registry

    registry = Registry(args.output_dir)
    sft, sources = str(registry.require("sft", args.run_name).path), reward_sources(args, registry)
    make_optimizer = ppo.optimizer_factory(args)
    with tempfile.TemporaryDirectory() as work:
        accelerator = ppo.make_accelerator(args, Path(work))
    tokenizer = load_tokenizer(sft)
    model, actors = load_models(args, accelerator, tokenizer, sft, sources, sources[0][0])
    prompts, _, data = ppo.load_prompts(args, tokenizer, actors)
    text = ppo.load_pretraining(args, tokenizer, actors.policy, data)
    return ppo.PPO(args, accelerator, model, make_optimizer(model), actors, prompts, text)


def look(trainer: Any, held_out: Any, before: list[float]) -> tuple[dict[str, float], list[float]]:
    """The figures of the policy's answers to held-out prompts, and each answer's utility; `before`: of the first look."""
    from rlhf.data.encode import decode_completions
    from rlhf.evaluation import win_rate
    from rlhf.ppo import HELD_OUT

    found = trainer.answer(held_out, HELD_OUT)
    tokens = [response[mask].tolist() for response, mask in zip(found.responses, found.mask)]
    answers = decode_completions(trainer.actors.tokenizer, tokens)
    utility = [judge(prompt, answer).utility for prompt, answer in zip(held_out.texts, answers)]
    row = {
        "rollouts": trainer.state.rollouts,
        "kl": float(found.kl.mean()),
        "reward": float(found.scores.mean()),
        "utility": sum(utility) / len(utility),
        "win_rate": win_rate(utility, before or utility)["win_rate"],
        "length": float(found.mask.sum(dim=1).float().mean()),
    }
    return row, utility


def draw(rows: list[dict[str, float]], stop: int, path: Path) -> None:
    """Reward, judge and KL over the rollouts, with a line where the recipe stops; and reward and judge against the KL."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 2.9), layout="constrained")
    *axes, plane = figure.subplots(1, 4)
    titles = {"reward": "reward model's score", "utility": "judge's utility", "kl": "KL to SFT, nats a response"}
    colours = dict(zip(titles, ("tab:blue", "tab:green", "tab:red")))
    for axis, (name, title) in zip(axes, titles.items()):
        axis.plot([r["rollouts"] for r in rows], [r[name] for r in rows], color=colours[name], linewidth=2)
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("PPO rollouts")
        if stop <= rows[-1]["rollouts"]:
            axis.axvline(stop, color="grey", linestyle="--", linewidth=1)
    if stop <= rows[-1]["rollouts"]:
        shift, side = (5, "left") if 2 * stop < rows[-1]["rollouts"] else (-5, "right")  # where there is more room
        place = {"xytext": (shift, 5), "textcoords": "offset points", "ha": side, "fontsize": 9}
        axes[0].annotate("the recipe stops here", (stop, axes[0].get_ylim()[0]), **place)  # below a score that rises
    for axis, name in ((plane, "reward"), (plane.twinx(), "utility")):
        axis.plot([r["kl"] for r in rows], [r[name] for r in rows], ".-", color=colours[name])
        axis.tick_params(axis="y", colors=colours[name])
        axis.spines["top"].set_visible(False)
    plane.set_title("score and judge against KL", fontsize=11)
    plane.set_xlabel("KL to SFT, nats a response")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m demo_world.curve", description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("runs"), help="root folder of the registry")
    parser.add_argument("--run_name", default="demo", help="a demo that has run")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--rollouts", type=int, default=60)
    parser.add_argument("--every", type=int, default=2, help="rollouts between two looks")
    parser.add_argument("--prompts", type=int, default=500, help="held-out prompts")
    parser.add_argument(
        "--out", type=Path, help="figure, and beside it its points as .json; default: curve.png in the run's folder"
    )
    args, more = parser.parse_known_args()
    from rlhf.cli import silence_libraries

    silence_libraries()
    demo = Demo(args.output_dir, args.run_name, args.seed)
    rows, stop = watched_run(demo, args.rollouts, args.every, args.prompts, more)
    out = args.out or args.output_dir / args.run_name / "curve.png"
    draw(rows, stop, out)
    out.with_suffix(".json").write_text(json.dumps({"stop": stop, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
