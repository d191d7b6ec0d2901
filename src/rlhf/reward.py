"""Stage 2: a reward model on K-way rankings (InstructGPT, section 3.5 and appendix C.2).

One item is a prompt with its K completions, K = 2 to 9. They share one forward, in which each completion sees the prompt and
itself, and all C(K, 2) pairs of the prompt are in one loss: -log σ(r_better - r_worse) averaged over its strictly ordered pairs
(eq. 1). Ties carry no pair. The loss of an optimiser step is divided by the number of its prompts that have a pair, over
accumulation steps and processes, so that the gradient does not depend on how the step is cut.

After training a constant is added so that demonstrations score 0 on average. What the paper does not have is off unless asked
for: ties as soft labels, label smoothing, margins from grades, a centring penalty, an ensemble of heads, early stopping.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any, TypeAlias, cast

import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import EarlyStoppingCallback, Trainer, set_seed

from rlhf import adapters, reward_report, shared_prompt
from rlhf.bases import fingerprint_of_model
from rlhf.config import RewardArgs
from rlhf.data import fingerprint, load
from rlhf.data.encode import batches, encode_completions, encode_prompts, pad
from rlhf.engine import prepare_trainer, settle
from rlhf.evaluation import ranking_metrics
from rlhf.models import (
    add_head,
    add_reward_bias,
    compile_layers,
    context_length,
    load_scalar_model,
    load_tokenizer,
    scalar_head,
)
from rlhf.objectives import (
    centring_penalty,
    ordered_and_tied_pairs,
    ordered_pairs,
    pairwise_ranking_loss,
    ranking_loss,
    rating_margins,
    smoothed_pairs,
)
from rlhf.registry import Artifact
from rlhf.training import (
    LikeLengths,
    MarkComplete,
    Rows,
    TrainingError,
    check_processes,
    held_out_or_none,
    keep_fitting,
    load_splits,
    open_registry,
    pin_inputs,
    publish,
    push_published,
    refuse_other_architecture,
    repeats,
    resolve,
    saver,
    trainer_arguments,
    work_folder,
)

MAX_K = 9
ABSENT = -100  # rank of a completion that is not there
LABELS = ("ranks", "learned", "ratings")  # of a batch: what the model does not take
FIGURES = "evaluation"  # folder beside the weights
HEADS = "heads.safetensors"  # beside the weights of an ensemble: weight [M, H] and bias [M] of each of its heads


def run(args: RewardArgs) -> Artifact | None:
    """Trains and publishes `RUN_NAME/rm`; returns the artifact on the first process."""
    registry = open_registry(args)
    path, sft = resolve(registry, args.model_name_or_path, args.run_name, "sft")
    with work_folder(args, registry, "rm") as (work, resume):
        training_args = trainer_arguments(
            args, work, remove_unused_columns=False, label_names=["ranks"], **_keep_the_best(args)
        )
        check_processes()
        set_seed(args.seed)
        tokenizer = load_tokenizer(path, trust_remote_code=args.trust_remote_code)
        model = new_model(args, path, tokenizer)
        adapters.check_resume(model, resume)
        comparisons, held_out = load_splits(args, "comparisons")
        limit = min(args.max_length, context_length(model) or args.max_length)
        train = encode(tokenizer, comparisons, limit, ties=args.ties)
        evaluation = encode(tokenizer, held_out, limit, needed=False)
        if not len(train):
            raise TrainingError(
                f"{args.dataset_name}: every comparison is a tie, so that there is nothing to learn from"
            )
        demonstrations = demonstration_rows(args, tokenizer, comparisons, limit)
        trainer = new_trainer(args, training_args, model, tokenizer, train, evaluation)
        prepare_trainer(trainer, args.optim)
        data = [fingerprint(comparisons)]
        origin = fingerprint_of_model(path) if args.use_peft and sft is None else path
        pin_inputs(work, resume, {"model_name_or_path": (origin, sft)}, data)
        refuse_other_architecture(model, resume)
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        heads = mean_of_heads(trainer)
        metrics: dict[str, Any] = {"comparisons": len(train)}
        metrics |= centre_on_demonstrations(trainer, demonstrations)
        ensemble = centred_heads(trainer, heads, demonstrations) if heads is not None else {}
        report = None
        if len(evaluation):
            score, unwrapped = scored_by_trainer(trainer), trainer.accelerator.unwrap_model(trainer.model)
            report = held_out_report(
                *(score, unwrapped, tokenizer, evaluation, held_out, comparisons, demonstrations, ensemble)
            )
            metrics |= reward_report.summary(report)
        save = saver(trainer.accelerator, trainer.model_wrapped, tokenizer)
        artifact = publish(
            registry,
            args,
            "rm",
            partial(_save, save, ensemble, report),
            parents=[sft] if sft else [],
            base_model=None if sft else path,
            data=data,
            metrics=metrics,
            history=trainer.state.log_history,
            extra={"samples": report["examples"]} if report is not None else None,
            models={"here": model},
        )
        if artifact is not None and report is not None:
            reward_report.write(report, registry.evals_dir(artifact), drawn=artifact.path / FIGURES)
    return push_published(args, artifact)


def _save(save: Any, ensemble: dict[str, Tensor], report: dict[str, Any] | None, folder: Path | None) -> None:
    """The version's files: weights and tokenizer, the heads of an ensemble, and the figures that its card shows."""
    save(folder)
    if folder is not None and ensemble:
        save_file(ensemble, folder / HEADS)
    if folder is not None and report is not None:
        reward_report.draw(report, folder / FIGURES)


