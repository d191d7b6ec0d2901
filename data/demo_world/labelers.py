"""Simulated labelers: they rank answers by the judge's utility, through their own taste and noise.

Each labeler weighs helpfulness, truthfulness and harmlessness a little differently, likes length a little more or
less, and adds N(0, noise) to each answer. What comes out is put on a scale of seven steps, as InstructGPT's labelers
did, so that answers that seem about equal tie.
"""

import random
from collections.abc import Sequence
from itertools import combinations

from .judge import judge

NOISE = 0.15  # two labelers then agree on about 73 % of pairs of answers sampled from an SFT model
STEPS = 7


class Labelers:
    """`rank` is a function of (seed, labeler, prompt, completions) and of nothing else.

    noise: standard deviation on the scale of utility. flip: share of (labeler, prompt)s ranked upside down.
    names: the labelers; one that begins with "random" ranks at random, for a deliberately broken run.
    """

    def __init__(self, seed: int = 0, noise: float = NOISE, flip: float = 0.0, names: Sequence[str] | None = None):
        self.seed, self.noise, self.flip = seed, noise, flip
        self.names = list(names or [f"labeler-{i:02d}" for i in range(1, 6)])

    def assign(self, key: object) -> str:
        """Which labeler gets a prompt."""
        return random.Random(f"{self.seed}|assign|{key}").choice(self.names)

    def rank(self, prompt: str, completions: Sequence[str], labeler: str | None = None, key: object = "") -> list[int]:
        """Ranks from 1 (best) with ties; `key` tells apart repeated labels of the same answers."""
        labeler = labeler or self.assign(prompt)
        ratings = self.ratings(prompt, completions, labeler, key)
        better = sorted(set(ratings), reverse=True)
        return [better.index(rating) + 1 for rating in ratings]

    def ratings(self, prompt: str, completions: Sequence[str], labeler: str, key: object = "") -> list[int]:
        """From 1 (worst) to 7, one an answer."""
        rng = random.Random("|".join((str(self.seed), labeler, prompt, *completions, str(key))))
        if labeler.startswith("random"):
            return [rng.randint(1, STEPS) for _ in completions]
        help_taste, truth_taste, harm_taste, length_taste = self.taste(labeler)
        scale = []
        for completion in completions:
            s = judge(prompt, completion)
            liking = s.utility + help_taste * s.helpful + truth_taste * s.truthful + harm_taste * (s.harmless - 1)
            liking += length_taste * min(len(completion.split()), 40) / 40 + rng.gauss(0, self.noise)
            scale.append(min(STEPS, max(1, 1 + round(liking * (STEPS - 1)))))
        return [STEPS + 1 - step for step in scale] if rng.random() < self.flip else scale

    def taste(self, labeler: str) -> tuple[float, ...]:
        """Small weights of a labeler's own on the three sub-scores, and on length."""
        rng = random.Random(f"{self.seed}|taste|{labeler}")
        return (rng.uniform(0, 0.1), rng.uniform(0, 0.1), rng.uniform(0, 0.1), rng.uniform(-0.05, 0.1))


def agreement(rankings_a: Sequence[Sequence[int]], rankings_b: Sequence[Sequence[int]]) -> float:
    """Share of pairs of answers that two labelers order alike; a pair that one of them ties and the other orders is
    half an agreement, one that both tie is a whole one."""
    total, agreed = 0, 0.0
    for ranks_a, ranks_b in zip(rankings_a, rankings_b):
        for i, j in combinations(range(len(ranks_a)), 2):
            order_a, order_b = sign(ranks_a[i] - ranks_a[j]), sign(ranks_b[i] - ranks_b[j])
            agreed += 1 - abs(order_a - order_b) / 2
            total += 1
    if not total:
        raise ValueError("no pair to compare: every ranking has fewer than two answers")
    return agreed / total


def sign(x: int) -> int:
    return (x > 0) - (x < 0)
