"""`rlhf best-of-n RUN/ppo`: where PPO stands on the plane of reward against KL, beside the best of n samples of its SFT model.

Rejection sampling needs no training: what PPO gets has to be compared with what n samples and the same reward model get at the
same distance from the SFT model (Stiennon et al. 2020, figure 5; Gao et al. 2022). Neither says whether the reward is right.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.actors import Source, refuse_other_tokenizers
from rlhf.config import STAGE_ARGS
from rlhf.data import load
from rlhf.data.encode import encode_prompts
from rlhf.evaluation import Answers, answer, best_of_n_kl, expected_best, mean_ci95, response_logps, score_answers
from rlhf.models import context_length, load_policy, load_scalar_model, load_tokenizer
from rlhf.registry import Artifact, Registry
from rlhf.training import TrainingError, keep_fitting, load_splits, resolve

NAME = "best_of_n"
Point = dict[str, Any]  # name, reward and kl with their intervals


def run(options: argparse.Namespace) -> None:
    """The command: the points, as a table and as files beside the version."""
    registry = Registry(options.root)
    artifact = registry.get(options.ref)
    if artifact.stage not in ("sft", "ppo"):
        raise TrainingError(f"{artifact.ref} is of stage {artifact.stage}; give a policy: RUN/ppo or RUN/sft")
    start = started_from(registry, artifact)
    judge = reward_of(registry, artifact, options.reward)
    refuse_other_tokenizers(start, [judge])
    report = measure(artifact, start, judge, options)
    path = write(report, registry.evals_dir(artifact))
    print_points(report)
    print(path)


def started_from(registry: Registry, artifact: Artifact) -> Source:
    """The model that a policy is compared with: PPO's reference, or an SFT version itself."""
    if artifact.stage == "sft":
        return str(artifact.path), artifact
    if artifact.manifest.get("base_model"):
        return artifact.manifest["base_model"], None
    parent = registry.get(artifact.parents[0]["ref"])  # PPO names its reference first
    return str(parent.path), parent


def reward_of(registry: Registry, artifact: Artifact, asked: str | None) -> Source:
    """The reward model asked for, else the one that PPO was trained with, else the run's newest."""
    if asked is not None or artifact.stage == "sft":
        return resolve(registry, asked, artifact.run, "rm")
    trained_with = [parent["ref"] for parent in artifact.parents if "/rm/" in parent["ref"]]
    if len(trained_with) != 1:
        raise TrainingError(
            f"{artifact.ref} was trained with {len(trained_with)} reward models of the registry; say which: --reward RUN/rm"
        )
    return resolve(registry, trained_with[0], artifact.run, "rm")


def prompts_of(artifact: Artifact, data: str | None, count: int) -> list[Any]:
    """Prompts that the version was not trained on: those given, or those that its training held out."""
    if data is not None:
        records = load("prompts", data)
    else:
        records = load_splits(stage_args(artifact), "prompts" if artifact.stage == "ppo" else "demonstrations")[1]
        if not len(records):
            raise TrainingError(
                f"{artifact.ref} was trained without holding prompts out; give some that it has not seen: --data FILE"
            )
    found: list[Any] = records["prompt"][:count]
    return found


def stage_args(artifact: Artifact) -> Any:
    """The arguments that a version was trained with."""
    cls = STAGE_ARGS[artifact.stage]
    known = {field.name for field in dataclasses.fields(cls)}
    return cls(**{name: value for name, value in artifact.manifest["config"].items() if name in known})


