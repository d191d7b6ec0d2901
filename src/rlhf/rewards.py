"""Where scores come from: reward models, and plain functions of texts (rule-based rewards).

Any number of them, with weights. One of weight 0 does not steer: it watches, and a run whose reward goes up while a watching
reward goes down is over-optimising.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlhf import RLHFError
from rlhf.data.encode import batches, pad
from rlhf.models import scalar_scores


class RewardError(RLHFError):
    """A reward function cannot be used, or did not return a finite number for each completion."""


@dataclass(frozen=True)
class Episodes:
    """Finished responses as a reward sees them: token ids for models, texts and the data set's columns for functions."""

    prompts: Sequence[Sequence[int]]
    responses: Sequence[Sequence[int]]
    prompt_texts: Sequence[Any]
    completions: Sequence[str]
    columns: dict[str, list[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.responses)


@dataclass(frozen=True)
class Reward:
    """A named reward with its weight; `score(episodes)` gives [B] float32 on the CPU."""

    name: str
    weight: float
    score: Callable[[Episodes], Tensor]
    model: Any = None  # what `score` reads, where it is a model


def model_reward(name: str, weight: float, model: Any, pad_token_id: int, batch_size: int) -> Reward:
    """A scalar-head model, read at the last real token of prompt and response."""

    @torch.no_grad()
    def score(episodes: Episodes) -> Tensor:
        rows = [[*prompt, *response] for prompt, response in zip(episodes.prompts, episodes.responses)]
        result = torch.empty(len(rows))
        for batch in batches([len(row) for row in rows], batch_size):
            ids, mask = (tensor.to(model.device) for tensor in pad([rows[i] for i in batch], pad_token_id))
            result[torch.tensor(batch)] = scalar_scores(model, ids, mask).float().cpu()
        if not torch.isfinite(result).all():
            worst = float(result[~torch.isfinite(result)][0])
            raise RewardError(
                f"reward model {name} scored a response {worst}: its weights, or its dtype, cannot be right; check them with "
                "`rlhf eval`, or set dtype to float32"
            )
        return result

    return Reward(name, weight, score, model)


def function_reward(name: str, weight: float, reference: str) -> Reward:
    """`package.module:function`, called as function(prompts, completions, **columns), which returns a float for each."""
    function = find_function(reference)

    def score(episodes: Episodes) -> Tensor:
        try:
            values = function(list(episodes.prompt_texts), list(episodes.completions), **episodes.columns)
        except Exception as error:  # whatever a user's function raises is the user's to read, in one line
            raise RewardError(f"reward function {reference} raised {_in_one_line(error)}") from error
        return torch.tensor(_checked(values, len(episodes), reference))

    return Reward(name, weight, score)


def find_function(reference: str) -> Callable[..., Any]:
    """The function that `package.module:function` names."""
    module_name, colon, name = reference.partition(":")
    if not colon or not module_name or not name:
        raise RewardError(f"reward function {reference!r}: write package.module:function")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise RewardError(
            f"reward function {reference}: cannot import {module_name} ({' '.join(str(error).split())}); check PYTHONPATH"
        ) from error
    except Exception as error:  # a module runs when it is imported, and may do anything
        raise RewardError(
            f"reward function {reference}: importing {module_name} raised {_in_one_line(error)}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise RewardError(f"reward function {reference}: {module_name} has no function {name!r}")
    return function


def _in_one_line(error: BaseException) -> str:
    """What was raised, its text without line breaks, and the innermost place where."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f" ({trace.tb_frame.f_code.co_filename}:{trace.tb_lineno})" if trace is not None else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"


def _checked(values: Any, count: int, reference: str) -> list[float]:
    try:
        values = list(values)
    except TypeError:
        raise RewardError(
            f"reward function {reference} returned {type(values).__name__}, not a list of numbers"
        ) from None
    if len(values) != count:
        raise RewardError(f"reward function {reference} returned {len(values)} rewards for {count} completions")
    numbers = []
    for i, value in enumerate(values):
        try:
            number = float("" if isinstance(value, (str, bytes)) else value)
        except (TypeError, ValueError, OverflowError):  # None, a list, an array of several, 10 ** 400 …
            told = " ".join(repr(value).split())[:80]
            raise RewardError(
                f"reward function {reference} returned {told} for completion {i}, which is no number"
            ) from None
        if not math.isfinite(number):
            raise RewardError(
                f"reward function {reference} returned {number} for completion {i}; rewards must be finite"
            )
        numbers.append(number)
    return numbers


def weighted(rewards: Sequence[Reward], values: Tensor) -> Tensor:
    """The score [B] of each response from its rewards [B, M]: their weighted sum, those of weight 0 left out."""
    weights = torch.tensor([r.weight for r in rewards])
    return torch.where(weights != 0, values * weights, 0.0).sum(dim=1)
