"""How large a model is: what a config says, and the exact number of its parameters.

GPT-2's and OPT's numbers follow from formulas; of any other architecture, or a variant of theirs, transformers builds the model
on the meta device, which costs no memory, and the parameters are counted.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlhf import RLHFError

OPT_POSITION_OFFSET = 2  # OPT's table of positions has two rows more than positions
TOO_LARGE = 10**12  # for any number of a plan


class PlanError(RLHFError):
    """A plan that cannot be made as asked."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a causal LM. `family` is whose activations it keeps: gpt2, opt, or llama (gated MLP, RMSNorm, rotary).

    embed: width of the token embeddings, which OPT-350m projects to `hidden`. counted: all parameters, those of the layers'
    matrices, and all with a scalar head, where there is no formula here. approximate: its layers may keep other activations than
    the family's.
    """

    name: str
    family: str
    vocab: int
    positions: int
    hidden: int
    layers: int
    heads: int
    ffn: int
    embed: int
    kv_heads: int
    head_dim: int
    pre_norm: bool = True
    attention_dropout: float = 0.0
    embedding_dropout: float = 0.0
    counted: tuple[int, int, int] | None = None
    approximate: bool = False

    @property
    def projected(self) -> bool:
        return self.embed != self.hidden

    @property
    def attention_width(self) -> int:
        """Width of queries, and of keys and values once repeated for all heads."""
        return self.heads * self.head_dim

    @property
    def parameters(self) -> int:
        """Parameters of the causal LM, tied ones once. Exact: it is tested against transformers' own models."""
        if self.counted is not None:
            return self.counted[0]
        h, positions = self.hidden, self.positions + (OPT_POSITION_OFFSET if self.family == "opt" else 0)
        layer = 4 * (h * h + h) + 2 * h * self.ffn + self.ffn + h + 4 * h  # attention, MLP, two norms
        outside = self.vocab * self.embed + positions * h + (2 * h if self.pre_norm else 0)
        projections = 2 * h * self.embed if self.projected else 0
        return outside + projections + self.layers * layer

    @property
    def scalar_parameters(self) -> int:
        """Parameters of the reward model or critic: a scalar head, without bias, in the place of the unembedding."""
        return self.parameters + self.embed if self.counted is None else self.counted[2]

    @property
    def matrix_parameters(self) -> int:
        """Parameters of the layers' linear maps: what autocast copies to 16 bits, and what quantisation packs."""
        if self.counted is not None:
            return self.counted[1]
        return self.layers * (4 * self.hidden**2 + 2 * self.hidden * self.ffn)

    @property
    def kv_values(self) -> int:
        """Numbers that the KV cache holds for one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    def forward_flops(self, length: float) -> float:
        """Floating-point operations of a forward, for one token of a sequence of `length`.

        2 N for the matrices and 2 · layers · width · length for causal attention: a third of the 6 N + 12 L H Q T of training in
        Chowdhery et al. 2022 (PaLM), appendix B, and half of its attention, because the upper triangle is not computed.
        """
        return 2 * self.parameters + 2 * self.layers * self.attention_width * length


def _gpt2(name: str, hidden: int, layers: int, heads: int) -> Shape:
    return Shape(
        name=name, family="gpt2", vocab=50257, positions=1024, hidden=hidden, layers=layers, heads=heads, ffn=4 * hidden,
        embed=hidden, kv_heads=heads, head_dim=hidden // heads, attention_dropout=0.1, embedding_dropout=0.1,
    )  # fmt: skip


def _opt(name: str, hidden: int, layers: int, heads: int, **more: Any) -> Shape:
    values = {"embed": hidden, **more}
    return Shape(
        name=name, family="opt", vocab=50272, positions=2048, hidden=hidden, layers=layers, heads=heads, ffn=4 * hidden,
        kv_heads=heads, head_dim=hidden // heads, **values,
    )  # fmt: skip


# Sizes: Radford et al. 2019 and the checkpoints' configs; Zhang et al. 2022, table 1. OPT-175B has GPT-3's.
BUILT_IN = {
    shape.name: shape
    for shape in (
        _gpt2("distilgpt2", 768, 6, 12),
        _gpt2("gpt2", 768, 12, 12),
        _gpt2("gpt2-medium", 1024, 24, 16),
        _gpt2("gpt2-large", 1280, 36, 20),
        _gpt2("gpt2-xl", 1600, 48, 25),
        _opt("opt-125m", 768, 12, 12),
        _opt("opt-350m", 1024, 24, 16, embed=512, pre_norm=False),
        _opt("opt-1.3b", 2048, 24, 32),
        _opt("opt-2.7b", 2560, 32, 32),
        _opt("opt-6.7b", 4096, 32, 32),
        _opt("opt-13b", 5120, 40, 40),
        _opt("opt-30b", 7168, 48, 56),
        _opt("opt-66b", 9216, 64, 72),
        _opt("opt-175b", 12288, 96, 96),
    )
}
OWNERS = ("facebook/", "openai-community/", "distilbert/")


def find(model: str) -> Shape:
    """The shape of a built-in name (with or without its owner), of a folder with a config.json, or of a Hub id."""
    name = model
    for owner in OWNERS:
        name = name.removeprefix(owner)
    config = Path(model) / "config.json"
    try:
        if name.lower() in BUILT_IN and not Path(model).exists():
            return BUILT_IN[name.lower()]
        found = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else _hub_config(model)
    except OSError as error:  # a name too long, or a folder that may not be read
        raise PlanError(f"cannot read {str(config)[:160]}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{str(config)[:160]} does not describe a model: {_reason(error)}") from None
    return from_config(model, found)


def _reason(error: Exception) -> str:
    """The start of what a library says, which can be pages."""
    return " ".join(str(error).split())[:160]


def _hub_config(model: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model).to_dict()
    except Exception as error:  # OSError without network, ValueError for a type unknown, and whatever the Hub answers
        raise PlanError(
            f"no built-in shape or folder {model!r}, and its config cannot be loaded ({_reason(error)}); built in: "
            + ", ".join(BUILT_IN)
        ) from None


def from_config(name: str, config: Any) -> Shape:
    """The shape that a config (the contents of config.json) describes."""
    kind = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(kind, str):
        raise PlanError(f"the config of {name} does not describe a model: it has no model_type")
    if kind not in FORMULAS:
        return _counted(name, config)
    shape = _from_gpt2(name, config) if kind == "gpt2" else _from_opt(name, config)
    if all(config.get(key, value) == value for key, value in FORMULAS[kind].items()):
        return shape
    return replace(shape, counted=_counted(name, config).counted)


# What the formulas of parameters rest on; a model with another value is counted.
FORMULAS: dict[str, dict[str, bool]] = {
    "gpt2": {"tie_word_embeddings": True, "add_cross_attention": False},
    "opt": {"tie_word_embeddings": True, "enable_bias": True, "layer_norm_elementwise_affine": True},
}


def _size(name: str, key: str, value: Any) -> int:
    """A size in a config. Raises PlanError where it is none."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < TOO_LARGE:
        raise PlanError(f"{key} in the config of {name} must be a whole number above 0 and is {str(value)[:20]}")
    return value


