"""One dataclass a stage, and one `parse` that reads YAML and the command line into it.

A run is described by choices only: what follows from them is a property. Every value is checked against its annotation
wherever it comes from (YAML, command line, Python): a misspelt key or a `2.7` for an int would otherwise train
something else than was asked. Names are those of `transformers.TrainingArguments` and of TRL where they exist.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import operator
import re
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

from rlhf import RLHFError


class ConfigError(RLHFError):
    """A value, key or file of the configuration is wrong; the text names it."""


def option(default: Any, help: str, **bounds: float) -> Any:
    """A dataclass field with its help text and its bounds (ge, gt, le, lt); lists and dicts are copied."""
    metadata = {"help": help, "bounds": bounds}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


Packing = Literal["wrapped", "bfd_split"]
PACKING = "how raw text fills examples: documents joined and cut, or whole documents by best fit (bfd_split)"

# --------------------------------------------------------------------------------------------------------------- stages


@dataclass
class StageArgs:
    """What every stage has: where it works, its data, its optimiser."""

    output_dir: str = option(
        "runs", "root folder of the registry; this stage's versions go to OUTPUT_DIR/RUN_NAME/STAGE/vN"
    )
    run_name: str = option("default", "name of the run; stages of one run find each other by it")
    seed: int = option(
        42, "seed of everything random; two runs with one seed give equal weights on a CPU", ge=0, le=2**32 - 1
    )

    dataset_name: str | None = option(None, "a local file or folder, or a Hub data set id")
    dataset_config: str | None = option(None, "configuration of a Hub data set (its `name` in load_dataset)")
    dataset_dir: str | None = option(None, "folder inside a Hub data set (its `data_dir` in load_dataset)")
    dataset_train_split: str = option("train", "split of a Hub data set to train on")
    dataset_test_split: str | None = option(
        None, "split of a Hub data set to evaluate on; default: a share of the training data"
    )
    dataset_format: str | None = option(
        None, "format of the records; default: detected from the first one (docs/data.md)"
    )
    on_error: Literal["stop", "skip"] = option(
        "stop", "what a malformed record does: stop the stage, or be counted and skipped"
    )
    eval_fraction: float = option(
        0.05, "share of prompts held out for evaluation when there is no test split", ge=0, le=0.9
    )
    max_train_samples: int | None = option(None, "use at most this many records for training", ge=1)
    max_eval_samples: int | None = option(None, "use at most this many records for evaluation", ge=1)

    model_revision: str | None = option(None, "branch, tag or commit of a Hub checkpoint")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("float32", "dtype that weights are loaded in")
    attn_implementation: str | None = option(
        None, "attention kernel: eager, sdpa, flash_attention_2; default: the best there is"
    )
    trust_remote_code: bool = option(False, "run model code that comes with a Hub checkpoint")

    learning_rate: float = option(1e-5, "peak learning rate", gt=0)
    per_device_train_batch_size: int = option(8, "items a process takes through one forward and backward", ge=1)
    weight_decay: float = option(0.0, "decoupled weight decay (AdamW)", ge=0)
    adam_beta1: float = option(0.9, "Adam's beta 1 (InstructGPT: 0.9)", ge=0, lt=1)
    adam_beta2: float = option(0.95, "Adam's beta 2 (InstructGPT: 0.95)", ge=0, lt=1)
    adam_epsilon: float = option(1e-8, "Adam's epsilon", gt=0)
    max_grad_norm: float = option(1.0, "clip the gradient's norm to this; 0: no clipping", ge=0)
    optim: str = option(
        "adamw_torch", "optimiser: muon, or by transformers' names; adamw_torch is its fused form on CUDA"
    )
    bf16: bool = option(False, "bfloat16 autocast")
    gradient_checkpointing: bool = option(
        False, "recompute activations in the backward pass: less memory, about 30 % more time"
    )
    torch_compile: bool = option(
        False, "compile the transformer layers with torch.compile; pays off on long runs on a GPU"
    )
    logging_steps: int = option(10, "optimiser steps between two lines of metrics", ge=1)
    save_steps: int | None = option(None, "optimiser steps between two training checkpoints; default: none", ge=1)
    save_total_limit: int = option(2, "training checkpoints to keep", ge=1)
    resume_from_checkpoint: str | None = option(None, "`latest`, or a checkpoint folder of this stage")
    report_to: list[str] = option([], "trackers: tensorboard, trackio, wandb …; default: none but the files of the run")
    disable_tqdm: bool = option(False, "no progress bar")
    push_to_hub: bool = option(
        False, "push the version to the Hugging Face Hub once it is published, as `rlhf push` does (docs/hub.md)"
    )
    hub_model_id: str | None = option(None, "the model repository of push_to_hub, and the name in the card: USER/NAME")
    hub_private_repo: bool = option(True, "a repository that push_to_hub makes is private; false: for everyone to see")
    license: str | None = option(None, "licence of what is published, for its card: apache-2.0, mit, other …")
    dataset_license: str | None = option(None, "licence of dataset_name, for the card")

    stage: typing.ClassVar[str] = ""

    def __post_init__(self) -> None:
        for name, known in _options(type(self)).items():
            setattr(self, name, known.check(getattr(self, name), name))
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", self.run_name):
            raise ConfigError(
                f"run_name: {self.run_name!r} is not a folder name; use letters, digits, '.', '_' and '-'"
            )
        if self.hub_model_id is not None and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", self.hub_model_id):
            raise ConfigError(f"hub_model_id: {self.hub_model_id!r} is no model repository; write USER/NAME")
        if self.push_to_hub and self.hub_model_id is None:
            raise ConfigError("push_to_hub: where to is not said; give hub_model_id, USER/NAME")


@dataclass
class TrainerArgs(StageArgs):
    """What the stages that run transformers' Trainer have besides."""

    num_train_epochs: float = option(1.0, "passes over the training data", gt=0)
    max_steps: int = option(-1, "optimiser steps, instead of epochs; -1: by epochs", ge=-1)
    gradient_accumulation_steps: int = option(1, "forward and backward passes for one optimiser step", ge=1)
    per_device_eval_batch_size: int = option(8, "items a process takes through one forward in evaluation", ge=1)
    lr_scheduler_type: str = option("cosine_with_min_lr", "schedule, by transformers' names")
    lr_scheduler_kwargs: dict[str, Any] | None = option(
        None,
        "further settings of the schedule; null: cosine_with_min_lr goes to 10 % of the peak (InstructGPT), others none",
    )
    warmup_steps: int = option(0, "optimiser steps of linear warm-up", ge=0)
    eval_steps: int | None = option(None, "optimiser steps between two evaluations; default: after each epoch", ge=1)
    training_arguments: dict[str, Any] = option({}, "anything else that transformers.TrainingArguments takes, by name")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_steps == 0:
            raise ConfigError("max_steps: 0 would train nothing; give 1 or more, or -1 to go by epochs")
        for name in self.training_arguments:
            if name.endswith("_token"):  # a config goes into every manifest and card
                raise ConfigError(
                    f"training_arguments: {name} does not belong in a config; log in with `hf auth login`, or set HF_TOKEN"
                )
            if name.startswith(("hub_", "push_to_hub")):  # Trainer would push checkpoints, without card and manifest
                raise ConfigError(
                    f"training_arguments: {name} is not for here; give push_to_hub and hub_model_id as options of the stage"
                )

    @property
    def scheduler_kwargs(self) -> dict[str, Any]:
        """Settings of the schedule; InstructGPT's floor of a tenth of the peak where nothing else is asked for."""
        if self.lr_scheduler_kwargs is not None:
            return self.lr_scheduler_kwargs
        return {"min_lr_rate": 0.1} if self.lr_scheduler_type == "cosine_with_min_lr" else {}


