"""Stage 1: supervised fine-tuning on demonstrations, with `trl.SFTTrainer` (InstructGPT, section 3.5 and appendix C.1).

The loss is on completions and their EOS only. Records are tokenised here, by the function that reward model and PPO use too,
because SFTTrainer's own tokenisation of prompt and completion together can merge tokens across the seam.

InstructGPT trains 16 epochs with residual dropout 0.2 and cosine decay to a tenth of the peak, without warm-up: our defaults.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from rlhf import adapters
from rlhf.bases import fingerprint_of_model, start_of
from rlhf.config import SFTArgs
from rlhf.data import fingerprint
from rlhf.data.encode import blocks, encode_demonstrations, encode_prompts
from rlhf.data.records import prompt_text
from rlhf.engine import gathered, prepare_trainer, settle, state_dict, weights_of, whole
from rlhf.evaluation import answer, score_answers
from rlhf.models import (
    accepts,
    causal_mask,
    compile_layers,
    context_length,
    load_policy,
    load_scalar_model,
    load_tokenizer,
    quiet,
)
from rlhf.registry import Artifact, Registry
from rlhf.training import (
    LikeLengths,
    MarkComplete,
    OnceAnEpoch,
    TrainingError,
    check_processes,
    held_out_or_none,
    keep_fitting,
    load_splits,
    load_text,
    open_registry,
    pin_inputs,
    publish,
    push_published,
    refuse_other_architecture,
    resolve,
    saver,
    synchronise,
    trainer_arguments,
    work_folder,
)

SAMPLES = 4  # answers to held-out prompts that the card shows


def run(args: SFTArgs) -> Artifact | None:
    """Trains and publishes `RUN_NAME/sft`; returns the artifact on the first process."""
    registry = open_registry(args)
    path, base = resolve(registry, args.model_name_or_path, args.run_name, "base")
    with work_folder(args, registry, "sft") as (work, resume):
        training_args = sft_arguments(args, work)
        check_processes()
        set_seed(args.seed)
        tokenizer = load_tokenizer(path, revision=args.model_revision, trust_remote_code=args.trust_remote_code)
        model = load_policy(
            path,
            tokenizer,
            dtype=args.dtype,
            revision=args.model_revision,
            attn_implementation=args.attn_implementation,
            trust_remote_code=args.trust_remote_code,
            resid_pdrop=args.resid_pdrop,
            peft=args,
        )
        adapters.check_resume(model, resume)
        if args.packing:
            refuse_leaking_packing(model)
        if args.torch_compile:
            compile_layers(model)
        demonstrations, held_out = load_splits(args, "demonstrations")
        limit = min(args.max_length, context_length(model) or args.max_length)
        data = [fingerprint(demonstrations)]
        train = with_pretraining_mix(args, tokenizer, encode(args, tokenizer, demonstrations, limit), limit, data)
        evaluation = held_out_or_none(training_args, encode(args, tokenizer, held_out, limit, needed=False))
        with adapters.precision_kept(model):
            trainer = CompletionTrainer(
                model=model,
                args=training_args,
                train_dataset=train,
                eval_dataset=evaluation,
                processing_class=tokenizer,
                callbacks=[MarkComplete(args.save_total_limit)],
            )
        prepare_trainer(trainer, args.optim)
        chooser, judge = choose_by_reward(args, registry, work, tokenizer, held_out)
        if chooser is not None:
            chooser.trainer = trainer
            trainer.add_callback(chooser)
        origin = fingerprint_of_model(path, args.model_revision) if args.use_peft and base is None else path
        pin_inputs(work, resume, {"model_name_or_path": (origin, base)} | judge, data)
        refuse_other_architecture(model, resume)
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        metrics: dict[str, Any] = {"demonstrations": len(demonstrations), "training_examples": len(train)}
        if chooser is not None:
            metrics |= chooser.load_best(model)
        if trainer.eval_dataset is not None:
            loss = trainer.evaluate()["eval_loss"]
            metrics |= {"eval_loss": loss, "perplexity": math.exp(min(loss, 50.0))}
        samples = sample_answers(args, trainer, tokenizer, held_out["prompt"][:SAMPLES])
        restore_dropout(model, path, args)
        artifact = publish(
            registry,
            args,
            "sft",
            saver(trainer.accelerator, trainer.model_wrapped, tokenizer),
            parents=[base] if base else [],
            base_model=None if base else path,
            data=data,
            metrics=metrics,
            history=trainer.state.log_history,
            extra={"samples": samples} if samples else None,
            models={"here": model},
        )
    return push_published(args, artifact)


def sft_arguments(args: SFTArgs, work: Any) -> SFTConfig:
    """Our choices as SFTConfig, whose own defaults differ by device (bfloat16, gradient checkpointing)."""
    config = trainer_arguments(
        args,
        work,
        SFTConfig,
        max_length=args.max_length,
        packing=args.packing,
        dataset_kwargs={"skip_prepare_dataset": not args.packing},
        remove_unused_columns=False,
    )
    assert isinstance(config, SFTConfig)
    return config


def encode(args: SFTArgs, tokenizer: Any, records: Dataset, limit: int, *, needed: bool = True) -> Dataset:
    """`input_ids` and `labels`, the prompt's labels -100; examples over the limits dropped and counted."""
    rows = encode_demonstrations(
        tokenizer, records["prompt"][:], records["completion"][:], every_turn=args.train_on == "every_turn"
    )
    # A prompt is what stands before the first answer that is learned.
    short = [next(i for i, label in enumerate(labels) if label != -100) <= args.max_prompt_length for _, labels in rows]
    rows = [rows[i] for i in keep_fitting("prompts of demonstrations", short, args.max_prompt_length, needed=needed)]
    fits = [len(ids) <= limit for ids, _ in rows]
    rows = [rows[i] for i in keep_fitting("demonstrations", fits, limit, needed=needed)]
    return Dataset.from_dict({"input_ids": [ids for ids, _ in rows], "labels": [labels for _, labels in rows]})


