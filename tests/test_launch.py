"""What a launch asks of the machine, and what is said when its memory does not do."""

import errno
import importlib
import os
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import test_ppo
import tiny
import torch
from accelerate.utils import DistributedType
from safetensors import SafetensorError
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from rlhf import RLHFError, ppo, sft
from rlhf.cli import run_stage
from rlhf.engine import (
    EngineError,
    check_deepspeed,
    check_precision,
    prepare,
    prepare_trainer,
    refuse_optimizers_of_others,
)
from rlhf.launch import LaunchError, check_launch, ran_out_of_memory, ran_out_of_space
from rlhf.muon import Muon
from rlhf.planning.advice import memory_advice, setup_of

FSDP_2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    ("gpus", "environment", "says"),
    [
        (2, {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}, "8 processes .* with 2 GPUs; give --num_processes 2$"),
        (2, {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, "4 processes .* with 2 GPUs; give --num_processes 4$"),
        (1, {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true"}, "with 1 GPU; give"),
        (0, {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, "2 processes .* as many GPUs, and there is none"),
        (0, {"ACCELERATE_USE_FSDP": "true"}, "FSDP is for CUDA"),
        (4, {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_CPU": "true"}, "FSDP is for CUDA"),
        (
            1,
            {"ACCELERATE_USE_FSDP": "true"},
            "^fsdp_version is 1: .*; set it to 2, as in configs/accelerate/fsdp2.yaml$",
        ),
        (
            1,
            FSDP_2 | {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
            "^fsdp_cpu_ram_efficient_loading is true: .* to false,",
        ),
        (1, FSDP_2 | {"FSDP_OFFLOAD_PARAMS": "True"}, "^fsdp_offload_params is true: .*; set it to false,"),
        (1, FSDP_2 | {"FSDP_OFFLOAD_PARAMS": "false", "FSDP_CPU_RAM_EFFICIENT_LOADING": "False"}, None),
        (1, {"FSDP_OFFLOAD_PARAMS": "true"}, None),
        (0, {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_CPU": "true"}, "switches DeepSpeed off in silence"),
        (2, {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, None),
        (0, {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}, None),
        (0, {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true"}, None),
        (1, {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}, None),
        (0, {}, None),
    ],
)
def test_a_launch_that_cannot_work_is_refused(monkeypatch, gpus, environment, says):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", *(f"ACCELERATE_USE_{x}" for x in ("CPU", "DEEPSPEED", "FSDP"))):
        monkeypatch.delenv(name, raising=False)
    for name in ("VERSION", "CPU_RAM_EFFICIENT_LOADING", "OFFLOAD_PARAMS"):
        monkeypatch.delenv(f"FSDP_{name}", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if says is None:
        check_launch()
    else:
        with pytest.raises(LaunchError, match=says) as caught:
            check_launch()
        assert "\n" not in str(caught.value)


def test_a_lock_that_a_killed_launch_left_is_refused_and_a_new_one_told(monkeypatch, tmp_path, capsys):
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    check_launch()
    lock.touch()
    check_launch()
    assert f"waiting for {lock}" in capsys.readouterr().err
    os.utime(lock, (time.time() - 3600,) * 2)
    with pytest.raises(LaunchError, match=r"lock 60 minutes ago; DeepSpeed would wait for it forever: remove it$"):
        check_launch()


def stand_in(config, optim, model=None):
    """What is asked of a Trainer before it makes an engine."""
    plugin = SimpleNamespace(deepspeed_config=config, zero_stage=config["zero_optimization"]["stage"])
    return SimpleNamespace(
        accelerator=SimpleNamespace(
            distributed_type=DistributedType.DEEPSPEED, state=SimpleNamespace(deepspeed_plugin=plugin)
        ),
        args=TrainingArguments(output_dir="unused", optim=optim, report_to="none"),
        model=model or torch.nn.Linear(1, 1),
        get_optimizer_cls_and_kwargs=Trainer.get_optimizer_cls_and_kwargs,
        add_callback=lambda callback: None,
    )


@pytest.mark.parametrize("device", ["cpu", "none"])
def test_an_offloaded_optimiser_is_an_adam(device):
    """DeepSpeed's CPU Adam would step in the place of any other, in silence: under PPO's engine and under Trainer's."""
    config = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": device}}}

    prepare_trainer(stand_in(config, "adamw_torch"), "adamw_torch")
    check_deepspeed(config, torch.optim.Adam)
    if device == "none":
        prepare_trainer(stand_in(config, "sgd"), "sgd")
        return
    for asked, check in (
        ("SGD", lambda: prepare_trainer(stand_in(config, "sgd"), "sgd")),
        ("SGD", lambda: check_deepspeed(config, torch.optim.SGD)),
        ("Muon", lambda: prepare_trainer(stand_in(config, "adamw_torch"), "muon")),
        ("Muon", lambda: check_deepspeed(config, Muon)),
    ):
        with pytest.raises(
            EngineError, match=f"an offloaded optimiser is DeepSpeed's CPU Adam, and {asked} was asked for"
        ):
            check()


def test_zero_steps_no_optimiser_that_looks_at_whole_matrices():
    from transformers.optimization import Adafactor

    config = {"zero_optimization": {"stage": 2}}
    for check in (
        lambda: prepare_trainer(stand_in(config, "adafactor"), "adafactor"),
        lambda: check_deepspeed(config, Adafactor),
    ):
        with pytest.raises(
            EngineError, match=r"^optim: ZeRO steps flat pieces .* and Adafactor may .* adamw_torch, or "
        ):
            check()
    for whole in (torch.optim.AdamW, torch.optim.SGD, Muon):
        check_deepspeed(config, whole)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_deepspeed_file_does_not_decide_the_precision(tmp_path, monkeypatch, bf16):
    auto = {"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}
    for fine in (auto, {"bf16": {"enabled": bf16}}, {"bf16": {"enabled": True}} if bf16 else {}):
        check_precision(fine, bf16)
    for other in ({"bf16": {"enabled": not bf16}}, {"bf16": {"enabled": "auto"}, "fp16": {"enabled": True}}):
        with pytest.raises(
            EngineError, match=f"bf16 is {bf16}, and the DeepSpeed file decides otherwise .*; write auto there"
        ):
            check_precision(other, bf16)
        plugin = SimpleNamespace(deepspeed_config=other)
        made = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
        monkeypatch.setattr(ppo, "Accelerator", lambda made=made, **_: made)
        with pytest.raises(EngineError, match=f"bf16 is {bf16}, and the DeepSpeed file"):
            ppo.make_accelerator(test_ppo.ppo_args(tmp_path, bf16=bf16), tmp_path)


def test_a_deepspeed_file_leaves_the_stage_s_own_to_the_stage():
    config = {"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": False}}
    prepare_trainer(stand_in(config, "adamw_torch"), "adamw_torch")
    assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]  # or nothing could be published
    for more, says in (
        (
            {"optimizer": {"type": "Adam"}},
            "section 'optimizer', which would take the place of the stage's own; take it out$",
        ),
        ({"scheduler": {"type": "WarmupLR"}}, "section 'scheduler'"),
        ({"zero_optimization": {"stage": 0}}, r"without ZeRO \(stage 0\) .*ddp.yaml$"),
    ):
        with pytest.raises(EngineError, match=says):
            prepare_trainer(stand_in(config | more, "adamw_torch"), "adamw_torch")


def test_fsdp_knows_the_optimisers_of_pytorch():
    import bitsandbytes

    for known in (torch.optim.AdamW, torch.optim.SGD, Muon):
        refuse_optimizers_of_others(known)
    with pytest.raises(
        EngineError, match=r"^optim: FSDP spreads weights .*, and AdamW8bit was asked for; set it to adamw"
    ):
        refuse_optimizers_of_others(bitsandbytes.optim.AdamW8bit)


def test_fsdp_has_no_rollouts_of_a_layer_at_a_time():
    accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP)
    with pytest.raises(EngineError, match=r"^ds3_gather_for_generation: under FSDP .*zero3.yaml, or set it to true$"):
        prepare(accelerator, torch.nn.Linear(1, 1), None, 1, gather=False)


@pytest.mark.parametrize("optim", ["galore_adamw", "lomo", "stable_adamw"])
def test_an_optimiser_of_a_package_that_is_missing_is_one_line(tmp_path, optim):
    tiny.published(tmp_path, "base")
    with pytest.raises(RLHFError, match=r"^optim: ") as error:
        sft.run(tiny.sft_args(tmp_path, optim=optim))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("stage, trained, expected", [(3, "all", 2), (3, "a part", 0), (2, "all", 0)])
def test_zero_3_gathers_layers_whole_where_all_of_them_learn(stage, trained, expected):
    """2 layers; one whose weights are frozen, as under adapters, would be released before its gradient is computed."""
    leaves = pytest.importorskip("deepspeed.utils.z3_leaf_module")
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=16))
    if trained == "a part":
        model.transformer.wte.weight.requires_grad_(False)
    prepare_trainer(stand_in({"zero_optimization": {"stage": stage}}, "adamw_torch", model), "adamw_torch")
    assert leaves.get_z3_leaf_modules(model) == list(model.transformer.h)[:expected]


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward"])
def test_each_stage_prepares_its_trainer_before_it_trains(monkeypatch, tmp_path, stage):
    def refuse(trainer, optim):
        assert optim == "muon"
        assert trainer.state.global_step == 0
        raise EngineError("asked")

    module = importlib.import_module(f"rlhf.{stage}")
    monkeypatch.setattr(module, "prepare_trainer", refuse)
    tiny.published(tmp_path, "base", "sft")
    with pytest.raises(EngineError, match="asked"):
        module.run(getattr(tiny, f"{stage}_args")(tmp_path, optim="muon"))


def test_a_full_disk_is_told_from_other_errors():
    assert ran_out_of_space(OSError(errno.ENOSPC, "No space left on device"))
    assert not ran_out_of_space(OSError(errno.ENOENT, "No such file")) and not ran_out_of_space(ValueError("no"))
    assert ran_out_of_space(
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    )
    assert ran_out_of_space(RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 226112 vs 226000"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_stage_on_a_full_disk_says_so_in_one_line(monkeypatch, tmp_path, capsys):
    registry = tiny.published(tmp_path, "base")

    def write(*args, **kwargs):
        with open("/dev/full", "w") as full:
            full.write("weights")

    monkeypatch.setattr(importlib.import_module("rlhf.adapters"), "save", write)
    config = tiny.write_config(tmp_path / "sft.json", tiny.sft_args(tmp_path))
    with pytest.raises(SystemExit) as stopped:
        run_stage("sft", ["--config", config])
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "sft: no space left to write below" in line and "or give another --output_dir" in line
    assert not registry.list("tiny", "sft") and not list((registry.root / "tiny" / "sft").glob(".draft*"))


def test_the_stage_s_precision_decides_and_not_the_launcher_s(tmp_path):
    """A run is what its manifest says."""
    registry = tiny.published(tmp_path, "base")
    config = tiny.write_config(tmp_path / "sft.json", tiny.sft_args(tmp_path))
    words = [tiny.program("accelerate"), "launch", "--config_file", "configs/accelerate/cpu.yaml"]
    for precision in ("no", "bf16"):
        done = tiny.launch([*words, "--mixed_precision", precision, "scripts/sft.py", "--config", config])
        assert done.returncode == 0, done.stderr[-3000:]
        told = "the launcher's mixed precision (bf16) is not used; give --bf16 true for bfloat16"
        assert (told in done.stderr) == (precision == "bf16")
    one, other = registry.list("tiny", "sft")
    assert one.weights_sha256 == other.weights_sha256


def test_bfloat16_is_trained_on_a_cpu_too(tmp_path):
    tiny.published(tmp_path, "base")
    artifact = sft.run(tiny.sft_args(tmp_path, bf16=True))
    assert artifact.manifest["config"]["bf16"] is True


@pytest.mark.parametrize("changes, told", [({}, True), ({"use_peft": True}, False), ({"dtype": "float32"}, False)])
def test_whole_weights_that_learn_in_16_bits_are_told(tmp_path, capsys, changes, told):
    tiny.published(tmp_path, "base")
    sft.run(tiny.sft_args(tmp_path, **{"dtype": "bfloat16", **changes}))
    assert ("dtype bfloat16: small steps of weights in 16 bits are lost" in capsys.readouterr().err) == told


@pytest.mark.parametrize(
    "changes, says",
    [
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"powr": 2}},
            "^lr_scheduler_type polynomial: .*'powr'",
        ),
        (
            {"training_arguments": {"deepspeed": "x.json"}},
            "^training_arguments: deepspeed is the launch's; choose a file",
        ),
        ({"training_arguments": {"fsdp": "full_shard"}}, "^training_arguments: fsdp is the launch's; choose a file"),
    ],
)
def test_what_a_trainer_would_refuse_late_is_refused_at_once(tmp_path, changes, says):
    tiny.published(tmp_path, "base")
    with pytest.raises(RLHFError, match=says):
        sft.run(tiny.sft_args(tmp_path, **changes))


def test_a_deepspeed_file_that_differs_from_the_options_is_one_line(monkeypatch, tmp_path, capsys):
    tiny.published(tmp_path, "base")
    differ = ["ds gradient_accumulation_steps=1 vs hf gradient_accumulation_steps=4", "ds bf16=True vs hf bf16=False"]
    text = "Please correct the following DeepSpeed config values that mismatch TrainingArguments values:\n"
    text += "".join(f"- {one}\n" for one in differ) + "The easiest is to set these to 'auto'."

    def train(*args, **kwargs):
        raise ValueError(text)

    monkeypatch.setattr(Trainer, "train", train)
    config = tiny.write_config(tmp_path / "sft.json", tiny.sft_args(tmp_path))
    with pytest.raises(SystemExit):
        run_stage("sft", ["--config", config])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert f"differ ({differ[0]}; {differ[1]}); write auto there" in line


def test_errors_of_memory_are_told_from_others():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert ran_out_of_memory(caught.value)
    assert ran_out_of_memory(torch.OutOfMemoryError("CUDA out of memory")) and ran_out_of_memory(MemoryError())
    assert ran_out_of_memory(ImportError("x.so: failed to map segment from shared object"))
    assert not ran_out_of_memory(ImportError("No module named x"))
    assert not ran_out_of_memory(RuntimeError("shapes differ")) and not ran_out_of_memory(ValueError("bad_alloc"))


def test_the_advice_has_the_plans_numbers(tmp_path):
    test_ppo.stages(tmp_path)
    args = test_ppo.ppo_args(tmp_path, per_device_rollout_batch_size=8)
    line = memory_advice("ppo", args)
    assert (
        "lower per_device_train_batch_size (4), per_device_rollout_batch_size (8), per_device_ptx_batch_size (8)"
        in line
    )
    assert "`rlhf plan` counts 0.00 of " in line and "under single" in line and "\n" not in line
    for stage, make in (("sft", tiny.sft_args), ("reward", tiny.reward_args)):
        assert "`rlhf plan` counts" in memory_advice(stage, make(tmp_path))
    assert setup_of(args).gather and not setup_of(replace(args, ds3_gather_for_generation=False)).gather
    missing = memory_advice("sft", tiny.sft_args(tmp_path, model_name_or_path=str(tmp_path / "nowhere")))
    assert "ran out of memory; lower" in missing and "plan" not in missing


LIMITED = """
import contextlib, resource, sys
import rlhf.sft
from rlhf.cli import run_stage
with contextlib.suppress(ImportError):
    import deepspeed  # as Trainer does: the batch is what is not to fit, and not a library
in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + (96 << 20),) * 2)
run_stage("sft", sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits a process's memory as Linux does")
def test_a_stage_that_runs_out_of_memory_ends_in_one_line(tmp_path):
    registry = tiny.published(tmp_path, "base")
    args = tiny.sft_args(tmp_path, tiny.demonstrations(8) * 1000, per_device_train_batch_size=8000, max_steps=1)
    config = tiny.write_config(tmp_path / "sft.json", args)
    done = tiny.launch([sys.executable, "-c", LIMITED, "--config", config])
    assert done.returncode == 2, done.stderr[-2000:]
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert line.startswith(
        "error: sft ran out of memory; lower per_device_train_batch_size (8000), set gradient_checkpointing"
    )
    assert "Traceback" not in done.stderr
    assert not (registry.root / "tiny" / "sft").exists()