@dataclass
class AdapterArgs:
    """Parameter-efficient training; names and defaults are those of TRL's ModelConfig."""

    use_peft: bool = option(False, "train adapters (LoRA) on weights that stay as they are (docs/peft.md)")
    lora_r: int = option(16, "rank of a new adapter; one that is trained further keeps its settings", ge=1)
    lora_alpha: int = option(32, "a new adapter's output is scaled by lora_alpha / lora_r", ge=1)
    lora_dropout: float = option(0.05, "dropout before a new adapter; off in PPO", ge=0, lt=1)
    lora_target_modules: list[str] | None = option(
        None,
        "modules that get an adapter, by the end of their names, or all-linear; default: peft's for the architecture",
    )
    lora_target_parameters: list[str] | None = option(
        None, "weights outside linear modules that get an adapter (of experts), by the end of their names"
    )
    lora_modules_to_save: list[str] | None = option(
        None, "modules trained whole beside the adapter; of a reward model its head and last norm always are"
    )
    use_rslora: bool = option(False, "scale by lora_alpha / sqrt(lora_r) instead (rank-stabilised LoRA)")
    use_dora: bool = option(False, "adapt magnitude and direction apart (DoRA)")
    load_in_8bit: bool = option(False, "quantise the weights below the adapters to 8 bits (bitsandbytes)")
    load_in_4bit: bool = option(False, "quantise the weights below the adapters to 4 bits (bitsandbytes)")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = option("nf4", "4-bit data type")
    use_bnb_nested_quant: bool = option(False, "quantise the constants of the 4-bit quantisation too")
    bnb_4bit_quant_storage: Literal["uint8", "float16", "bfloat16", "float32"] | None = option(
        None, "dtype that 4-bit weights are stored in; default: uint8"
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]  # of the stage that this is mixed into
        if self.load_in_8bit and self.load_in_4bit:
            raise ConfigError("load_in_8bit and load_in_4bit exclude each other; choose one")
        if self.load_in_8bit and self.use_dora:
            raise ConfigError(
                "use_dora: peft cannot read the size of 8-bit weights; set load_in_4bit, or use_dora: false"
            )
        targets = self.lora_target_modules
        if targets is not None and (not targets or ("all-linear" in targets and len(targets) > 1)):
            raise ConfigError("lora_target_modules: name modules, or write all-linear alone; null takes peft's default")
        if self.use_peft and self.lora_target_parameters and self.lora_dropout:
            raise ConfigError("lora_target_parameters: peft has no dropout there; set lora_dropout: 0")
        if (self.load_in_8bit or self.load_in_4bit) and not self.use_peft:
            chosen = "load_in_8bit" if self.load_in_8bit else "load_in_4bit"
            raise ConfigError(
                f"{chosen}: quantised weights cannot be trained themselves; add use_peft: true, or leave it out"
            )


