"""Stage 2: a reward model on K-way rankings (InstructGPT, section 3.5 and appendix C.2).

One item is a prompt with its K completions, K = 2 to 9. They share one forward, in which each completion sees the prompt and
itself, and all C(K, 2) pairs of the prompt are in one loss: -log σ(r_better - r_worse) averaged over its strictly ordered pairs
(eq. 1). Ties carry no pair. The loss of an optimiser step is divided by the number of its prompts that have a pair, over
accumulation steps and processes, so that the gradient does not depend on how the step is cut.

After training a constant is added so that demonstrations score 0 on average.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import Trainer, set_seed

from rlhf.config import RewardArgs
from rlhf.data import fingerprint, load
from rlhf.data.encode import encode_completions, encode_prompts, pad
from rlhf.engine import settle
from rlhf.evaluation import ranking_metrics
from rlhf.models import accepts, add_reward_bias, context_length, load_scalar_model, load_tokenizer
from rlhf.objectives import ranking_loss
from rlhf.registry import Artifact, Registry
from rlhf.training import (
    MarkComplete,
    Rows,
    TrainingError,
    check_processes,
    held_out_or_none,
    keep_fitting,
    load_splits,
    publish,
    resolve,
    saver,
    trainer_arguments,
    work_folder,
)

MAX_K = 9
ABSENT = -100  # rank of a completion that is not there


def run(args: RewardArgs) -> Artifact | None:
    """Trains and publishes `RUN_NAME/rm`; returns the artifact on the first process."""
    registry = Registry(args.output_dir)
    path, sft = resolve(registry, args.model_name_or_path, args.run_name, "sft")
    with work_folder(args, registry, "rm") as (work, resume):
        training_args = trainer_arguments(args, work, remove_unused_columns=False, label_names=["ranks"])
        check_processes()
        set_seed(args.seed)
        tokenizer = load_tokenizer(path, trust_remote_code=args.trust_remote_code)
        model = load_scalar_model(
            path,
            tokenizer,
            new_head=True,
            dtype=args.dtype,
            attn_implementation=args.attn_implementation,
            trust_remote_code=args.trust_remote_code,
        )
        comparisons, held_out = load_splits(args, "comparisons")
        limit = min(args.max_length, context_length(model) or args.max_length)
        train = encode(tokenizer, comparisons, limit)
        evaluation = encode(tokenizer, held_out, limit, needed=False)
        if not len(train):
            raise TrainingError(
                f"{args.dataset_name}: every comparison is a tie, so that there is nothing to learn from"
            )
        demonstrations = demonstration_rows(args, tokenizer, comparisons, limit)
        trainer = RewardTrainer(
            model=model,
            args=training_args,
            train_dataset=train,
            eval_dataset=held_out_or_none(training_args, evaluation),
            processing_class=tokenizer,
            data_collator=Collator(tokenizer.pad_token_id, shares_prompts(model)),
            compute_metrics=lambda out: {
                "accuracy": ranking_metrics(*_real(out.predictions, out.label_ids))["accuracy"]
            },
            callbacks=[MarkComplete()],
        )
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        metrics: dict[str, Any] = {"comparisons": len(train)}
        metrics |= centre_on_demonstrations(trainer, demonstrations)
        if len(evaluation):
            metrics |= held_out_metrics(trainer, evaluation)
        return publish(
            registry,
            args,
            "rm",
            saver(trainer.accelerator, trainer.model_wrapped, tokenizer),
            parents=[sft] if sft else [],
            base_model=None if sft else path,
            data=[fingerprint(comparisons)],
            metrics=metrics,
            history=trainer.state.log_history,
        )


def encode(tokenizer: Any, records: Dataset, limit: int, *, needed: bool = True) -> Rows:
    """Items {"prompt": ids, "completions": K lists of ids, "ranks": K ints}; too long (counted) and all-tied ones dropped."""
    if not len(records):
        return Rows([])
    prompts = encode_prompts(tokenizer, records["prompt"][:])
    ended = _ended(records)
    items: list[dict[str, Any]] = []
    for prompt, completions, ranks, end in zip(prompts, records["completions"][:], records["ranks"][:], ended):
        items.append(
            {"prompt": prompt, "completions": encode_completions(tokenizer, completions, end), "ranks": list(ranks)}
        )
    fits = [len(item["prompt"]) + max(map(len, item["completions"])) <= limit for item in items]
    kept = [items[i] for i in keep_fitting("comparisons", fits, limit, needed=needed)]
    return Rows([item for item in kept if len(set(item["ranks"])) > 1])


class Collator:
    """Items as one batch: `ranks` [B, 9], absent completions -100, and token rows [R, L] padded on the right.

    With share_prompt a row is a prompt followed by all of its completions, each at the positions right after the prompt;
    `segments` [R, L] is 0 on the prompt, k on the k-th completion, -1 on padding. Otherwise a row is a prompt with one
    completion, and there are no segments. `read` [N] is the place of each completion's last token in the flattened rows.
    """

    def __init__(self, pad_token_id: int, share_prompt: bool = True):
        self.pad_token_id, self.share_prompt = pad_token_id, share_prompt

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        rows: list[list[int]] = []
        positions: list[list[int]] = []
        segments: list[list[int]] = []
        ends: list[tuple[int, int]] = []
        for item in items:
            prompt, completions = item["prompt"], item["completions"]
            for group in [completions] if self.share_prompt else [[c] for c in completions]:
                row, place, segment = list(prompt), list(range(len(prompt))), [0] * len(prompt)
                for k, completion in enumerate(group, 1):
                    row += completion
                    place += range(len(prompt), len(prompt) + len(completion))
                    segment += [k] * len(completion)
                    ends.append((len(rows), len(row) - 1))
                rows.append(row)
                positions.append(place)
                segments.append(segment)
        ids, mask = pad(rows, self.pad_token_id)
        batch = {
            "ranks": torch.tensor([[*item["ranks"], *[ABSENT] * (MAX_K - len(item["ranks"]))] for item in items]),
            "input_ids": ids,
            "attention_mask": mask,
            "read": torch.tensor([row * ids.shape[1] + end for row, end in ends]),
        }
        if self.share_prompt:
            batch |= {"position_ids": pad(positions, 0)[0], "segments": pad(segments, -1)[0]}
        return batch


def shares_prompts(model: Any) -> bool:
    """Whether the model takes the mask and positions that let the completions of a prompt share its forward."""
    return accepts(model, "position_ids") and model.config._attn_implementation in ("eager", "sdpa")


def forward_scores(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    read: Tensor,
    position_ids: Tensor | None = None,
    segments: Tensor | None = None,
) -> Tensor:
    """Rewards [N] of the completions that end at `read`. Bound to the model as its forward, so that its engine sees the call."""
    mask = attention_mask.long() if segments is None else segment_mask(segments, model.dtype)
    extra = {} if position_ids is None else {"position_ids": position_ids}
    backbone = getattr(model, model.base_model_prefix)
    hidden = backbone(input_ids=input_ids, attention_mask=mask, use_cache=False, **extra).last_hidden_state
    return model.score(hidden.flatten(0, 1)[read]).squeeze(-1).float()


def segment_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive attention mask [R, 1, L, L]: a token sees the prompt and its own completion, up to itself."""
    before = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool, device=segments.device).tril()
    same = (segments[:, :, None] == segments[:, None, :]) | (segments[:, None, :] == 0)
    mask = torch.zeros(len(segments), 1, *before.shape, dtype=dtype, device=segments.device)
    return mask.masked_fill(~(same & before)[:, None], torch.finfo(dtype).min)


