"""Whether to trust a reward model: figures on held-out comparisons, each with its interval, from scores that are given.

Nothing here runs a model. `report` makes plain values (JSON), `write` puts them and their figures beside the version, and
`print_report` shows the short of it on the terminal. Intervals are 95 %, by bootstrap over prompts: the pairs of one prompt are
not independent.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.data.records import prompt_text
from rlhf.evaluation import bootstrap_ci95

BINS = 10  # of the reliability curve, over [0, 1]
ECE = (
    "each strictly ordered pair is counted both ways: p = sigmoid(r_a - r_b) with label 1 where a is preferred, and 1 - p with "
    "label 0. ECE = sum over 10 bins of [0, 1] of (share of the items) * |mean label - mean p|"
)
LONGER = "longer is better"
CONTROLS = 200  # rows of each kind that is scored beside the answers


@dataclass(frozen=True)
class Ranking:
    """One labeler's ranking of the K completions of a prompt, and what the model says of them."""

    prompt: str
    completions: Sequence[str]
    ranks: Sequence[int]
    scores: Sequence[float]
    lengths: Sequence[int]  # tokens
    members: Sequence[Sequence[float]] | None = None  # rewards of an ensemble's members, M a completion
    labeler: str | None = None
    source: str | None = None
    use_case: str | None = None

    @classmethod
    def of(
        cls,
        record: Mapping[str, Any],
        item: Mapping[str, Any],
        scores: Sequence[float],
        members: Sequence[Sequence[float]] | None = None,
    ) -> Ranking:
        """From a canonical record, its encoded item and its scores."""
        names = {name: record.get(name) for name in ("labeler", "source", "use_case")}
        lengths = [len(ids) for ids in item["completions"]]
        text = prompt_text(record["prompt"])
        return cls(text, record["completions"], record["ranks"], scores, lengths, members, **names)


# --- the figures