def _head_dim(name: str, hidden: int, heads: int) -> int:
    if hidden % heads:
        raise PlanError(
            f"the config of {name} does not describe a model: {hidden} numbers are not {heads} heads of one size"
        )
    return hidden // heads


def _from_gpt2(name: str, config: dict[str, Any]) -> Shape:
    default = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}
    size = {key: _size(name, key, config.get(key, value)) for key, value in default.items()}
    hidden, heads = size["n_embd"], size["n_head"]
    inner = config.get("n_inner")
    return Shape(
        name=name,
        family="gpt2",
        vocab=size["vocab_size"],
        positions=size["n_positions"],
        hidden=hidden,
        layers=size["n_layer"],
        heads=heads,
        ffn=4 * hidden if inner is None else _size(name, "n_inner", inner),
        embed=hidden,
        kv_heads=heads,
        head_dim=_head_dim(name, hidden, heads),
        attention_dropout=config.get("attn_pdrop", 0.1),
        embedding_dropout=config.get("embd_pdrop", 0.1),
    )


def _from_opt(name: str, config: dict[str, Any]) -> Shape:
    default = {
        "vocab_size": 50272, "max_position_embeddings": 2048, "hidden_size": 768, "num_hidden_layers": 12,
        "num_attention_heads": 12, "ffn_dim": 3072,
    }  # fmt: skip
    size = {key: _size(name, key, config.get(key, value)) for key, value in default.items()}
    hidden, heads = size["hidden_size"], size["num_attention_heads"]
    embed = config.get("word_embed_proj_dim")
    return Shape(
        name=name,
        family="opt",
        vocab=size["vocab_size"],
        positions=size["max_position_embeddings"],
        hidden=hidden,
        layers=size["num_hidden_layers"],
        heads=heads,
        ffn=size["ffn_dim"],
        embed=hidden if embed is None else _size(name, "word_embed_proj_dim", embed),
        kv_heads=heads,
        head_dim=_head_dim(name, hidden, heads),
        pre_norm=config.get("do_layer_norm_before", True) and not config.get("_remove_final_layer_norm", False),
        attention_dropout=config.get("attention_dropout", 0.0),
    )


