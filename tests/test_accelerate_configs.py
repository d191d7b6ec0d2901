"""configs/accelerate: accelerate reads every file, and those that can run on a CPU start processes that synchronise."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config import load_config_from_file

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "configs" / "accelerate"
FILES = sorted(FOLDER.glob("*.yaml"))
EXPECTED = {
    "cpu": "NO", "single": "NO", "cpu_ddp": "MULTI_GPU", "ddp": "MULTI_GPU", "zero1": "DEEPSPEED", "zero2": "DEEPSPEED",
    "zero3": "DEEPSPEED", "zero3_offload": "DEEPSPEED", "multinode": "DEEPSPEED", "fsdp2": "FSDP",
}  # fmt: skip

# Prints what the process is, and what it has after one step on data of its own: equal everywhere if gradients are averaged.
SCRIPT = """
import json, os, torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
several = int(os.environ.get("WORLD_SIZE", "1")) > 1
accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if several else [])
if accelerator.state.deepspeed_plugin is not None:
    accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
inputs = torch.full((1, 64), float(accelerator.process_index + 1), device=accelerator.device)
accelerator.backward(model(inputs).sum())
optimizer.step()
inner = getattr(optimizer.optimizer, "optimizer", optimizer.optimizer)
inner = getattr(inner, "optimizer", inner)
tensors = [t for s in inner.state.values() for t in s.values() if torch.is_tensor(t) and t.numel() > 1]
print("RESULT " + json.dumps({
    "processes": accelerator.num_processes,
    "type": accelerator.distributed_type.value,
    "sum": float(accelerator.reduce(torch.ones(1, device=accelerator.device), "sum")),
    "output": float(model(torch.ones_like(inputs)).sum()),
    "moments": sum(t.numel() * t.element_size() for t in tensors),
}) + "\\n", end="", flush=True)
accelerator.end_training()  # without it a process may abort at its exit
"""
PARAMETERS = 2 * (64 * 64 + 64)


def test_the_files_are_those_that_the_documentation_names():
    assert {path.stem for path in FILES} == set(EXPECTED)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_accelerate_reads_it(path):
    config = load_config_from_file(str(path))
    assert config.distributed_type == EXPECTED[path.stem]
    known = set(config.to_dict()) | {"compute_environment", "distributed_type"}
    unknown = set(yaml.safe_load(path.read_text())) - known - {"deepspeed_config", "fsdp_config"}
    assert not unknown


@pytest.mark.parametrize("path", [p for p in FILES if EXPECTED[p.stem] == "DEEPSPEED"], ids=lambda p: p.stem)
def test_deepspeed_files_leave_to_the_stage_what_the_stage_decides(path):
    named = load_config_from_file(str(path)).deepspeed_config["deepspeed_config_file"]
    values = json.loads((ROOT / named).read_text())
    # What Trainer and PPO set from their own arguments must not be fixed here: Trainer refuses a mismatch.
    for name in (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    ):
        assert values[name] == "auto"
    assert values["bf16"]["enabled"] == "auto" and "optimizer" not in values and "scheduler" not in values
    # ActorCritic has no config to derive these from, so they may not be auto.
    assert "auto" not in values["zero_optimization"].values()
    # accelerate ignores, and warns about, a precision in a file that names a DeepSpeed file.
    assert "mixed_precision" not in yaml.safe_load(path.read_text())


def launch(name, *options, tmp_path, **environment):
    script = tmp_path / "step.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"configs/accelerate/{name}.yaml"]
    port = ["--main_process_port", "0"] if "2" in options or name == "cpu_ddp" else []
    env = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "DS_"))}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    done = subprocess.run(
        [*command, *port, *options, str(script)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # Two processes write to one pipe: a line may hold both.
    return [json.loads(part.split("\n")[0]) for part in done.stdout.split("RESULT ")[1:]]


def test_cpu_starts_one_process(tmp_path):
    (found,) = launch("cpu", tmp_path=tmp_path)
    assert (found["processes"], found["type"]) == (1, "NO")


def test_cpu_ddp_starts_two_that_synchronise(tmp_path):
    found = launch("cpu_ddp", tmp_path=tmp_path, ACCELERATE_USE_CPU="true")
    assert [(f["processes"], f["type"], f["sum"]) for f in found] == [(2, "MULTI_CPU", 2.0)] * 2
    assert found[0]["output"] == found[1]["output"]
    assert found[0]["moments"] == 8 * PARAMETERS


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed compiles its CPU communication")
@pytest.mark.parametrize("name", ["zero2", "zero3"])  # that the others follow one process, test_launches.py has shown
def test_deepspeed_on_the_cpu(name, tmp_path):
    found = launch(name, "--num_processes", "2", tmp_path=tmp_path, DS_ACCELERATOR="cpu")
    assert [(f["processes"], f["type"], f["sum"]) for f in found] == [(2, "DEEPSPEED", 2.0)] * 2
    assert found[0]["output"] == found[1]["output"]
    # Adam's moments are spread over the two processes.
    assert all(f["moments"] == 8 * PARAMETERS / 2 for f in found)


STUBS = {  # what a cluster has: the hosts of a job, and a start of the words on each machine
    # More than a pipe holds: whoever reads one line must not end it, and the script with it, by a broken pipe.
    "scontrol": '[ "$1 $2 $3" = "show hostnames node[7-8]" ] && printf "node7\\n" && yes node8 | head -n 100000',
    "srun": 'shift; for i in 0 1; do SLURM_NODEID=$i "$@"; done',
    "accelerate": 'echo "$OMP_NUM_THREADS $*"',
}


def test_the_slurm_script_launches_one_part_on_each_machine(tmp_path):
    for name, text in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "45678"}
    job |= {"SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "32"}
    words = ["bash", str(FOLDER / "slurm.sbatch"), "scripts/ppo.py", "--run_name", "a run"]
    kept = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "CONFIG")}
    environment = kept | job | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for rank, line in enumerate(done.stdout.splitlines()):
        assert line == (
            "8 launch --config_file configs/accelerate/multinode.yaml --num_machines 2 --num_processes 8 "
            f"--machine_rank {rank} --main_process_ip node7 --main_process_port 25678 scripts/ppo.py --run_name a run"
        )
    assert len(done.stdout.splitlines()) == 2
