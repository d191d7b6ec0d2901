"""The registry: whole versions or none, under tampering, concurrency and SIGKILL."""

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from rlhf import registry as registry_module
from rlhf.registry import (
    HashMismatch,
    MissingStage,
    Registry,
    RegistryError,
    TokenizerMismatch,
    TornArtifact,
    tokenizer_sha256,
)


@pytest.fixture
def registry(tmp_path):
    return Registry(tmp_path / "runs")


def write_tokenizer(folder, vocab=("a", "b"), pad=None, eos="</s>"):
    """The files of a word-level tokenizer, as far as the registry reads them."""
    tokens = [eos] + ([pad] if pad else [])
    added = [{"id": len(vocab) + i, "content": token, "special": True} for i, token in enumerate(tokens)]
    model = {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(vocab)}, "unk_token": "a"}
    (folder / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": added, "padding": None}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos, "pad_token": pad}))


def publish(registry, ref="demo/sft", weights=b"weights", tokenizer=None, **provenance):
    run, stage = ref.split("/")
    with registry.draft(run, stage) as draft:
        (draft.path / "model.safetensors").write_bytes(weights)
        (draft.path / "config.json").write_text("{}")
        (draft.path / "README.md").write_text("# card")
        (draft.path / "ema").mkdir()
        (draft.path / "ema" / "model.safetensors").write_bytes(b"average of " + weights)
        if tokenizer is not None:
            write_tokenizer(draft.path, **tokenizer)
        return draft.publish(**provenance)


def standing_on(base):
    """What a version that is an adapter records of its base."""
    return {".": {"kind": "artifact", "ref": base, "revision": None, "sha256": base.weights_sha256}}


def edit_manifest(artifact, **changes):
    path = artifact.path / "stage.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# --- publishing and finding


def test_a_version_holds_its_files_and_their_origin(registry):
    base = publish(registry, "demo/base", base_model="facebook/opt-125m", base_revision="abc")
    sft = publish(
        registry,
        parents=[base],
        config={"lr": 1e-5, "output": Path("out"), "betas": (0.9, 0.95)},
        data=[{"name": "demo", "fingerprint": "f00", "records": 12}],
        metrics={"loss": 1.5},
        device="1 CPU",
        extra={"note": "first"},
    )
    manifest = json.loads((sft.path / "stage.json").read_text())
    assert manifest == sft.manifest
    assert sft.path == registry.root / "demo" / "sft" / "v1" and sft.ref == "demo/sft/v1"
    assert sorted(manifest["files"]) == ["README.md", "config.json", "ema/model.safetensors", "model.safetensors"]
    assert manifest["files"]["config.json"] == {
        "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",  # printf '{}' | sha256sum
        "size": 2,
    }
    assert sft.parents == ({"ref": "demo/base/v1", "sha256": base.weights_sha256},)
    assert (manifest["base_model"], manifest["base_revision"]) == ("facebook/opt-125m", "abc")
    assert manifest["config"] == {"lr": 1e-5, "output": "out", "betas": [0.9, 0.95]}
    assert manifest["created"].endswith("+00:00") and manifest["device"] == "1 CPU"
    assert {"torch", "transformers", "trl", "rlhf"} <= set(manifest["packages"])
    assert manifest["python"].startswith("3.") and manifest["platform"] and manifest["extra"] == {"note": "first"}
    registry.verify(sft)


def test_weights_hash_reads_weights_only(registry):
    first = publish(registry, weights=b"one")
    with registry.draft("demo", "sft") as draft:
        shutil.copytree(first.path, draft.path, dirs_exist_ok=True)
        (draft.path / "README.md").write_text("another card")
        (draft.path / "training_args.bin").write_bytes(b"no weights, for all its name")
        same = draft.publish()
    assert same.weights_sha256 == first.weights_sha256
    assert publish(registry, weights=b"two").weights_sha256 != first.weights_sha256


def test_versions_count_up_and_require_takes_the_newest(registry):
    refs = [publish(registry).ref for _ in range(11)]
    assert refs == [f"demo/sft/v{n}" for n in range(1, 12)]
    assert registry.require("sft", "demo").ref == "demo/sft/v11"  # as a number, not as text


def test_list_is_ordered_by_run_stage_and_version(registry):
    for ref in ("b/sft", "a/ppo", "a/rm", "a/sft", "a/base", "a/sft"):
        publish(registry, ref)
    refs = [artifact.ref for artifact in registry.list()]
    assert refs == ["a/base/v1", "a/sft/v1", "a/sft/v2", "a/rm/v1", "a/ppo/v1", "b/sft/v1"]
    assert [artifact.ref for artifact in registry.list("a", "sft")] == ["a/sft/v1", "a/sft/v2"]
    assert registry.list("nobody") == [] and Registry(registry.root / "nowhere").list() == []


def test_a_draft_left_without_publish_leaves_nothing(registry):
    with registry.draft("demo", "sft") as draft:
        assert draft.path.name.startswith(".draft-") and draft.path.parent == registry.root / "demo" / "sft"
    with pytest.raises(ZeroDivisionError), registry.draft("demo", "sft"):
        raise ZeroDivisionError
    assert os.listdir(registry.root / "demo" / "sft") == []


def test_a_folder_without_manifest_does_not_exist_but_keeps_its_number(registry):
    publish(registry)
    torn = registry.root / "demo" / "sft" / "v7"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    (registry.root / "demo" / "sft" / "evals" / "v9").mkdir(parents=True)  # the evaluations of a version that is gone
    assert registry.require("sft", "demo").version == 1
    assert [artifact.version for artifact in registry.list()] == [1]
    with pytest.raises(MissingStage, match=r"no demo/sft/v7 in .*versions there: v1"):
        registry.get("demo/sft/v7")
    assert publish(registry).version == 10


@pytest.mark.parametrize(
    ("stage", "command"),
    [
        ("base", "accelerate launch scripts/pretrain.py --run_name demo"),
        ("sft", "make sft RUN=demo"),
        ("rm", "make rm RUN=demo"),
        ("ppo", "make ppo RUN=demo"),
    ],
)
def test_a_missing_stage_names_the_command_that_makes_it(registry, stage, command):
    with registry.draft("demo", stage):
        pass
    folder = registry.root / "demo" / stage
    with pytest.raises(MissingStage) as caught:
        registry.require(stage, "demo")
    assert str(caught.value) == f"no {stage} in run 'demo': {folder} is empty; train one: {command}"


def test_get_reads_references_tags_and_paths(registry, tmp_path, monkeypatch):
    first, second = publish(registry), publish(registry)
    registry.tag(first, "best")
    assert registry.get("demo/sft") == second and registry.get("demo/sft/v1") == first
    assert registry.get("demo/sft@best") == first
    elsewhere = Registry(tmp_path / "other")
    assert elsewhere.get(first.path) == first and elsewhere.get(f"{first.path}/") == first
    monkeypatch.chdir(registry.root)
    assert elsewhere.get("demo/sft/v1") == first  # a path that reads like a reference


def test_get_refuses_what_is_not_meant(registry, tmp_path):
    artifact = publish(registry)
    with pytest.raises(RegistryError, match="demo/sft is of stage sft, and stage rm is needed here"):
        registry.get("demo/sft", stage="rm")
    with pytest.raises(RegistryError, match="'facebook/opt-125m' is no artifact"):
        registry.get("facebook/opt-125m")
    with pytest.raises(MissingStage, match="no tag 'best', only: none"):
        registry.get("demo/sft@best")
    with pytest.raises(MissingStage, match="versions there: v1"):
        registry.get("demo/sft/v2")
    for ref, told in (
        ("demo/sft/v" + "9" * 5000, "is no artifact|File name too long"),
        ("x" * 300, "cannot read .*: File name too long; give another path"),
        ("~nosuchuser/x", "~nosuchuser/x: nobody of that name has a home here"),
    ):
        with pytest.raises(RegistryError, match=told):
            registry.get(ref)
    with pytest.raises(RegistryError, match="nobody of that name"):
        Registry("~nosuchuser/x")
    copy = shutil.copytree(artifact.path, tmp_path / "model")
    with pytest.raises(RegistryError, match=r"is not at <root>/<run>/<stage>/v<N>"):
        registry.get(copy)
    shutil.copytree(artifact.path, registry.root / "demo" / "sft" / "v2")
    with pytest.raises(TornArtifact, match="calls itself demo/sft/v1"):
        registry.get("demo/sft/v2")


@pytest.mark.parametrize("run", ["", ".", "..", "../x", "a/b", "/etc", ".hidden", "a\n", "a b", "ü", "a" * 129])
def test_names_cannot_leave_the_root(registry, run):
    for call in (
        lambda: registry.draft(run, "sft"),
        lambda: registry.require("sft", run),
        lambda: registry.list(run),
        lambda: registry.work_dir(run, "sft"),
    ):
        with pytest.raises(RegistryError, match="is no run name"):
            call()
    assert not registry.root.exists()


@pytest.mark.parametrize("stage", ["", "eval", "../rm", "SFT"])
def test_only_the_four_stages(registry, stage):
    with pytest.raises(RegistryError, match="is no stage"):
        registry.draft("demo", stage)


def test_an_unwritable_root_is_one_clear_line(tmp_path):
    (tmp_path / "runs").write_text("a file where a folder should be")
    with pytest.raises(RegistryError, match=r"cannot write to .*runs/demo/sft: Not a directory") as caught:
        Registry(tmp_path / "runs").draft("demo", "sft")
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_one_clear_line(registry, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(registry_module, "write_json", full)
    with pytest.raises(RegistryError, match=r"cannot publish to .*: No space left on device"):
        publish(registry)
    assert registry.list() == [] and os.listdir(registry.root / "demo" / "sft") == [".lock"]


@pytest.mark.parametrize("broken", ["os.open", "os.replace", "os.rename", "rlhf.registry.write_json"])
def test_tags_and_removal_on_a_disk_that_takes_nothing_are_one_clear_line(registry, monkeypatch, broken):
    """A read-only file system or somebody else's (the lock cannot be made), a full one, one that fails in between."""
    artifact = publish(registry)
    before = sorted(os.listdir(artifact.path.parent))

    def fail(*arguments, **_):
        if broken == "rlhf.registry.write_json":
            Path(arguments[0]).write_text("half")
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(broken, fail)
    change = registry.remove if broken == "os.rename" else lambda artifact: registry.tag(artifact, "best")
    with pytest.raises(
        RegistryError, match=r"cannot (write|write to|remove) .*: Read-only file system; free space"
    ) as caught:
        change(artifact)
    monkeypatch.undo()
    assert "\n" not in str(caught.value) and sorted(os.listdir(artifact.path.parent)) == before
    registry.tag(artifact, "best")  # the lock is free


def test_publish_refuses_links_and_drafts_without_weights(registry, tmp_path):
    with registry.draft("demo", "sft") as draft:
        with pytest.raises(RegistryError, match="nothing to publish"):
            draft.publish()
        (tmp_path / "weights").write_bytes(b"x")
        (draft.path / "model.safetensors").symlink_to(tmp_path / "weights")
        with pytest.raises(RegistryError, match=r"model\.safetensors is a link"):
            draft.publish()
    assert registry.list() == []


def test_an_adapter_whose_base_has_gone_is_not_published(registry):
    base = publish(registry, "demo/base")
    registry.remove(base)
    with pytest.raises(MissingStage, match=rf"the new sft is an adapter on demo/base/v1, and {base.path} has gone"):
        publish(registry, adapters=standing_on(base))
    assert registry.list() == []
    publish(registry, parents=[base])  # whole weights stand on their own


def test_a_draft_is_published_once(registry):
    with registry.draft("demo", "sft") as draft:
        (draft.path / "model.safetensors").write_bytes(b"x")
        draft.publish()
        with pytest.raises(RegistryError, match="published already"):
            draft.publish()
    assert len(registry.list()) == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused_by_name(registry, bad):
    with pytest.raises(RegistryError, match=r"metrics\.eval\.loss is"):
        publish(registry, metrics={"eval": {"loss": bad}})
    with pytest.raises(RegistryError, match=r"config\.betas\[1\] is"):
        publish(registry, config={"betas": (0.9, bad)})
    assert registry.list() == []


def test_numbers_of_numpy_become_plain_and_objects_are_refused(registry):
    numpy = pytest.importorskip("numpy")
    artifact = publish(registry, metrics={"loss": numpy.float32(0.5), "steps": numpy.int64(3), "x": numpy.float64(2)})
    assert artifact.manifest["metrics"] == {"loss": 0.5, "steps": 3, "x": 2.0}
    with pytest.raises(RegistryError, match=r"metrics\.loss is nan"):
        publish(registry, metrics={"loss": numpy.float32("nan")})
    with pytest.raises(RegistryError, match=r"config\.model is a object, which a manifest cannot hold"):
        publish(registry, config={"model": object()})
    with pytest.raises(RegistryError, match=r"metrics\.curve is a ndarray"):
        publish(registry, metrics={"curve": numpy.zeros(3)})


def test_everything_is_on_the_disk_before_the_rename(registry, monkeypatch):
    events = []
    fsync, rename = os.fsync, os.rename
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc to name a file descriptor")

    def record_fsync(fd):
        events.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        fsync(fd)

    def record_rename(source, target):
        events.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    publish(registry)
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    assert {"README.md", "config.json", "model.safetensors", "ema"} <= set(before)
    assert before[-2] == "stage.json" and before[-1].startswith(".draft-")  # the manifest last, then its folder
    assert after == ["sft"]


# --- checking


def test_changed_weights_are_refused(registry):
    artifact = publish(registry, weights=b"good")
    (artifact.path / "model.safetensors").write_bytes(b"evil")  # of the same size
    for call in (
        lambda: registry.require("sft", "demo"),
        lambda: registry.get("demo/sft"),
        lambda: registry.get(artifact.path),
        lambda: registry.verify("demo/sft/v1"),
    ):
        with pytest.raises(HashMismatch, match=r"v1/model\.safetensors has changed .* make sft RUN=demo"):
            call()
    assert registry.require("sft", "demo", verify=False) == registry.get("demo/sft", verify=False) == artifact


def test_a_missing_file_is_named(registry):
    artifact = publish(registry)
    (artifact.path / "ema" / "model.safetensors").unlink()
    for call in (lambda: registry.require("sft", "demo"), lambda: registry.verify(artifact)):
        with pytest.raises(TornArtifact, match=r"v1/ema/model\.safetensors is missing"):
            call()


def test_an_added_file_is_named_by_verify(registry):
    artifact = publish(registry)
    (artifact.path / "ema" / "notes.txt").write_text("mine")
    with pytest.raises(TornArtifact, match=r"v1/ema/notes\.txt is not in stage\.json"):
        registry.verify(artifact)


def test_an_edited_card_stops_verify_and_no_training(registry):
    artifact = publish(registry)
    (artifact.path / "README.md").write_text("# a better card")
    assert registry.require("sft", "demo") == artifact
    with pytest.raises(HashMismatch, match=r"README\.md has changed"):
        registry.verify(artifact)


def test_verify_compares_the_parents_weights(registry):
    base = publish(registry, "demo/base", weights=b"old")
    sft = publish(registry, parents=[base])
    registry.verify(sft)
    shutil.rmtree(base.path)
    registry.verify(sft)  # a version may travel without its parents
    publish(registry, "demo/base", weights=b"new")
    with pytest.raises(HashMismatch, match=r"demo/sft/v1 was trained from other weights than .*base/v1 holds"):
        registry.verify(sft)


def test_verify_wants_the_base_of_an_adapter_and_no_parent(registry, tmp_path):
    """A base by its reference, by its path from another registry, and one that was pulled from elsewhere."""
    for root in (registry, Registry(tmp_path / "other")):
        base = publish(registry, "demo/base")
        adapter = publish(root, parents=[base], adapters=standing_on(base))
        root.verify(adapter)
        registry.remove(base)
        with pytest.raises(TornArtifact, match=rf"demo/sft/v1 is an adapter on .*{base.ref}, which is not here"):
            root.verify(adapter)
        edit_manifest(adapter, adapters={".": {**adapter.adapters["."], "ref": "alice/demo@rlhf-v1:demo/base/v1"}})
        with pytest.raises(TornArtifact, match=r"alice/demo@rlhf-v1:demo/base/v1, which is not here"):
            root.verify("demo/sft")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"stage": 1}',
        "\x00",
        '{"stage": "sft", "run": "demo", "version": 2, "files": {"a": 1}}',
        "[" * 200_000,
        '{"version": ' + "9" * 5000 + "}",
    ],
)
def test_a_corrupt_manifest_is_an_error_for_get_and_a_warning_for_list(registry, caplog, text):
    first, second = publish(registry), publish(registry)
    (second.path / "stage.json").write_text(text)
    for call in (lambda: registry.require("sft", "demo"), lambda: registry.get("demo/sft/v2")):
        with pytest.raises(TornArtifact, match=r"cannot read .*v2/stage\.json"):
            call()
    with caplog.at_level(logging.WARNING):
        assert registry.list() == [first]
    assert "skipped: cannot read" in caplog.text and "v2/stage.json" in caplog.text
    assert publish(registry).version == 3
    with pytest.raises(TornArtifact):  # whose parents they are cannot be known
        registry.prunable()


