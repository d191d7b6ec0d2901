"""How a training went, as one picture: drawn from the lines of a version's metrics.jsonl, for its card and for `rlhf report`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Line = Mapping[str, Any]
Panel = tuple[str, list[tuple[str, str]]]  # title, and the (field, label) of each curve

FEWEST = 5  # points; fewer are no curve
PPO: list[Panel] = [
    ("reward model's score", [("objective/scores", "score")]),
    ("KL from the reference, nats an answer", [("objective/kl", "KL")]),
    ("entropy, nats a token", [("objective/entropy_per_token", "entropy")]),
    ("tokens of an answer", [("response/length", "length")]),
    ("share of answers that end", [("response/ended", "ended with EOS")]),
    ("value function, explained variance", [("value/explained_variance", "explained variance")]),
]
TRAINER: list[Panel] = [
    ("loss", [("loss", "training"), ("eval_loss", "held out")]),
    ("held-out accuracy", [("eval_accuracy", "pairs")]),
    ("reward model's score of held-out answers", [("eval_reward", "score")]),
    ("learning rate", [("learning_rate", "learning rate")]),
    ("norm of the gradient", [("grad_norm", "norm")]),
]


def panels(history: Sequence[Line]) -> list[tuple[str, str, list[tuple[str, list[float], list[float]]]]]:
    """(title, name of the x axis, [(label, xs, ys)]) of what the lines hold; empty where they are too few for a curve."""
    ppo = any("objective/scores" in line for line in history)
    axis = "rollout" if ppo else "step"
    found = []
    for title, fields in (_rewards(history) + PPO) if ppo else TRAINER:
        curves = [(label, *_points(history, axis, name)) for name, label in fields]
        curves = [curve for curve in curves if curve[1]]
        if curves:
            found.append((title, axis, curves))
    longest = max((len(xs) for _, _, curves in found for _, xs, _ in curves), default=0)
    return found if longest >= FEWEST else []


def _rewards(history: Sequence[Line]) -> list[Panel]:
    """One panel with the reward models and functions, where there are several."""
    names = sorted({name for line in history for name in line if name.startswith("reward/")})
    return [("each reward", [(name, name.removeprefix("reward/")) for name in names])] if len(names) > 1 else []


def _points(history: Sequence[Line], axis: str, name: str) -> tuple[list[float], list[float]]:
    points = [(line[axis], line[name]) for line in history if axis in line and isinstance(line.get(name), (int, float))]
    return [float(x) for x, _ in points], [float(y) for _, y in points]


def draw(history: Sequence[Line], target: Any) -> bool:
    """The picture as PNG into `target` (a path or a binary stream); False, and nothing written, where there is no curve."""
    found = panels(history)
    if not found:
        return False
    from matplotlib.figure import Figure  # takes a second; without pyplot there is no window and no state

    if isinstance(target, Path):
        target.parent.mkdir(parents=True, exist_ok=True)
    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.5 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for place, (title, axis, curves) in zip(axes, found):
        for label, xs, ys in curves:
            place.plot(xs, ys, label=label, linewidth=1.2, marker="o" if len(xs) < 30 else None, markersize=2.5)
        place.set_title(title, fontsize="medium")
        place.set_xlabel(axis)
        place.grid(alpha=0.25)
        if len(curves) > 1:
            place.legend(fontsize="small")
    for place in axes[len(found) :]:
        place.set_axis_off()
    figure.savefig(target, format="png", dpi=110, metadata={"Software": None})
    return True
