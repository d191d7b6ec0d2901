"""What the demo shows on the terminal."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

console = Console(stderr=True)


def say_stage(name: str, what: str) -> None:
    console.rule(f"[bold]{name}[/bold]: {what}", align="left", style="cyan")


def show(demo: Any, summary: dict[str, Any]) -> None:
    """Stages with their figures, three prompts side by side, lineage, and where to go from here."""
    out = Console()
    out.print(stages(summary))
    out.print(qualities(summary))
    for example in json.loads((demo.root / demo.run / "examples.json").read_text()):
        out.print(side_by_side(example))
    out.print(lineage(demo))
    run = demo.root / demo.run
    out.print(
        f"\nfigures   {run / 'summary.json'}\nmodels    {run}/<stage>/v<N>, each a folder that transformers loads"
    )
    out.print(
        "next      rlhf registry ls · rlhf registry show "
        f"{demo.run}/ppo · your own data: README.md, 'Each stage on your own data'",
        markup=False,
    )


def stages(s: dict[str, Any]) -> Table:
    table = Table(title="RLHF in the demo world", title_justify="left")
    for name in ("stage", "seconds", "figure"):
        table.add_column(name, justify="right" if name == "seconds" else "left")
    figures = {
        "world": s["cleaning"],
        "base": f"perplexity {s['perplexity']['base']:.2f} on held-out text",
        "sft": f"{s['sft_share_of_best']:.0%} of the best answers' utility, from demonstrations of which "
        f"{s['demonstrations_bad_share']:.0%} are bad",
        "feedback": f"two labelers agree on {s['labeler_agreement']:.0%} of pairs",
        "rm": f"pair accuracy {s['rm_accuracy']:.3f} (length {s['length_accuracy']:.3f}, "
        f"bag of words {s['bag_of_words_accuracy']:.3f})"
        + (f", ECE {s['rm_ece']:.3f}" if s["rm_ece"] is not None else ""),
        "ppo": f"win rate {s['win_rate']:.3f} over SFT {interval(s['win_rate_ci95'])}, KL {s['kl']:.1f} nats",
        "evaluation": f"win rate {s['win_rate_permuted']:.3f} with answers given to other prompts",
        "total": f"at most {s['peak_memory_gib']} GiB of memory" if s["peak_memory_gib"] else "",
    }
    for name, seconds in s["seconds"].items():
        table.add_row(name, f"{seconds:.0f}", figures.get(name, ""), end_section=name == "evaluation")
    return table


def qualities(s: dict[str, Any]) -> Table:
    table = Table(title=f"The judge on {s['held_out_prompts']} held-out prompts", title_justify="left")
    for name in ("", "helpful", "truthful", "harmless", "utility", "length", "ends"):
        table.add_column(name, justify="left" if not name else "right")
    for name, scores in s["scores"].items():
        extra = [f"{s['length'][name]:.1f}", f"{s['eos_rate'][name]:.0%}"] if name in s["length"] else ["", ""]
        table.add_row(name, *(f"{value:.3f}" for value in scores.values()), *extra, end_section=name == "best")
    gains = s["ppo_minus_sft"].values()
    table.add_row("PPO − SFT", *(f"{g['mean']:+.3f}\n{interval(g['ci95'], '+')}" for g in gains), "", "")
    return table


def interval(ci: list[float], sign: str = "") -> str:
    return f"[{ci[0]:{sign}.3f}, {ci[1]:{sign}.3f}]".replace("[", "(").replace("]", ")")


def side_by_side(example: dict[str, Any]) -> Table:
    title = Text(example["prompt"].strip(), style="table.title")  # what a model writes may look like markup
    table = Table(title=title, title_justify="left", show_lines=True, min_width=80)
    for name in ("", "answer", "help", "truth", "harm", "utility"):
        table.add_column(name, ratio=1 if name == "answer" else None)
    for name, a in example["answers"].items():
        scores = (f"{a[part]:.2f}" for part in ("helpful", "truthful", "harmless", "utility"))
        table.add_row(name, Text(a["text"].strip()), *scores)
    return table


def lineage(demo: Any) -> Tree:
    from rlhf.registry import Registry

    def grow(tree: Tree, node: Any) -> Tree:
        branch = tree.add(node.ref)
        for parent in node.parents:
            grow(branch, parent)
        return tree

    registry = Registry(demo.root)
    return grow(Tree("lineage"), registry.lineage(registry.require("ppo", demo.run)))
