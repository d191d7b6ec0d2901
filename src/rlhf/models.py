"""Tokenizers, causal policies and scalar-head models (reward model, critic), for any causal LM that transformers loads.

Sequences are padded on the right here, prompt and response in one row: positions then count from 0 without help, which GPT-2
needs for exact log-probabilities, and architectures that take no `position_ids` need too.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from rlhf import RLHFError
from rlhf.engine import gathered

PAD_TOKEN = "<|pad|>"

# Their logits are `lm_head(last hidden state)` and nothing else, so that single positions can be unembedded on their own.
PLAIN_UNEMBEDDING = {"gpt2", "opt", "gpt_neo", "gpt_neox", "gptj", "bloom", "llama", "mistral", "qwen2", "qwen3", "phi"}


class ModelError(RLHFError):
    """A checkpoint or tokenizer cannot be used as asked."""


def load_tokenizer(path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a checkpoint, with an EOS and with a PAD of its own.

    PAD = EOS would teach models never to stop, so a tokenizer without PAD gets `<|pad|>`. WordPiece tokenizers of GPT-2 models
    have no EOS: their [SEP] ends a text.
    """
    with _loading(path):
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    if tokenizer.eos_token is None:
        if tokenizer.sep_token is None:
            raise ModelError(
                f"the tokenizer of {path} has neither EOS nor SEP, so that no answer could end; set eos_token"
            )
        tokenizer.eos_token = tokenizer.sep_token
    if tokenizer.pad_token is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    return tokenizer


def load_policy(
    path: str | Path,
    tokenizer: Any,
    *,
    dtype: str = "float32",
    revision: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    resid_pdrop: float | None = None,
) -> PreTrainedModel:
    """A causal LM whose embeddings hold every token of `tokenizer`; `resid_pdrop` replaces its residual dropout."""
    with _loading(path):
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
        _set_dropout(config, resid_pdrop)
        model = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            revision=revision,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
        )
    fit_vocabulary(model, tokenizer)
    return model


def load_scalar_model(
    path: str | Path,
    tokenizer: Any,
    *,
    new_head: bool = False,
    dtype: str = "float32",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A model with one number a position: `score(last hidden state)`, by transformers' sequence-classification classes.

    new_head: the checkpoint is a causal LM, whose unembedding is replaced by a head with weight N(0, 1/sqrt(d + 1)) (Stiennon et
    al. 2020; InstructGPT C.2). Otherwise the checkpoint must bring its head. Dropout is off: a reward has one value.
    """
    model: Any
    with _loading(path):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, num_labels=1)
        _set_dropout(config, 0.0, everywhere=True)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    if not hasattr(model, "score"):
        raise ModelError(f"{type(model).__name__} of {path} keeps its head elsewhere than in `score`; not supported")
    missing = {str(key) for key in info["missing_keys"]}
    if not new_head and any(key.startswith("score.") for key in missing):
        raise ModelError(
            f"{path} has no scalar head (score.weight); give the folder of a reward model, as `make rm` writes it"
        )
    if new_head:
        with gathered([model.score.weight], modify=True):
            width = model.score.weight.shape[-1]
            nn.init.normal_(model.score.weight, std=1 / math.sqrt(width + 1))
    fit_vocabulary(model, tokenizer)
    return model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' bars over files that take a moment, and its report of a head that is new on purpose."""
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()


@contextlib.contextmanager
def _loading(path: str | Path) -> Iterator[None]:
    """Turns the failures of a load into one line."""
    try:
        with quiet():
            yield
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"cannot load {path}: {reason[:300]}") from error


def _set_dropout(config: Any, value: float | None, everywhere: bool = False) -> None:
    """Residual dropout goes by `resid_pdrop` (GPT-2) or `dropout` (OPT)."""
    if value is None:
        return
    names: tuple[str, ...] = ("resid_pdrop", "dropout")
    if everywhere:
        names += ("embd_pdrop", "attn_pdrop", "attention_dropout", "summary_first_dropout", "hidden_dropout")
        names += ("layerdrop",)
    for name in names:
        if hasattr(config, name):
            setattr(config, name, value)