SIZES = (
    "vocab_size", "max_position_embeddings", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "intermediate_size", "ffn_dim",
)  # fmt: skip


def _counted(name: str, config: dict[str, Any]) -> Shape:
    """Any other architecture: transformers builds it without memory, and its parameters are counted."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        loaded = AutoConfig.for_model(**config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(loaded)
        text = loaded.get_text_config()
        found = {key: getattr(text, key, None) for key in SIZES}  # raises where layers differ in one
    except Exception as error:
        raise PlanError(f"{name}: its config does not describe a causal LM to plan: {_reason(error)}") from None
    if not found["num_attention_heads"]:
        raise PlanError(f"{name}: {loaded.model_type} has no attention heads: not supported")

    def size(key: str, default: Any = None) -> int:
        return _size(name, key, found[key] or default)

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    # Falcon's config has names of its own; transformers' cache of its newer architecture holds all heads.
    one_head = loaded.model_type == "falcon" and text.multi_query and not text.new_decoder_architecture
    gated = any(name.endswith("gate_proj.weight") for name, _ in model.named_parameters())
    return Shape(
        name=name,
        family="llama" if gated else "gpt2",  # without a gate, what GPT-2 keeps is the upper end of what is common
        vocab=size("vocab_size"),
        positions=size("max_position_embeddings", 2048),
        hidden=hidden,
        layers=size("num_hidden_layers"),
        heads=heads,
        ffn=size("intermediate_size", found["ffn_dim"] or 4 * hidden),
        embed=hidden,
        kv_heads=1 if one_head else size("num_key_value_heads", heads),
        head_dim=size("head_dim", hidden // heads),
        counted=_count(model),
        approximate=loaded.model_type not in ("llama", "mistral", "qwen2", "qwen3"),
    )


def _count(model: Any) -> tuple[int, int, int]:
    """Parameters of a causal LM, of its layers' matrices, and of the model with a scalar head in place of the unembedding."""
    from torch import nn

    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings()
    own = [p for p in head.parameters() if id(p) not in tables]  # a weight that is not tied, and a bias
    outside = tables | {id(p) for p in own}
    total = sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for p in model.parameters() if p.dim() > 1 and id(p) not in outside)
    return total, matrices, total - sum(p.numel() for p in own) + head.weight.shape[-1]