def _keep_the_best(args: RewardArgs) -> dict[str, Any]:
    """Trainer settings that end with the checkpoint of the best held-out accuracy; none without early stopping."""
    if args.early_stopping_patience is None:
        return {}
    by_steps = (
        {"save_strategy": "steps", "save_steps": args.eval_steps} if args.eval_steps else {"save_strategy": "epoch"}
    )
    return {**by_steps, "load_best_model_at_end": True, "metric_for_best_model": "eval_accuracy"}


def new_model(args: RewardArgs, path: str, tokenizer: Any) -> Any:
    """The SFT model with a new scalar head, or with as many as the ensemble has."""
    model = load_scalar_model(
        path,
        tokenizer,
        new_head=True,
        dtype=args.dtype,
        attn_implementation=args.attn_implementation,
        trust_remote_code=args.trust_remote_code,
        resid_pdrop=args.resid_pdrop,
        peft=args,
    )
    if args.heads > 1:
        model.score = add_head(cast(nn.Linear, model.score), args.heads)
    if args.torch_compile:
        compile_layers(model)
    return model


def new_trainer(
    args: RewardArgs, training_args: Any, model: Any, tokenizer: Any, train: Rows, evaluation: Rows
) -> RewardTrainer:
    """The trainer of one reward model on encoded comparisons."""
    if args.margin_scale > 0 and not all("ratings" in item for item in train.rows):
        raise TrainingError(
            f"margin_scale is {args.margin_scale:g}, and {args.dataset_name} has comparisons without `ratings`; give each "
            "completion a grade (docs/reward.md), or set margin_scale to 0"
        )
    callbacks: list[Any] = [MarkComplete(args.save_total_limit)]
    if args.early_stopping_patience is not None:
        if not len(evaluation):
            raise TrainingError(
                "early_stopping_patience watches held-out comparisons and there are none; raise eval_fraction"
            )
        callbacks.append(EarlyStoppingCallback(args.early_stopping_patience))
    share = shared_prompt.supports(model)
    if share:
        shared_prompt.enable(model)
    return RewardTrainer(
        objective=partial(objective, args),
        keeps_ties=args.ties == "soft",
        model=model,
        args=training_args,
        train_dataset=train,
        eval_dataset=held_out_or_none(training_args, evaluation),
        processing_class=tokenizer,
        data_collator=Collator(tokenizer.pad_token_id, share),
        compute_metrics=lambda out: {
            "accuracy": ranking_metrics(*_real(_one_score(out.predictions), out.label_ids))["accuracy"]
        },
        callbacks=callbacks,
    )