@pytest.mark.parametrize(
    "adapters",
    [
        *(None, [], "x", 5, {".": None}, {".": {}}, {".": "demo/base/v1"}),
        *({".": {"kind": "artifact", "sha256": ""}}, {".": {"kind": "artifact", "ref": 1, "sha256": ""}}),
        *({".": {"kind": "model", "ref": "gpt2"}}, {".": {"kind": "other", "ref": "demo/base/v1", "sha256": ""}}),
        {".": {"kind": "model", "ref": "gpt2", "sha256": "", "revision": 5}},
        {".": {"kind": "model", "ref": "gpt2", "sha256": "", "reward_bias": "1"}},
        {".": {"kind": "model", "ref": "gpt2", "sha256": "", "quantization": "4"}},
    ],
)
def test_adapters_that_are_not_as_published_are_a_corrupt_manifest(registry, adapters):
    edit_manifest(publish(registry), adapters=adapters)
    for call in (lambda: registry.get("demo/sft"), lambda: registry.verify("demo/sft"), registry.prunable):
        with pytest.raises(TornArtifact, match=r"cannot read .*v1/stage\.json \(.*\); restore it or remove the folder"):
            call()


@pytest.mark.parametrize("folder", [False, True])
def test_a_version_that_lost_its_manifest_is_told_and_protects_its_parents(registry, folder):
    bases = [publish(registry, "demo/base") for _ in range(2)]
    sft = publish(registry, parents=bases[:1])
    (sft.path / "stage.json").unlink()
    if folder:
        (sft.path / "stage.json").mkdir()
    told = []
    assert list(registry.scan(on_error=told.append)) == bases
    assert [str(error) for error in told] == [f"{sft.path} holds no stage.json: restore it or remove the folder"]
    with pytest.raises(TornArtifact, match=r"sft/v1 holds no stage\.json"):
        registry.prunable(keep=1)
    shutil.rmtree(sft.path)
    assert registry.prunable(keep=1) == bases[:1]


