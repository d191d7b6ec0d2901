"""How large a model is: what a config says, and the exact number of its parameters.

GPT-2's and OPT's numbers follow from formulas; of any other architecture transformers builds the model on the meta device,
which costs no memory, and the parameters are counted.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
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

    embed: width of the token embeddings, which OPT-350m projects to `hidden`. counted: all parameters, and those of the layers'
    matrices, of an architecture without a formula here. approximate: its layers may keep other activations than the family's.
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
    tied: bool = True
    attention_dropout: float = 0.0
    embedding_dropout: float = 0.0
    counted: tuple[int, int] | None = None
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
        return self.parameters + self.embed - (0 if self.tied else self.vocab * self.embed)

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
    if name.lower() in BUILT_IN and not Path(model).exists():
        return BUILT_IN[name.lower()]
    config = Path(model) / "config.json"
    if config.is_file():
        try:
            return from_config(model, json.loads(config.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError) as error:
            raise PlanError(f"{config} does not describe a model: {error}") from None
    return from_config(model, _hub_config(model))


def _hub_config(model: str) -> dict[str, Any]:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model).to_dict()
    except Exception as error:  # OSError without network, ValueError for a type unknown, and whatever the Hub answers
        reason = " ".join(str(error).split())[:160]
        raise PlanError(
            f"no built-in shape or folder {model!r}, and its config cannot be loaded ({reason}); built in: "
            + ", ".join(BUILT_IN)
        ) from None


def from_config(name: str, config: dict[str, Any]) -> Shape:
    """The shape that a config (the contents of config.json) describes."""
    kind = config.get("model_type")
    if kind == "gpt2":
        return _from_gpt2(name, config)
    if kind == "opt":
        return _from_opt(name, config)
    return _counted(name, config)


def _from_gpt2(name: str, config: dict[str, Any]) -> Shape:
    get = {
        "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12,
        "attn_pdrop": 0.1, "embd_pdrop": 0.1,
    } | config  # fmt: skip
    return Shape(
        name=name,
        family="gpt2",
        vocab=get["vocab_size"],
        positions=get["n_positions"],
        hidden=get["n_embd"],
        layers=get["n_layer"],
        heads=get["n_head"],
        ffn=get.get("n_inner") or 4 * get["n_embd"],
        embed=get["n_embd"],
        kv_heads=get["n_head"],
        head_dim=get["n_embd"] // get["n_head"],
        attention_dropout=get["attn_pdrop"],
        embedding_dropout=get["embd_pdrop"],
    )


def _from_opt(name: str, config: dict[str, Any]) -> Shape:
    get = {
        "vocab_size": 50272, "max_position_embeddings": 2048, "hidden_size": 768, "num_hidden_layers": 12,
        "num_attention_heads": 12, "ffn_dim": 3072, "do_layer_norm_before": True, "_remove_final_layer_norm": False,
        "attention_dropout": 0.0,
    } | config  # fmt: skip
    return Shape(
        name=name,
        family="opt",
        vocab=get["vocab_size"],
        positions=get["max_position_embeddings"],
        hidden=get["hidden_size"],
        layers=get["num_hidden_layers"],
        heads=get["num_attention_heads"],
        ffn=get["ffn_dim"],
        embed=get.get("word_embed_proj_dim") or get["hidden_size"],
        kv_heads=get["num_attention_heads"],
        head_dim=get["hidden_size"] // get["num_attention_heads"],
        pre_norm=get["do_layer_norm_before"] and not get["_remove_final_layer_norm"],
        attention_dropout=get["attention_dropout"],
    )


def _counted(name: str, config: dict[str, Any]) -> Shape:
    """Any other architecture: transformers builds it without memory, and its parameters are counted."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        loaded = AutoConfig.for_model(**config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(loaded)
    except Exception as error:
        raise PlanError(f"{name}: no causal LM can be built from its config: {' '.join(str(error).split())}") from None
    text = loaded.get_text_config()
    tables = {id(e.weight) for e in (model.get_input_embeddings(), model.get_output_embeddings()) if e is not None}
    matrices = sum(p.numel() for p in model.parameters() if p.dim() > 1 and id(p) not in tables)
    hidden, heads = text.hidden_size, text.num_attention_heads
    ffn = getattr(text, "intermediate_size", None) or getattr(text, "ffn_dim", None) or 4 * hidden
    gated = any(name.endswith("gate_proj.weight") for name, _ in model.named_parameters())
    return Shape(
        name=name,
        family="llama" if gated else "gpt2",  # without a gate, what GPT-2 keeps is the upper end of what is common
        vocab=text.vocab_size,
        positions=getattr(text, "max_position_embeddings", None) or 2048,
        hidden=hidden,
        layers=text.num_hidden_layers,
        heads=heads,
        ffn=ffn,
        embed=hidden,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or hidden // heads,
        tied=len(tables) == 1,
        counted=(sum(p.numel() for p in model.parameters()), matrices),
        approximate=loaded.model_type not in ("llama", "mistral", "qwen2", "qwen3"),
    )