def measure(artifact: Artifact, start: Source, judge: Source, options: argparse.Namespace) -> dict[str, Any]:
    """The SFT model, its best of each n, and of PPO the last weights and their average: reward and KL of each."""
    args, device = stage_args(artifact), "cuda" if torch.cuda.is_available() else "cpu"
    how = {"dtype": args.dtype, "trust_remote_code": args.trust_remote_code}
    tokenizer = load_tokenizer(start[0], trust_remote_code=args.trust_remote_code)
    reference = load_policy(start[0], tokenizer, **how).eval().to(device)
    reward = load_scalar_model(judge[0], tokenizer, **how).eval().to(device)
    length = options.response_length or args.response_length
    prompts = prompts_of(artifact, options.data, options.max_prompts)
    room = max(0, (context_length(reference) or sys.maxsize) - length)
    fits = [len(row) <= room for row in encode_prompts(tokenizer, prompts)]
    prompts = [prompts[i] for i in keep_fitting("prompts", fits, room)]
    temperature = getattr(args, "temperature", 1.0)
    sampling = {"response_length": length, "temperature": temperature, "seed": options.seed}

    def rewards_of(answers: Answers) -> Tensor:
        return score_answers(reward, tokenizer, [p + t for p, t in zip(answers.prompts, answers.tokens)])

    tries = [rewards_of(answer(reference, tokenizer, prompts, step=k, **sampling)) for k in range(max(options.n))]
    scores = torch.stack(tries)
    points = [point("sft", expected_best(scores, 1), n=1)]
    points += [point(f"best of {n}", expected_best(scores, n), n=n) for n in sorted(set(options.n)) if n > 1]
    for name, folder in (("ppo", artifact.path), ("ppo, average", artifact.path / "ema")):
        if artifact.stage == "ppo" and folder.is_dir():
            policy = load_policy(folder, tokenizer, **how).eval().to(device)
            answers = answer(policy, tokenizer, prompts, **sampling)
            kl = response_logps(policy, tokenizer, answers, temperature=temperature)
            kl -= response_logps(reference, tokenizer, answers, temperature=temperature)
            points.append(point(name, rewards_of(answers), kl=kl))
    names = [artifact.ref if artifact else path for path, artifact in (start, judge)]
    return {"version": artifact.ref, "sft": names[0], "reward": names[1], "prompts": len(prompts), "points": points}


def point(name: str, rewards: Tensor, *, n: int | None = None, kl: Tensor | None = None) -> Point:
    """A point from the rewards [B] of prompts and the log-ratios [B] of their answers; of best-of-n the KL is known."""
    reward, reward_ci95 = mean_ci95(rewards.tolist())
    found: Point = {"name": name, "reward": reward, "reward_ci95": reward_ci95}
    if n is not None:
        return found | {"n": n, "kl": best_of_n_kl(n), "kl_ci95": None}
    assert kl is not None
    mean, interval = mean_ci95(kl.tolist())
    return found | {"n": None, "kl": mean, "kl_ci95": interval}


def write(report: dict[str, Any], folder: Path) -> Path:
    """`best_of_n.json` and its figure; what was there is replaced."""
    from matplotlib.figure import Figure  # takes a second; without pyplot there is no window and no state

    folder.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    sampled = [p for p in report["points"] if p["n"] is not None]
    axes.plot([p["kl"] for p in sampled], [p["reward"] for p in sampled], "o-", label=f"best of n of {report['sft']}")
    for each in report["points"]:
        if each["n"] is None:
            axes.plot(each["kl"], each["reward"], "s", label=each["name"])
        else:
            axes.annotate(str(each["n"]), (each["kl"], each["reward"]), textcoords="offset points", xytext=(4, -10))
    axes.set(xlabel="KL from the SFT model, nats a response", ylabel=f"reward by {report['reward']}")
    axes.legend()
    figure.savefig(folder / f".{NAME}.png")
    (folder / f".{NAME}.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    for suffix in ("png", "json"):
        (folder / f".{NAME}.{suffix}").replace(folder / f"{NAME}.{suffix}")
    return folder / f"{NAME}.json"


def print_points(report: dict[str, Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    title = f"{report['version']} by {report['reward']}, {report['prompts']} held-out prompts"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for name in ("policy", "KL, nats", "95 %", "reward", "95 %"):
        table.add_column(name, justify="left" if name == "policy" else "right")
    for each in report["points"]:
        table.add_row(
            each["name"],
            f"{each['kl']:.2f}",
            _interval(each["kl_ci95"]),
            f"{each['reward']:.3f}",
            _interval(each["reward_ci95"]),
        )
    Console().print(table)


def _interval(bounds: Sequence[float] | None) -> str:
    return "" if bounds is None else f"({bounds[0]:.2f}, {bounds[1]:.2f})"