def objective(
    args: RewardArgs, scores: Tensor, ranks: Tensor, prompts: Tensor, ratings: Tensor | None, count: Any
) -> Tensor:
    """The loss of rewards [N]: InstructGPT's eq. 1 and what was chosen besides."""
    if not args.varies_the_loss:
        return ranking_loss(scores, ranks, prompts, count=count)
    targets = (ordered_and_tied_pairs if args.ties == "soft" else ordered_pairs)(ranks, prompts)
    margins = None if ratings is None or args.margin_scale == 0 else rating_margins(ratings, args.margin_scale)
    loss = pairwise_ranking_loss(scores, smoothed_pairs(targets, args.label_smoothing), prompts, margins, count)
    if args.centring_coef:
        loss = loss + args.centring_coef * centring_penalty(scores, targets, prompts, count)
    return loss


def encode(tokenizer: Any, records: Dataset, limit: int, *, needed: bool = True, ties: str = "drop") -> Rows:
    """Items {"prompt": ids, "completions": K lists of ids, "ranks": K ints, "record": index}, and "ratings" where there are any.

    Too long ones (counted) are dropped, and all-tied ones unless ties are soft labels.
    """
    if not len(records):
        return Rows([])
    prompts = encode_prompts(tokenizer, records["prompt"][:])
    ended = _ended(records)
    ratings = records["ratings"][:] if "ratings" in records.column_names else [None] * len(records)
    items: list[dict[str, Any]] = []
    for prompt, completions, ranks, end, grades in zip(
        prompts, records["completions"][:], records["ranks"][:], ended, ratings
    ):
        ids = encode_completions(tokenizer, completions, end)
        item = {"prompt": prompt, "completions": ids, "ranks": list(ranks), "record": len(items)}
        items.append(item if grades is None else {**item, "ratings": list(grades)})
    fits = [len(item["prompt"]) + max(map(len, item["completions"])) <= limit for item in items]
    kept = [items[i] for i in keep_fitting("comparisons", fits, limit, needed=needed)]
    return Rows([item for item in kept if ties == "soft" or len(set(item["ranks"])) > 1])