@dataclass
class PretrainArgs(TrainerArgs):
    """Stage 0: a small GPT-2 or OPT from scratch on raw text, where no checkpoint is at hand."""

    architecture: Literal["gpt2", "opt"] = option("gpt2", "architecture of the new model")
    hidden_size: int = option(128, "width of the model", ge=8)
    intermediate_size: int | None = option(None, "width within its MLPs; default: 4 x hidden_size", ge=1)
    num_hidden_layers: int = option(2, "layers", ge=1)
    num_attention_heads: int = option(4, "attention heads; hidden_size must be a multiple of it", ge=1)
    max_position_embeddings: int = option(256, "longest context, in tokens", ge=8)
    initializer_range: float = option(
        0.02,
        "standard deviation of the first weights; small models on small texts learn to copy sooner with more",
        gt=0,
        le=1,
    )
    embd_pdrop: float = option(0.0, "dropout of embeddings, attention and residuals", ge=0, le=0.9)
    tokenizer_name: str | None = option(None, "a tokenizer to use (folder or Hub id); default: train one on the text")
    tokenizer_vocab_file: str | None = option(None, "vocab.json of a byte-level BPE to use, with tokenizer_merges_file")
    tokenizer_merges_file: str | None = option(None, "merges.txt of that byte-level BPE")
    vocab_size: int = option(2048, "size of the tokenizer to train, PAD and EOS included", ge=258)
    block_size: int = option(128, "tokens in one training example", ge=8)
    packing_strategy: Packing = option("wrapped", PACKING)
    learning_rate: float = option(1e-3, "peak learning rate", gt=0)
    warmup_steps: int = option(20, "optimiser steps of linear warm-up", ge=0)
    weight_decay: float = option(0.1, "decoupled weight decay (AdamW)", ge=0)

    stage: typing.ClassVar[str] = "pretrain"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size: {self.hidden_size} is not a multiple of num_attention_heads ({self.num_attention_heads})"
            )
        if self.block_size > self.max_position_embeddings:
            raise ConfigError(
                f"block_size: {self.block_size} is longer than max_position_embeddings ({self.max_position_embeddings})"
            )
        if (self.tokenizer_vocab_file is None) != (self.tokenizer_merges_file is None):
            raise ConfigError("tokenizer_vocab_file and tokenizer_merges_file go together; give both or none")