def test_a_version_that_may_not_be_read_is_told_and_not_passed_over(registry, monkeypatch):
    """As a folder of somebody else; for root it is done by hand."""
    first, second = publish(registry), publish(registry)
    path_stat, path_open = Path.stat, Path.open

    def refused(path):
        if path.parent == second.path:
            raise PermissionError(13, "Permission denied", str(path))
        return path

    monkeypatch.setattr(Path, "stat", lambda path, **options: path_stat(refused(path), **options))
    monkeypatch.setattr(Path, "open", lambda path, *options, **more: path_open(refused(path), *options, **more))
    told = []
    assert list(registry.scan(on_error=told.append)) == [first]
    with pytest.raises(RegistryError, match=r"cannot read .*/v2: Permission denied; give another path, or see who may"):
        registry.get(second.path)
    for call in (registry.prunable, lambda: registry.require("sft", "demo")):
        with pytest.raises(TornArtifact, match=r"cannot read .*v2/stage\.json .*Permission denied"):
            call()
    assert len(told) == 1 and isinstance(told[0], TornArtifact)


# --- tokenizers


def test_another_tokenizer_than_the_parents_is_refused_at_publish(registry):
    base = publish(registry, "demo/base", tokenizer={})
    sft = publish(registry, parents=[base], tokenizer={"pad": "<pad>"})
    assert sft.manifest["tokenizer_sha256"] == base.manifest["tokenizer_sha256"] is not None
    for other in ({"vocab": ("a", "c")}, {"eos": "<end>"}, {"vocab": ("b", "a")}):
        with pytest.raises(TokenizerMismatch, match=r"the new rm has another tokenizer than its parent demo/sft/v1"):
            publish(registry, "demo/rm", parents=[sft], tokenizer=other)
    with pytest.raises(TokenizerMismatch, match="the new rm has no tokenizer, unlike its parent demo/sft/v1"):
        publish(registry, "demo/rm", parents=[sft])
    rm = publish(registry, "other/rm", tokenizer={"vocab": ("x", "y")})
    with pytest.raises(TokenizerMismatch, match=r"parent other/rm/v1 \(a rm\)"):
        publish(registry, "demo/ppo", parents=[sft, rm], tokenizer={})
    assert [artifact.ref for artifact in registry.list()] == ["demo/base/v1", "demo/sft/v1", "other/rm/v1"]