def report(
    rankings: Sequence[Ranking], controls: Mapping[str, Sequence[float]], agreement: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Everything as plain values. `controls` are scores of other texts, demonstrations first; `agreement` is the labelers'."""
    pairs = _Pairs(rankings)
    longer = accuracy([replace(ranking, scores=ranking.lengths) for ranking in rankings])
    samples = [score for ranking in rankings for score in ranking.scores]
    found: dict[str, Any] = {
        **accuracy(rankings),
        "longer_is_better": longer["accuracy"],
        "longer_is_better_ci95": longer["accuracy_ci95"],
        "over_longer_is_better": _over_longer(pairs),
        "labeler_agreement": agreement,
        "by_k": dict(sorted(_by(rankings, lambda r: str(len(r.ranks))).items())),
        "by_labeler": _by(rankings, lambda r: r.labeler),
        "by_source": _by(rankings, lambda r: r.source),
        "by_use_case": _by(rankings, lambda r: r.use_case),
        "by_length_difference": _by_length(pairs),
        "calibration": calibration(pairs.gaps, pairs.prompt),
        "reward_and_length": reward_and_length(rankings),
        "scores": {name: _spread(values) for name, values in {**controls, "held-out answers": samples}.items()},
        "margins": _margins(pairs.gaps),
        "examples": _examples(rankings),
    }
    if any(ranking.members is not None for ranking in rankings):
        found["ensemble"] = _ensemble(rankings, pairs)
    return found | {"curves": _curves(rankings, pairs, controls, samples)}


def accuracy(rankings: Sequence[Ranking]) -> dict[str, Any]:
    """Pair accuracy, its interval, numbers of pairs and prompts, mean margin; 0.5 over no pair where there is none.

    Two labelers' rankings of one prompt are of one prompt: they are resampled together.
    """
    pairs = _Pairs(rankings)
    if not len(pairs.gaps):
        return {"accuracy": 0.5, "accuracy_ci95": [0.0, 1.0], "pairs": 0, "prompts": 0, "margin": 0.0}
    return {**pairs.rate(pairs.every), "margin": float(pairs.gaps.mean())}


class _Pairs:
    """All strictly ordered pairs: reward and length gaps (better minus worse), and the prompt of each."""

    def __init__(self, rankings: Sequence[Ranking]):
        gaps: list[float] = []
        lengths: list[int] = []
        prompt: list[int] = []
        spread: list[float] = []
        places: dict[str, int] = {}
        for ranking in rankings:
            place = places.setdefault(ranking.prompt, len(places))
            for better, worse in ordered(ranking.ranks):
                gaps.append(ranking.scores[better] - ranking.scores[worse])
                lengths.append(ranking.lengths[better] - ranking.lengths[worse])
                prompt.append(place)
                if ranking.members is not None:
                    spread.append(float(np.std(np.subtract(ranking.members[better], ranking.members[worse]))))
        self.gaps, self.lengths = np.asarray(gaps, dtype=np.float64), np.asarray(lengths, dtype=np.float64)
        self.prompt, self.spread = np.asarray(prompt, dtype=int), np.asarray(spread, dtype=np.float64)
        self.every = np.ones(len(gaps), dtype=bool)

    def rate(self, chosen: Any) -> dict[str, Any]:
        """Accuracy over the pairs where `chosen`, equal rewards counting half."""
        credit = (self.gaps > 0) + 0.5 * (self.gaps == 0)
        rows = _by_prompt(self.prompt[chosen], credit[chosen], np.ones(int(np.sum(chosen))))
        if not len(rows):
            return {"accuracy": None, "accuracy_ci95": None, "pairs": 0, "prompts": 0}
        interval = bootstrap_ci95(rows, lambda sample: sample[..., 0].sum(axis=1) / sample[..., 1].sum(axis=1))
        total = rows.sum(axis=0)
        return {
            "accuracy": float(total[0] / total[1]),
            "accuracy_ci95": interval,
            "pairs": int(total[1]),
            "prompts": len(rows),
        }


def ordered(ranks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Places (better, worse) of every strictly ordered pair."""
    for i, j in combinations(range(len(ranks)), 2):
        if ranks[i] != ranks[j]:
            yield (i, j) if ranks[i] < ranks[j] else (j, i)


def _by_prompt(prompt: Any, *columns: Any) -> Any:
    """Columns [N] summed by prompt: [prompts, columns]."""
    names, place = np.unique(prompt, return_inverse=True)
    table = np.zeros((len(names), len(columns)))
    for i, column in enumerate(columns):
        np.add.at(table[:, i], place, column)
    return table


def _over_longer(pairs: _Pairs) -> dict[str, Any] | None:
    """The model's accuracy less that of "longer is better" on the same pairs, with the interval of the difference."""
    credit = (np.sign(pairs.gaps) - np.sign(pairs.lengths)) / 2
    rows = _by_prompt(pairs.prompt, credit, np.ones(len(credit)))
    if not len(rows):
        return None
    interval = bootstrap_ci95(rows, lambda sample: sample[..., 0].sum(axis=1) / sample[..., 1].sum(axis=1))
    return {"difference": float(credit.mean()), "difference_ci95": interval}


def _by(rankings: Sequence[Ranking], key: Callable[[Ranking], str | None]) -> dict[str, Any]:
    """Accuracy of each group, the largest first; empty where no ranking names one."""
    groups: dict[str, list[Ranking]] = defaultdict(list)
    for ranking in rankings:
        name = key(ranking)
        if name is not None:
            groups[name].append(ranking)
    found = {name: accuracy(group) for name, group in groups.items()}
    return dict(sorted(found.items(), key=lambda entry: -entry[1]["pairs"]))


def _by_length(pairs: _Pairs) -> dict[str, Any]:
    """Accuracy where the preferred answer is longer, shorter, and by quarters of the difference in length."""
    size = np.abs(pairs.lengths)
    found = {
        "preferred is longer": pairs.rate(pairs.lengths > 0),
        "preferred is shorter": pairs.rate(pairs.lengths < 0),
    }
    if len(size):
        edges = sorted({int(edge) for edge in np.quantile(size, [0, 0.25, 0.5, 0.75, 1])})
        for low, high in pairwise(edges):
            first = low == edges[0]
            name = f"{low if first else low + 1} to {high} tokens apart"
            found[name] = pairs.rate((size >= low if first else size > low) & (size <= high))
    return found


def calibration(gaps: Any, prompt: Any) -> dict[str, Any]:
    """Reliability of p = sigmoid(gap), with the expected calibration error over symmetrised pairs (`ECE` defines it).

    gaps [N]: reward of the preferred answer less that of the other; prompt [N]: which prompt a pair is of.
    Source: Guo et al. 2017, with both orders of a pair, as else every label would be 1.
    """
    gaps, prompt = np.asarray(gaps, dtype=np.float64), np.asarray(prompt)
    if not len(gaps):
        return {"ece": None, "ece_ci95": None, "nll": None, "bins": [], "definition": ECE}
    p = np.concatenate([sigmoid(gaps), 1 - sigmoid(gaps)])
    label = np.repeat([1.0, 0.0], len(gaps))
    place = np.minimum((p * BINS).astype(int), BINS - 1)
    both = np.concatenate([prompt, prompt])
    counts, labels, ps = (
        np.stack([_sum_by(both, values * (place == b)) for b in range(BINS)], axis=1)
        for values in (np.ones(len(p)), label, p)
    )
    table = np.stack([counts, labels, ps], axis=-1)  # [prompts, BINS, 3]

    def error(sample: Any) -> Any:
        total = sample.sum(axis=1)  # [R, BINS, 3]
        return np.abs(total[..., 1] - total[..., 2]).sum(axis=-1) / total[..., 0].sum(axis=-1)

    total = table.sum(axis=0)
    bins = [
        {"from": b / BINS, "to": (b + 1) / BINS, "items": int(n), "predicted": float(q / n), "observed": float(y / n)}
        for b, (n, y, q) in enumerate(total)
        if n
    ]
    return {
        "ece": float(error(table[None])[0]),
        "ece_ci95": bootstrap_ci95(table, error),
        "nll": float(np.logaddexp(0, -gaps).mean()),
        "bins": bins,
        "definition": ECE,
    }


def _sum_by(prompt: Any, values: Any) -> Any:
    return _by_prompt(prompt, values)[:, 0]


def sigmoid(x: Any) -> Any:
    """1 / (1 + exp(-x)), without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * np.asarray(x, dtype=np.float64)))


def reward_and_length(rankings: Sequence[Ranking]) -> dict[str, Any]:
    """Correlation of reward with tokens: over all answers, and within a prompt (both less their prompt's mean)."""
    scores = [np.asarray(r.scores, dtype=np.float64) for r in rankings]
    lengths = [np.asarray(r.lengths, dtype=np.float64) for r in rankings]
    if not scores:
        return {"pearson": None, "spearman": None, "pearson_within_prompt": None}
    r, n = np.concatenate(scores), np.concatenate(lengths)
    within = [np.concatenate([x - x.mean() for x in parts]) for parts in (scores, lengths)]
    return {
        "pearson": _pearson(r, n),
        "spearman": _pearson(_place(r), _place(n)),
        "pearson_within_prompt": _pearson(*within),
    }


def _pearson(a: Any, b: Any) -> float | None:
    """Correlation; None where one of them does not vary."""
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a**2).sum() * (b**2).sum())
    return float((a * b).sum() / scale) if scale > 0 else None


def _place(values: Any) -> Any:
    """Ranks from 0, equal values sharing their mean rank."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - counts + (counts - 1) / 2)[place]


def _spread(values: Sequence[float]) -> dict[str, Any]:
    array = np.asarray(values, dtype=np.float64)
    if not len(array):
        return {"count": 0, "mean": None, "std": None}
    return {"count": len(array), "mean": float(array.mean()), "std": float(array.std())}


def _margins(gaps: Any) -> dict[str, Any]:
    if not len(gaps):
        return {"mean": None, "std": None, "quantiles": {}}
    quantiles = {str(q): float(np.quantile(gaps, q)) for q in (0.05, 0.25, 0.5, 0.75, 0.95)}
    return {"mean": float(gaps.mean()), "std": float(gaps.std()), "quantiles": quantiles}


def _ensemble(rankings: Sequence[Ranking], pairs: _Pairs) -> dict[str, Any]:
    """How far the members are apart, and whether the pairs that they disagree on are those that the mean gets wrong."""
    members = np.asarray([row for r in rankings for row in (r.members or [])], dtype=np.float64)  # [completions, M]
    each = [
        accuracy([replace(r, scores=[row[m] for row in r.members or []]) for r in rankings])["accuracy"]
        for m in range(members.shape[1])
    ]
    found: dict[str, Any] = {
        "members": members.shape[1],
        "member_accuracy": each,
        "std_of_reward": float(members.std(axis=1).mean()),
        "std_of_margin": float(pairs.spread.mean()) if len(pairs.spread) else None,
    }
    if len(pairs.spread):
        middle = np.median(pairs.spread)
        found["half that they agree on more"] = pairs.rate(pairs.spread <= middle)
        found["half that they agree on less"] = pairs.rate(pairs.spread > middle)
    return found


def labeler_agreement(data: Sequence[Iterable[Mapping[str, Any]]]) -> dict[str, Any] | None:
    """How often two labelers order a pair alike, over pairs that both ordered strictly: the ceiling of the accuracy.

    data: comparisons with `labeler`. None where no two labelers ranked the same answers. `with_ties` counts a pair that one of
    them tied and the other ordered as half, and one that both tied as whole.
    """
    seen: dict[str, list[tuple[str, dict[str, int]]]] = defaultdict(list)
    for records in data:
        for record in records:
            if record.get("labeler"):
                ranks = dict(zip(record["completions"], record["ranks"]))
                seen[prompt_text(record["prompt"])].append((str(record["labeler"]), ranks))
    rows = []
    for rankings in seen.values():
        alike = strict = half = every = 0.0
        for (one, a), (other, b) in combinations(rankings, 2):
            if one == other:
                continue
            for x, y in combinations([text for text in a if text in b], 2):
                first, second = np.sign(a[y] - a[x]), np.sign(b[y] - b[x])
                every += 1
                half += 1.0 if first == second else 0.5 if 0 in (first, second) else 0.0
                if first and second:
                    strict += 1
                    alike += first == second
        if every:
            rows.append((alike, strict, half, every))
    table = np.asarray(rows, dtype=np.float64).reshape(-1, 4)
    table = table[table[:, 1] > 0]
    if not len(table):
        return None
    total = table.sum(axis=0)
    share = lambda sample: sample[..., 0].sum(axis=1) / sample[..., 1].sum(axis=1)  # noqa: E731
    return {
        "agreement": float(total[0] / total[1]),
        "agreement_ci95": bootstrap_ci95(table, share),
        "pairs": int(total[1]),
        "prompts": len(table),
        "with_ties": float(total[2] / total[3]),
    }


def control_rows(
    items: Sequence[Mapping[str, Any]], last_id: int, demonstrations: Sequence[Sequence[int]], seed: int = 0
) -> dict[str, list[list[int]]]:
    """Token rows that an RM is asked about besides: demonstrations, each best answer after another prompt, and random tokens.

    items: encoded held-out comparisons. Random tokens, ids 0 to last_id, are as many as the best answer has, after its prompt,
    and the last token (EOS) stays. No row is longer than the longest of the items, which the model can read.
    """
    longest = max((len(item["prompt"]) + max(map(len, item["completions"])) for item in items), default=0)
    rng = random.Random(seed)
    chosen = rng.sample(list(items), min(CONTROLS, len(items)))
    best = [item["completions"][item["ranks"].index(min(item["ranks"]))] for item in chosen]
    rows = {
        "demonstrations": [list(row) for row in rng.sample(list(demonstrations), min(CONTROLS, len(demonstrations)))]
    }
    if len(chosen) > 1:
        moved = best[1:] + best[:1]
        pairs = [item["prompt"] + answer for item, answer in zip(chosen, moved)]
        rows["answers to other prompts"] = [row for row in pairs if len(row) <= longest]
    rows["random tokens"] = [
        item["prompt"] + [rng.randint(0, last_id) for _ in answer[:-1]] + list(answer[-1:])
        for item, answer in zip(chosen, best)
    ]
    return rows


def _examples(rankings: Sequence[Ranking]) -> list[dict[str, Any]]:
    """Of two prompts the answers that score highest and lowest, with the rank that the labeler gave them."""
    found = []
    for ranking in [r for r in rankings if len(r.scores) > 1][:2]:
        order = sorted(range(len(ranking.scores)), key=lambda i: ranking.scores[i])
        for i in (order[-1], order[0]):
            answer = {"prompt": ranking.prompt, "completion": ranking.completions[i]}
            found.append({**answer, "score": round(float(ranking.scores[i]), 4), "rank": ranking.ranks[i]})
    return found


def _curves(
    rankings: Sequence[Ranking], pairs: _Pairs, controls: Mapping[str, Sequence[float]], samples: Sequence[float]
) -> dict[str, Any]:
    """What the figures draw, kept so that they can be drawn again."""
    scores = {**controls, "held-out answers": samples}
    lengths = [length for ranking in rankings for length in ranking.lengths]
    return {
        "scores": {name: [round(float(v), 4) for v in values] for name, values in scores.items()},
        "lengths": lengths,
        "margins": [round(float(gap), 4) for gap in pairs.gaps],
    }


def summary(report: Mapping[str, Any]) -> dict[str, Any]:
    """What of a report goes into the version's manifest and card: the headline figures."""
    names = ("accuracy", "accuracy_ci95", "pairs", "prompts", "margin", "longer_is_better", "longer_is_better_ci95")
    found = {name: report[name] for name in names}
    if report["calibration"]["ece"] is not None:
        found |= {"ece": report["calibration"]["ece"], "ece_ci95": report["calibration"]["ece_ci95"]}
    if report["reward_and_length"]["pearson_within_prompt"] is not None:
        found["reward_length_correlation"] = report["reward_and_length"]["pearson_within_prompt"]
    if report["labeler_agreement"] is not None:
        found["labeler_agreement"] = report["labeler_agreement"]["agreement"]
        found["labeler_agreement_ci95"] = report["labeler_agreement"]["agreement_ci95"]
    if "ensemble" in report:
        found["ensemble_std_of_margin"] = report["ensemble"]["std_of_margin"]
    return found


# --- files


def write(report: Mapping[str, Any], folder: Path, name: str = "rm", drawn: Path | None = None) -> Path:
    """`<name>.json` and its figures in `folder`, whole or not at all; what was there of this name is replaced.

    drawn: a folder that has the figures already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{name}-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        if drawn is None:
            draw(report, partial, name)
        else:
            shutil.copytree(drawn, partial)
        (partial / f"{name}.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        for path in sorted(partial.iterdir()):
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder / f"{name}.json"


def draw(report: Mapping[str, Any], folder: Path, name: str = "rm") -> None:
    """The figures as PNG: reliability, scores, margins, reward over length, accuracy by group."""
    from matplotlib.figure import Figure  # takes a second; without pyplot there is no window and no state

    folder.mkdir(parents=True, exist_ok=True)
    for title, plot, height in (
        ("reliability", _plot_reliability, 3.6),
        ("scores", _plot_scores, 3.6),
        ("margins", _plot_margins, 3.6),
        ("length", _plot_length, 3.6),
        ("accuracy", _plot_accuracy, max(3.6, 1.2 + 0.22 * len(accuracy_rows(report)))),
    ):
        figure = Figure(figsize=(6, height), layout="constrained")
        plot(figure.subplots(), report)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph", UserWarning)  # names in scripts that the font has not
            figure.savefig(folder / f"{name}-{title}.png", dpi=110, metadata={"Software": None})


def _plot_reliability(axes: Any, report: Mapping[str, Any]) -> None:
    """Points as large as their share of the pairs."""
    bins = report["calibration"]["bins"]
    total = sum(b["items"] for b in bins) or 1
    predicted, observed = [b["predicted"] for b in bins], [b["observed"] for b in bins]
    axes.plot([0, 1], [0, 1], color="grey", linewidth=1, label="calibrated")
    axes.plot(predicted, observed, color="C0", linewidth=1, label="reward model (area: share of pairs)")
    axes.scatter(
        predicted, observed, s=[12 + 400 * b["items"] / total for b in bins], color="C0", alpha=0.6, linewidths=0
    )
    axes.set(
        xlabel="predicted: sigmoid(reward difference)",
        ylabel="observed share preferred",
        xlim=(-0.03, 1.03),
        ylim=(-0.03, 1.03),
    )
    ece = report["calibration"]
    axes.set_title(f"Calibration, ECE {shown(ece['ece'])} {interval(ece['ece_ci95'])}".rstrip())
    axes.legend(fontsize="small", loc="upper left")


def _plot_scores(axes: Any, report: Mapping[str, Any]) -> None:
    every = [v for values in report["curves"]["scores"].values() for v in values]
    edges = np.histogram_bin_edges(every, bins=30) if every else 30
    for name, values in report["curves"]["scores"].items():
        if values:
            weights = np.full(len(values), 1 / len(values))
            axes.hist(values, bins=edges, weights=weights, histtype="step", label=f"{name} ({np.mean(values):+.2f})")
    axes.set(xlabel="reward", ylabel="share")
    axes.margins(y=0.35)  # room for the legend
    axes.set_title("Scores (mean)")
    axes.legend(fontsize="small", loc="upper left", ncols=2, columnspacing=1)


def _plot_margins(axes: Any, report: Mapping[str, Any]) -> None:
    gaps = np.asarray(report["curves"]["margins"], dtype=np.float64)
    if len(gaps):
        width = float(np.ptp(gaps)) / 40 or 1.0
        edges = width * np.arange(np.floor(gaps.min() / width), np.ceil(gaps.max() / width) + 2)  # 0 is one of them
        for side, colour, label in ((gaps <= 0, "C3", "not in order"), (gaps > 0, "C0", "in order")):
            weights = np.full(int(side.sum()), 1 / len(gaps))
            axes.hist(gaps[side], bins=edges, weights=weights, color=colour, label=f"{label} ({side.mean():.0%})")
        axes.legend(fontsize="small")
    axes.axvline(0, color="grey", linewidth=1)
    axes.set(xlabel="reward of the preferred answer less that of the other", ylabel="share of pairs")
    margins = report["margins"]
    axes.set_title(f"Margins, mean {shown(margins['mean'])} ± {shown(margins['std'])}")


def _plot_length(axes: Any, report: Mapping[str, Any]) -> None:
    scores, lengths = report["curves"]["scores"]["held-out answers"], report["curves"]["lengths"]
    axes.scatter(lengths, scores, s=6, alpha=0.4, linewidths=0)
    axes.set(xlabel="tokens of the answer", ylabel="reward")
    found = report["reward_and_length"]
    within = shown(found["pearson_within_prompt"])
    axes.set_title(f"Reward and length, r = {shown(found['pearson'])}, within a prompt {within}")


def _plot_accuracy(axes: Any, report: Mapping[str, Any]) -> None:
    rows = accuracy_rows(report)[::-1]
    for place, (name, found) in enumerate(rows):
        low, high = found["accuracy_ci95"]
        colour = "C1" if name == LONGER else "C0"
        axes.plot([low, high], [place, place], color=colour)
        axes.plot(found["accuracy"], place, "o", color=colour)
    axes.axvline(0.5, color="grey", linewidth=1)
    if report["labeler_agreement"]:
        ceiling = report["labeler_agreement"]["agreement"]
        axes.axvline(ceiling, color="C2", linewidth=1, linestyle="--", label="two labelers agree")
        axes.legend(fontsize="small", loc="lower left")
    names = [f"{_plain(name)} ({found['pairs']})" for name, found in rows]
    axes.set_yticks(range(len(rows)), names, fontsize="small")
    axes.set(xlabel="pair accuracy, 95 %", xlim=(-0.02, 1.02), ylim=(-0.6, len(rows) - 0.4))
    axes.set_title("Held-out accuracy (pairs)")


def _plain(name: str) -> str:
    """A name as a figure can have it: short, and no mathematics."""
    name = " ".join(name.split())
    return (name if len(name) <= 30 else name[:29] + "…").replace("$", r"\$")


def accuracy_rows(report: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(name, figures) of all groups that have a pair, in the order of the table."""
    longer = {"accuracy": report["longer_is_better"], "accuracy_ci95": report["longer_is_better_ci95"]}
    rows = [("all pairs", dict(report)), (LONGER, {**longer, "pairs": report["pairs"]})]
    for title, key in (
        ("K =", "by_k"),
        ("", "by_length_difference"),
        ("use case", "by_use_case"),
        ("from", "by_source"),
    ):
        rows += [(f"{title} {name}".strip(), found) for name, found in report[key].items()]
    rows += [(f"labeler {name}", found) for name, found in list(report["by_labeler"].items())[:6]]
    folds = report.get("held_out_labelers", {}).get("folds", [])
    rows += [(f"without {', '.join(fold['labelers'])}, on theirs", fold["held_out_labelers"]) for fold in folds]
    return [(name, found) for name, found in rows if found["pairs"]]


# --- the terminal


def print_report(report: Mapping[str, Any], title: str) -> None:
    """A table of accuracies and one of the rest."""
    from rich.box import SIMPLE, SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(title=Text(title), title_justify="left", box=SIMPLE_HEAD)
    for name in ("held-out pairs", "accuracy", "95 %", "pairs"):
        table.add_column(name, justify="left" if name == "held-out pairs" else "right")
    for name, found in accuracy_rows(report):
        table.add_row(Text(name), shown(found["accuracy"]), interval(found["accuracy_ci95"]), str(found["pairs"]))
    console.print(table)
    table = Table(show_header=False, box=SIMPLE)
    for name, value in _facts(report):
        table.add_row(name, value)
    console.print(table)


def _facts(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    over, agreement = report["over_longer_is_better"], report["labeler_agreement"]
    if over:
        yield "over longer is better", f"{over['difference']:+.3f} {interval(over['difference_ci95'])}"
    if agreement:
        told = f"{shown(agreement['agreement'])} {interval(agreement['agreement_ci95'])}"
        yield "two labelers agree on", f"{told} of {agreement['pairs']} pairs: the ceiling"
    else:
        yield "two labelers agree on", "unknown: no two ranked the same answers"
    held_out = report.get("held_out_labelers")
    if held_out:
        for name, key in (("held-out labelers", ""), ("labelers trained on", "training_labelers_")):
            told = f"{shown(held_out[f'{key}mean'])} ± {shown(held_out[f'{key}standard_error'])}"
            yield f"accuracy, {name}", f"{told} ({held_out['groups']} groups)"
    ece = report["calibration"]
    yield "calibration error (ECE)", f"{shown(ece['ece'])} {interval(ece['ece_ci95'])}"
    length = report["reward_and_length"]
    yield (
        "reward and length",
        f"r = {shown(length['pearson'])}, within a prompt {shown(length['pearson_within_prompt'])}",
    )
    margins = report["margins"]
    yield "margin", f"{shown(margins['mean'])} ± {shown(margins['std'])}"
    for name, spread in report["scores"].items():
        yield f"score of {name}", f"{shown(spread['mean'])} ± {shown(spread['std'])} ({spread['count']})"
    if "ensemble" in report:
        found = report["ensemble"]
        each = ", ".join(map(shown, found["member_accuracy"]))
        yield (
            f"ensemble of {found['members']}",
            f"std of a margin {shown(found['std_of_margin'])}; accuracy each {each}",
        )
        if "mean" in found:
            mean = found["mean"]
            yield "their mean reward", f"accuracy {shown(mean['accuracy'])} {interval(mean['accuracy_ci95'])}"
        for name in ("half that they agree on more", "half that they agree on less"):
            if name in found:
                yield name, f"accuracy {shown(found[name]['accuracy'])} {interval(found[name]['accuracy_ci95'])}"


def shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def interval(low_high: Sequence[float] | None) -> str:
    return "" if low_high is None else f"({low_high[0]:.3f}, {low_high[1]:.3f})"
