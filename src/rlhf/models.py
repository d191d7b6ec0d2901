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
from transformers.activations import GELUTanh, NewGELUActivation
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf import RLHFError, adapters
from rlhf.bases import Start, loading_quantized, quantization, start_of
from rlhf.data.encode import chat_template
from rlhf.engine import gathered, weights_of
from rlhf.hub_api import one_line
from rlhf.objectives import token_logprobs
from rlhf.unembed import logprobs, low_precision_of

PAD_TOKEN = "<|pad|>"

# Their logits are `lm_head(last hidden state)` and nothing else, so that single positions can be unembedded on their own.
PLAIN_UNEMBEDDING = {"gpt2", "opt", "gpt_neo", "gpt_neox", "gptj", "bloom", "llama", "mistral", "qwen2", "qwen3", "phi"}


# Bases that are loaded, by the sha256 of their weights: the model as it came, and the names of weights that it did not bring.
Held = dict[str, tuple[Any, set[str]]]


NO_POLICY = "which answers with a number and not with text; give a base, an SFT model or a policy"


class ModelError(RLHFError):
    """A checkpoint or tokenizer cannot be used as asked."""


def load_tokenizer(path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a checkpoint, with an EOS, a PAD of its own and a chat template.

    PAD = EOS would teach models never to stop, so a tokenizer without PAD gets `<|pad|>`. WordPiece tokenizers of GPT-2 models
    have no EOS: their [SEP] ends a text. Where there is no chat template it is the shipped one, which is saved with a version.
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
    tokenizer.chat_template = chat_template(tokenizer)
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
    peft: Any = None,
    trainable: bool = True,
    merge: bool = True,
    bases: Held | None = None,
) -> Any:
    """A causal LM whose embeddings hold every token of `tokenizer`; `resid_pdrop` replaces its residual dropout.

    peft: the stage's arguments, where they say what is trained (`adapters.attach`); without them an adapter is merged into its
    base, or by merge=False kept apart. bases: what other models have loaded; the weights are then theirs.
    """
    start = start_of(path, revision)
    if start.has_head:
        raise ModelError(f"{path} is a reward model, {NO_POLICY}")
    how = {"dtype": dtype, "attn_implementation": attn_implementation, "trust_remote_code": trust_remote_code}
    with _loading(path, start):
        config = AutoConfig.from_pretrained(
            start.base.path, revision=start.base.revision, trust_remote_code=trust_remote_code
        )
        _set_dropout(config, resid_pdrop)
        model, _ = _load_base(AutoModelForCausalLM, start, config, how, tokenizer, peft, bases)
    return adapters.attach(model, start, peft, task="CAUSAL_LM", trainable=trainable, merge=merge)


def load_scalar_model(
    path: str | Path,
    tokenizer: Any,
    *,
    new_head: bool = False,
    dtype: str = "float32",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    resid_pdrop: float = 0.0,
    peft: Any = None,
    trainable: bool = True,
    merge: bool = True,
    bases: Held | None = None,
) -> Any:
    """A model with one number a position: `score(last hidden state)`, by transformers' sequence-classification classes.

    new_head: the checkpoint is a causal LM, whose unembedding is replaced by a head with weight N(0, 1/sqrt(d + 1)) (Stiennon et
    al. 2020; InstructGPT C.2). Otherwise the checkpoint must bring its head. Dropout is off: a reward has one value. resid_pdrop:
    the residual dropout in training mode, which the config, and so a published version, does not have. peft, trainable, merge,
    bases: as of load_policy; head and last norm are trained whole beside an adapter.
    """
    start = start_of(path)
    how = {"dtype": dtype, "attn_implementation": attn_implementation, "trust_remote_code": trust_remote_code}
    model: Any
    with _loading(path, start):
        config = AutoConfig.from_pretrained(
            start.base.path, revision=start.base.revision, trust_remote_code=trust_remote_code, num_labels=1
        )
        _set_dropout(config, 0.0, everywhere=True)
        _set_dropout(config, resid_pdrop)
        model, missing = _load_base(AutoModelForSequenceClassification, start, config, how, tokenizer, peft, bases)
        _set_dropout(model.config, 0.0)
    if not hasattr(model, "score"):
        raise ModelError(f"{type(model).__name__} of {path} keeps its head elsewhere than in `score`; not supported")
    if not new_head and not start.has_head and any(key.startswith("score.") for key in missing):
        raise ModelError(
            f"{path} has no scalar head (score.weight); give the folder of a reward model, as `make rm` writes it"
        )
    if new_head:
        with gathered([model.score.weight], modify=True):
            width = model.score.weight.shape[-1]
            nn.init.normal_(model.score.weight, std=1 / math.sqrt(width + 1))
        if getattr(model.config, "reward_bias", 0.0):  # of the reward model it starts from, whose head is gone
            model.config.reward_bias = 0.0
    elif start.reward_bias:
        model.config.reward_bias = start.reward_bias
    also = _head_modules(model)
    return adapters.attach(model, start, peft, task="SEQ_CLS", also=also, trainable=trainable, merge=merge)


