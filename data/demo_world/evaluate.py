"""What the demo measures: every model's answers to held-out prompts, scored by the judge that no stage has seen."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch

from rlhf import evaluation, models
from rlhf.data.encode import encode_completions, encode_prompts
from rlhf.feedback import collect_completions
from rlhf.manifest import provenance
from rlhf.registry import Registry

from .answers import best_answers
from .judge import Score, judge, permuted
from .labelers import STEPS

PARTS = ("helpful", "truthful", "harmless", "utility")
BLOCK = 64  # tokens of raw text that the base was trained on at once


def evaluate(demo: Any, world: dict[str, Any], agreed: float) -> dict[str, Any]:
    """The summary of a run, seconds aside."""
    from .demo import RESPONSE_LENGTH, SAMPLE_SEED, load_policy, read

    registry = Registry(demo.root)
    artifacts = {stage: registry.require(stage, demo.run) for stage in ("base", "sft", "rm", "ppo")}
    records = read(demo.data / "eval_prompts.jsonl")
    prompts = [r["prompt"] for r in records]
    policies, answers, scores = {}, {}, {}
    for name in ("base", "sft", "ppo"):
        policies[name], tokenizer = load_policy(artifacts[name])
        answers[name] = evaluation.answer(
            policies[name],
            tokenizer,
            prompts,
            response_length=RESPONSE_LENGTH,
            seed=demo.seed + 2 * SAMPLE_SEED,
            batch_size=256,
            shown_as=f"answers of {name}",
        )
        scores[name] = [judge(p, a) for p, a in zip(prompts, answers[name].texts)]
    scores["best"] = [judge(p, best_answers(p)[0]) for p in prompts]

    summary: dict[str, Any] = {"seed": demo.seed, "scale": demo.scale, "labelers": demo.labelers}
    summary |= reward_model_figures(demo, artifacts["rm"], policies["sft"], records)
    summary["labeler_agreement"] = agreed
    summary["demonstrations_bad_share"] = world["demonstrations"]["bad_share"]
    summary |= evaluation.win_rate(utilities(scores["ppo"]), utilities(scores["sft"]))
    summary["win_rate_permuted"] = permuted_win_rate(prompts, answers["ppo"].texts, scores["sft"])
    summary["win_rate_by_group"] = by_group(records, scores["ppo"], scores["sft"])
    summary["scores"] = {name: {part: mean(of, part) for part in PARTS} for name, of in scores.items()}
    summary["ppo_minus_sft"] = {part: difference(scores["ppo"], scores["sft"], part) for part in PARTS}
    summary["sft_share_of_best"] = mean(scores["sft"], "utility") / mean(scores["best"], "utility")
    gap = evaluation.response_logps(policies["ppo"], tokenizer, answers["ppo"]) - evaluation.response_logps(
        policies["sft"], tokenizer, answers["ppo"]
    )
    summary["kl"] = float(gap.mean())
    summary["length"] = {n: float(torch.tensor(a.lengths).float().mean()) for n, a in answers.items()}
    summary["eos_rate"] = {n: sum(a.ended) / len(a.ended) for n, a in answers.items()}
    text = [r["text"] for r in read(demo.data / "base_heldout.jsonl")]
    summary["perplexity"] = {
        n: evaluation.perplexity(p, tokenizer, text, block_size=BLOCK, packing_strategy="bfd_split")
        for n, p in policies.items()
    }
    summary["rollouts"] = artifacts["ppo"].manifest["metrics"]["rollouts"]
    summary["stopped"] = artifacts["ppo"].manifest["metrics"]["stopped"]
    summary["held_out_prompts"] = len(prompts)
    here = provenance()
    summary["versions"] = {n: here["packages"].get(n) for n in ("torch", "transformers", "trl", "accelerate", "rlhf")}
    summary["versions"]["python"] = here["python"]
    examples = pick_examples(records, answers, scores)
    (demo.root / demo.run / "examples.json").write_text(json.dumps(examples, indent=2) + "\n", encoding="utf-8")
    return summary


def utilities(scores: Sequence[Score]) -> list[float]:
    return [s.utility for s in scores]


def mean(scores: Sequence[Score], part: str) -> float:
    return sum(getattr(s, part) for s in scores) / len(scores)


def difference(scores: Sequence[Score], others: Sequence[Score], part: str) -> dict[str, Any]:
    value, interval = evaluation.mean_ci95([getattr(a, part) - getattr(b, part) for a, b in zip(scores, others)])
    return {"mean": value, "ci95": interval}


def permuted_win_rate(prompts: Sequence[str], answers: Sequence[str], others: Sequence[Score]) -> float:
    """The control: PPO's answers, each given to another prompt."""
    moved = [judge(p, a) for p, a in zip(prompts, permuted(answers))]
    return float(evaluation.win_rate(utilities(moved), utilities(others))["win_rate"])


def by_group(records: Sequence[dict], scores: Sequence[Score], others: Sequence[Score]) -> dict[str, Any]:
    """Win rate on familiar prompts, on held-out facts and on held-out phrasings, each apart."""
    groups = {}
    for group in sorted({r["group"] for r in records}):
        chosen = [i for i, r in enumerate(records) if r["group"] == group]
        mine, theirs = [scores[i] for i in chosen], [others[i] for i in chosen]
        groups[group] = evaluation.win_rate(utilities(mine), utilities(theirs)) | {
            "sft_utility": mean(theirs, "utility"),
            "ppo_utility": mean(mine, "utility"),
            "prompts": len(chosen),
        }
    return groups


