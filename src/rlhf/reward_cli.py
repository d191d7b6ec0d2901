"""The commands `rlhf eval` and `rlhf probe`: their arguments. What they do is in `reward_eval` and `probe`."""

from __future__ import annotations

import argparse
from typing import Any


def count(word: str) -> int:
    """An argument that is a whole number from 1 up."""
    value = int(word)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{word} is below 1")
    return value


count.__name__ = "whole number"  # how argparse names it where `int` fails


def add_reward(commands: Any) -> None:
    def add(name: str, run: str, help: str) -> Any:
        parser: argparse.ArgumentParser = commands.add_parser(name, help=help, description=help)
        parser.set_defaults(run=run)
        parser.add_argument("ref", metavar="RUN/rm[/vN]", help="the version; the newest of the stage without vN")
        parser.add_argument("--root", default="runs", help="root folder of the registry (default: %(default)s)")
        own = "comparisons that it was not trained on (default: those that its training held out)"
        parser.add_argument("--data", metavar="FILE", help=own)
        parser.add_argument("--format", metavar="NAME", help="of that file (default: detected by its fields)")
        parser.add_argument("--on-error", choices=["stop", "skip"], default="stop", help="default: %(default)s")
        parser.add_argument("--max-prompts", type=count, metavar="N", help="use at most this many comparisons")
        batch = "prompts in one forward (default: %(default)s)"
        parser.add_argument("--batch-size", type=count, default=8, metavar="N", help=batch)
        return parser.add_argument

    more = add("eval", "rlhf.reward_eval:evaluate", "whether to trust a reward model: figures on held-out comparisons")
    more("--demonstrations", metavar="FILE", help="demonstrations to score (default: those it was centred on)")
    more("--members", nargs="+", default=[], metavar="REF", help="other versions, to see where they disagree with it")
    cross = "train again without each of N groups of labelers, and score those"
    more("--cross-validate", type=count, metavar="N", help=cross)
    more = add(
        "probe", "rlhf.probe:probe", "how a reward model takes perturbed answers: typos, flattery, cuts, keywords …"
    )
    more("--kinds", nargs="+", metavar="NAME", help="perturbations to try (default: all)")
    more("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    more("--worst", type=count, default=5, metavar="N", help="worst cases to show (default: %(default)s)")