class Collator:
    """Items as one batch: `ranks` [B, 9], absent completions -100, and token rows padded on the right.

    With share_prompt all items are one row [1, L] without padding: each prompt followed by all of its completions, each at the
    positions right after the prompt; `lengths` [B, 10] has the tokens of the prompt and of each completion, 0 where there is
    none. Otherwise a row of [R, L] is a prompt with one completion. `read` [N] is the place of each completion's last token in
    the flattened rows. `ratings` [B, 9] come along where every item has them.
    """

    def __init__(self, pad_token_id: int, share_prompt: bool = True):
        self.pad_token_id, self.share_prompt = pad_token_id, share_prompt

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        batch = {"ranks": torch.tensor([_filled(item["ranks"], ABSENT) for item in items])}
        if all("ratings" in item for item in items):
            batch["ratings"] = torch.tensor([_filled(item["ratings"], 0.0) for item in items], dtype=torch.float)
        return batch | (self._shared(items) if self.share_prompt else self._rows(items))

    def _shared(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        ids: list[int] = []
        positions: list[int] = []
        read: list[int] = []
        for item in items:
            ids += item["prompt"]
            start = len(item["prompt"])
            positions += range(start)
            for completion in item["completions"]:
                ids += completion
                positions += range(start, start + len(completion))
                read.append(len(ids) - 1)
        lengths = [[len(item["prompt"]), *_filled(map(len, item["completions"]), 0)] for item in items]
        return {
            "input_ids": torch.tensor([ids]),
            "position_ids": torch.tensor([positions]),
            "lengths": torch.tensor(lengths),
            "read": torch.tensor(read),
        }

    def _rows(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        rows = [item["prompt"] + completion for item in items for completion in item["completions"]]
        ids, mask = pad(rows, self.pad_token_id)
        read = torch.tensor([i * ids.shape[1] + len(row) - 1 for i, row in enumerate(rows)])
        return {"input_ids": ids, "attention_mask": mask, "read": read}


def _filled(values: Iterable[Any], filler: Any) -> list[Any]:
    """The values of one prompt's completions, as many as a prompt can have."""
    given = list(values)
    return given + [filler] * (MAX_K - len(given))


def forward_scores(
    model: Any,
    input_ids: Tensor,
    read: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Rewards [N], of an ensemble [N, M], of the completions that end at `read`. Bound to the model as its forward, so that
    its engine sees the call.
    """
    model = adapters.plain(model)
    backbone = getattr(model, model.base_model_prefix)
    if lengths is None:
        assert attention_mask is not None
        how: dict[str, Any] = {"attention_mask": attention_mask.long()}
    else:
        rankings = shared_prompt.layout(*_lengths(lengths), input_ids.device)
        # A mask of four dimensions is handed on as it is: the layout says all that there is to say.
        how = {"attention_mask": input_ids.new_zeros(1, 1, 1, 1), "position_ids": position_ids, "rankings": rankings}
    hidden = backbone(input_ids=input_ids, use_cache=False, **how).last_hidden_state
    return scalar_head(model, hidden.flatten(0, 1)[read])


def _lengths(lengths: Tensor) -> tuple[list[int], list[list[int]]]:
    """Tokens of each prompt, and of each of its completions."""
    rows = lengths.tolist()
    return [row[0] for row in rows], [[length for length in row[1:] if length] for row in rows]


class RewardTrainer(Trainer):
    """A Trainer whose item is a prompt with its completions, and whose loss is InstructGPT's eq. 1 or another `objective`.

    objective(rewards [N], ranks [N], prompt_index [N], ratings [N] or None, count) -> scalar; an ensemble's is the mean over its
    heads. `keeps_ties`: a prompt whose completions all tie counts as one that has a pair.
    """

    objective: Any

    def __init__(self, *, objective: Any = None, keeps_ties: bool = False, **kwargs: Any):
        model = kwargs["model"]
        model.forward = MethodType(forward_scores, model)
        self.objective, self.keeps_ties = objective or _papers_objective, keeps_ties
        super().__init__(**kwargs)
        # Tells Trainer that the loss is divided by the whole step's count already: see get_batch_samples.
        self.model_accepts_loss_kwargs = True
        sharded = self.accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)
        if sharded and adapters.trained(model.score).out_features > 1:
            raise TrainingError(
                "heads: an ensemble of heads cannot be trained sharded; launch with DDP, or set heads to 1"
            )

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Batches of like length where rows are padded, and where they are asked for; otherwise they are plainly random."""
        rows = self.train_dataset if train_dataset is None else train_dataset
        asked = self.args.train_sampling_strategy == "group_by_length" or not getattr(
            self.data_collator, "share_prompt", True
        )
        if not asked or not isinstance(rows, Rows):
            return super()._get_train_sampler(train_dataset)
        longest = [len(item["prompt"]) + max(map(len, item["completions"])) for item in rows.rows]
        return LikeLengths(self, longest)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """In the order of the data, whatever training does: predictions are read by their place."""
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The step's batches, and the number of their prompts that have a pair, over all processes.

        `learned` of a batch is its ranks but for prompts that are there only to make processes' shares equal: theirs are absent.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in batches:
            batch["learned"] = batch["ranks"].clone()
        for batch in batches[-1:]:
            batch["learned"][len(batch["learned"]) - repeats(self) :] = ABSENT
        has = has_completions if self.keeps_ties else has_pair
        count = sum((has(batch["learned"]).sum() for batch in batches), torch.tensor(0)).to(device)
        return batches, self.accelerator.gather(count).sum()

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective; times the number of processes, because their gradients are averaged."""
        ranks, ratings = inputs["ranks"], inputs.get("ratings")
        learned = inputs.get("learned", ranks)
        real = ranks != ABSENT
        scores = model(**{name: tensor for name, tensor in inputs.items() if name not in LABELS})
        prompt = torch.arange(len(ranks), device=ranks.device)[:, None].expand_as(ranks)
        grades = None if ratings is None else ratings[real]
        members = scores[:, None] if scores.ndim == 1 else scores
        losses = [
            self.objective(column, learned[real], prompt[real], grades, num_items_in_batch)
            for column in members.unbind(1)
        ]
        loss = torch.stack(losses).mean()
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        padded = scores.new_zeros(*ranks.shape, *scores.shape[1:])
        padded[real] = scores.detach()
        return (loss, {"scores": padded}) if return_outputs else loss

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return loss.detach(), outputs["scores"], inputs["ranks"]


def _papers_objective(scores: Tensor, ranks: Tensor, prompts: Tensor, ratings: Tensor | None, count: Any) -> Tensor:
    return ranking_loss(scores, ranks, prompts, count=count)


def has_pair(ranks: Tensor) -> Tensor:
    """Which prompts [B] of ranks [B, 9] have two completions of different rank."""
    low = ranks.masked_fill(ranks == ABSENT, 1 << 30).amin(dim=1)
    return (ranks.amax(dim=1) > low) & (low < 1 << 30)


def has_completions(ranks: Tensor) -> Tensor:
    """Which prompts [B] of ranks [B, 9] have two completions, of whatever rank."""
    return (ranks != ABSENT).sum(dim=1) > 1


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
    """Adds the constant that makes demonstrations score 0 on average; says where it is kept, and the mean that is left."""
    score = scored_by_trainer(trainer)
    before = score_rows(score, rows)
    settle(trainer.model_wrapped)
    model = trainer.accelerator.unwrap_model(trainer.model)
    place = add_reward_bias(model, -float(before.mean()))
    after = score_rows(score, rows) + getattr(model.config, "reward_bias", 0.0)
    return {
        "bias": -float(before.mean()),
        "bias_kept_in": place,
        "demonstrations_mean": float(after.mean()),
        "demonstrations_std": float(after.std(unbiased=False)),
    }


def mean_of_heads(trainer: RewardTrainer) -> Tensor | None:
    """Makes one head of an ensemble's, their mean, so that plain transformers gives the ensemble's mean reward.

    Returns the heads [M, H] as they were trained; None where there is one anyway.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if adapters.trained(model.score).out_features == 1:  # the weight's own shape says nothing where it is sharded
        return None
    heads = model.score.weight.detach().clone()
    model.score = add_head(model.score, 1)
    with torch.no_grad():
        model.score.weight.copy_(heads.mean(dim=0, keepdim=True))
    return heads


def centred_heads(trainer: RewardTrainer, heads: Tensor, rows: Sequence[list[int]]) -> dict[str, Tensor]:
    """The heads [M, H] with the biases [M] that make demonstrations score 0 on average by each of them."""
    with all_heads(trainer.accelerator.unwrap_model(trainer.model), heads):
        bias = -score_rows(scored_by_trainer(trainer), rows).mean(dim=0)
    return {"weight": heads.float().cpu().contiguous(), "bias": bias.float()}


@contextlib.contextmanager
def all_heads(model: Any, heads: Tensor) -> Iterator[None]:
    """Within it the model gives the rewards of all heads [M, H], without their biases."""
    one = model.score
    model.score = add_head(one, len(heads))
    with torch.no_grad():
        model.score.weight.copy_(heads)
    try:
        yield
    finally:
        model.score = one


# --- scores of a model that is trained


Score: TypeAlias = Callable[[Sequence[dict[str, Any]]], list[list[Any]]]  # items -> rewards, K a prompt


def scored_by_trainer(trainer: RewardTrainer) -> Score:
    """Scores spread over the processes of the launch."""

    def score(items: Sequence[dict[str, Any]]) -> list[list[Any]]:
        output = trainer.predict(Rows(items))  # type: ignore[arg-type]
        return _real(output.predictions, output.label_ids)[0]

    return score


def scored_by_model(model: Any, pad_token_id: int, batch_size: int = 8) -> Score:
    """Scores of one process, batches of like length."""
    share = shared_prompt.supports(model)
    if share:
        shared_prompt.enable(model)
    collate = Collator(pad_token_id, share)

    @torch.no_grad()
    def score(items: Sequence[dict[str, Any]]) -> list[list[Any]]:
        found: list[list[Any]] = [[]] * len(items)
        for places in batches([len(i["prompt"]) + sum(map(len, i["completions"])) for i in items], batch_size):
            batch = collate([items[place] for place in places])
            inputs = {name: t.to(model.device) for name, t in batch.items() if name not in LABELS}
            scores = iter(forward_scores(model, **inputs).tolist())
            for place in places:
                found[place] = [next(scores) for _ in items[place]["completions"]]
        return found

    return score


def score_rows(score: Score, rows: Sequence[list[int]]) -> Tensor:
    """Rewards [N], of an ensemble [N, M], of token rows."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    groups = [order[k : k + MAX_K] for k in range(0, len(order), MAX_K)]
    items = [{"prompt": [], "completions": [rows[i] for i in g], "ranks": [1] * len(g)} for g in groups]
    found = torch.tensor([one for scores in score(items) for one in scores])
    result = torch.empty_like(found)
    result[torch.tensor(order)] = found
    return result


def held_out_report(
    score: Score,
    model: Any,
    tokenizer: Any,
    evaluation: Rows,
    records: Dataset,
    training: Dataset | None,
    demonstrations: Sequence[list[int]],
    ensemble: dict[str, Tensor] | None = None,
) -> dict[str, Any]:
    """What tells whether to trust a model, on encoded held-out comparisons of `records` (`reward_report.report`).

    training: further comparisons that agreement between labelers is counted on, not the model.
    """
    rankings = held_out_rankings(score, model, evaluation, records, ensemble)
    bias = getattr(model.config, "reward_bias", 0.0)
    texts = reward_report.control_rows(evaluation.rows, max(tokenizer.get_vocab().values()), demonstrations)
    controls = {name: (score_rows(score, rows) + bias).tolist() for name, rows in texts.items()}
    labelled = [records] if training is None else [records, training]
    return reward_report.report(rankings, controls, reward_report.labeler_agreement(labelled))


def held_out_rankings(
    score: Score, model: Any, evaluation: Rows, records: Dataset, ensemble: dict[str, Tensor] | None = None
) -> list[reward_report.Ranking]:
    """Encoded comparisons with their rewards, and with those of an ensemble's members."""
    bias = getattr(model.config, "reward_bias", 0.0)
    scores = [[one + bias for one in row] for row in score(evaluation.rows)]
    members: list[Any] = [None] * len(scores)
    if ensemble:
        with all_heads(model, ensemble["weight"].to(model.score.weight)):
            by_head = score(evaluation.rows)
        biases = ensemble["bias"].tolist()
        members = [[[r + b for r, b in zip(row, biases)] for row in rows] for rows in by_head]
    return [
        reward_report.Ranking.of(records[item["record"]], item, score, member)
        for item, score, member in zip(evaluation.rows, scores, members)
    ]


def _ended(records: Dataset) -> list[list[bool] | None]:
    """For each record which completions ended; None where it does not say, which means all."""
    return records["ended"][:] if "ended" in records.column_names else [None] * len(records)


def _real(scores: Any, ranks: Any) -> tuple[list[list[Any]], list[list[int]]]:
    """Scores and ranks of the completions that are there, a list a prompt."""
    keep = ranks != ABSENT
    return [s[k].tolist() for s, k in zip(scores, keep)], [r[k].tolist() for r, k in zip(ranks, keep)]


def _one_score(scores: Any) -> Any:
    """[B, 9] of [B, 9], or of an ensemble's [B, 9, M]: the mean over its heads, which is the reward that is published."""
    return scores.mean(axis=-1) if scores.ndim == 3 else scores
