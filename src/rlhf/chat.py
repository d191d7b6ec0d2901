"""`rlhf chat MODEL`: a conversation with a policy, in the terminal or through a pipe; answers appear word by word.

What is asked becomes tokens by the functions that training uses (`encode_prompts`: the chat template, or a plain prompt), and
answers are sampled as PPO samples them: from the whole distribution, at temperature 1 unless told otherwise, without the ids that
no response may hold.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from transformers import GenerationConfig, TextStreamer

from rlhf import RLHFError
from rlhf.data.encode import Messages, decode_completions, encode_prompts
from rlhf.models import banned_ids, context_length, load_policy, load_tokenizer
from rlhf.registry import Registry
from rlhf.training import resolve

HELP = "/new starts over, /quit (or end of file) leaves"


class ChatError(RLHFError):
    """A model cannot be talked to as asked."""


def run(options: argparse.Namespace) -> None:
    """The command: one answer for each line that is read."""
    form = None if options.prompt_format is None else plain_form(options.prompt_format)
    if form is not None and options.system is not None:
        raise ChatError("--system is a message, and --prompt-format has none: put it into the format")
    model, tokenizer = open_policy(options)
    torch.manual_seed(options.seed % 2**63)
    chat = Chat(model, tokenizer, options.max_new_tokens, options.temperature, form, options.system)
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        print(f"{options.model}: {HELP}", file=sys.stderr)
    for line in asked(at_terminal):
        if line == "/quit":
            return
        if line == "/new":
            chat.start_over()
            continue
        try:
            chat.ask(line)
        except RLHFError as error:
            if not at_terminal:
                raise
            print(f"error: {error}", file=sys.stderr)


def asked(at_terminal: bool) -> Iterator[str]:
    """Lines with something in them, without the white space around."""
    if not at_terminal:
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(encoding="utf-8", errors="replace")
        yield from filter(None, map(str.strip, sys.stdin))
        return
    import readline  # noqa: F401  (arrow keys and history, as soon as it is loaded)

    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        if line:
            yield line


def plain_form(form: str) -> str:
    """A format as typed in a shell: \\n is a new line, and {} is where the question goes."""
    if form.count("{}") != 1:
        raise ChatError(f"--prompt-format is {form!r}, and needs one {{}} where the question goes")
    return form.replace("\\n", "\n")


def open_policy(options: argparse.Namespace) -> tuple[Any, Any]:
    """(model, tokenizer) of RUN/STAGE[/vN], a folder or a Hub id, on the GPU where there is one."""
    path, artifact = resolve(Registry(options.root), options.model, "", "sft")
    if artifact is not None and artifact.stage == "rm":
        raise ChatError(f"{artifact.ref} is a reward model, which writes nothing; give a base, sft or ppo version")
    config = {} if artifact is None else artifact.manifest["config"]
    trust = options.trust_remote_code or bool(config.get("trust_remote_code"))
    tokenizer = load_tokenizer(path, revision=options.revision, trust_remote_code=trust)
    dtype = options.dtype or config.get("dtype") or "float32"
    model = load_policy(
        path, tokenizer, dtype=dtype, revision=options.revision, trust_remote_code=trust, trainable=False
    )
    if not getattr(model, "is_quantized", False):  # which is on its device, and must not be asked to move
        model.to("cuda" if torch.cuda.is_available() else "cpu")
    return model.eval(), tokenizer


@dataclass
class Chat:
    """A conversation so far. `form`: each line is a plain prompt of its own instead, put into this text at {}."""

    model: Any
    tokenizer: Any
    max_new_tokens: int
    temperature: float
    form: str | None = None
    system: str | None = None
    messages: Messages = field(default_factory=list)

    def __post_init__(self) -> None:
        self.start_over()
        sampling = {"temperature": self.temperature, "top_k": 0, "top_p": 1.0} if self.temperature else {}
        # In place of the checkpoint's own, which may cut the distribution or penalise repetition.
        self.model.generation_config = GenerationConfig(
            do_sample=self.temperature > 0,
            **sampling,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            suppress_tokens=banned_ids(self.model, self.tokenizer).tolist(),
        )

    def start_over(self) -> None:
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def ask(self, line: str) -> str:
        """Prints the answer as it is sampled; it and the question then belong to the conversation."""
        if self.form is not None:
            return self._answer(*self._fitting([self.form.replace("{}", line)]))
        question = {"role": "user", "content": line}
        turns = self.messages[self.system is not None :]
        head = self.messages[: self.system is not None]
        # A conversation that has filled the context goes on without its oldest questions and answers.
        shorter = [[*head, *turns[start:], question] for start in range(0, len(turns) + 1, 2)]
        ids, room = self._fitting(shorter)
        answer = self._answer(ids, room)
        self.messages += [question, {"role": "assistant", "content": answer}]
        return answer

    def _fitting(self, prompts: Sequence[str | Messages]) -> tuple[list[int], int]:
        """Tokens of the first prompt that leaves room for an answer (or of the last), and that room."""
        limit = context_length(self.model)
        ids: list[int] = []
        for prompt in prompts:
            (ids,) = encode_prompts(self.tokenizer, [prompt])
            if limit is None or len(ids) + min(self.max_new_tokens, limit // 2) <= limit:
                break
        room = self.max_new_tokens if limit is None else min(self.max_new_tokens, limit - len(ids))
        if room < 1:
            raise ChatError(f"the question has {len(ids)} tokens and the model reads {limit}; ask a shorter one")
        return ids, room

    def _answer(self, ids: list[int], room: int) -> str:
        prompt, decoding = torch.tensor([ids], device=self.model.device), cast(Any, _Decoding(self.tokenizer))
        with torch.no_grad():
            row = self.model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=room,
                streamer=TextStreamer(decoding, skip_prompt=True),
            )[0]
        return decode_completions(self.tokenizer, [row[len(ids) :].tolist()])[0]


@dataclass(frozen=True)
class _Decoding:
    """What a streamer asks of a tokenizer: texts as they are decoded everywhere."""

    tokenizer: Any

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        return decode_completions(self.tokenizer, [ids])[0]
