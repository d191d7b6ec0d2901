"""Push and pull against a Hub on loopback: huggingface_hub's own client over HTTP, the command as a process."""

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import warnings

import huggingface_hub.constants
import pytest
from hub_server import HubServer, Repo

from rlhf import cli, hub_api
from rlhf.bases import fingerprint_of_model
from rlhf.hub import HubError, command, plan, pull, push
from rlhf.registry import HashMismatch, Registry, RegistryError, TokenizerMismatch, TornArtifact

REPO = "alice/demo"
BIG = 50_000  # bytes: over the server's limit for a regular file


@pytest.fixture
def waits(monkeypatch):
    """Seconds that were slept instead of sleeping."""
    slept = []
    monkeypatch.setattr(hub_api.time, "sleep", slept.append)
    return slept


@pytest.fixture
def hub(monkeypatch, waits):
    with HubServer() as server:
        # what the variables HF_ENDPOINT, HF_HUB_DISABLE_XET and HF_HUB_OFFLINE set at import
        constants = huggingface_hub.constants
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", server.token)
        yield server


@pytest.fixture
def registry(tmp_path):
    return Registry(tmp_path / "runs")


def publish(registry, ref="demo/sft", weights=b"w", names=("model.safetensors",), tokenizer=None, **provenance):
    with registry.draft(*ref.split("/")) as draft:
        for name in names:
            (draft.path / name).write_bytes((weights * (BIG // len(weights) + 1))[:BIG])
        (draft.path / "config.json").write_text("{}")
        (draft.path / "README.md").write_text("---\nlibrary_name: transformers\n---\n# card\n")
        (draft.path / "ema").mkdir()
        (draft.path / "ema" / "model.safetensors").write_bytes(b"average of " + weights)
        if tokenizer is not None:
            (draft.path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": tokenizer}, "added_tokens": []}))
        return draft.publish(**provenance)


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def on_hub(hub, revision="main"):
    files = dict(hub.repos[REPO].tree(revision))
    files.pop(".gitattributes", None)
    return files


# --- as processes


def environment(hub, home, token):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    ours = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    return {**clean, **ours, **({"HF_TOKEN": token} if token else {})}


def rlhf(hub, tmp_path, *arguments, token=None):
    return subprocess.run(
        [sys.executable, "-m", "rlhf.cli", *map(str, arguments)],
        env=environment(hub, tmp_path / "home", token),
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_commands_push_and_pull_the_same_bytes_and_tell_no_token(hub, registry, tmp_path):
    artifact = publish(registry, base_model="gpt2", metrics={"eval_loss": 1.25})
    root, other = ("--root", registry.root), Registry(tmp_path / "other")
    planned = rlhf(hub, tmp_path, "push", "demo/sft", REPO, "--dry-run", *root)
    assert (planned.returncode, hub.requests) == (0, [])
    assert f"{BIG:,} B" in planned.stdout and "ema/model.safetensors" in planned.stdout
    assert planned.stdout.endswith("would go to alice/demo, tag rlhf-v1 (private)\n")

    hub.fail("POST /api/repos/create", status=429, Retry_After=0)
    first = rlhf(hub, tmp_path, "push", "demo/sft", REPO, *root, token=hub.token)
    again = rlhf(hub, tmp_path, "push", "demo/sft/v1", REPO, *root, token=hub.token)
    assert (first.returncode, first.stdout) == (0, f"pushed demo/sft/v1  {hub.url}/{REPO}  (private)\n"), first.stderr
    assert first.stderr == "the Hub answers 429 (as asked); trying again in 1 s\n"
    assert again.stdout == f"already there: demo/sft/v1  {hub.url}/{REPO}  (private)\n"
    assert hub.repos[REPO].private and len(hub.repos[REPO].commits) == 2
    assert on_hub(hub, "rlhf-v1") == contents(artifact.path)

    pulled = rlhf(hub, tmp_path, "pull", REPO, "--revision", "rlhf-v1", "--root", other.root, token=hub.token)
    assert (pulled.returncode, pulled.stderr) == (0, "")
    assert pulled.stdout == f"demo/sft/v1  {other.root}/demo/sft/v1\n"
    assert contents(other.get("demo/sft/v1").path) == contents(artifact.path)
    assert sorted(os.listdir(other.root)) == ["demo"]
    other.verify("demo/sft/v1")

    refused = rlhf(hub, tmp_path, "push", "demo/sft", "alice/second", *root, token=hub.reader_token)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1) and "(role: read)" in refused.stderr
    told = "".join(p.stdout + p.stderr for p in (planned, first, again, pulled, refused))
    files = [*contents(tmp_path).values(), *on_hub(hub).values()]
    for token in (hub.token, hub.reader_token):
        assert token not in told and not any(token.encode() in content for content in files)
    assert {has_token for method, path, has_token in hub.requests if path.startswith("/storage/")} == {False}


IN_PLAIN_TRANSFORMERS = """
import sys, torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast
from rlhf.hub import push
from rlhf.models import add_reward_bias
from rlhf.registry import Registry

torch.manual_seed(0)
bpe = ByteLevelBPETokenizer()
bpe.train_from_iterator(["the river runs past the old mill"] * 9, vocab_size=300, special_tokens=["</s>", "<pad>"])
tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="</s>", pad_token="<pad>")
config = GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, vocab_size=300, num_labels=1)
config.eos_token_id, config.bos_token_id, config.pad_token_id = 0, 0, 1
policy, reward = GPT2LMHeadModel(config).eval(), GPT2ForSequenceClassification(config).eval()
ids = tokenizer("the old mill", return_tensors="pt")
unshifted = reward(**ids).logits[0, 0].item()
add_reward_bias(reward, 3.0)
made = []
for stage, model in (("sft", policy), ("rm", reward)):
    with Registry(sys.argv[1]).draft("tiny", stage) as draft:
        model.save_pretrained(draft.path)
        tokenizer.save_pretrained(draft.path)
        made.append(draft.publish(parents=made))
    push(made[-1], f"alice/{stage}")

loaded = AutoTokenizer.from_pretrained("alice/rm")("the old mill", return_tensors="pt")
assert loaded["input_ids"].tolist() == ids["input_ids"].tolist()
assert torch.equal(AutoModelForCausalLM.from_pretrained("alice/sft")(**loaded).logits, policy(**ids).logits)
score = AutoModelForSequenceClassification.from_pretrained("alice/rm", revision="rlhf-v1")(**loaded).logits[0, 0].item()
assert score == reward(**ids).logits[0, 0].item() and abs(score - unshifted - 3) < 1e-5, (score, unshifted)
text = pipeline("text-generation", model="alice/sft")("the river", max_new_tokens=8, do_sample=False)
ids = tokenizer("the river", return_tensors="pt")
assert text[0]["generated_text"] == tokenizer.decode(policy.generate(**ids, max_new_tokens=8, do_sample=False)[0])
"""


def test_what_is_pushed_loads_in_plain_transformers_with_the_same_numbers(hub, tmp_path):
    process = subprocess.run(
        [sys.executable, "-c", IN_PLAIN_TRANSFORMERS, tmp_path / "runs"],
        env=environment(hub, tmp_path / "home", hub.token),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    assert hub.count("GET /storage/") == 2  # the weights came from the Hub


# --- pushing


def test_a_large_file_goes_up_in_one_part_or_in_several(hub, registry):
    for version, chunk_size in enumerate((None, 16_000), start=1):
        hub.chunk_size = chunk_size
        artifact = publish(registry, weights=os.urandom(BIG))
        assert push(artifact, REPO).tag == f"rlhf-v{version}"
        assert on_hub(hub) == contents(artifact.path)
    assert (
        hub.count(r"PUT /storage/\w+$") == 2 and hub.count(r"PUT /storage/\w+/\d") == 8
    )  # the weights and their average
    assert hub.count("POST /alice/demo/verify") == 4


def test_dry_run_names_what_a_push_uploads(registry):
    artifact = publish(registry)
    (artifact.path / "notes.txt").write_text("no part of the version")
    files = plan(artifact, REPO)
    assert set(files) == {"README.md", "config.json", "ema/model.safetensors", "model.safetensors", "stage.json"}
    assert files["model.safetensors"] == BIG and files["stage.json"] == (artifact.path / "stage.json").stat().st_size


@pytest.mark.parametrize("folder", [False, True])
def test_a_push_without_its_card_is_refused_before_the_hub_is_asked(hub, registry, capsys, folder):
    artifact = publish(registry)
    (artifact.path / "README.md").unlink()
    if folder:
        (artifact.path / "README.md").mkdir()
    for options in ((), ("--dry-run",)):
        assert cli.main(["push", "demo/sft", REPO, "--root", str(registry.root), *options]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err == (
            f"error: {artifact.path}/README.md is no file, though stage.json lists it: restore it, or write a new card\n"
        )
    assert hub.requests == []


def test_a_dry_run_refuses_what_a_push_refuses(registry):
    base = publish(registry, "demo/base")
    on = {".": {"kind": "artifact", "ref": base, "revision": None, "sha256": base.weights_sha256}}
    with pytest.raises(HubError, match=r"demo/sft/v1 is an adapter on demo/base/v1, which is on this machine only"):
        plan(publish(registry, parents=[base], adapters=on), REPO)


@pytest.mark.parametrize(
    ("step", "how"),
    [
        ("GET /api/models/alice/demo$", {"drop": "before"}),
        ("POST /api/repos/create", {"status": 503}),
        ("POST /api/validate-yaml", {"status": 502}),
        ("POST .*/preupload/", {"status": 500}),
        ("PUT /storage/", {"drop": "inside"}),
        ("PUT /storage/", {"status": 500}),
        ("POST .*/commit/", {"status": 500, "times": 2}),
        ("POST .*/commit/", {"drop": "before"}),
        ("POST .*/commit/", {"drop": "after"}),
        ("GET .*/tree/", {"status": 500}),
        ("POST .*/tag/", {"status": 429, "Retry_After": "7"}),
        ("POST .*/tag/", {"drop": "after"}),
    ],
)
def test_a_passing_failure_of_any_step_is_retried(hub, registry, waits, step, how):
    hub.fail(step, **how)
    artifact = publish(registry)
    push(artifact, REPO)
    assert on_hub(hub, "rlhf-v1") == contents(artifact.path)
    assert [commit.message[:6] for commit in hub.repos[REPO].commits] == ["initia", "demo/s"]  # none of them twice
    assert waits and all(wait >= 1 for wait in waits) and (how.get("Retry_After") is None or waits == [7.0])


def test_waits_grow_and_end(hub, registry, waits, caplog):
    hub.fail("GET /api/models/", status=503, times=99)
    with pytest.raises(
        HubError, match=r"the Hub answers 503 .* nothing is lost: `rlhf push /.*/demo/sft/v1 alice/demo`"
    ):
        push(publish(registry), REPO)
    assert waits == [1.0, 2.0, 4.0, 8.0] and hub.count("GET /api/models") == 5
    assert caplog.messages[0] == "the Hub answers 503 (as asked); trying again in 1 s"


def test_an_interrupted_push_is_resumed_by_the_same_command(hub, registry):
    artifact = publish(registry, weights=os.urandom(999))
    hub.fail("POST .*/commit/", status=500, times=99)
    with pytest.raises(HubError, match="goes on where this stopped"):
        push(artifact, REPO)
    assert len(hub.repos[REPO].commits) == 1 and hub.repos[REPO].tags == {}
    sent = hub.count("PUT /storage/")
    hub.failures.clear()
    push(artifact, REPO)
    assert sent == hub.count("PUT /storage/") == 2  # what had arrived was not sent again
    del hub.repos[REPO].tags["rlhf-v1"]  # as if it had been killed before the tag
    assert push(artifact, REPO).changed
    assert len(hub.repos[REPO].commits) == 2 and on_hub(hub, "rlhf-v1") == contents(artifact.path)


def test_the_next_version_replaces_the_files_of_the_one_before_and_nothing_else(hub, registry):
    first = publish(registry, names=("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"))
    second = publish(registry)
    push(first, REPO)
    repo = hub.repos[REPO]
    repo.add({**repo.tree(), "LICENSE": b"added by people on the Hub"})
    push(second, REPO)
    assert on_hub(hub) == {**contents(second.path), "LICENSE": b"added by people on the Hub"}
    assert on_hub(hub, "rlhf-v1") == contents(first.path)
    assert push(first, REPO).changed  # an older version is there under its tag, and `main` is what was pushed last
    assert on_hub(hub) == on_hub(hub, "rlhf-v1") == {**contents(first.path), "LICENSE": b"added by people on the Hub"}
    assert on_hub(hub, "rlhf-v2")["stage.json"] == (second.path / "stage.json").read_bytes()
    assert not push(first, REPO).changed


def test_public_is_said_each_time(hub, registry):
    artifact = publish(registry)
    assert not push(artifact, REPO, private=False).private and not hub.repos[REPO].private
    for again in (artifact, publish(registry)):
        with pytest.raises(HubError, match="alice/demo is public: push with --public"):
            push(again, REPO)
    assert len(hub.repos[REPO].commits) == 2
    hub.repos["alice/hidden"] = hub.repos.pop(REPO)
    hub.repos["alice/hidden"].private = True
    assert push(artifact, "alice/hidden", private=False).private  # an existing repository is not opened in passing


def test_what_others_put_there_is_replaced_by_force_only(hub, registry):
    artifact, rm = publish(registry), publish(registry, "demo/rm")
    push(rm, REPO)
    with pytest.raises(HubError, match=r"alice/demo holds demo/rm, not demo/sft: choose another name, or .* --force"):
        push(artifact, REPO)
    hub.repos[REPO].add({"pytorch_model.bin": b"theirs", "README.md": b"# theirs"})
    for other in (artifact, rm):
        with pytest.raises(HubError, match=r"exists and was not made by rlhf \(2 files\): .*--force"):
            push(other, REPO)
    assert len(hub.repos[REPO].commits) == 3
    push(artifact, REPO, force=True)
    assert on_hub(hub) == on_hub(hub, "rlhf-v1") == contents(artifact.path)


def test_a_tag_of_another_version_is_moved_by_force_only(hub, registry, tmp_path):
    theirs, ours = publish(Registry(tmp_path / "other"), weights=b"theirs"), publish(registry)
    push(theirs, REPO)
    with pytest.raises(HubError, match="has a tag rlhf-v1, of another version 1 than demo/sft/v1"):
        push(ours, REPO)
    assert on_hub(hub, "rlhf-v1") == contents(theirs.path)
    push(ours, REPO, force=True)
    assert on_hub(hub, "rlhf-v1") == contents(ours.path)


def test_an_upload_that_is_not_whole_gets_no_tag(hub, registry):
    artifact = publish(registry)
    push(artifact, REPO)
    del hub.repos[REPO].tags["rlhf-v1"]
    hub.repos[REPO].add({**hub.repos[REPO].tree(), ".gitignore": b"config.json"})
    second = publish(registry)
    (hub.repos[REPO].tree()).pop("config.json")
    with pytest.raises(HubError, match=r"config\.json is not in alice/demo after the upload \(a \.gitignore there\?\)"):
        push(second, REPO)
    assert hub.repos[REPO].tags == {}


def test_a_file_that_holds_a_token_is_not_pushed(hub, registry, monkeypatch):
    foreign, by_browser = "hf_" + "a1B2" * 8, "hf_oauth_" + ".".join(["eyJh-b_0"] * 4)
    monkeypatch.setenv("HF_TOKEN", "an-odd-token")
    for secret in (foreign, by_browser, "an-odd-token"):
        artifact = publish(registry, config={"training_arguments": {"hub_token": secret}})
        with pytest.raises(HubError, match=r"stage\.json holds a Hub token, and a push would publish it") as caught:
            push(artifact, REPO, force=True)
        assert secret not in str(caught.value)
    assert hub.requests == []


# --- errors


def error_of(hub, registry, capsys, repo=REPO, arguments=()):
    """The one line of a push that is refused with status 2."""
    artifact = publish(registry)
    before = contents(artifact.path)
    assert cli.main(["push", "demo/sft", repo, "--root", str(registry.root), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and hub.token not in err
    assert contents(artifact.path) == before
    return err


def test_without_a_token(hub, registry, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(registry.root / "no-token"))
    assert "run `hf auth login`, or set HF_TOKEN to one that may write" in error_of(hub, registry, capsys)
    assert hub.requests == []


def test_with_a_token_that_may_only_read(hub, registry, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.reader_token)
    assert "the token of alice (role: read) may not write to alice/demo (403)" in error_of(hub, registry, capsys)
    hub.repos[REPO] = Repo(private=True)
    hub.repos[REPO].add({".gitattributes": b""})
    assert "may not write to alice/demo (403)" in error_of(hub, registry, capsys)


def test_with_a_token_that_is_not_valid(hub, registry, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    assert "the Hub refuses the token (401)" in error_of(hub, registry, capsys)


def test_a_namespace_of_others(hub, registry, capsys):
    assert "may not write to bob/demo (403)" in error_of(hub, registry, capsys, "bob/demo")


@pytest.mark.parametrize("repo", ["demo", "a/b/c", "alice/de mo", "alice/..", "https://huggingface.co/alice/demo"])
def test_names_that_are_none(hub, registry, capsys, repo):
    assert "write user/name" in error_of(hub, registry, capsys, repo).lower()
    assert hub.requests == []


def test_without_a_network(hub, registry, capsys, monkeypatch, waits):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://user:password@127.0.0.1:9")
    monkeypatch.setattr(hub_api._log, "disabled", True)
    text = error_of(hub, registry, capsys)
    assert "cannot reach http://127.0.0.1:9" in text and "password" not in text
    assert "look at the network and at HF_ENDPOINT" in text
    assert len(waits) == 4
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in error_of(hub, registry, capsys)
    assert len(waits) == 4  # a choice does not pass


@pytest.mark.parametrize(
    "endpoint", ["localhost:9", "hub", "http://", "https:///x", "http://me:pass@hub:port", "ftp://hub"]
)
def test_an_endpoint_that_is_no_address(hub, registry, capsys, monkeypatch, waits, endpoint):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    text = error_of(hub, registry, capsys)
    assert f"HF_ENDPOINT is '{endpoint.replace('me:pass@', '')}', which is no address: write https://HOST" in text
    assert max(waits, default=0) < 1


def test_a_token_that_is_none(hub, registry, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_é")
    text = error_of(hub, registry, capsys)
    assert "the Hub token has letters that no token has: run `hf auth login`" in text and "hf_é" not in text


def test_a_card_whose_header_the_hub_refuses(hub, registry, capsys):
    artifact = publish(registry)
    (artifact.path / "README.md").write_text("# no header")
    assert cli.main(["push", "demo/sft", REPO, "--root", str(registry.root)]) == 2
    told = "error: Invalid metadata in README.md. - no metadata: mend the header of that card, and push again\n"
    assert capsys.readouterr().err == told


def test_what_the_hub_refuses_is_told_on_one_line_without_the_token(hub, registry, capsys):
    message = f"no space left\nfor {hub.token}"
    hub.fail("POST .*/commit/", status=413, X_Error_Message=message.replace("\n", " "))
    text = error_of(hub, registry, capsys)
    assert "the Hub answers 413 (no space left for <token>" in text


def test_the_command_that_goes_on_is_named_as_it_has_to_be_typed(hub, registry, capsys, monkeypatch):
    monkeypatch.chdir(registry.root.parent)
    for arguments, options in (((), ""), (("--public", "--force"), " --public --force")):
        hub.fail("GET /api/models/", status=400)
        version = len(registry.list()) + 1
        expected = f"nothing is lost: `rlhf push demo/sft/v{version} alice/demo{options}` goes on where this stopped\n"
        assert error_of(hub, registry, capsys, arguments=arguments).endswith(expected)
    registry.verify("demo/sft/v1")
    artifact = publish(Registry(registry.root.parent / "my runs"))
    assert command(artifact, REPO) == f"rlhf push '{artifact.path}' alice/demo"


def test_addresses_are_told_without_user_and_password():
    told = "We couldn't connect to 'http://me:pass@hub:80/a/b' or https://me@hub; mail me@hub"
    assert hub_api.public(told) == "We couldn't connect to 'http://hub:80/a/b' or https://hub; mail me@hub"
    signed = ValueError("GET http://me:p@ss@hub/blob?X-Amz-Signature=c0ffee\nfailed")
    assert hub_api.one_line(signed) == "GET http://hub/blob failed"


# --- pulling


def test_pull_takes_the_newest_or_a_revision_and_knows_what_is_here(hub, registry, tmp_path):
    first, second = publish(registry), publish(registry, weights=b"2")
    for artifact in (first, second):
        push(artifact, REPO)
    other = Registry(tmp_path / "other")
    assert pull(REPO, other).ref == "demo/sft/v2"  # its own number, since that is free
    assert pull(REPO, other, revision="rlhf-v1").ref == "demo/sft/v1"
    assert pull(REPO, other, revision="rlhf-v1", run_name="mine").ref == "mine/sft/v1"
    hub.requests.clear()
    assert pull(REPO, other).ref == pull(REPO, registry).ref == "demo/sft/v2"
    assert hub.count("GET /storage") == 0
    assert contents(other.get("demo/sft/v1").path) == contents(first.path)
    for artifact in other.list():
        other.verify(artifact)
    with pytest.raises(HubError, match="has no revision 'v9'; its tags: rlhf-v1, rlhf-v2"):
        pull(REPO, other, revision="v9")


def test_a_number_that_is_taken_gives_way(hub, registry, tmp_path):
    artifact = publish(registry, weights=b"from the Hub")
    push(artifact, REPO)
    other = Registry(tmp_path / "other")
    publish(other)
    pulled = pull(REPO, other)
    assert pulled.ref == "demo/sft/v2" and pulled.weights_sha256 == artifact.weights_sha256
    assert {**pulled.manifest, "version": 1} == artifact.manifest and other.get("demo/sft") == pulled
    assert pull(REPO, other) == pulled and len(other.list()) == 2


def test_a_pull_that_is_interrupted_goes_on(hub, registry, tmp_path, waits):
    artifact = publish(registry, names=("a.safetensors", "b.safetensors"), weights=b"ab")
    push(artifact, REPO)
    other = Registry(tmp_path / "other")
    hub.fail("GET .*/resolve/.*/config.json", status=400)
    with pytest.raises(HubError, match="the registry is as it was: pull again"):
        pull(REPO, other)
    assert other.list() == []
    hub.fail("GET /storage/", drop="inside")
    hub.requests.clear()
    assert contents(pull(REPO, other).path) == contents(artifact.path)
    assert hub.count("GET .*/README.md") == 0  # it had arrived
    assert [path.name for path in other.root.iterdir()] == ["demo"]


def test_a_full_disk_ends_a_pull_in_one_line(hub, registry, tmp_path, capsys, monkeypatch, waits, recwarn):
    push(publish(registry), REPO)
    download = huggingface_hub.HfApi.hf_hub_download

    def full(self, repo_id, name, *, local_dir, **options):
        if name == "model.safetensors":
            warnings.warn_explicit(
                "Not enough free disk space", UserWarning, "file_download.py", 1, "huggingface_hub.file_download"
            )
            raise OSError(errno.ENOSPC, "No space left on device")
        return download(self, repo_id, name, local_dir=local_dir, **options)

    monkeypatch.setattr(huggingface_hub.HfApi, "hf_hub_download", full)
    root = tmp_path / "other"
    assert cli.main(["pull", REPO, "--root", str(root)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: cannot write {root}/.pull-alice--demo-") and err.count("\n") == 1
    assert err.endswith(
        "/model.safetensors: No space left on device; free space there, or see who may write, and run the same command again\n"
    )
    assert max(waits, default=0) < 1 and not [warning for warning in recwarn if warning.category is UserWarning]


def test_a_pull_mends_a_version_that_is_here_and_damaged(hub, registry):
    """What was lost or changed is fetched, and nothing else; an edited card stays."""
    artifact = publish(registry, names=("a.safetensors", "b.safetensors"))
    whole = contents(artifact.path)
    push(artifact, REPO)
    (artifact.path / "a.safetensors").write_bytes(b"x" * BIG)
    shutil.rmtree(artifact.path / "ema")
    (artifact.path / "README.md").write_text("# mine")
    hub.requests.clear()
    assert pull(REPO, registry) == artifact and hub.count("GET .*/resolve/.*(b.safetensors|config.json|README.md)") == 0
    assert contents(artifact.path) == whole | {"README.md": b"# mine"}
    assert [artifact.ref for artifact in registry.list()] == ["demo/sft/v1"]
    assert sorted(os.listdir(registry.root)) == ["demo"]

    (artifact.path / "config.json").unlink()
    (artifact.path / "config.json").mkdir()
    with pytest.raises(HubError, match=rf"cannot restore .*config\.json: .*; remove {artifact.path} and pull again"):
        pull(REPO, registry)
    shutil.rmtree(artifact.path)
    assert pull(REPO, registry).ref == "demo/sft/v1" and contents(artifact.path) == whole
    hub.repos[REPO].add({**hub.repos[REPO].tree(), "config.json": b"[]"})
    (artifact.path / "config.json").unlink()
    with pytest.raises(HubError, match=r"config\.json is not that of demo/sft/v1"):
        pull(REPO, registry)


def test_what_is_not_as_its_manifest_says_is_not_taken_in(hub, registry, tmp_path):
    push(publish(registry), REPO)
    repo, good = hub.repos[REPO], dict(hub.repos[REPO].tree())
    other = Registry(tmp_path / "other")
    for change, text in (
        ({"model.safetensors": b"x" * BIG}, "model.safetensors is not that of demo/sft/v1"),
        ({"config.json": None}, "lacks config.json, which its stage.json lists"),
        ({"stage.json": b"{}"}, "has no stage.json, so it was not pushed by rlhf"),
        ({"stage.json": None}, "has no stage.json, so it was not pushed by rlhf"),
        ({"tokenizer_config.json": b'{"eos_token": "x"}', "stage.json": "tokenizer"}, "tokenizer_config.json"),
    ):
        files = {**good, **change}
        if files["stage.json"] == "tokenizer":
            manifest = json.loads(good["stage.json"])
            manifest["files"]["../x.json"] = manifest["files"]["config.json"]
            files |= {"stage.json": json.dumps(manifest).encode(), "../x.json": b"{}"}
            text = r"lacks \.\./x\.json"
        repo.add({name: data for name, data in files.items() if data is not None}, message=text)
        with pytest.raises(HubError, match=text):
            pull(REPO, other)
        assert other.list() == [] and (not other.root.exists() or not any(other.root.iterdir()))


def test_a_card_that_people_edited_on_the_hub_comes_along(hub, registry, tmp_path):
    artifact = publish(registry)
    push(artifact, REPO)
    hub.repos[REPO].add({**hub.repos[REPO].tree(), "README.md": b"# edited", "figure.png": b"added"})
    other = Registry(tmp_path / "other")
    pulled = pull(REPO, other)
    other.verify(pulled)
    assert (pulled.path / "README.md").read_text() == "# edited"
    assert not (pulled.path / "figure.png").exists()
    assert pull(REPO, registry) == artifact  # here it is the same version, with the card it had


def test_pull_says_what_is_missing(hub, registry, monkeypatch):
    with pytest.raises(HubError, match=r"there is no model alice/demo on .*, or it is not for you to see"):
        pull(REPO, registry)
    push(publish(registry), REPO)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(registry.root / "no-token"))
    with pytest.raises(HubError, match="a private one needs a token: `hf auth login`"):
        pull(REPO, registry)
    hub.repos[REPO].private = False
    assert pull(REPO, registry, run_name="public").ref == "public/sft/v1"  # no token is needed
    with pytest.raises(RegistryError, match="is no run name"):
        pull(REPO, registry, run_name="../x")


def test_two_pulls_at_once_do_not_mix(hub, registry, tmp_path):
    push(publish(registry), REPO)
    other, results = Registry(tmp_path / "other"), []

    def run():
        try:
            results.append(pull(REPO, other).ref)
        except HubError as error:
            results.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "demo/sft/v1" in results and len(other.list()) == 1
    assert all(result == "demo/sft/v1" or "another process is pulling" in result for result in results)


# --- adopting


def copy_of(artifact, registry):
    registry.root.mkdir(parents=True, exist_ok=True)
    return shutil.copytree(artifact.path, registry.root / ".incoming")


def test_adopting_knows_parents_by_their_weights(registry, tmp_path):
    """The parent's name may be taken here by another version, of another tokenizer: nobody must take that for it."""
    sft = publish(registry, weights=b"theirs", tokenizer={"a": 0})
    rm = publish(registry, "demo/rm", parents=[sft], tokenizer={"a": 0})
    other = Registry(tmp_path / "other")
    publish(other, weights=b"ours", tokenizer={"b": 0})
    stranger = other.adopt(copy_of(rm, other), origin="alice/demo@rlhf-v1")
    assert stranger.parents == ({"ref": "alice/demo@rlhf-v1:demo/sft/v1", "sha256": sft.weights_sha256},)
    other.verify(stranger)
    assert [node.kind for node in other.lineage(stranger).parents] == ["missing"]

    third = Registry(tmp_path / "third")
    publish(third, weights=b"ours", tokenizer={"b": 0})
    moved = third.adopt(copy_of(sft, third))
    child = third.adopt(copy_of(rm, third))
    assert (moved.ref, child.parents[0]["ref"]) == ("demo/sft/v2", "demo/sft/v2")
    third.verify(child)
    publish(registry, weights=b"theirs", tokenizer={"a": 0})  # the same weights under a newer name
    fifth = registry.adopt(copy_of(rm, registry), run="mine")
    assert fifth.parents == rm.parents  # the name it was trained by is right, and stays
    again = Registry(tmp_path / "fourth")
    assert again.adopt(copy_of(stranger, again)).parents == stranger.parents  # its origin is not told twice


def test_a_parent_that_comes_after_its_child_is_found_by_its_weights(registry, tmp_path):
    """The child's manifest names it as it was called elsewhere, and gc keeps it; so with the base of an adapter."""
    base = publish(registry, "demo/base", weights=b"base")
    sft = publish(registry, weights=b"theirs", parents=[base])
    on = {".": {"kind": "artifact", "ref": sft, "revision": None, "sha256": sft.weights_sha256}}
    rm = publish(registry, "demo/rm", parents=[sft], adapters=on)
    other = Registry(tmp_path / "other")
    child = other.adopt(copy_of(rm, other), origin="alice/rm@rlhf-v1")
    with pytest.raises(TornArtifact, match="alice/rm@rlhf-v1:demo/sft/v1, which is not here"):
        other.verify(child)
    publish(other, weights=b"ours")
    publish(other, "demo/rm", weights=b"theirs")  # of the same weights, and of another stage
    parent = other.adopt(copy_of(sft, other), origin="alice/sft@rlhf-v1")
    publish(other, weights=b"newer")
    assert other.lineage(child).parents[0].artifact == parent and parent.ref == "demo/sft/v2"
    other.verify(child)
    other.tag(child, "kept")
    assert [artifact.ref for artifact in other.prunable(keep=1)] == ["demo/sft/v1"]


def test_adopting_keeps_the_manifest_and_takes_no_number_twice(registry, tmp_path):
    publish(registry)
    artifact = publish(registry, weights=b"2")
    other = Registry(tmp_path / "other")
    folder = copy_of(artifact, other)
    written = (artifact.path / "stage.json").read_bytes()
    adopted = other.adopt(folder)
    assert (adopted.ref, adopted.manifest) == ("demo/sft/v2", artifact.manifest) and not folder.exists()
    assert (adopted.path / "stage.json").read_bytes() == written
    assert other.adopt(copy_of(artifact, other)) == adopted and folder.exists()  # it is here already: the copy stays
    shutil.rmtree(folder)
    other.evals_dir(adopted).mkdir(parents=True)
    other.remove(adopted)
    assert other.adopt(copy_of(artifact, other)).ref == "demo/sft/v3"  # v2 has evaluations


def test_adopting_refuses_what_is_not_whole(registry, tmp_path):
    artifact = publish(registry, tokenizer={"a": 0})
    other = Registry(tmp_path / "other")

    def refused(error, text, name, content):
        folder = copy_of(artifact, other)
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_text(content)
        with pytest.raises(error, match=text):
            other.adopt(folder)
        assert other.list() == [] and folder.exists()
        shutil.rmtree(folder)

    manifest = json.dumps({**artifact.manifest, "version": 0})
    refused(TornArtifact, "config.json is missing from demo/sft/v1", "config.json", None)
    refused(TornArtifact, "more.txt is not of demo/sft/v1", "more.txt", "")
    refused(HashMismatch, "config.json is not that of demo/sft/v1", "config.json", "[]")
    refused(RegistryError, "holds no stage.json", "stage.json", None)
    refused(TornArtifact, "cannot read", "stage.json", "{")
    refused(TornArtifact, "has the version 0", "stage.json", manifest)
    odd = json.dumps({**artifact.manifest, "tokenizer_sha256": "0"})
    refused(TokenizerMismatch, "the tokenizer is not that of demo/sft/v1", "stage.json", odd)
    refused(RegistryError, "is no stage", "stage.json", json.dumps({**artifact.manifest, "stage": "../x"}))


def test_adopting_from_another_disk_says_so(registry, tmp_path, monkeypatch):
    artifact = publish(registry)
    other = Registry(tmp_path / "other")
    folder = copy_of(artifact, other)

    def rename(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(RegistryError, match=r"cannot move .*\.incoming into .*: Invalid cross-device link"):
        other.adopt(folder)
    assert folder.exists() and other.list() == []


def test_retries_are_logged_by_their_reason_alone(hub, registry, caplog):
    caplog.set_level(logging.DEBUG)
    hub.fail("PUT /storage/", status=500)
    hub.fail("POST .*/commit/", drop="before")
    push(publish(registry), REPO)
    assert hub.token not in caplog.text
    assert [r.name for r in caplog.records if r.levelno >= logging.WARNING] == ["rlhf.hub_api"]


def test_a_plan_follows_an_adapter_on_the_hub_to_its_base(hub, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    hub.repos["alice/lora"] = Repo(private=True)
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "facebook/opt-125m", "r": 8}
    hub.repos["alice/lora"].add({"adapter_config.json": json.dumps(adapter).encode()})
    words = ["--gpus", "1", "--gpu-memory", "80", "--stage", "sft", "--json"]
    assert cli.main(["plan", "--model", "alice/lora", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert cli.main(["plan", "--model", "facebook/opt-125m", *words]) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert cli.main(["plan", "--model", "alice/nothing", *words]) == 2
    assert capsys.readouterr().err.startswith("error: no built-in shape or folder 'alice/nothing'")


def test_a_version_that_was_pulled_is_pushed_back_as_what_it_is(hub, registry, tmp_path):
    """Its manifest calls a parent by the name that it has here."""
    sft = publish(registry)
    rm = publish(registry, "demo/rm", parents=[sft])
    push(rm, REPO)
    other = Registry(tmp_path / "other")
    publish(other, weights=b"ours")
    pulled = pull(REPO, other)
    assert pulled.manifest["parents"] != rm.manifest["parents"]
    assert not push(pulled, REPO).changed
    with pytest.raises(HubError, match="of another version 1 than demo/rm/v1"):
        push(publish(Registry(tmp_path / "third"), "demo/rm", weights=b"new"), REPO)


def test_the_fingerprint_of_a_model_on_the_hub_is_its_commit(hub, monkeypatch, tmp_path):
    """A branch that moves makes it another model; nothing but the config is fetched for that."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    hub.repos["alice/base"] = repo = Repo(private=True)
    repo.add({"config.json": b"{}", "model.safetensors": b"one"})
    first = fingerprint_of_model("alice/base")
    assert first == f"alice/base {repo.commits[0].sha[:12]}" == fingerprint_of_model("alice/base")
    repo.add({"config.json": b"{}", "model.safetensors": b"two"})
    assert fingerprint_of_model("alice/base") == f"alice/base {repo.commits[1].sha[:12]}"
    assert fingerprint_of_model("alice/base", repo.commits[0].sha) == first
    assert not hub.count("model.safetensors")