@dataclass
class SFTArgs(AdapterArgs, TrainerArgs):
    """Stage 1: supervised fine-tuning on demonstrations. Defaults are InstructGPT's for 1.3B (appendix C.1)."""

    model_name_or_path: str | None = option(
        None, "Hub id, folder or RUN/STAGE of the checkpoint; default: the run's own base"
    )
    max_length: int = option(
        2048, "longest prompt and completion, in tokens; longer ones are dropped and counted", ge=8
    )
    max_prompt_length: int = option(1024, "longest prompt, in tokens; longer ones are dropped and counted", ge=1)
    train_on: Literal["every_turn", "completion"] = option(
        "every_turn", "answers that are learned in a conversation: all of the assistant's turns, or the last alone"
    )
    packing: bool = option(False, "several examples in one row; refused where attention would leak between them (OPT)")
    resid_pdrop: float | None = option(0.2, "residual dropout while training; null: the checkpoint's own", ge=0, le=0.9)
    learning_rate: float = option(9.65e-6, "peak learning rate", gt=0)
    num_train_epochs: float = option(16.0, "passes over the demonstrations", gt=0)
    per_device_train_batch_size: int = option(
        32, "demonstrations a process takes through one forward and backward", ge=1
    )

    ptx_dataset_name: str | None = option(
        None,
        "raw text mixed into training, as InstructGPT's PPO starts from (C.4): a local file or folder, or a Hub data set",
    )
    ptx_dataset_config: str | None = option(None, "configuration of that Hub data set")
    ptx_dataset_split: str = option("train", "split of that Hub data set")
    ptx_fraction: float = option(
        0.1, "share of the training examples that are raw text, where there is any", gt=0, le=0.9
    )
    ptx_block_size: int = option(128, "tokens in one example of raw text", ge=8)
    ptx_packing_strategy: Packing = option("wrapped", PACKING)
    reward_model_path: str | None = option(
        None,
        "folder or RUN/STAGE of a reward model: the epoch whose answers to held-out prompts it likes best is published",
    )
    response_length: int = option(128, "longest answer that the reward model is asked about, in tokens", ge=1)

    stage: typing.ClassVar[str] = "sft"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reward_model_path is not None and self.eval_fraction == 0 and self.dataset_test_split is None:
            raise ConfigError("reward_model_path chooses by held-out prompts; set eval_fraction or dataset_test_split")


@dataclass
class RewardArgs(AdapterArgs, TrainerArgs):
    """Stage 2: a reward model on K-way rankings. Defaults are InstructGPT's (appendix C.2)."""

    model_name_or_path: str | None = option(
        None, "folder or RUN/STAGE of the SFT model to start from; default: the run's own sft"
    )
    demonstrations_name: str | None = option(
        None,
        "demonstrations that shall score 0 on average; default: the best-ranked training completions",
    )
    max_length: int = option(
        2048, "longest prompt and completion, in tokens; comparisons with a longer one are dropped", ge=8
    )
    learning_rate: float = option(9e-6, "peak learning rate", gt=0)
    per_device_train_batch_size: int = option(
        64, "prompts, each with all of its completions, in one forward and backward", ge=1
    )

    resid_pdrop: float = option(
        0.0, "residual dropout while training, for several epochs on few rankings (not in the paper)", ge=0, le=0.9
    )
    ties: Literal["drop", "soft"] = option(
        "drop", "equal ranks carry no pair (InstructGPT), or are a pair whose labels are half and half"
    )
    label_smoothing: float = option(
        0.0, "probability that a label is wrong; 0: labels are taken as they are", ge=0, lt=0.5
    )
    margin_scale: float = option(
        0.0, "reward units that one grade of `ratings` asks for between two completions; 0: no margins", ge=0
    )
    centring_coef: float = option(
        0.0, "coefficient of the penalty on the sum of a pair's rewards, squared; 0: none", ge=0
    )
    heads: int = option(
        1, "heads of an ensemble on one trunk; their mean is the reward, their spread is kept", ge=1, le=64
    )
    early_stopping_patience: int | None = option(
        None,
        "evaluations without a better held-out accuracy after which training stops; the best one is published; null: never",
        ge=1,
    )

    stage: typing.ClassVar[str] = "reward"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.early_stopping_patience is not None and self.eval_fraction == 0 and self.dataset_test_split is None:
            raise ConfigError(
                "early_stopping_patience watches held-out comparisons; set eval_fraction or dataset_test_split"
            )
        if self.heads > 1 and self.use_peft:
            raise ConfigError(
                "heads: an ensemble of heads is trained without adapters; set heads to 1, or use_peft off"
            )

    @property
    def varies_the_loss(self) -> bool:
        """Whether the loss is another than InstructGPT's eq. 1."""
        return self.ties != "drop" or any((self.label_smoothing, self.margin_scale, self.centring_coef))


