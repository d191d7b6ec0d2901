"""Launches of tests/test_launches.py in a file of their own: files run beside each other, and launches take longest."""

import dataclasses

import pytest
import test_launches
import test_ppo
import tiny
import torch
from safetensors.torch import load_file
from test_launches import PROCESSES, command, marked, stage_args, variables

alone = test_launches.alone


@pytest.mark.slow
@pytest.mark.parametrize("strategy", marked("zero3_offload", "fsdp2"))
def test_two_processes_follow_one(tmp_path, alone, strategy):
    test_launches.check_that_two_processes_follow_one(tmp_path, alone, strategy)


@pytest.mark.slow
def test_under_fsdp_every_stage_survives_a_process_that_fails(tmp_path):
    test_launches.check_that_every_stage_survives(tmp_path, "fsdp2")


@pytest.mark.slow
def test_under_fsdp_in_bfloat16_the_reference_starts_equal(tmp_path):
    """Rollout, reference and update see the same bfloat16 weights; those that learn are float32, and are published so."""
    registry = test_ppo.stages(tmp_path)
    args = stage_args(tmp_path, PROCESSES)["ppo"]
    args = dataclasses.replace(args, bf16=True, gradient_checkpointing=True, num_ppo_epochs=1)
    words = ["tests/launched.py", "ppo", tiny.write_config(tmp_path / "ppo.json", args)]
    done = tiny.launch(command("fsdp2", *words), **variables("fsdp2"))
    assert done.returncode == 0, done.stderr[-3000:]
    end = registry.require("ppo", "tiny")
    first, second = tiny.history(end)
    assert first["objective/kl"] == 0 and second["objective/kl_k3"] > 0
    for line in (first, second):
        assert line["policy/first_ratio"] == pytest.approx(1, abs=1e-6)
    for part in ("", "critic", "ema"):
        assert {w.dtype for w in load_file(end.path / part / "model.safetensors").values()} == {torch.float32}
