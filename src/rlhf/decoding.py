"""One token at a time: keys and values that are not copied for each token, and on a GPU each step replayed as one CUDA graph.

On a CPU they grow by some tokens at once, and lose the rows of sequences that have ended. On a GPU they have their final size: a
step of a small model is some hundred kernels of a few microseconds each, and launched one by one from Python they take several
times as long as they run. With nothing that grows a step is the same work at each token: it is recorded once and replayed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from rlhf.engine import is_whole
from rlhf.models import PLAIN_UNEMBEDDING, accepts
from rlhf.unembed import low_precision_of, lowered, product

MULTIPLE = 8  # columns of a preallocated cache: attention kernels want masks of whole lines
ROOM = 16  # columns that a growing cache gets when it is full


class Growing(DynamicLayer):
    """Keys and values [B, heads, length, d] of one layer, views of tensors with room behind them.

    A token is written into its place; `DynamicLayer` copies all that came before for each token.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.buffers = [states[:, :, :0] for states in (key_states, value_states)]
        before = self.get_seq_length()
        after = before + key_states.shape[-2]
        for i, states in enumerate((key_states, value_states)):
            if after > self.buffers[i].shape[-2]:
                room = states.new_zeros(*states.shape[:2], ROOM, states.shape[-1])
                self.buffers[i] = torch.cat([self.buffers[i][:, :, :before], states, room], dim=-2)
            else:
                self.buffers[i][:, :, before:after] = states
        return self._show(after)

    def select(self, rows: Tensor) -> None:
        """Goes on with some of the sequences, or with some of them several times."""
        length = self.get_seq_length()
        self.buffers = [buffer.index_select(0, rows) for buffer in self.buffers]
        self._show(length)

    def _show(self, length: int) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (buffer[:, :, :length] for buffer in self.buffers)
        return self.keys, self.values


