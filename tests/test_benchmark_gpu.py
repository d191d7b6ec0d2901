"""benchmarks/gpu.py: its table from real stages, and its FLOPs by hand and by PyTorch's own counter."""

import importlib.util
import json
import math
import sys

import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

PATH = tiny.ROOT / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("benchmark_gpu", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark_gpu"] = module
    spec.loader.exec_module(module)
    return module


def test_every_row_runs_on_tiny_models(tmp_path):
    done = tiny.launch([sys.executable, str(PATH), "--smoke", "--out", str(tmp_path / "gpu.json")])
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "gpu.json").read_text())
    rows = {(row["model"], row["stage"], row["options"]): row for row in report["rows"]}
    assert {(model, stage, "sdpa") for model in ("gpt2", "opt-1.3b") for stage in ("sft", "rm", "ppo")} <= rows.keys()
    assert ("gpt2", "sft", "gradient checkpointing") in rows and ("gpt2", "ppo", "growing cache") in rows
    for row in rows.values():
        assert row["seconds"] > 0 and row["tokens_per_second"] > 0 and row["timed_steps"] == 2
        if row["stage"] == "ppo":
            parts = row["rollout"] + row["scoring"] + row["update"]
            assert 0.5 * row["seconds"] < parts <= 1.001 * row["seconds"]
            assert row["first_ratio"] == pytest.approx(1, abs=1e-4)
    table = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(table) == 2 + len(rows) and "s/step" in table[0]


def test_flops_by_hand(gpu):
    shape = gpu.SHAPES["gpt2"]
    body = 12 * 12 * 768**2  # 12 layers of 12 d²
    assert shape.forward(1, 0) == 2 * body
    assert shape.forward(0, 0, 1) == 2 * 768 * 50_257
    assert shape.forward(0, gpu.causal(3)) == 4 * 768 * 12 * 6
    assert gpu.SHAPES["opt-1.3b"].forward(1, 0) == pytest.approx(2 * 1.208e9, rel=1e-3)


@pytest.mark.parametrize("name", ["gpt2", "opt-1.3b"])
def test_flops_are_those_that_pytorch_counts(gpu, name):
    shape = gpu.TINY[name]
    shape.config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(shape.config)
    ids = torch.zeros(2, 16, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(ids)
    # It counts the whole square of pairs, those that the mask hides included.
    assert counter.get_total_flops() == shape.forward(32, 2 * 16 * 16, 32)


def test_rows_are_chosen_by_their_options_and_named_by_their_launch(gpu, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "configs/accelerate/deepspeed/zero2.json")
    row = {"seconds": 1.0, "tokens_per_second": 1.0, "flops": 1.0}
    monkeypatch.setattr(gpu, "STAGES", dict.fromkeys(gpu.STAGES, lambda *args: dict(row)))
    assert gpu.main(["--smoke", "--models", "opt-1.3b", "--options", "LoRA"]) == 0
    rows = [line.split(" | ")[:3] for line in capsys.readouterr().out.splitlines() if line.startswith("| opt")]
    assert rows == [["| opt-1.3b", stage, "LoRA, zero2"] for stage in ("sft", "rm", "ppo")]


def test_a_row_that_fails_is_named_and_the_others_stay(gpu, monkeypatch, capsys):
    monkeypatch.setitem(gpu.STAGES, "sft", lambda *args: math.sqrt(-1))
    assert gpu.main(["--smoke", "--models", "gpt2", "--stages", "sft", "rm"]) == 1
    out = capsys.readouterr().out
    assert "| gpt2 | sft | sdpa | ValueError" in out and "| gpt2 | rm | sdpa | 0." in out