@dataclass
class PPOArgs(AdapterArgs, StageArgs):
    """Stage 3: KL-penalised PPO with pretraining mix. Defaults are InstructGPT's (C.4) unless the help says else."""

    sft_model_path: str | None = option(None, "folder or RUN/STAGE of policy and reference; default: the run's own sft")
    reward_model_path: list[str] | None = option(
        None, "folders or RUN/STAGE of reward models; default: the run's own rm; []: none, functions only"
    )
    reward_functions: list[str] = option(
        [], "rewards as package.module:function(prompts, completions, **columns) -> list of numbers"
    )
    reward_weights: list[float] | None = option(
        None, "weights of reward models and then functions; default: 1 each; a reward of weight 0 only watches"
    )
    critic_path: str | None = option(
        None,
        "folder or RUN/STAGE to start the critic from, a ppo version's critic for example; default: the first reward model",
    )

    share_base: bool = option(
        True, "with use_peft: hold weights that several models stand on once, instead of once a model (docs/peft.md)"
    )

    total_episodes: int = option(256_000, "episodes (prompt and response) in the whole run", ge=1)
    batch_size: int = option(512, "episodes in one rollout, over all processes", ge=1)
    num_mini_batches: int = option(8, "optimiser steps that one rollout is cut into", ge=1)
    num_ppo_epochs: int = option(1, "passes over one rollout (inner epochs)", ge=1)
    per_device_train_batch_size: int = option(8, "episodes a process takes through one forward and backward", ge=1)
    per_device_rollout_batch_size: int = option(64, "prompts a process decodes at once", ge=1)
    ds3_gather_for_generation: bool = option(
        True,
        "ZeRO 3 gathers each model whole for a rollout; false: a layer at a time, for models that do not fit on one GPU, "
        "which takes far longer",
    )
    per_device_ptx_batch_size: int = option(
        8, "pretraining examples a process takes through one forward and backward", ge=1
    )
    max_prompt_length: int = option(1024, "longest prompt, in tokens; longer ones are dropped and counted", ge=1)
    response_length: int = option(1024, "longest response, in tokens", ge=1)
    temperature: float = option(
        1.0, "sampling temperature; divides the logits in rollout, reference and update alike", ge=1e-6, le=1e6
    )

    learning_rate: float = option(
        5e-6, "peak learning rate of the policy (InstructGPT: above 8e-6 diverged without ptx)", gt=0
    )
    critic_learning_rate: float = option(9e-6, "peak learning rate of the critic", gt=0)
    warmup_steps: int = option(10, "rollouts of linear warm-up from a tenth of the peak; constant afterwards", ge=0)
    adam_epsilon: float = option(1e-5, "Adam's epsilon (lm-human-preferences: 1e-5)", gt=0)

    kl_coef: float = option(0.02, "coefficient of the per-token KL penalty", ge=0)
    kl_estimator: Literal["k1", "k2", "k3"] = option("k1", "estimator of the KL in the penalty")
    kl_target: float | None = option(
        None, "nats a response that an adaptive coefficient aims at; null: fixed (Ziegler: 6)", gt=0
    )
    kl_horizon: int = option(10_000, "episodes over which the adaptive coefficient moves", ge=1)
    kl_budget: float | None = option(
        None, "mean KL of a rollout, in nats a response, above which an alarm is raised", gt=0
    )
    early_stop: bool = option(
        True, "end the run after the first rollout whose KL is over kl_budget; that rollout is still learned from"
    )
    gamma: float = option(1.0, "discount", ge=0, le=1)
    lam: float = option(0.95, "lambda of GAE (not in the paper; Ziegler's)", ge=0, le=1)
    cliprange: float = option(0.2, "clip range of the policy's ratio", gt=0)
    cliprange_value: float = option(0.2, "clip range of the value (not in the paper; Ziegler's)", gt=0)
    vf_coef: float = option(0.1, "coefficient of the value loss (Ziegler's)", ge=0)
    scale_scores: bool = option(False, "divide scores by the running standard deviation of all scores so far")
    clip_scores: float | None = option(None, "clip scores, after scaling, to plus and minus this", gt=0)
    whiten_rewards: bool = option(False, "scale shaped rewards to unit variance, their mean unshifted")
    missing_eos_penalty: float | None = option(
        1.0, "subtracted from the score of a response without EOS; null: none", ge=0
    )
    missing_eos_score: float | None = option(None, "replaces the score of a response without EOS (N+ details: -1)")

    ptx_coef: float = option(27.8, "coefficient of the pretraining loss; 0: PPO without ptx", ge=0)
    ptx_ratio: float = option(8.0, "pretraining examples for one episode", gt=0)
    ptx_dataset_name: str | None = option(None, "raw text for ptx: a local file or folder, or a Hub data set id")
    ptx_dataset_config: str | None = option(None, "configuration of that Hub data set")
    ptx_dataset_split: str = option("train", "split of that Hub data set")
    ptx_block_size: int = option(128, "tokens in one pretraining example", ge=8)
    ptx_packing_strategy: Packing = option("wrapped", PACKING)
    ema_decay: float | None = option(
        0.992, "decay of the average of the policy's weights, an optimiser step; null: no average", ge=0, le=1
    )

    eval_episodes: int = option(256, "held-out prompts answered before and after the run, at most", ge=0)
    sample_steps: int | None = option(10, "rollouts between two shows of sample texts; null: never", ge=1)
    logging_steps: int = option(1, "rollouts between two lines of metrics", ge=1)

    stage: typing.ClassVar[str] = "ppo"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % self.num_mini_batches:
            raise ConfigError(
                f"batch_size: {self.batch_size} is not a multiple of num_mini_batches ({self.num_mini_batches})"
            )
        if self.kl_target is not None and self.kl_coef == 0:
            raise ConfigError("kl_coef: 0 stays 0 whatever kl_target is: it is multiplied; give one above 0")
        if self.kl_target is not None and self.batch_size >= 5 * self.kl_horizon:
            raise ConfigError(
                f"kl_horizon: {self.kl_horizon} episodes are too few for rollouts of {self.batch_size}; give more than a fifth"
            )
        rewards = len(self.reward_functions) + (1 if self.reward_model_path is None else len(self.reward_model_path))
        if self.reward_weights is not None and len(self.reward_weights) != rewards:
            raise ConfigError(f"reward_weights: {len(self.reward_weights)} weights for {rewards} rewards")
        if rewards == 0 or (self.reward_weights is not None and not any(self.reward_weights)):
            raise ConfigError(
                "no reward steers: give a reward_model_path or reward_functions with a weight other than 0"
            )
        if self.missing_eos_penalty is not None and self.missing_eos_score is not None:
            raise ConfigError("missing_eos_penalty and missing_eos_score exclude each other; set one of them to null")
        if self.ptx_coef > 0 and self.ptx_dataset_name is None:
            raise ConfigError(
                "ptx_coef is above 0 but ptx_dataset_name is not given; name raw text, or set ptx_coef to 0"
            )

    @property
    def mini_batch_size(self) -> int:
        """Episodes in one optimiser step, over all processes."""
        return self.batch_size // self.num_mini_batches

    @property
    def num_rollouts(self) -> int:
        """Rollouts in the whole run."""
        return max(1, round(self.total_episodes / self.batch_size))