def test_another_tokenizer_than_the_parents_is_refused_at_require(registry):
    sft = publish(registry, tokenizer={})
    rm = publish(registry, "demo/rm", parents=[sft], tokenizer={"pad": "<pad>"})
    assert registry.require("rm", "demo") == rm
    write_tokenizer(sft.path, vocab=("x", "y"))
    edit_manifest(sft, tokenizer_sha256=tokenizer_sha256(sft.path))
    with pytest.raises(TokenizerMismatch, match="demo/rm/v1 has another tokenizer than its parent demo/sft/v1"):
        registry.require("rm", "demo")
    write_tokenizer(rm.path, vocab=("x", "y"))
    files = rm.manifest["files"] | {
        name: {"sha256": registry_module.file_sha256(rm.path / name), "size": (rm.path / name).stat().st_size}
        for name in ("tokenizer.json", "tokenizer_config.json")
    }
    edit_manifest(rm, files=files)  # the files agree with the manifest, the tokenizer does not
    with pytest.raises(TokenizerMismatch, match=r"the tokenizer in .* is not the published one"):
        registry.require("rm", "demo")


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """A folder with a byte-level BPE, as a first stage saves it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat, hello world"] * 5, trainer)
    folder = tmp_path_factory.mktemp("bpe")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    ).save_pretrained(folder)
    return folder


def load(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def saved(tokenizer, folder):
    tokenizer.save_pretrained(folder)
    return tokenizer_sha256(folder)


def test_pad_padding_and_truncation_do_not_change_a_tokenizer(bpe, tmp_path):
    original = tokenizer_sha256(bpe)
    assert original == saved(load(bpe), tmp_path / "again")
    tokenizer = load(bpe)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert saved(tokenizer, tmp_path / "pad") == original
    assert "<pad>" in (tmp_path / "pad" / "tokenizer.json").read_text()
    tokenizer = load(tmp_path / "pad")
    tokenizer.padding_side = "left"
    tokenizer(["the cat", "hello"], padding="max_length", truncation=True, max_length=9)
    assert saved(tokenizer, tmp_path / "settings") == original
    content = json.loads((tmp_path / "settings" / "tokenizer.json").read_text())
    assert content["padding"] and content["truncation"]
    tokenizer.chat_template = "{{ messages }}"
    assert saved(tokenizer, tmp_path / "template") == original


def test_the_class_that_loads_it_does_not_change_a_tokenizer(bpe, tmp_path):
    from transformers import GPT2Config, GPT2Tokenizer

    assert saved(GPT2Tokenizer.from_pretrained(bpe), tmp_path / "gpt2") == tokenizer_sha256(bpe)
    GPT2Config().save_pretrained(tmp_path / "gpt2")
    assert saved(load(tmp_path / "gpt2"), tmp_path / "auto") == tokenizer_sha256(bpe)


def test_whatever_else_changes_is_another_tokenizer(bpe, tmp_path):
    original = tokenizer_sha256(bpe)
    tokenizer = load(bpe)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    hashes = [original, saved(tokenizer, tmp_path / "special")]
    tokenizer = load(bpe)
    tokenizer.add_tokens(["cat"])
    hashes.append(saved(tokenizer, tmp_path / "word"))
    tokenizer = load(bpe)
    tokenizer.eos_token = "!"
    hashes.append(saved(tokenizer, tmp_path / "eos"))

    def edited(name, edit):
        content = json.loads((bpe / "tokenizer.json").read_text())
        edit(content)
        folder = shutil.copytree(bpe, tmp_path / name)
        (folder / "tokenizer.json").write_text(json.dumps(content))
        return tokenizer_sha256(folder)

    def swap_ids(content):
        vocab = content["model"]["vocab"]
        vocab["the"], vocab["a"] = vocab["a"], vocab.get("the", 276)

    assert edited("same", lambda content: None) == original
    hashes.append(edited("ids", swap_ids))
    hashes.append(edited("merge", lambda content: content["model"]["merges"].reverse()))
    hashes.append(edited("prefix", lambda content: content["pre_tokenizer"].update(add_prefix_space=True)))
    hashes.append(edited("normalizer", lambda content: content.update(normalizer={"type": "NFC"})))
    hashes.append(edited("post", lambda content: content.update(post_processor=None)))
    hashes.append(edited("fallback", lambda content: content["model"].update(byte_fallback=True)))
    hashes.append(edited("unk", lambda content: content["model"].update(unk_id=0)))
    assert len(set(hashes)) == len(hashes) == 11


def test_pad_that_is_also_eos_is_not_left_out(tmp_path):
    for name, eos in (("one", "<a>"), ("two", "<b>")):
        (tmp_path / name).mkdir()
        write_tokenizer(tmp_path / name, eos=eos)
        config = {"pad_token": {"content": eos}, "unk_token": {"content": eos}}  # as older files write them
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(config))
    assert tokenizer_sha256(tmp_path / "one") != tokenizer_sha256(tmp_path / "two")


def test_tokenizers_without_tokenizer_json(tmp_path):
    assert tokenizer_sha256(tmp_path) is None
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    plain = tokenizer_sha256(tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"[PAD]": 1}')
    assert tokenizer_sha256(tmp_path) != plain
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": "[PAD]"}')
    assert tokenizer_sha256(tmp_path) == plain
    (tmp_path / "merges.txt").write_text("#version: 0.2\na a\n")
    assert tokenizer_sha256(tmp_path) != plain
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(RegistryError, match=r"the tokenizer files in .* cannot be read"):
        tokenizer_sha256(tmp_path)


# --- lineage, tags, cleaning up


def shape(node):
    return (node.ref, node.kind, [shape(parent) for parent in node.parents])


def test_lineage_goes_down_to_the_model_and_names_what_is_missing(registry, tmp_path):
    sft = publish(registry, base_model="gpt2", base_revision="e7da7f2")
    rm = publish(registry, "demo/rm", parents=[sft])
    ppo = publish(registry, "demo/ppo", parents=[sft, rm])
    model: tuple = ("gpt2@e7da7f2", "model", [])
    below = ("demo/sft/v1", "artifact", [model])
    assert shape(registry.lineage("demo/ppo")) == (
        *("demo/ppo/v1", "artifact"),
        [below, ("demo/rm/v1", "artifact", [below])],
    )
    shutil.rmtree(rm.path)
    assert shape(registry.lineage(ppo))[2] == [below, ("demo/rm/v1", "missing", [])]


def test_parents_may_lie_in_another_registry(registry, tmp_path):
    base = publish(registry, "demo/base", tokenizer={})
    other = Registry(tmp_path / "other")
    publish(other, "demo/base", weights=b"another base of the same name", tokenizer={"vocab": ("z",)})
    sft = publish(other, parents=[base], tokenizer={})
    assert sft.parents[0]["ref"] == "../runs/demo/base/v1"
    other.verify(sft)
    assert other.lineage(sft).parents[0].artifact == base
    shutil.move(tmp_path / "runs", tmp_path / "gone")
    assert other.lineage(sft).parents[0].kind == "missing"


def test_tags_name_versions_and_move(registry):
    first, second = publish(registry), publish(registry)
    assert registry.tags("demo", "sft") == {}
    registry.tag(first, "best")
    registry.tag(first, "paper-1.0")
    registry.tag(second, "best")
    assert registry.tags("demo", "sft") == {"best": 2, "paper-1.0": 1}
    registry.untag("demo", "sft", "best")
    assert registry.tags("demo", "sft") == {"paper-1.0": 1}
    with pytest.raises(MissingStage, match="no tag 'best'"):
        registry.untag("demo", "sft", "best")
    for name in ("v3", "", "../x", "a/b"):
        with pytest.raises(RegistryError):
            registry.tag(first, name)
    registry.verify(first)  # tags lie beside the version
    assert registry.evals_dir(second) == registry.root / "demo" / "sft" / "evals" / "v2"
    for text in ("{", '{"paper-1.0": 1e999}', "[" * 200_000):
        (registry.root / "demo" / "sft" / "tags.json").write_text(text)
        with pytest.raises(RegistryError, match=r"tags\.json cannot be read"):
            registry.get("demo/sft@paper-1.0")


def test_tags_given_at_once_are_all_kept(registry):
    artifact = publish(registry)
    threads = [threading.Thread(target=registry.tag, args=(artifact, f"tag{n}")) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(registry.tags("demo", "sft")) == 12


def test_only_old_drafts_of_dead_processes_are_removed(registry):
    folder = registry.root / "demo" / "sft"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = registry_module._host()
    old, pids = time.time() - 25 * 3600, {"dead": dead.pid, "live": os.getpid()}

    def make(pid, host, age):
        path = folder / f".draft-{random.randrange(16**8):08x}-{pid}-{host}"
        path.mkdir(parents=True)
        (path / "model.safetensors").write_bytes(b"half")
        for where in (path / "model.safetensors", path):
            os.utime(where, (age, age))
        return path

    gone = [make(pids["dead"], host, old), make(1, "elsewhere", old)]
    kept = [make(pids["live"], host, old), make(pids["dead"], host, time.time()), make(1, "elsewhere", time.time())]
    busy = make(1, "elsewhere", old)
    os.utime(busy / "model.safetensors")  # somebody still writes into it
    assert sorted(registry.stale_drafts()) == sorted(gone)
    with registry.draft("demo", "sft"):
        assert not any(path.exists() for path in gone)
        assert all(path.exists() for path in (*kept, busy))


def test_prunable_spares_the_newest_the_tagged_and_every_ancestor(registry):
    bases = [publish(registry, "demo/base") for _ in range(4)]
    sfts = [publish(registry, parents=[bases[1 if n == 1 else 0]]) for n in range(5)]
    publish(registry, "demo/rm", parents=[sfts[2]])
    publish(registry, "other/rm", parents=[sfts[1]])
    registry.tag(sfts[3], "best")
    # kept: sft v5 (newest), v4 (tagged), v3 and v2 (parents of rms); base v4 (newest), v1 (parent of most sfts) and v2
    # (a grandparent only: of other/rm/v1 by way of sft v2)
    assert [artifact.ref for artifact in registry.prunable(keep=1)] == ["demo/base/v3", "demo/sft/v1"]
    assert registry.prunable(keep=5) == []
    with pytest.raises(RegistryError, match="keep must be at least 1"):
        registry.prunable(keep=0)
    registry.remove(sfts[0])
    assert [artifact.version for artifact in registry.list("demo", "sft")] == [2, 3, 4, 5]
    assert sorted(name for name in os.listdir(sfts[0].path.parent) if name.startswith(".draft-")) == []


def test_prunable_spares_the_base_of_an_adapter_whose_other_parents_are_missing(registry):
    """As after pulling a reward model that is an adapter: the SFT adapter between it and the base did not come along."""
    bases = [publish(registry, "demo/base") for _ in range(2)]
    sft = publish(registry, parents=[bases[0]], adapters=standing_on(bases[0]))
    publish(registry, "demo/rm", parents=[sft], adapters=standing_on(bases[0]))
    registry.remove(sft)
    assert registry.prunable(keep=1) == []


# --- processes

PUBLISHER = """
import sys
from rlhf.registry import Registry
root, count, files, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
print("ready", flush=True)
for n in range(count):
    with Registry(root).draft("demo", "sft") as draft:
        for i in range(files):
            (draft.path / f"model-{i:05}.safetensors").write_bytes(bytes([n % 256]) * size)
        draft.publish(metrics={"n": n})