def _load_base(
    kind: Any, start: Start, config: Any, how: dict[str, Any], tokenizer: Any, peft: Any, bases: Held | None
) -> tuple[Any, set[str]]:
    """The base of a model, at the tokenizer's size, and the names of weights that it did not bring.

    Where `bases` holds these weights, the model is a twin of what holds them.
    """
    wanted = start.quantization if peft is None else quantization(peft)
    if bases is not None and start.base.sha256 in bases:
        found = _twin(kind, bases[start.base.sha256], config, how)
        if found is not None:
            fit_vocabulary(found[0], tokenizer)
            return found
    if torch.cuda.is_available():  # cuDNN compiles a plan for each new shape, and each batch has one of its own
        torch.backends.cuda.enable_cudnn_sdp(False)
    model, info = kind.from_pretrained(
        start.base.path,
        config=config,
        revision=start.base.revision,
        output_loading_info=True,
        **how,
        **loading_quantized(wanted),
    )
    missing = {str(key) for key in info["missing_keys"]}
    if kind is AutoModelForCausalLM and any(str(key).startswith("score.") for key in info["unexpected_keys"]):
        raise ModelError(f"{start.base.path} is a reward model, {NO_POLICY}")
    lacking = sorted(key for key in missing if not key.startswith("score."))
    if lacking:  # transformers would draw them at random
        raise ModelError(
            f"{start.base.path} lacks {len(lacking)} weights of {type(model).__name__} (the first: {lacking[0]}); restore the "
            "checkpoint, or give one of this kind"
        )
    fit_vocabulary(model, tokenizer)
    fuse_activations(model)
    adapters.settle_quantized(model)
    if bases is not None:
        bases.setdefault(start.base.sha256, (model, missing))
        model = adapters.twin(model)
        if "score.weight" in missing:
            model.score.weight = nn.Parameter(model.score.weight.detach().clone())  # a head of its own
    return model, missing


def _twin(kind: Any, held: tuple[Any, set[str]], config: Any, how: dict[str, Any]) -> tuple[Any, set[str]] | None:
    """A model of this kind over weights that are loaded; None where its backbone is of another class."""
    model, missing = held
    config.vocab_size = model.config.get_text_config().vocab_size
    with torch.device("meta"):
        skeleton = kind.from_config(config, **{**how, "dtype": model.dtype})
    if type(skeleton) is type(model):
        found = adapters.twin(model)
        if "score.weight" not in missing:
            return found, missing
    else:
        if kind is AutoModelForCausalLM or not hasattr(skeleton, "score"):
            return None  # the unembedding would have to be loaded
        found = adapters.twin(model, skeleton)
        if found is None:
            return None
    # Zeros until a new head or an adapter's is put in their place.
    found.score = nn.Linear(found.score.in_features, 1, bias=False, device=model.device, dtype=model.dtype)
    nn.init.zeros_(found.score.weight)
    return found.eval(), missing | {"score.weight"}