STAGE_ARGS: dict[str, type[StageArgs]] = {c.stage: c for c in (PretrainArgs, SFTArgs, RewardArgs, PPOArgs)}


# -------------------------------------------------------------------------------------------------------------- parsing


def parse(stage: str, argv: Sequence[str] | None = None) -> Any:
    """Arguments of a stage from `argv` (default: the process's own).

    `--config FILE` is read first, options override it. With no argument at all the demo's recipe is taken.
    Raises ConfigError: one line that names the file or option, and the closest known name where one is unknown.
    """
    cls = STAGE_ARGS[stage]
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv:
        argv = ["--config", str(demo_config(stage))]
    options = _read_command_line(cls, argv)
    values: dict[str, Any] = {}
    config = options.pop("config", None)
    if config is not None:
        values.update(read_yaml(cls, config))
    values.update(options)
    return cls(**values)


def demo_config(stage: str) -> Path:
    """The demo's recipe: configs/<stage>/demo.yaml of this checkout, or of the folder one is in."""
    relative = Path("configs") / stage / "demo.yaml"
    for root in (Path(__file__).resolve().parents[2], Path.cwd()):
        if (root / relative).is_file():
            return root / relative
    raise ConfigError(f"no argument given and {relative} is not here; give --config FILE, or run in a checkout of rlhf")


def to_dict(args: StageArgs) -> dict[str, Any]:
    """All choices as plain values, for stage.json."""
    return dataclasses.asdict(args)