def reward_model_figures(demo: Any, rm: Any, sft: Any, records: Sequence[dict]) -> dict[str, Any]:
    """Pair accuracy against the judge's true order on fresh samples for held-out prompts, beside two simple rivals.

    What lies on one of the labelers' seven steps is tied and no pair; `rm_accuracy_exact` orders every difference in utility.
    """
    from .demo import RESPONSE_LENGTH, SAMPLE_SEED, read

    tokenizer = models.load_tokenizer(rm.path)
    reward = models.load_scalar_model(rm.path, tokenizer).eval()
    chosen = [r["prompt"] for r in records if r["group"] == "familiar"]
    samples = collect_completions(
        sft,
        tokenizer,
        chosen,
        [6] * len(chosen),
        response_length=RESPONSE_LENGTH,
        seed=demo.seed + 3 * SAMPLE_SEED,
        batch_size=512,
        shown_as="samples to be ordered",
    )
    samples = [s for s in samples if len(s.completions) > 1]
    truth = [true_ranks(s.prompt, s.completions) for s in samples]
    exact = [true_ranks(s.prompt, s.completions, steps=None) for s in samples]
    rows, counts = [], [len(s.completions) for s in samples]
    for s in samples:
        prompt = encode_prompts(tokenizer, [s.prompt])[0]
        rows += [prompt + ids for ids in encode_completions(tokenizer, s.completions, s.ended)]
    scores = evaluation.score_answers(reward, tokenizer, rows, batch_size=256).split(counts)
    bag = BagOfWords(read(demo.data / "comparisons.jsonl"))
    accuracy = {
        "rm": evaluation.ranking_metrics([s.tolist() for s in scores], truth),
        "length": best_of_both([[len(c.split()) for c in s.completions] for s in samples], truth),
        "bag_of_words": evaluation.ranking_metrics([bag.scores(s.completions) for s in samples], truth),
    }
    return {
        "rm_accuracy": accuracy["rm"]["accuracy"],
        "rm_accuracy_ci95": accuracy["rm"]["accuracy_ci95"],
        "rm_accuracy_pairs": accuracy["rm"]["pairs"],
        "rm_accuracy_prompts": len(chosen),
        "rm_accuracy_exact": evaluation.ranking_metrics([s.tolist() for s in scores], exact)["accuracy"],
        "length_accuracy": accuracy["length"]["accuracy"],
        "bag_of_words_accuracy": accuracy["bag_of_words"]["accuracy"],
        "rm_accuracy_on_labels": rm.manifest["metrics"].get("accuracy"),
        "rm_ece": rm.manifest["metrics"].get("ece"),
        "rm_demonstrations_mean": rm.manifest["metrics"]["demonstrations_mean"],
    }


def true_ranks(prompt: str, completions: Sequence[str], steps: int | None = STEPS) -> list[int]:
    """Ranks by the judge's utility, on the seven steps that labelers rate with: what lies on one step is tied. None: as it is."""
    values = [judge(prompt, c).utility for c in completions]
    values = values if steps is None else [round((steps - 1) * value) for value in values]
    order = sorted(set(values), reverse=True)
    return [order.index(v) + 1 for v in values]


def best_of_both(lengths: Sequence[Sequence[float]], ranks: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Length alone, whichever of longer and shorter does better."""
    longer = evaluation.ranking_metrics(lengths, ranks)
    shorter = evaluation.ranking_metrics([[-x for x in row] for row in lengths], ranks)
    return max(longer, shorter, key=lambda m: m["accuracy"])


class BagOfWords:
    """A Bradley-Terry model on the word counts of an answer, fitted to the same rankings as the reward model."""

    def __init__(self, comparisons: Sequence[dict], steps: int = 200):
        texts = [text for c in comparisons for text in c["completions"]]
        self.index = {word: i for i, word in enumerate(sorted({w for text in texts for w in text.split()}))}
        pairs, start = [], 0
        for c in comparisons:
            for i, a in enumerate(c["ranks"], start):
                for j, b in enumerate(c["ranks"], start):
                    if a < b:
                        pairs.append((i, j))
            start += len(c["ranks"])
        better, worse = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T
        bags = self.bags(texts)
        self.weight = torch.zeros(len(self.index), requires_grad=True)
        optimizer = torch.optim.Adam([self.weight], lr=0.05)
        for _ in range(steps if pairs else 0):
            optimizer.zero_grad()
            scores = bags @ self.weight
            gaps = scores.index_select(0, better) - scores.index_select(0, worse)
            loss = torch.nn.functional.softplus(-gaps).mean() + 1e-4 * self.weight.square().sum()
            loss.backward()
            optimizer.step()

    def bags(self, texts: Sequence[str]) -> torch.Tensor:
        """How often each known word is in each text [N, words]."""
        places = [(row, self.index[w]) for row, text in enumerate(texts) for w in text.split() if w in self.index]
        counts = torch.zeros(len(texts), len(self.index))
        rows, columns = torch.tensor(places, dtype=torch.long).reshape(-1, 2).T
        return counts.index_put_((rows, columns), torch.ones(len(places)), accumulate=True)

    def scores(self, completions: Sequence[str]) -> list[float]:
        return (self.bags(completions) @ self.weight.detach()).tolist()


def pick_examples(records: Sequence[dict], answers: dict, scores: dict) -> list[dict[str, Any]]:
    """Three familiar prompts, the first of three kinds: not chosen by how well they came out."""
    chosen: dict[str, int] = {}
    for i, record in enumerate(records):
        if record["kind"] in ("generation", "open_qa", "brainstorming") and record["group"] == "familiar":
            chosen.setdefault(record["kind"], i)
    return [
        {
            "kind": kind,
            "prompt": records[i]["prompt"],
            "answers": {n: {"text": a.texts[i], **vars(scores[n][i])} for n, a in answers.items()},
        }
        for kind, i in sorted(chosen.items())
    ]