def with_pretraining_mix(
    args: SFTArgs, tokenizer: Any, train: Dataset, limit: int, data: list[dict[str, Any]]
) -> Dataset:
    """The examples with raw text among them, ptx_fraction of all (InstructGPT C.4 mixes in 10 %); as they are without any."""
    if args.ptx_dataset_name is None:
        return train
    text = load_text(args)
    data.append(fingerprint(text))
    try:
        size = min(args.ptx_block_size, limit)
        pretraining = blocks(tokenizer, text["text"][:], size, args.ptx_packing_strategy)
    except ValueError as error:
        raise TrainingError(f"{args.ptx_dataset_name}: {error}; give more text, or a smaller ptx_block_size") from None
    count = max(1, round(len(train) * args.ptx_fraction / (1 - args.ptx_fraction)))
    order = torch.randperm(len(pretraining), generator=torch.Generator().manual_seed(args.seed))
    chosen = pretraining[order.repeat(-(-count // len(order)))[:count]]
    rows = [row[row != tokenizer.pad_token_id].tolist() for row in chosen]
    return concatenate_datasets([train, Dataset.from_dict({"input_ids": rows, "labels": rows})])


class ChooseByReward(TrainerCallback):
    """Keeps the epoch whose answers to held-out prompts a reward model scores best: InstructGPT chose its SFT models so (C.1)."""

    def __init__(self, args: SFTArgs, folder: Path, tokenizer: Any, prompts: Sequence[Any], reward: Any):
        self.args, self.folder, self.tokenizer, self.prompts, self.reward = args, folder, tokenizer, prompts, reward
        self.trainer: Any = None

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        training, _ = model.training, model.eval()
        with whole(self.trainer.model_wrapped, model):
            answers = answer(
                model, self.tokenizer, self.prompts, response_length=self.args.response_length, seed=self.args.seed
            )
            rows = [prompt + tokens for prompt, tokens in zip(answers.prompts, answers.tokens)]
            with gathered(self.reward.parameters()):
                score = float(score_answers(self.reward.to(model.device), self.tokenizer, rows).mean())
        model.train(training)
        state.log_history.append({"epoch": state.epoch, "step": state.global_step, "eval_reward": score})
        weights = state_dict(self.trainer.accelerator, self.trainer.model_wrapped)
        if state.is_world_process_zero and score > self.best().get("eval_reward", float("-inf")):
            with quiet():
                adapters.save(model, self.folder, weights)
            (self.folder / "best.json").write_text(json.dumps({"eval_reward": score, "epoch": state.epoch}))

    def best(self) -> dict[str, Any]:
        found = self.folder / "best.json"
        return json.loads(found.read_text()) if found.is_file() else {}

    def load_best(self, model: Any) -> dict[str, Any]:
        """Puts the chosen weights into `model`; their score and epoch."""
        synchronise()
        settle(self.trainer.model_wrapped)
        if self.args.use_peft:
            with weights_of(model, modify=True):
                adapters.restore(model, self.folder)
        else:
            chosen = load_policy(self.folder, self.tokenizer)
            with gathered(chosen.parameters()), weights_of(model, modify=True):
                model.load_state_dict(chosen.state_dict())
        return {f"chosen_{name}": value for name, value in self.best().items()}


def choose_by_reward(
    args: SFTArgs, registry: Registry, work: Path, tokenizer: Any, held_out: Dataset
) -> tuple[ChooseByReward | None, dict[str, tuple[str, Artifact | None]]]:
    """The callback that chooses the epoch, and the reward model that it asks; nothing where none is given."""
    if args.reward_model_path is None:
        return None, {}
    path, artifact = resolve(registry, args.reward_model_path, args.run_name, "rm")
    theirs = load_tokenizer(path)
    if theirs.get_vocab() != tokenizer.get_vocab():
        raise TrainingError(
            f"{artifact.ref if artifact else path} has another tokenizer than the model; it cannot choose"
        )
    if not len(held_out):
        raise TrainingError("reward_model_path chooses by held-out prompts and there are none; raise eval_fraction")
    reward = load_scalar_model(path, tokenizer).eval()
    chooser = ChooseByReward(args, work / "best", tokenizer, held_out["prompt"][:], reward)
    return chooser, {"reward_model_path": (path, artifact)}


def sample_answers(args: SFTArgs, trainer: Any, tokenizer: Any, prompts: Sequence[Any]) -> list[dict[str, Any]]:
    """One answer to each of a few held-out prompts, for the card; every process samples the same."""
    model = trainer.model.eval()
    context = context_length(model) or args.max_length
    fitting = [
        p for p, ids in zip(prompts, encode_prompts(tokenizer, prompts)) if len(ids) + args.response_length <= context
    ]
    if not fitting:
        return []
    with whole(trainer.model_wrapped, model):
        answers = answer(model, tokenizer, fitting, response_length=args.response_length, seed=args.seed)
    return [
        {"prompt": prompt_text(prompt), "completion": text, "ended": ended}
        for prompt, text, ended in zip(fitting, answers.texts, answers.ended)
    ]


class CompletionTrainer(OnceAnEpoch, SFTTrainer):
    """SFTTrainer that unembeds the positions before a trained token only: prompts cost no vocabulary-wide row.

    On a GPU its own LM head does that, tile by tile, and here rows lose their mask. On a CPU that head is slow. The loss is
    SFTTrainer's, a sum over trained tokens divided by their number in the optimiser step; a packed row, and a model that always
    unembeds everything, take SFTTrainer's own way.
    """

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        return LikeLengths(self, [len(ids) for ids in rows["input_ids"]])

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if return_outputs or self.padding_free or not accepts(self.model, "logits_to_keep"):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if inputs["input_ids"].is_cuda:
            return super().compute_loss(self.unmasked(model), inputs, num_items_in_batch=num_items_in_batch)
        targets = inputs["labels"][:, 1:]
        keep = (targets != -100).any(dim=0).nonzero().squeeze(-1)
        plain = {name: tensor for name, tensor in inputs.items() if name != "labels"}
        logits = model(**plain, logits_to_keep=keep, use_cache=False).logits
        total = cross_entropy(
            logits.flatten(0, 1).float(), targets[:, keep].flatten(), ignore_index=-100, reduction="sum"
        )
        if num_items_in_batch is None:
            return total / (targets != -100).sum().clamp(min=1)
        # Gradients of several processes are averaged, and num_items_in_batch counts the tokens of all of them.
        return total / num_items_in_batch * self.accelerator.num_processes

    def unmasked(self, model: Any) -> Callable[..., Any]:
        """The model with `causal_mask` of what it is given; the Trainer counts tokens by the mask itself."""
        return lambda *, attention_mask, **given: model(attention_mask=causal_mask(self.model, attention_mask), **given)


@torch.no_grad()
def refuse_leaking_packing(model: Any) -> None:
    """Compares the logits of two packed examples with those of each alone, and refuses where attention leaks (OPT)."""
    training = model.training
    model.eval()
    with gathered(model.parameters()):
        worst = _leak(model)
    model.train(training)
    if worst > 1e-3:
        raise TrainingError(
            f"packing: examples would see each other in {type(model).__name__} (logits differ by {worst:.2g}); set it to false"
        )


def _leak(model: Any) -> float:
    """The largest difference of a logit of two packed examples to that of each alone."""
    first, second = torch.arange(5, 13)[None], torch.arange(13, 21)[None]
    position = torch.arange(8)[None]
    alone = torch.cat([model(input_ids=ids).logits for ids in (first, second)], dim=1)
    packed = model(
        input_ids=torch.cat([first, second], dim=1),
        position_ids=torch.cat([position, position], dim=1),
        use_cache=False,
    ).logits
    return (alone - packed).abs().max().item()


def restore_dropout(model: Any, path: str, args: SFTArgs) -> None:
    """The published config has the checkpoint's own dropout again: later stages decide theirs."""
    if args.resid_pdrop is None or args.use_peft:
        return
    original = load_policy_config(path, args)
    for name in ("resid_pdrop", "dropout"):
        if hasattr(original, name):
            setattr(model.config, name, getattr(original, name))


def load_policy_config(path: str, args: SFTArgs) -> Any:
    """The config of the checkpoint that training started from."""
    from transformers import AutoConfig

    base = start_of(path, args.model_revision).base
    return AutoConfig.from_pretrained(base.path, revision=base.revision, trust_remote_code=args.trust_remote_code)
