"""What autograd keeps of a forward pass, by architecture: bytes of the tensors saved for the backward pass.

The terms below name what each operation saves; they were read off `torch.autograd.graph.saved_tensors_hooks` over GPT-2's, OPT's
and Llama's layers in transformers with sdpa attention, and the tests repeat that measurement. A number takes `s` bytes in the
matrices (2 under bf16) and `r` in the residual stream (4 under autocast, whose layer norms answer in float32).

A frozen matrix, below adapters, needs its weight for the backward pass and not its input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf.planning.shapes import Shape

Mode = Literal["fp32", "autocast", "bf16"]  # all float32; float32 weights under bf16 autocast; bf16 weights


@dataclass(frozen=True)
class Pass:
    """One forward: `rows` sequences of `length` tokens. dropout: in training mode. masked: some rows are padded.

    adapters: the layers are frozen but for adapters on query and value (GPT-2: on its joint projection), with dropout before
    them where `adapter_dropout`.
    """

    rows: int
    length: int
    mode: Mode = "autocast"
    device: Literal["cuda", "cpu"] = "cuda"
    dropout: bool = False
    masked: bool = True
    adapters: bool = False
    adapter_dropout: bool = False

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def s(self) -> int:
        """Bytes of a number in matrix products."""
        return 4 if self.mode == "fp32" else 2

    @property
    def r(self) -> int:
        """Bytes of a number in the residual stream."""
        return 2 if self.mode == "bf16" else 4

    @property
    def n(self) -> int:
        """Bytes of a number that goes into a layer norm: CUDA's autocast takes them in float32 where weights are bf16, too."""
        return 4 if self.adapters and self.device == "cuda" else self.r


def block(shape: Shape, p: Pass) -> int:
    """Bytes that one layer saves. Flash or memory-efficient attention: no length × length matrix, but for the padding mask."""
    per_token = {"gpt2": _gpt2_block, "opt": _opt_block, "llama": _llama_block}[shape.family](shape, p)
    if p.dropout and shape.attention_dropout and p.device == "cpu":
        # No flash kernel on the CPU drops attention weights: probabilities, noise, their product and q, k, v in float32 are kept.
        attention = 4 * 3 * shape.heads * p.length + 3 * shape.attention_width * (4 - p.s)
    else:
        mask = p.length * p.s if p.masked else 0  # sdpa turns the boolean mask into numbers, in every layer
        attention = mask + 4 * shape.heads  # and the log-sum-exp of each row of attention
    return p.tokens * (per_token + attention)


def _gpt2_block(shape: Shape, p: Pass) -> int:
    h = shape.hidden
    norms = 2 * h * p.n + 16  # inputs; mean and 1/sigma in float32
    if p.adapters:  # the adapter's input; q, k, v; the attention's output; gelu's input
        return norms + _adapted(shape, p) + (4 * h + shape.ffn) * p.s + _residual_dropout(shape, p)
    matrices = 6 * h * p.s  # inputs of c_attn and c_fc; q, k, v; the attention's output
    return norms + matrices + 2 * shape.ffn * p.s + _residual_dropout(shape, p)  # … ; gelu's input and c_proj's


def _opt_block(shape: Shape, p: Pass) -> int:
    h = shape.hidden
    norms = 2 * h * p.n + 16
    if p.adapters:
        return norms + _adapted(shape, p) + (4 * h + shape.ffn) * p.s + _residual_dropout(shape, p)
    inputs = 3 if p.mode == "autocast" else 1  # q, k and v each cast the float32 norm for themselves
    matrices = (inputs + 5) * h * p.s  # … ; q, k, v; the attention's output; fc1's input
    return norms + matrices + shape.ffn * p.s + _residual_dropout(shape, p)


def _llama_block(shape: Shape, p: Pass) -> int:
    h, a = shape.hidden, shape.attention_width
    if p.adapters:  # gate, silu(gate) and up
        return 2 * (4 * h + 4) + _adapted(shape, p) + (4 * a + 3 * shape.ffn) * p.s
    norms = 2 * h * (4 + p.r) + 8  # the float32 input and the normalised one
    inputs = 5 if p.mode == "autocast" else 2
    matrices = (inputs * h + 4 * a) * p.s  # inputs of q, k, v and of gate, up; q, k, v for all heads, the output
    return norms + matrices + 4 * shape.ffn * p.s  # gate, silu(gate), up and their product


def _adapted(shape: Shape, p: Pass) -> int:
    """What adapters save: their inputs in 16 bits, of query's and value's own where dropout comes before, and its masks."""
    count = 1 if shape.family == "gpt2" else 2
    if not p.adapter_dropout:
        return shape.hidden * p.s * (1 if p.s == 4 else count)  # autocast casts for each
    return count * shape.hidden * (p.s + (1 if p.device == "cuda" else 4))


def _residual_dropout(shape: Shape, p: Pass) -> int:
    """After attention and after the MLP: a boolean mask on CUDA, the noise itself on the CPU."""
    return 2 * shape.hidden * (1 if p.device == "cuda" else p.s) if p.dropout else 0