def _head_modules(model: Any) -> list[str]:
    """Names of the scalar head and of the last norm, which is where the reward's bias is kept."""
    norm, _ = _last_norm(model)
    return ["score", *(name for name, module in model.named_modules() if module is norm)]


def add_head(score: nn.Linear, heads: int) -> nn.Linear:
    """A new scalar head in the place of `score`, with `heads` outputs: an ensemble's members, each with its own first weights."""
    new = nn.Linear(score.in_features, heads, bias=False, dtype=score.weight.dtype, device=score.weight.device)
    nn.init.normal_(new.weight, std=1 / math.sqrt(score.in_features + 1))
    return new


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
def _loading(path: str | Path, start: Start | None = None) -> Iterator[None]:
    """Turns the failures of a load into one line, which names the base where that is loaded for an adapter."""
    try:
        with quiet():
            yield
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        what = path if start is None or start.adapter is None else f"{start.base.name}, the base of {path}"
        raise ModelError(f"cannot load {what}: {one_line(error)[:300]}") from error


def _set_dropout(config: Any, value: float | None, everywhere: bool = False) -> None:
    """Residual dropout goes by `resid_pdrop` (GPT-2), `dropout` (OPT) or `hidden_dropout` (GPT-NeoX, of embeddings too)."""
    if value is None:
        return
    names: tuple[str, ...] = ("resid_pdrop", "dropout", "hidden_dropout")
    if everywhere:
        names += ("embd_pdrop", "attn_pdrop", "attention_dropout", "summary_first_dropout", "layerdrop")
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


