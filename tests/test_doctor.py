"""`rlhf doctor`: one line each, with what to do; the machine as it is, and machines that lack something."""

import argparse
import importlib.metadata
import importlib.util
import os
import re
import shutil
import time

import pytest
import torch

from rlhf import cli, doctor


def findings(look, tmp_path):
    return list(doctor.looked(look, argparse.Namespace(root=str(tmp_path / "runs"))))


def test_a_line_for_everything_and_no_token(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "s" * 34)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    status = cli.main(["doctor", "--root", str(tmp_path / "runs")])
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[1] for line in lines]
    for name in (
        "python",
        "torch",
        "transformers",
        "trl",
        "device",
        "threads",
        "processes",
        "memory",
        "registry",
        "hub",
    ):
        assert name in names or (name == "device" and torch.cuda.is_available())
    assert all(line.split()[0] in (doctor.OK, doctor.NOTE, doctor.BAD) for line in lines)
    assert status == int(any(line.startswith(doctor.BAD) for line in lines))
    assert not any("sssss" in line for line in lines)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://user:password@hub.example")
    assert findings(doctor.hub, tmp_path)[0].text.startswith("https://hub.example, ")
    assert not (tmp_path / "runs").exists()


def test_packages_that_are_missing_or_old(tmp_path, monkeypatch):
    version = importlib.metadata.version

    def of(name):
        if name in ("deepspeed", "peft"):
            raise importlib.metadata.PackageNotFoundError(name)
        return "4.57.1" if name == "transformers" else version(name)

    monkeypatch.setattr(importlib.metadata, "version", of)
    monkeypatch.setattr(
        importlib.metadata, "requires", lambda _: ["transformers<6,>=5.0", 'deepspeed>=0.18; extra == "x"']
    )
    found = {finding.name: finding for finding in findings(doctor.packages, tmp_path)}
    assert (found["torch"].state, found["torch"].text) == (doctor.OK, version("torch"))
    assert found["deepspeed"].state == doctor.NOTE and "pip install 'rlhf[deepspeed]'" in found["deepspeed"].text
    assert found["peft"].state == doctor.BAD and "not installed: make setup" in found["peft"].text
    assert found["transformers"].state == doctor.BAD
    assert found["transformers"].text == "4.57.1, and <6,>=5.0 is needed: pip install 'transformers<6,>=5.0'"


def test_gpus(tmp_path, monkeypatch):
    facts = argparse.Namespace(name="NVIDIA V100", total_memory=16 * 2**30, major=7)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: facts)
    (finding,) = findings(doctor.devices, tmp_path)
    assert str(finding) == "note  cuda:0       NVIDIA V100, 16 GiB; no bfloat16: leave --bf16 false"


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_deepspeed_without_a_compiler_or_with_a_stale_lock(tmp_path, monkeypatch):
    lock = tmp_path / "extensions" / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    if shutil.which("g++"):
        assert "nothing, the first launch takes longer" in findings(doctor.deepspeed, tmp_path)[0].text
        lock.touch()
        os.utime(lock, (time.time() - 3600,) * 2)
        (finding,) = findings(doctor.deepspeed, tmp_path)
        assert finding.state == doctor.BAD and re.search(r"lock 60 minutes ago.*: remove it$", finding.text)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "no C++ compiler" in findings(doctor.deepspeed, tmp_path)[0].text


def test_a_root_that_cannot_be_written_and_a_disk_that_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert (
        findings(doctor.registry, tmp_path)[0].text
        == f"{tmp_path} cannot be written to: give --output_dir to the stages (here: --root)"
    )
    monkeypatch.setattr(os, "access", lambda *_: True)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: argparse.Namespace(free=2**30))
    (finding,) = findings(doctor.registry, tmp_path)
    assert finding.state == doctor.NOTE and "1 GiB free; checkpoints fill a disk quickly" in finding.text


def test_a_root_that_is_a_file(tmp_path):
    (tmp_path / "runs").write_text("")
    (finding,) = findings(doctor.registry, tmp_path)
    assert finding.state == doctor.BAD and finding.text.startswith(f"{tmp_path}/runs is no folder: give --output_dir")


def test_what_breaks_while_it_is_looked_at_is_told(tmp_path):
    def torch_(args):
        raise ImportError("libcudart.so.13: cannot open\nshared object file")
        yield

    (finding,) = findings(torch_, tmp_path)
    assert str(finding) == "BAD   torch_       ImportError: libcudart.so.13: cannot open shared object file"