def outside(shape: Shape, p: Pass) -> int:
    """Bytes saved before the first and after the last layer: ids, embedding dropout, projections, last norm."""
    h = shape.hidden
    per_token = 8 + (8 if shape.family == "opt" else 0)
    if shape.family == "llama":
        per_token += h * (4 + (0 if p.adapters else p.r)) + 4
    elif shape.pre_norm:
        per_token += h * p.n + 8
    if shape.projected:
        per_token += h * p.s  # project_out's input; project_in's is the embedding
        per_token += shape.embed * p.s
    if p.dropout and shape.embedding_dropout:
        per_token += h * (1 if p.device == "cuda" else p.r)
    return p.tokens * per_token


def backbone(shape: Shape, p: Pass, checkpointing: bool = False) -> int:
    """Bytes saved by all layers; with gradient checkpointing, by their inputs alone."""
    layer = p.tokens * shape.hidden * p.r if checkpointing else block(shape, p)
    return shape.layers * layer + outside(shape, p)


def backward_of_a_layer(shape: Shape, p: Pass, checkpointing: bool = False) -> int:
    """Bytes that come and go in a layer's backward: gradients of MLP and residual stream; all that it saves, if recomputed.

    Of GPT-2's MLP one gradient at once: c_proj's input is freed before gelu's backward pass. A ReLU keeps that input as its own.
    """
    wide = 1 if shape.family == "gpt2" else 2
    gradients = p.tokens * (wide * shape.ffn * p.s + 2 * shape.hidden * p.r)
    return gradients + (block(shape, p) if checkpointing else 0)


def without_gradient(shape: Shape, p: Pass) -> int:
    """Bytes of the widest moment of a forward that saves nothing, which is in an MLP. Measured by the allocator's record.

    GPT-2 and OPT hold two numbers of their MLP's width at once, GPT-2 six of the model's and OPT four.
    """
    wide, stream = {"gpt2": (2, 6), "opt": (2, 4), "llama": (3, 4)}[shape.family]
    return p.tokens * (wide * shape.ffn * p.s + shape.hidden * (2 * p.n + (stream - 2) * p.s))


def weight_copies(shape: Shape, p: Pass) -> int:
    """Autocast's 16-bit copies of the layers' matrices, which the graph keeps until the backward pass is through."""
    return 2 * shape.matrix_parameters if p.mode == "autocast" else 0


# ------------------------------------------------------------------------------------------------------------------- heads

CHUNK, TOKENS_AT_ONCE = 32768, 4096  # the tile of TRL's fused LM head: vocabulary, tokens; ours has as many tokens


def sft_head(shape: Shape, p: Pass) -> tuple[int, int]:
    """(kept, transient) bytes of SFT's LM head: on CUDA SFTTrainer's, which never has all logits, but gradients in float32;
    on a CPU cross-entropy of whole logits, of which twice as much comes in the backward pass.
    """
    if p.device == "cpu":
        return p.tokens * (shape.embed * p.s + 4 * shape.vocab), 8 * p.tokens * shape.vocab
    kept = p.tokens * (shape.embed * p.s + 24)
    tile = min(p.tokens, TOKENS_AT_ONCE) * CHUNK * p.s  # one tile, whatever the vocabulary
    return kept, tile + 4 * shape.embed * (p.tokens if p.adapters else shape.vocab + p.tokens)


def logits_head(shape: Shape, p: Pass, positions: int, chunked: bool = False) -> tuple[int, int]:
    """(kept, transient) bytes of log-probabilities at `positions`: float32 logits, and three times as much in their backward.

    Measured with the allocator's own record: 16 bytes a logit at the peak, 4 of them kept from the forward.
    chunked: by `rlhf.unembed`, which keeps hidden states alone; float32 logits and their gradient in 16 bits are there for some
    thousand positions at once, the weight's gradient in float32 and the weight in 16 bits beside them.
    """
    if chunked:
        kept = positions * (shape.embed * p.r + 12)
        tile = 6 * min(positions, TOKENS_AT_ONCE) * shape.vocab
        weight = (2 if p.adapters else 6) * shape.vocab * shape.embed
        return kept, tile + weight + positions * shape.embed * p.r
    kept = positions * (shape.embed * p.s + 4 * shape.vocab)
    return kept, 12 * positions * shape.vocab + (2 * shape.vocab * shape.embed if p.mode == "autocast" else 0)


def scoring_head(shape: Shape, p: Pass, positions: int, temperature: float = 1.0, chunked: bool = False) -> int:
    """Bytes of log-probabilities at `positions` without gradient. Measured: 8, 12 (with a temperature), 10 (bf16) a logit.

    chunked: by `rlhf.unembed`, 4 bytes a logit of some thousand positions, and the weight in 16 bits.
    """
    if chunked:
        tile = 4 * min(positions, TOKENS_AT_ONCE) * shape.vocab
        return tile + 2 * shape.vocab * shape.embed + positions * shape.embed * (p.s + p.r)
    per_logit = 10 if p.mode != "fp32" else (8 if temperature == 1.0 else 12)
    return positions * (per_logit * shape.vocab + shape.embed * (p.s + 4))