def fuse_activations(model: nn.Module) -> None:
    """GPT-2's `gelu_new` as PyTorch's one kernel of the same function, equal but for rounding; the config keeps its name.

    transformers composes it of six operations, which take three numbers more of the MLP's width a token.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is NewGELUActivation:
                setattr(module, name, GELUTanh())


def compile_layers(model: nn.Module) -> None:
    """Compiles each transformer layer with torch.compile, in place: names and weights stay as they are.

    Layers of a model are one piece of code, compiled once and again where a shape changes for the first time; a whole model
    would be compiled anew for each number of positions that are read.
    """
    # One entry for each kind of call (policy, critic; with gradient, without; fixed and changing shapes), not for each layer.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile()


def eagerly(model: nn.Module) -> contextlib.AbstractContextManager:
    """A context in which compiled layers run as they were written: with a cache each step would be compiled anew."""
    if any(module._compiled_call_impl is not None for module in model.modules()):
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()


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
    return argument in inspect.signature(adapters.plain(model).forward).parameters


def causal_mask(model: Any, attention_mask: Tensor) -> Tensor:
    """The mask [B, L] of right-padded rows as the model shall get it.

    A causal model's real tokens never see the padding behind them. So on CUDA the mask is left empty where positions do not
    come from it, and attention runs as PyTorch's causal kernel (FlashAttention) instead of one that reads a mask [B, 1, L, L].
    """
    if attention_mask.is_cuda and model.config.model_type in PLAIN_UNEMBEDDING - {"bloom"}:
        return torch.ones_like(attention_mask, dtype=torch.long)
    return attention_mask.long()


def hidden_states(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Last hidden states [B, L, H] of right-padded rows [B, L]; those of padding mean nothing."""
    model = adapters.plain(model)
    backbone = getattr(model, model.base_model_prefix)
    mask = causal_mask(model, attention_mask)
    return backbone(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state


def pick(states: Tensor, where: Tensor) -> Tensor:
    """The states [N, ...] of [B, L, ...] at a mask [B, L], or at places [N] in the flattened rows (no wait for the GPU)."""
    return states[where] if where.dtype == torch.bool else states.flatten(0, 1)[where]


def logits_at(model: Any, input_ids: Tensor, attention_mask: Tensor, where: Tensor) -> Tensor:
    """Logits [N, V] of the N positions `where`: a mask [B, L], or places [N] in the flattened rows.

    Only these positions pass the unembedding: prompts and padding cost no V-wide row.
    """
    if model.config.model_type in PLAIN_UNEMBEDDING:
        return model.get_output_embeddings()(pick(hidden_states(model, input_ids, attention_mask), where))
    return pick(model(input_ids=input_ids, attention_mask=attention_mask.long(), use_cache=False).logits, where)


def logprobs_at(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    where: Tensor,
    tokens: Tensor,
    temperature: float = 1.0,
    banned: Tensor | None = None,
) -> Tensor:
    """Log-probability [N] in nats of `tokens` [N] after the N positions `where`, among the ids that are not banned.

    In float32; models in low precision take the unembedding by `rlhf.unembed`, without its rounding and its memory.
    """
    if model.config.model_type in PLAIN_UNEMBEDDING:
        head = model.get_output_embeddings()
        dtype = low_precision_of(head)
        if dtype is not None:
            states = pick(hidden_states(model, input_ids, attention_mask), where)
            out = tokens.new_empty(0) if banned is None else banned
            return logprobs(states, head.weight, tokens, temperature, out, dtype)
    logits = logits_at(model, input_ids, attention_mask, where)
    if banned is not None:
        logits = logits.index_fill(-1, banned, float("-inf"))
    return token_logprobs(logits[None], tokens[None], temperature)[0]


def values_at(model: Any, input_ids: Tensor, attention_mask: Tensor, where: Tensor) -> Tensor:
    """The scalar head's output [N] at the N positions `where`: a mask [B, L], or places [N] in the flattened rows."""
    values = scalar_head(model, pick(hidden_states(model, input_ids, attention_mask), where))
    return values + getattr(model.config, "reward_bias", 0.0)


def scalar_head(model: Any, hidden: Tensor) -> Tensor:
    """One number [N] of hidden states [N, H], of an ensemble's heads [N, M], in the head's own precision also under autocast:
    bfloat16 has 8 bits.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        dtype = next(adapters.trained(model.score).parameters()).dtype
        return model.score(hidden.to(dtype)).squeeze(-1).float()


def scalar_scores(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The reward [B] of right-padded rows [B, L], read at the last real token (by the mask, never by comparing ids)."""
    last = attention_mask.long().sum(dim=1) - 1
    place = torch.arange(len(input_ids), device=input_ids.device) * input_ids.shape[1] + last
    return values_at(model, input_ids, attention_mask, place)


def add_reward_bias(model: Any, bias: float) -> str:
    """Adds a constant to every reward, in a place that plain transformers keeps; returns the place, for the card.

    The heads have no bias and a saved `score.bias` would be dropped, so the constant goes into the last norm's bias:
    w·(h + b·w/|w|²) = w·h + b. Models whose last norm has none (RMSNorm) get `reward_bias` in the config, which only we apply.
    """
    model = adapters.plain(model)
    with weights_of(model, modify=True):
        return _add_reward_bias(model, bias)


def _add_reward_bias(model: Any, bias: float) -> str:
    weight = model.score.weight.detach().float().reshape(-1)
    norm, projection = _last_norm(model)
    norm = adapters.trained(norm)
    if norm is None or getattr(norm, "bias", None) is None or not weight.any():
        model.config.reward_bias = getattr(model.config, "reward_bias", 0.0) + float(bias)
        return "config.reward_bias"
    shift = bias * weight / weight.dot(weight)
    if projection is not None:
        # OPT-350m: the head reads P·norm(x), so the shift s in norm space must give P·s = b·w/|w|²; the part along Pᵀw will do.
        direction = adapters.effective_weight(projection).T @ weight
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