class RewardTrainer(Trainer):
    """A Trainer whose item is a prompt with its completions, and whose loss is InstructGPT's eq. 1."""

    def __init__(self, **kwargs: Any):
        model = kwargs["model"]
        model.forward = MethodType(forward_scores, model)
        super().__init__(**kwargs)
        # Tells Trainer that the loss is divided by the whole step's count already: see get_batch_samples.
        self.model_accepts_loss_kwargs = True

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The step's batches, and the number of their prompts that have a pair, over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = sum((has_pair(batch["ranks"]).sum() for batch in batches), torch.tensor(0)).to(device)
        return batches, self.accelerator.gather(count).sum()

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Eq. 1; times the number of processes, because their gradients are averaged."""
        ranks = inputs["ranks"]
        real = ranks != ABSENT
        scores = model(**{name: tensor for name, tensor in inputs.items() if name != "ranks"})
        prompt = torch.arange(len(ranks), device=ranks.device)[:, None].expand_as(ranks)
        loss = ranking_loss(scores, ranks[real], prompt[real], count=num_items_in_batch)
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        padded = scores.new_full(ranks.shape, 0.0).masked_scatter(real, scores.detach())
        return (loss, {"scores": padded}) if return_outputs else loss

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return loss.detach(), outputs["scores"], inputs["ranks"]


def has_pair(ranks: Tensor) -> Tensor:
    """Which prompts [B] of ranks [B, 9] have two completions of different rank."""
    low = ranks.masked_fill(ranks == ABSENT, 1 << 30).amin(dim=1)
    return (ranks.amax(dim=1) > low) & (low < 1 << 30)


def demonstration_rows(args: RewardArgs, tokenizer: Any, comparisons: Dataset, limit: int) -> list[list[int]]:
    """Token rows of the demonstrations; read before training, so that a wrong name does not cost a training."""
    ended: list[bool] | None = None
    if args.demonstrations_name is not None:
        records = load("demonstrations", args.demonstrations_name, on_error=args.on_error)
        prompts, completions = records["prompt"][:], records["completion"][:]
    else:
        best = [ranks.index(min(ranks)) for ranks in comparisons["ranks"][:]]
        prompts, completions = comparisons["prompt"][:], [c[i] for c, i in zip(comparisons["completions"][:], best)]
        ended = [end is None or end[i] for end, i in zip(_ended(comparisons), best)]
    encoded = zip(encode_prompts(tokenizer, prompts), encode_completions(tokenizer, completions, ended))
    rows = [prompt + completion for prompt, completion in encoded]
    return [rows[i] for i in keep_fitting("demonstrations", [len(row) <= limit for row in rows], limit)]


def centre_on_demonstrations(trainer: RewardTrainer, rows: Sequence[list[int]]) -> dict[str, Any]:
    """Adds the constant that makes demonstrations score 0 on average; says where it is kept."""
    before = score_rows(trainer, rows)
    settle(trainer.model_wrapped)
    place = add_reward_bias(trainer.accelerator.unwrap_model(trainer.model), -float(before.mean()))
    std = float(before.std(unbiased=False))
    return {"bias": -float(before.mean()), "bias_kept_in": place, "demonstrations_std": std}


def score_rows(trainer: RewardTrainer, rows: Sequence[list[int]]) -> Tensor:
    """Rewards [N] of token rows, spread over the processes by the trainer."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    groups = [order[k : k + MAX_K] for k in range(0, len(order), MAX_K)]
    items = [{"prompt": [], "completions": [rows[i] for i in g], "ranks": [1] * len(g)} for g in groups]
    output = trainer.predict(Rows(items))  # type: ignore[arg-type]
    scores, ranks = torch.from_numpy(output.predictions), torch.from_numpy(output.label_ids)
    result = torch.empty(len(rows))
    result[torch.tensor(order)] = scores[ranks != ABSENT].float()
    return result


def held_out_metrics(trainer: RewardTrainer, evaluation: Rows) -> dict[str, Any]:
    """Pair accuracy on held-out prompts with its interval, beside what "longer is better" reaches on the same pairs."""
    output = trainer.predict(evaluation)  # type: ignore[arg-type]
    scores, ranks = _real(output.predictions, output.label_ids)
    lengths = [[float(len(row)) for row in item["completions"]] for item in evaluation.rows]
    longer = ranking_metrics(lengths, [item["ranks"] for item in evaluation.rows])
    return {
        **ranking_metrics(scores, ranks),
        "longer_is_better": longer["accuracy"],
        "longer_is_better_ci95": longer["accuracy_ci95"],
    }


def _ended(records: Dataset) -> list[list[bool] | None]:
    """For each record which completions ended; None where it does not say, which means all."""
    return records["ended"][:] if "ended" in records.column_names else [None] * len(records)


def _real(scores: Any, ranks: Any) -> tuple[list[list[float]], list[list[int]]]:
    """Scores and ranks of the completions that are there, a list a prompt."""
    keep = ranks != ABSENT
    return [s[k].tolist() for s, k in zip(scores, keep)], [r[k].tolist() for r, k in zip(ranks, keep)]