def growing_cache(policy: Any) -> Cache:
    """An empty cache of the policy in which layers of plain attention have `Growing`'s tensors."""
    cache = DynamicCache(config=policy.config)
    cache.layers = [Growing() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def select_rows(cache: Any, rows: Tensor) -> None:
    """`cache.batch_select_indices(rows)`, which indexes; on a CPU `index_select` copies whole rows in a fifth of the time."""
    for layer in cache.layers:
        if isinstance(layer, Growing):
            layer.select(rows)
        else:
            layer.batch_select_indices(rows)


class Preallocated(DynamicLayer):
    """Keys and values [B, heads, width, d] of one layer: the prompt's are written at once, then one column a step.

    `column` [1] is where a step writes; it is shared by all layers. Columns that are not written yet are 0, and masked.
    """

    def __init__(self, width: int, column: Tensor):
        super().__init__()
        self.width, self.column, self.length = width, column, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.length:
            self.is_initialized, self.length = True, key_states.shape[-2]
            self.keys, self.values = (self._allocate(states) for states in (key_states, value_states))
            return key_states, value_states
        assert self.keys is not None and self.values is not None
        self.keys.index_copy_(2, self.column, key_states)
        self.values.index_copy_(2, self.column, value_states)
        return self.keys, self.values

    def _allocate(self, states: Tensor) -> Tensor:
        buffer = states.new_zeros(*states.shape[:2], self.width, states.shape[-1])
        buffer[:, :, : self.length] = states
        return buffer

    def select(self, rows: Tensor) -> None:
        """Goes on with some of the sequences."""
        assert self.keys is not None and self.values is not None
        self.keys, self.values = self.keys[rows], self.values[rows]

    def get_seq_length(self, *args: Any) -> int:
        return self.length


def can_preallocate(policy: Any) -> bool:
    """Whether the policy decodes with masks and positions given, full attention in every layer, and whole weights.

    Quantised layers may wait for the CPU, which no recording can; bitsandbytes' 4-bit layers do not.
    """
    policy = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
    quantized, four_bit = (getattr(policy, name, False) for name in ("is_quantized", "is_loaded_in_4bit"))
    return (
        accepts(policy, "position_ids")
        and policy.config.model_type in PLAIN_UNEMBEDDING - {"gpt_neo"}  # which has local layers without saying so
        and policy.config._attn_implementation in ("sdpa", "eager")
        and (four_bit or not quantized)
        and all(is_whole(parameter) for parameter in policy.parameters())
        and all(type(layer) is DynamicLayer for layer in DynamicCache(config=policy.config).layers)
    )


@contextlib.contextmanager
def cudnn_attention() -> Iterator[None]:
    """cuDNN's attention, which models are loaded without (its plans are compiled for each shape): a step's shape stays."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


class Decoder:
    """Next-token logits [B, V] of prompts [B, P] padded on the left, then of each token [B] that is put behind them.

    steps: tokens that will be decoded. On CUDA a step is a graph; elsewhere it is the same work, launched as usual.
    """

    def __init__(self, policy: Any, ids: Tensor, mask: Tensor, steps: int):
        self.policy = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
        self.graph: torch.cuda.CUDAGraph | None = None
        width = ids.shape[1] + steps
        width += -width % MULTIPLE
        self.column = torch.full((1,), ids.shape[1], device=ids.device)
        count = len(DynamicCache(config=policy.config).layers)
        self.layers = [Preallocated(width, self.column) for _ in range(count)]
        self.cache = Cache(layers=list(self.layers))
        self.visible = torch.zeros(len(ids), width, dtype=torch.bool, device=ids.device)
        self.visible[:, : ids.shape[1]] = mask
        self.position = mask.sum(dim=1, keepdim=True)
        self.token = ids[:, -1:].clone()
        self.head = self.policy.get_output_embeddings()
        self.low = low_precision_of(self.head)
        self.weight = None if self.low is None else lowered(self.head.weight, self.low)
        position = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        self.logits = self._forward(ids, mask.long(), position)

    def step(self, token: Tensor) -> Tensor:
        """The logits [B, V] after `token` [B]; they are overwritten by the next step."""
        self.token.copy_(token[:, None])
        self.visible.index_fill_(1, self.column, True)
        if self.graph is not None:
            self.graph.replay()
        elif self.token.is_cuda:
            self._record()
        else:
            self.logits = self._once()
        self.position += 1
        self.column += 1
        return self.logits

    def keep(self, rows: Tensor) -> None:
        """Goes on with some of the sequences [n], or with some of them several times; the next step is recorded anew."""
        self.graph, self.logits = None, self.logits[rows]
        self.visible, self.position, self.token = self.visible[rows], self.position[rows], self.token[rows]
        for layer in self.layers:
            layer.select(rows)

    def _once(self) -> Tensor:
        visible = self.visible[:, None, None, :]
        if self.policy.config._attn_implementation == "eager":
            hidden = torch.finfo(self.policy.dtype).min
            visible = torch.zeros(visible.shape, dtype=self.policy.dtype, device=visible.device).masked_fill(
                ~visible, hidden
            )
        return self._forward(self.token, visible, self.position)

    def _forward(self, ids: Tensor, mask: Tensor, position: Tensor) -> Tensor:
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": position, "past_key_values": self.cache}
        with cudnn_attention():
            if self.weight is None:
                return self.policy(**given, use_cache=True, logits_to_keep=1).logits[:, -1]
            backbone = getattr(self.policy, self.policy.base_model_prefix)
            states = backbone(**given, use_cache=True).last_hidden_state[:, -1]
        return product(states.to(self.low), self.weight.t())[:, : len(self.head.weight)]

    def _record(self) -> None:
        """Runs the step and records it. A step changes nothing but its own column, so that it can run again and again."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # libraries set themselves up in the first runs, which a recording must not hold
            for _ in range(2):
                self._once()
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        # "thread_local": what other threads do (trackers, data loaders) does not break the recording.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.logits = self._once()
        self.graph.replay()