def read_yaml(cls: type[StageArgs], path: str) -> dict[str, Any]:
    """The choices that a YAML file makes, keys and values checked; errors name the file and the line."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}") from None
    except (OSError, ValueError) as error:  # ValueError: a path that no system has, with a NUL in it
        raise ConfigError(f"cannot read the config {path}: {getattr(error, 'strerror', None) or error}") from None
    try:
        values, lines = _load_yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: {getattr(error, 'problem', None) or ' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a config is a mapping of names to values, not a {type(values).__name__}")
    known = _options(cls)
    for key, value in values.items():
        where = f"{path}:{lines[key]}" if key in lines else path
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}{_closest(str(key), known)}")
        values[key] = known[key].check(value, f"{where}: {key}")
    return values


def _load_yaml(text: str) -> tuple[Any, dict[Any, int]]:
    """The document, and the line of each of its keys."""
    loader = _StrictLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, {}
        keys = node.value if isinstance(node, yaml.MappingNode) else []
        lines = {key.value: key.start_mark.line + 1 for key, _ in keys if isinstance(key, yaml.ScalarNode)}
        return loader.construct_document(node), lines
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    finally:
        loader.dispose()


_INT, _FLOAT, _DATE = (f"tag:yaml.org,2002:{name}" for name in ("int", "float", "timestamp"))


class _StrictLoader(yaml.SafeLoader):
    """YAML without its traps: no key twice, 1e-5 is a number, and 010, 1:30 and 2024-01-01 are text, not 8, 90 and a date."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else []:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, typing.Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key if isinstance(key, typing.Hashable) else str(key))
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError):  # what PyYAML raises at `!!int x` or `!!bool x`
            raise yaml.constructor.ConstructorError(
                None, None, f"cannot read {node.value!r} as {node.tag.rpartition(':')[2]}", node.start_mark
            ) from None


_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, _FLOAT, _DATE)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_implicit_resolver(_INT, re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789"))
_StrictLoader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise ConfigError(message)


class _Once(argparse.Action):
    """Stores a value, and refuses a second one."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if hasattr(namespace, self.dest):
            raise ConfigError(f"--{self.dest} is given twice")
        setattr(namespace, self.dest, values)


def _read_command_line(cls: type[StageArgs], argv: list[str]) -> dict[str, Any]:
    namespace, unknown = _build_parser(cls).parse_known_args([_underscored(word) for word in argv])
    known = _options(cls)
    for word in unknown:
        name = word.removeprefix("--").split("=")[0]
        raise ConfigError(
            f"unknown option {word!r}{_closest(name, [*known, 'config'], '--')}"
            if word.startswith("-")
            else f"unexpected word {word!r}"
        )
    values = vars(namespace)
    config = {"config": values.pop("config")} if "config" in values else {}
    return config | {
        name: known[name].check(_from_words(value, known[name].annotation, f"--{name}"), f"--{name}")
        for name, value in values.items()
    }


def _underscored(word: str) -> str:
    """--learning-rate is --learning_rate, as in HfArgumentParser."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _build_parser(cls: type[StageArgs]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=f"accelerate launch scripts/{cls.stage}.py",
        usage="%(prog)s [--config FILE] [--OPTION VALUE ...]",
        description=cls.__doc__,
        epilog="With no argument at all the demo's recipe is run. Every option is also a key of the YAML file.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=120),
    )
    parser._negative_number_matcher = re.compile(r"-\.?[0-9]")  # argparse's own takes -1e-3 for an option
    parser.add_argument("--config", action=_Once, metavar="FILE", help="YAML file with any of the options below")
    own = parser.add_argument_group("this stage")
    shared = parser.add_argument_group("every stage")
    known = _options(cls)
    inherited = {spec.name for spec in dataclasses.fields(TrainerArgs)}
    for spec in dataclasses.fields(cls):
        group = shared if spec.name in inherited else own
        group.add_argument(
            f"--{spec.name}",
            action=_Once,
            nargs=_nargs(known[spec.name].annotation),
            metavar=_metavar(known[spec.name].annotation),
            help=f"{spec.metadata['help']}{_default(spec)}".replace("%", "%%"),
        )
    return parser


def _default(spec: dataclasses.Field) -> str:
    value = spec.default if spec.default_factory is dataclasses.MISSING else spec.default_factory()
    if value is None or value == [] or value == {}:
        return "" if "default: " in spec.metadata["help"] else " (default: none)"
    return f" (default: {value})"


def _nargs(annotation: Any) -> str | None:
    if _has(annotation, list):
        return "*"
    return "?" if _has(annotation, bool) else None


def _metavar(annotation: Any) -> str:
    choices = [str(v) for part in _parts(annotation) if get_origin(part) is Literal for v in get_args(part)]
    if choices:
        return "{" + ",".join(choices) + "}"
    names = [getattr(get_origin(p) or p, "__name__", str(p)) for p in _parts(annotation) if p is not type(None)]
    return "|".join(names).upper().replace("LIST", "NAME")


def _from_words(value: Any, annotation: Any, where: str) -> Any:
    """What the shell's words mean: text for a text option, YAML for every other."""
    if _has(annotation, bool) and value is None:
        return True
    if value in ("null", "none", "None", ["null"], ["none"], ["None"]) and _has(annotation, type(None)):
        return None
    if isinstance(value, list):
        if len(value) == 1 and value[0].startswith("["):
            return _scalar(value[0], where)
        return value if list[str] in _parts(annotation) else [_scalar(word, where) for word in value]
    return value if _has(annotation, str) else _scalar(value, where)