"""


def start_publisher(root, count, files=3, size=1000):
    command = [sys.executable, "-c", PUBLISHER, str(root), str(count), str(files), str(size)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_eight_processes_publish_at_once(registry):
    count = int(os.environ.get("RLHF_TEST_VERSIONS", "4"))
    processes = [start_publisher(registry.root, count=count) for _ in range(8)]
    assert [process.wait(timeout=120) for process in processes] == [0] * 8
    artifacts = registry.list()
    assert [artifact.version for artifact in artifacts] == list(range(1, 8 * count + 1))
    assert sorted(artifact.manifest["metrics"]["n"] for artifact in artifacts) == sorted([*range(count)] * 8)
    for artifact in artifacts:
        registry.verify(artifact)
    assert not [name for name in os.listdir(registry.root / "demo" / "sft") if name.startswith(".draft-")]


def test_a_reader_sees_only_whole_versions(registry):
    processes = [start_publisher(registry.root, count=12, files=8, size=50_000) for _ in range(2)]
    seen = set()
    while any(process.poll() is None for process in processes):
        for artifact in registry.list():
            if artifact not in seen:
                registry.verify(artifact)
                seen.add(artifact)
    assert all(process.wait() == 0 for process in processes)
    assert len(registry.list()) == 24 and len(seen) > 2


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_publisher_leaves_nothing_half_visible(registry):
    chance = random.Random(0)
    drafts_left = 0
    start = time.monotonic()
    for _ in range(3):  # what a publication takes here: the kills shall come within a few of them
        publish(registry)
    few = time.monotonic() - start
    for _ in range(int(os.environ.get("RLHF_TEST_KILLS", "20"))):
        process = start_publisher(registry.root, count=1000, files=20, size=100_000)
        process.stdout.readline()
        time.sleep(chance.uniform(0, max(0.15, 3 * few)))
        process.kill()
        process.wait()
        folder = registry.root / "demo" / "sft"
        names = os.listdir(folder) if folder.exists() else []
        drafts_left += any(name.startswith(".draft-") for name in names)
        assert all((folder / name / "stage.json").is_file() for name in names if name.startswith("v"))
    artifacts = registry.list()
    assert drafts_left and len(artifacts) > 3  # the kills did hit the work, and some of it was done
    for artifact in artifacts:
        registry.verify(artifact)
    start = time.monotonic()
    assert publish(registry).version == len(artifacts) + 1
    assert time.monotonic() - start < 5  # no lock outlives its process


def test_the_import_is_light():
    command = [sys.executable, "-X", "importtime", "-c", "import rlhf.registry"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stderr.splitlines()
    modules = {line.split("|")[-1].strip().split(".")[0] for line in lines}
    assert {"rlhf", "filelock"} <= modules
    assert not modules & {"torch", "numpy", "transformers", "yaml", "datasets", "accelerate", "huggingface_hub", "rich"}


def test_the_commit_is_that_of_the_source_checkout_only(tmp_path):
    """Installed into an environment inside somebody's repository, the package does not take that one's commit."""
    code = textwrap.dedent("""
        from rlhf import manifest
        print(manifest.__file__)
        print(manifest.provenance()["git_commit"])
    """)
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@x", "-C", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "lib" / "site-packages")}
    shutil.copytree(Path(registry_module.__file__).parent, tmp_path / "lib" / "site-packages" / "rlhf")
    if not shutil.which("git"):
        pytest.skip("needs git")
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)

    def ask(env):
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
        return run.stdout.split()

    assert ask(environment) == [str(tmp_path / "lib" / "site-packages" / "rlhf" / "manifest.py"), "None"]
    shutil.move(tmp_path / "lib" / "site-packages", tmp_path / "src")
    source, commit = ask({**environment, "PYTHONPATH": str(tmp_path / "src")})
    assert source == str(tmp_path / "src" / "rlhf" / "manifest.py")
    assert commit == subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
