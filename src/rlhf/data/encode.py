"""Text to tokens: one way for every stage, so that SFT, reward model and PPO see the same tokens for the same record.

    encode_prompts(prompt) + encode_completions(completion) + [EOS if the completion ended]

Prompt and completion are tokenised apart, because at inference the prompt stands alone: a joint tokenisation could merge
across the seam into a token that generation never sees.

The name of a special token in a text (`<|endoftext|>`, `</s>`) is text like any other, and never that token: only this module,
the tokenizer and its chat template place special tokens. So no record can end a prompt, or forge a turn of a conversation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars, enable_progress_bars, is_progress_bar_enabled
from jinja2 import TemplateError
from torch import Tensor

from rlhf.data.records import DataError

Messages = list[dict[str, str]]

# Used where a tokenizer has no template of its own. An answer begins on its own line, since answers of conversations have no
# leading space, and each earlier one ends as its completion will, with EOS: history reads as what the model was trained to write.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\\n\\n' }}"
    "{% else %}{{ 'Assistant:\\n' + message['content'] + eos_token + '\\n\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"
)


# What BERT's tokenizers split off whether or not a space stands there: ideographs, and the marks of Chinese texts.
SPLIT_OFF = (
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002ceaf"
    "\u2010-\u2027\u3001-\u3003\u3008-\u3011\uff01-\uff0f\uff1a-\uff1f"
)
BESIDE_CHINESE = re.compile(rf"(?<=[{SPLIT_OFF}]) +| +(?=[{SPLIT_OFF}])")


def format_prompt(prompt: str | Messages, tokenizer: Any) -> str:
    """The text that a completion follows: a plain prompt as it stands, messages through the tokenizer's chat template."""
    if isinstance(prompt, str):
        return prompt
    template = chat_template(tokenizer)
    try:
        return tokenizer.apply_chat_template(prompt, chat_template=template, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:  # some know no system messages, or want turns to alternate
        roles = ", ".join(message["role"] for message in prompt[:6])
        begins = prompt[0]["content"][:40]
        raise DataError(
            f"the tokenizer's chat template refuses a conversation ({error}): {roles}, which begins {begins!a}; mend or remove it"
        ) from None


def chat_template(tokenizer: Any) -> str:
    """The tokenizer's own template, or the shipped one after the special tokens that the tokenizer puts before a text."""
    return tokenizer.chat_template or "".join(tokenizer.convert_ids_to_tokens(leading_ids(tokenizer))) + CHAT_TEMPLATE


def leading_ids(tokenizer: Any) -> list[int]:
    """Special tokens that the tokenizer itself puts before a text: none for GPT-2, `</s>` for OPT, [CLS] for BERT's."""
    whole, plain = tokenizer("a", verbose=False)["input_ids"], _as_text(tokenizer, ["a"])[0]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return list(whole[:start])
    return []


def encode_prompts(tokenizer: Any, prompts: Sequence[str | Messages]) -> list[list[int]]:
    """Token ids of each prompt, with the tokenizer's leading special tokens (a chat template writes its own).

    A prompt of no token at all becomes BOS (GPT-2: its EOS): a model needs a state before the first token of a response.
    """
    lead = leading_ids(tokenizer)
    texts = iter(_as_text(tokenizer, [prompt for prompt in prompts if isinstance(prompt, str)]))
    rows = [next(texts) if isinstance(prompt, str) else _chat_ids(tokenizer, prompt) for prompt in prompts]
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return [
        (lead if isinstance(prompt, str) or ids[: len(lead)] != lead else []) + ids or [start]
        for prompt, ids in zip(prompts, rows)
    ]


def _as_text(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts, in which the name of a special token is text."""
    if not texts:
        return []
    options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    return [list(ids) for ids in tokenizer(list(texts), **options)["input_ids"]]


def _chat_ids(tokenizer: Any, messages: Messages) -> list[int]:
    """Token ids of a conversation: the template's special tokens are tokens, those named in a message are text.

    A name in a message is held out, with a mark in its place, while the template is rendered; other messages tokenise as usual.
    """
    names = sorted((t.content for t in tokenizer.added_tokens_decoder.values() if t.special), key=len, reverse=True)
    pattern = re.compile("|".join([*map(re.escape, names), "\ue000[0-9]+\ue001"]))  # marks that are in the text, too
    held: list[str] = []

    def hold(match: re.Match[str]) -> str:
        held.append(match.group())
        return f"\ue000{len(held) - 1}\ue001"

    safe = [{**message, "content": pattern.sub(hold, message["content"])} for message in messages]
    ids: list[int] = []
    for i, piece in enumerate(re.split("\ue000([0-9]+)\ue001", format_prompt(safe, tokenizer))):
        if i % 2:
            ids += _as_text(tokenizer, [held[int(piece)]])[0]
        elif piece:
            ids += tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def encode_completions(
    tokenizer: Any, completions: Sequence[str], ended: Sequence[bool] | None = None
) -> list[list[int]]:
    """Token ids of each completion, and EOS after those that ended (default: all)."""
    rows = _as_text(tokenizer, completions)
    ended = [True] * len(rows) if ended is None else ended
    return [ids + ([tokenizer.eos_token_id] if end else []) for ids, end in zip(rows, ended)]


def decode_completions(tokenizer: Any, rows: Sequence[Sequence[int]] | Tensor) -> list[str]:
    """The texts of sampled tokens, without special tokens. Encoded again they give the same tokens, but for what WordPiece drops.

    WordPiece puts a space between any two tokens; Chinese has none, so those beside its characters and marks are taken away.
    """
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if type(decoder).__name__ != "WordPiece":
        return texts
    return [BESIDE_CHINESE.sub("", text) for text in texts]


def encode_demonstrations(
    tokenizer: Any, prompts: Sequence[str | Messages], completions: Sequence[str], *, every_turn: bool = True
) -> list[tuple[list[int], list[int]]]:
    """(input_ids, labels) for supervised training: labels are the answers' tokens with their EOS, and -100 elsewhere.

    every_turn: the assistant's earlier answers in a conversation are learned, too. Each is the tokens that the model would have
    to write there; where the template writes them otherwise into the history (it trims them, or leaves out their reasoning), the
    turns before and after become rows of their own, so that a conversation may give more than one row.
    """
    turns = [[*(_earlier(prompt) if every_turn else []), (prompt, end)] for prompt, end in zip(prompts, completions)]
    heads = iter(encode_prompts(tokenizer, [prompt for turn in turns for prompt, _ in turn]))
    answers = iter(encode_completions(tokenizer, [answer for turn in turns for _, answer in turn]))
    rows: list[tuple[list[int], list[int]]] = []
    for turn in turns:
        ids: list[int] = []
        labels: list[int] = []
        for _, head, answer in zip(turn, heads, answers):
            if head[: len(ids)] != ids:
                rows.append((ids, labels))
                ids, labels = [], []
            labels = labels + [-100] * (len(head) - len(ids)) + answer
            ids = head + answer
        rows.append((ids, labels))
    return rows


def _earlier(prompt: str | Messages) -> list[tuple[Messages, str]]:
    """The answers within a prompt, each with the conversation before it; an opening that answers nobody is none."""
    if isinstance(prompt, str):
        return []
    answered = [i for i, message in enumerate(prompt) if i and message["role"] == "assistant"]
    return [(prompt[:i], prompt[i]["content"]) for i in answered]


def pad(rows: Sequence[Sequence[int]], value: int, side: str = "right") -> tuple[Tensor, Tensor]:
    """Rows of unequal length as ids [B, L] and mask [B, L] bool, True on real tokens; `side` is where padding goes."""
    width = max((len(row) for row in rows), default=0)
    ids = torch.full((len(rows), width), value, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, where] = torch.tensor(row, dtype=torch.long)
        mask[i, where] = True
    return ids, mask


def blocks(tokenizer: Any, texts: Sequence[str], block_size: int, packing_strategy: str = "wrapped") -> Tensor:
    """Raw text as training examples [N, block_size], each document with its EOS.

    packing_strategy, named as in TRL. "wrapped": documents joined and cut, the incomplete rest dropped. "bfd_split": whole
    documents by best fit, with PAD behind them where no other fits; only those longer than a block are cut.
    Raises ValueError when the text is shorter than one block.
    """
    documents = [[*ids, tokenizer.eos_token_id] for ids in _as_text(tokenizer, texts)]
    total = sum(map(len, documents))
    if total < block_size:
        raise ValueError(f"the text has {total} tokens, fewer than one block of {block_size}")
    if packing_strategy == "bfd_split":
        ids, _ = pad(_packed(documents, block_size), tokenizer.pad_token_id)
        return torch.nn.functional.pad(ids, (0, block_size - ids.shape[1]), value=tokenizer.pad_token_id)
    stream = torch.tensor([token for ids in documents for token in ids])
    return stream[: total // block_size * block_size].view(-1, block_size)


def _packed(documents: list[list[int]], block_size: int) -> list[list[int]]:
    from trl.data_utils import pack_dataset  # takes seconds

    bars = is_progress_bar_enabled()
    disable_progress_bars()
    try:
        packed = pack_dataset(
            Dataset.from_dict({"input_ids": documents}), block_size, "bfd_split", {"batch_size": len(documents)}
        )
    finally:
        if bars:
            enable_progress_bars()
    return list(packed["input_ids"][:])


def batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices in batches of at most `size`, of like length, so that little is padding."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    for start in range(0, len(order), size):
        yield order[start : start + size]
