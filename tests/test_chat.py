"""`rlhf chat`: the tokens that training has, answers of plain decoding, mistakes in one line; by a pipe and at a terminal."""

import io
import json
import os
import shutil
import subprocess
import sys

import pytest
import tiny
import torch

from rlhf import chat, cli
from rlhf.data.encode import encode_prompts
from rlhf.models import banned_ids, load_policy, load_tokenizer

GREEDY = ["--temperature", "0", "--max-new-tokens", "6"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    tiny.published(folder, "sft")
    return folder / "runs"


@pytest.fixture
def say(root, monkeypatch, capsys):
    """Lines through the command, in this process: (status, answers, stderr)."""

    def say(text, *options, model="tiny/sft"):
        lines = text if isinstance(text, bytes) else text.encode()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines)))
        status = cli.main(["chat", model, "--root", str(root), *options])
        said = capsys.readouterr()
        return status, said.out, said.err

    return say


def greedy(artifact, prompt, count=6):
    """The most probable continuation, a forward of the whole row a token."""
    tokenizer = load_tokenizer(artifact.path)
    model = load_policy(artifact.path, tokenizer).eval()
    banned = banned_ids(model, tokenizer)
    (ids,) = encode_prompts(tokenizer, [prompt])
    start = len(ids)
    while len(ids) < start + count and ids[-1] != tokenizer.eos_token_id:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].index_fill(0, banned, float("-inf"))
        ids = [*ids, int(logits.argmax())]
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


def artifact(root):
    return chat.Registry(root).require("sft", "tiny")


def user(text):
    return {"role": "user", "content": text}


def test_a_conversation_has_the_prompts_that_training_has(root, say):
    """Each answer is that of plain decoding after the conversation so far; /new forgets it, a system message stays."""
    few = ["--temperature", "0", "--max-new-tokens", "3"]
    first = greedy(artifact(root), [user("a")], 3)
    second = greedy(artifact(root), [user("a"), {"role": "assistant", "content": first}, user("the")], 3)
    alone = greedy(artifact(root), [user("the")], 3)
    assert len({first, second, alone}) > 1
    assert say("a\n\n  the \n/new\nthe\n/quit\nnever asked\n", *few)[:2] == (0, f"{first}\n{second}\n{alone}\n")
    system = {"role": "system", "content": "Old."}
    told = greedy(artifact(root), [system, user("the")], 3)
    assert say("a\n/new\nthe\n", *few, "--system", "Old.")[1].endswith(f"\n{told}\n")


def test_plain_prompts_are_asked_one_by_one(root, say):
    wanted = [greedy(artifact(root), f"User: {text}\nAssistant:") for text in ("feed", "mill {}")]
    status, out, _ = say("feed\nmill {}\n", *GREEDY, "--prompt-format", r"User: {}\nAssistant:")
    assert status == 0 and out == "".join(f"{answer}\n" for answer in wanted)


def test_sampling_follows_the_seed_and_the_folder_is_the_version(root, say):
    options = ["--max-new-tokens", "12"]
    one = say("feed\n", *options)[1]
    assert say("feed\n", *options)[1] == one != say("feed\n", *options, "--seed", "1")[1]
    assert say("feed\n", *options, model=str(artifact(root).path))[1] == one


def test_a_checkpoint_s_own_decoding_is_not_taken(root, tmp_path, say):
    """A generation_config.json that forbids what is most probable changes nothing."""
    folder = shutil.copytree(artifact(root).path, tmp_path / "model", ignore=shutil.ignore_patterns("stage.json"))
    answer = say("feed\n", *GREEDY)[1]
    own = json.loads((folder / "generation_config.json").read_text())
    own |= {"do_sample": True, "repetition_penalty": 9.0, "top_k": 1, "min_new_tokens": 7}
    (folder / "generation_config.json").write_text(json.dumps(own))
    assert say("feed\n", *GREEDY, model=str(folder))[1] == answer


def test_a_full_context_drops_the_oldest_turns(root, say):
    """The context of 64 tokens holds a few turns; a tenth question is still answered, and as well as without the first."""
    status, out, _ = say("feed the old grey geese\n" * 10, *GREEDY)
    assert status == 0 and out.count("\n") >= 10
    status, out, err = say("feed\n" + "mill " * 200 + "\n", *GREEDY)
    assert status == 2 and "tokens and the model reads 64; ask a shorter one" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "model", "told"),
    [
        ([], "tiny/ppo", "no ppo in run 'tiny'"),
        ([], "nowhere/at all", "cannot load nowhere/at all"),
        (["--prompt-format", "no place"], "tiny/sft", "needs one {} where the question goes"),
        (["--prompt-format", "{}", "--system", "S"], "tiny/sft", "--system is a message"),
    ],
)
def test_mistakes_are_one_line(say, options, model, told):
    status, out, err = say("feed\n", *options, model=model)
    assert (status, out) == (2, "") and err.startswith("error: ") and told in err and err.count("\n") == 1


@pytest.mark.parametrize("word", ["-1", "nan", "inf", "1e300", "1e-300", "x"])
def test_temperatures_that_no_logits_may_be_divided_by(word, capsys):
    with pytest.raises(SystemExit):
        cli.main(["chat", "tiny/sft", f"--temperature={word}"])
    assert f"{word} is neither 0 nor a number from 1e-6 to 1e6" in capsys.readouterr().err or word == "x"


@pytest.mark.parametrize("word", ["1e-6", "1e6"])
def test_temperatures_at_the_limits(say, word):
    assert say("feed\n", "--max-new-tokens", "4", "--temperature", word)[0] == 0


def test_a_folder_that_may_not_be_read(say, monkeypatch):
    def refused(path, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(chat.Registry, "get", None)  # not asked for what is no reference
    monkeypatch.setattr("pathlib.Path.stat", refused)
    assert say("feed\n", model="/root/x")[2].startswith(
        "error: cannot read /root/x: Permission denied; give another path"
    )


def test_bytes_that_are_no_text_and_no_line_at_all(say):
    assert say(b"caf\xe9\n", *GREEDY)[0] == 0
    assert say("", *GREEDY)[:2] == (0, "")


def test_a_reward_model_does_not_talk(root, say, tmp_path):
    registry = chat.Registry(tmp_path / "runs")
    with registry.draft("tiny", "rm") as draft:
        shutil.copytree(
            artifact(root).path, draft.path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("stage.json")
        )
        draft.publish(parents=[])
    status, _, err = say("feed\n", "--root", str(registry.root), model="tiny/rm")
    assert status == 2 and "tiny/rm/v1 is a reward model" in err


def test_through_a_pipe_and_at_a_terminal(root):
    """As a user would: the same answers; at a terminal a question that is too long ends nothing."""
    command = [sys.executable, "-m", "rlhf.cli", "chat", "tiny/sft", "--root", str(root), *GREEDY]
    environment = {**tiny.environment(), "TERM": "dumb"}
    piped = subprocess.run(command, input=b"feed\n", capture_output=True, env=environment, timeout=300, check=True)
    assert piped.stderr == b"" and piped.stdout.decode() == greedy(artifact(root), [user("feed")]) + "\n"
    if not hasattr(os, "openpty"):
        return
    reader, writer = os.openpty()
    process = subprocess.Popen(command, stdin=writer, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    try:
        os.write(reader, b"/new\n" + b"mill " * 200 + b"\nfeed\n/quit\n")
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    os.close(writer), os.close(reader)
    assert process.returncode == 0 and b"ask a shorter one" in err and b"Traceback" not in err
    assert piped.stdout.decode().strip() in out.decode().replace("\r\n", "\n")