def _scalar(word: str, where: str) -> Any:
    try:
        return _load_yaml(word)[0]
    except yaml.YAMLError as error:
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ConfigError(f"{where}: cannot read the value {word!r}: {reason}") from None


# ------------------------------------------------------------------------------------------------------------- checking


def check(value: Any, annotation: Any, where: str) -> Any:
    """`value` if it fits `annotation` (an int where a float belongs becomes one), else ConfigError."""
    for part in _parts(annotation):
        fits, result = _fit(value, part, where)
        if fits:
            return result
    wanted = " or ".join(_name(part) for part in _parts(annotation))
    raise ConfigError(f"{where}: expected {wanted}, got {value!r}{_suggest_choice(value, annotation)}")


def _fit(value: Any, part: Any, where: str) -> tuple[bool, Any]:
    origin, inner = get_origin(part), get_args(part)
    if part is Any:
        _refuse_unplain(value, where)
        return True, value
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in inner), value
    if origin is list:
        if isinstance(value, str) and inner[0] is str:
            value = [value]
        if not isinstance(value, list):
            return False, value
        return True, [check(v, inner[0], f"{where}[{i}]") for i, v in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            return False, value
        return True, {check(k, inner[0], f"{where} key"): check(v, inner[1], f"{where}.{k}") for k, v in value.items()}
    if part is float and type(value) in (int, float):
        _refuse_unplain(value, where)
        return True, float(value)
    return type(value) is part, value


def _refuse_unplain(value: Any, where: str, depth: int = 0) -> None:
    """Only what JSON has goes into stage.json: finite numbers, text, true, false, null, and lists and mappings of these."""
    if type(value) in (int, float) and not abs(value) <= sys.float_info.max:
        raise ConfigError(f"{where}: {value if isinstance(value, float) else 'the number'} is not a finite number")
    if isinstance(value, (list, dict)) and depth > 20:  # a YAML alias can hold itself
        raise ConfigError(f"{where}: nested too deeply")
    if isinstance(value, dict):
        for key, inner in value.items():
            check(key, str, f"{where} key")
            _refuse_unplain(inner, f"{where}.{key}", depth + 1)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            _refuse_unplain(inner, f"{where}[{i}]", depth + 1)
    elif value is not None and type(value) not in (bool, int, float, str):
        raise ConfigError(f"{where}: expected a number, text, true, false, null, list or mapping, got {value!r}")


@dataclass(frozen=True)
class _Option:
    """What a field's values are checked against."""

    annotation: Any
    bounds: dict[str, float]

    def check(self, value: Any, where: str) -> Any:
        value = check(value, self.annotation, where)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            for kind, bound in self.bounds.items():
                test, sign = _BOUNDS[kind]
                if not test(value, bound):
                    raise ConfigError(f"{where}: must be {sign} {bound}, got {value}")
        return value


_BOUNDS = {"ge": (operator.ge, ">="), "gt": (operator.gt, ">"), "le": (operator.le, "<="), "lt": (operator.lt, "<")}


def _options(cls: type[StageArgs]) -> dict[str, _Option]:
    hints = typing.get_type_hints(cls)
    return {spec.name: _Option(hints[spec.name], spec.metadata["bounds"]) for spec in dataclasses.fields(cls)}


def _parts(annotation: Any) -> tuple[Any, ...]:
    union = get_origin(annotation) in (typing.Union, types.UnionType)
    return get_args(annotation) if union else (annotation,)


def _has(annotation: Any, kind: type) -> bool:
    return any(part is kind or get_origin(part) is kind for part in _parts(annotation)) or (
        kind is str and any(get_origin(part) is Literal for part in _parts(annotation))
    )


def _name(part: Any) -> str:
    if part is type(None):
        return "null"
    if get_origin(part) is Literal:
        return "one of " + ", ".join(map(str, get_args(part)))
    return str(part) if get_origin(part) else getattr(part, "__name__", str(part))


def _suggest_choice(value: Any, annotation: Any) -> str:
    choices = [str(v) for part in _parts(annotation) if get_origin(part) is Literal for v in get_args(part)]
    return _closest(value, choices) if isinstance(value, str) and choices else ""


def _closest(name: str, known: Any, prefix: str = "") -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {prefix}{close[0]}?" if close else "; see --help"
