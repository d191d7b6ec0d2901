"""K completions of each prompt, sampled from one policy, as they are put before a labeler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.data.encode import decode_completions, encode_prompts
from rlhf.models import banned_ids
from rlhf.rollout import sample_responses


@dataclass(frozen=True)
class Samples:
    """A prompt with the distinct completions that were sampled for it, and which of them ended by themselves."""

    prompt: Any
    completions: list[str]
    ended: list[bool]


def collect_completions(
    policy: Any,
    tokenizer: Any,
    prompts: Sequence[Any],
    counts: Sequence[int],
    *,
    response_length: int,
    seed: int = 0,
    temperature: float = 1.0,
    batch_size: int = 256,
    shown_as: str | None = None,
) -> list[Samples]:
    """Samples counts[i] completions of prompts[i]; equal and empty ones are shown once or not at all, as labelers see them.

    A completion's random numbers are keyed by (seed, its number, place of the prompt), so that more samples of a prompt
    keep the ones it had. `shown_as` is the name of a progress bar, on a terminal; None shows none.
    """
    ids = encode_prompts(tokenizer, prompts)
    jobs = [(k, i) for i, count in enumerate(counts) for k in range(count)]  # a prompt's side by side: it is read once
    tokens, ended = sample_responses(
        policy,
        [ids[i] for _, i in jobs],
        [(seed, k, i) for k, i in jobs],
        response_length=response_length,
        temperature=temperature,
        batch_size=batch_size,
        tokenizer=tokenizer,
        banned=banned_ids(policy, tokenizer),
        shown_as=shown_as,
    )
    texts = decode_completions(tokenizer, tokens)
    shown: list[dict[str, bool]] = [{} for _ in prompts]
    for (_, i), text, end in zip(jobs, texts, ended):
        if text.strip():
            shown[i].setdefault(text, end)
    return [Samples(prompt, list(found), list(found.values())) for prompt, found in zip(prompts, shown)]


def comparison(samples: Samples, ranks: Sequence[int], labeler: str, **more: Any) -> dict[str, Any]:
    """The canonical comparison record of ranked samples."""
    return {
        "prompt": samples.prompt,
        "completions": samples.completions,
        "ranks": list(ranks),
        "ended": samples.ended,
        "labeler": labeler,
        **more,
    }