def switch_off_dropout(model: nn.Module) -> None:
    """No dropout in training mode either, which gradient checkpointing needs; the config keeps the checkpoint's own."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def fit_vocabulary(model: Any, tokenizer: Any) -> None:
    """Grows the embeddings to the tokenizer, and never shrinks them; the model's special ids become the tokenizer's.

    New rows are the mean of the old ones: deterministic, and in the range that the layers know.
    """
    rows = model.config.get_text_config().vocab_size  # a sharded weight does not tell
    needed = 1 + max(tokenizer.get_vocab().values())  # not len(tokenizer): ids may have holes
    if needed > rows:
        model.resize_token_embeddings(needed, mean_resizing=False)
        embeddings = [e for e in (model.get_input_embeddings(), model.get_output_embeddings()) if e is not None]
        with torch.no_grad(), gathered([e.weight for e in embeddings], modify=True):
            for embedding in embeddings:
                embedding.weight[rows:] = embedding.weight[:rows].mean(dim=0)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.generation_config.eos_token_id = tokenizer.eos_token_id


def banned_ids(model: Any, tokenizer: Any) -> Tensor:
    """Ids that no response may hold: PAD, and rows of the embedding without a token (OPT has seven)."""
    vocabulary = model.config.get_text_config().vocab_size
    unused = set(range(vocabulary)) - set(tokenizer.get_vocab().values())
    return torch.tensor(sorted(unused | {tokenizer.pad_token_id}), dtype=torch.long)


def context_length(model: PreTrainedModel) -> int | None:
    """Positions that the model has, None when its config does not say."""
    config = model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)


def accepts(model: Any, argument: str) -> bool:
    """Whether the forward takes this argument (BLOOM and MPT, for example, take no `position_ids`)."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    return argument in inspect.signature(model.forward).parameters


def hidden_states(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Last hidden states [B, L, H] of right-padded rows [B, L]."""
    backbone = getattr(model, model.base_model_prefix)
    return backbone(input_ids=input_ids, attention_mask=attention_mask.long(), use_cache=False).last_hidden_state


def logits_at(model: Any, input_ids: Tensor, attention_mask: Tensor, where: Tensor) -> Tensor:
    """Logits [N, V] of the N positions where `where` [B, L] is True.

    Only these positions pass the unembedding: prompts and padding cost no V-wide row.
    """
    if model.config.model_type in PLAIN_UNEMBEDDING:
        return model.get_output_embeddings()(hidden_states(model, input_ids, attention_mask)[where])
    return model(input_ids=input_ids, attention_mask=attention_mask.long(), use_cache=False).logits[where]


def values_at(model: Any, input_ids: Tensor, attention_mask: Tensor, where: Tensor) -> Tensor:
    """The scalar head's output [N] at the N positions where `where` [B, L] is True."""
    hidden = hidden_states(model, input_ids, attention_mask)[where]
    values = model.score(hidden).squeeze(-1).float()
    return values + getattr(model.config, "reward_bias", 0.0)


def scalar_scores(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The reward [B] of right-padded rows [B, L], read at the last real token (by the mask, never by comparing ids)."""
    length = attention_mask.long().sum(dim=1, keepdim=True)
    position = torch.arange(input_ids.shape[1], device=input_ids.device)
    return values_at(model, input_ids, attention_mask, position == length - 1)


def add_reward_bias(model: Any, bias: float) -> str:
    """Adds a constant to every reward, in a place that plain transformers keeps; returns the place, for the card.

    The heads have no bias and a saved `score.bias` would be dropped, so the constant goes into the last norm's bias:
    w·(h + b·w/|w|²) = w·h + b. Models whose last norm has none (RMSNorm) get `reward_bias` in the config, which only we apply.
    """
    with gathered(model.parameters(), modify=True):
        return _add_reward_bias(model, bias)


def _add_reward_bias(model: Any, bias: float) -> str:
    weight = model.score.weight.detach().float().reshape(-1)
    norm, projection = _last_norm(model)
    if norm is None or getattr(norm, "bias", None) is None or not weight.any():
        model.config.reward_bias = getattr(model.config, "reward_bias", 0.0) + float(bias)
        return "config.reward_bias"
    shift = bias * weight / weight.dot(weight)
    if projection is not None:
        # OPT-350m: the head reads P·norm(x), so the shift s in norm space must give P·s = b·w/|w|²; the part along Pᵀw will do.
        direction = projection.weight.detach().float().T @ weight
        shift = bias * direction / direction.dot(direction)
    with torch.no_grad():
        norm.bias += shift.to(norm.bias.dtype)
    return "the last norm's bias"


def _last_norm(model: Any) -> tuple[Any, Any]:
    """The norm whose output the head reads, and the projection between them where there is one."""
    backbone: Any = getattr(model, model.base_model_prefix)
    backbone = getattr(backbone, "decoder", backbone)
    for name in ("ln_f", "final_layer_norm", "final_layernorm", "norm"):
        norm = getattr(backbone, name, None)
        if norm is not None:
            return norm, getattr(backbone, "project_out", None)
    if model.config.model_type == "opt" and not model.config.do_layer_norm_before:
        return backbone.layers[-1].final_layer_norm, getattr(backbone, "project_out", None)
    return None, None
