"""Stage 0: a small GPT-2 or OPT from scratch on raw text, for where no checkpoint is at hand.

It differs from a real base model in size only: byte-level BPE, next-token loss over documents joined by EOS, AdamW with cosine
decay. PAD is a token of its own from the start.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    OPTConfig,
    PreTrainedTokenizerFast,
    Trainer,
    default_data_collator,
    set_seed,
)

from rlhf.config import PretrainArgs
from rlhf.data import fingerprint
from rlhf.data.encode import CHAT_TEMPLATE, blocks
from rlhf.engine import prepare_trainer
from rlhf.models import PAD_TOKEN, compile_layers, load_tokenizer
from rlhf.registry import Artifact
from rlhf.training import (
    MarkComplete,
    OnceAnEpoch,
    Rows,
    TrainingError,
    check_processes,
    held_out_or_none,
    load_splits,
    open_registry,
    pin_inputs,
    publish,
    push_published,
    refuse_other_architecture,
    saver,
    trainer_arguments,
    work_folder,
)

EOS_TOKEN = "<|endoftext|>"


def run(args: PretrainArgs) -> Artifact | None:
    """Trains and publishes `RUN_NAME/base`; returns the artifact on the first process."""
    registry = open_registry(args)
    with work_folder(args, registry, "base") as (work, resume):
        training_args = trainer_arguments(args, work)
        check_processes()
        set_seed(args.seed)
        # Blocks are held out, not documents: one document may be the whole text.
        text, _ = load_splits(args, "text", eval_fraction=0.0)
        texts = text["text"][:]
        tokenizer = make_tokenizer(args, texts)
        train, held_out = token_blocks(args, tokenizer, texts)
        model = AutoModelForCausalLM.from_config(model_config(args, tokenizer))
        if args.torch_compile:
            compile_layers(model)
        model.loss_type = "ForCausalLM"  # said here, or transformers warns that the config does not say it
        trainer = BlockTrainer(
            model=model,
            args=training_args,
            train_dataset=train,
            eval_dataset=held_out_or_none(training_args, held_out),
            processing_class=tokenizer,
            data_collator=default_data_collator,
            callbacks=[MarkComplete(args.save_total_limit)],
        )
        prepare_trainer(trainer, args.optim)
        data = [fingerprint(text)]
        pin_inputs(work, resume, {}, data)
        refuse_other_architecture(model, resume)
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        metrics = {"parameters": model.num_parameters(), "train_tokens": learned_tokens(train)}
        metrics |= evaluate(trainer)
        artifact = publish(
            registry,
            args,
            "base",
            saver(trainer.accelerator, trainer.model_wrapped, tokenizer),
            data=data,
            metrics=metrics,
            history=trainer.state.log_history,
        )
    return push_published(args, artifact)


class BlockTrainer(OnceAnEpoch, Trainer):
    """A Trainer on blocks of text."""


def make_tokenizer(args: PretrainArgs, texts: list[str]) -> PreTrainedTokenizerFast:
    """The tokenizer asked for: one that exists, a byte-level BPE from its files, or one trained on the text."""
    if args.tokenizer_name is not None:
        return load_tokenizer(args.tokenizer_name)
    bpe = models.BPE()
    if args.tokenizer_vocab_file is not None:
        bpe = _read_bpe(args.tokenizer_vocab_file, str(args.tokenizer_merges_file))
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if args.tokenizer_vocab_file is None:
        trainer = trainers.BpeTrainer(
            vocab_size=args.vocab_size,
            special_tokens=[EOS_TOKEN, PAD_TOKEN],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        clean_up_tokenization_spaces=False,
        model_max_length=args.max_position_embeddings,
        chat_template=CHAT_TEMPLATE,
    )


def _read_bpe(vocab: str, merges: str) -> models.BPE:
    for path in (vocab, merges):
        if not Path(path).is_file():
            raise TrainingError(f"no tokenizer file {path}; give vocab.json and merges.txt of a byte-level BPE")
    try:
        bpe = models.BPE.from_file(vocab, merges)
        ids = json.loads(Path(vocab).read_text(encoding="utf-8"))
    except Exception as error:  # the tokenizers library raises plain Exception
        raise TrainingError(f"cannot read a byte-level BPE from {vocab} and {merges}: {error}") from error
    lacking = set(pre_tokenizers.ByteLevel.alphabet()) - ids.keys()
    if lacking:  # the library would leave them out of a text in silence
        raise TrainingError(f"{vocab} lacks {len(lacking)} of the 256 bytes; give vocab.json of a byte-level BPE")
    if sorted(ids.values()) != list(range(len(ids))):  # PAD gets the next id, which another token would have
        raise TrainingError(f"{vocab} does not number its tokens with the ids 0 to {len(ids) - 1}; renumber them")
    return bpe


def model_config(args: PretrainArgs, tokenizer: Any) -> GPT2Config | OPTConfig:
    """The architecture's own config class, at the size asked for."""
    shared: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if args.architecture == "opt":
        return OPTConfig(
            hidden_size=args.hidden_size,
            word_embed_proj_dim=args.hidden_size,
            ffn_dim=args.intermediate_size or 4 * args.hidden_size,
            num_hidden_layers=args.num_hidden_layers,
            num_attention_heads=args.num_attention_heads,
            max_position_embeddings=args.max_position_embeddings,
            init_std=args.initializer_range,
            dropout=args.embd_pdrop,
            attention_dropout=args.embd_pdrop,
            **shared,
        )
    return GPT2Config(
        n_embd=args.hidden_size,
        n_inner=args.intermediate_size,
        n_layer=args.num_hidden_layers,
        n_head=args.num_attention_heads,
        n_positions=args.max_position_embeddings,
        activation_function="gelu_pytorch_tanh",  # GPT-2's gelu_new, as one kernel
        initializer_range=args.initializer_range,
        resid_pdrop=args.embd_pdrop,
        embd_pdrop=args.embd_pdrop,
        attn_pdrop=args.embd_pdrop,
        **shared,
    )


def token_blocks(args: PretrainArgs, tokenizer: Any, texts: list[str]) -> tuple[Rows, Rows]:
    """Training and held-out blocks; the held-out ones are the last share of the text, of packed documents a random one."""
    try:
        ids = blocks(tokenizer, texts, args.block_size, args.packing_strategy)
    except ValueError as error:
        raise TrainingError(f"{args.dataset_name}: {error}; give more text, or a smaller block_size") from None
    if args.packing_strategy == "bfd_split":  # which puts the longest documents first
        ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(args.seed))]
    cut = max(1, len(ids) - round(args.eval_fraction * len(ids)))
    labels = ids.masked_fill(ids == tokenizer.pad_token_id, -100)
    seen = torch.ones(args.block_size, dtype=torch.long)  # padding lies behind the text, which never looks there
    rows = [{"input_ids": block, "attention_mask": seen, "labels": learned} for block, learned in zip(ids, labels)]
    return Rows(rows[:cut]), Rows(rows[cut:])


def learned_tokens(rows: Rows) -> int:
    """Tokens of the text in training blocks, without padding."""
    return sum(int((row["labels"] != -100).sum()) for row in rows.rows)


def evaluate(trainer: Trainer) -> dict[str, float]:
    """Held-out loss in nats a token, and its perplexity; nothing where nothing is held out."""
    if trainer.eval_dataset is None:
        return {}
    loss = trainer.evaluate()["eval_loss"]
    return {"eval_loss": loss, "perplexity": math.exp(min(loss, 50.0))}
