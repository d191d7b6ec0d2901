"""What the stages share: work folders, kills and resumption, wrong input, and the ways to start a run."""

import dataclasses
import errno
import itertools
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_ppo
import tiny
import torch
from accelerate.data_loader import BatchSamplerShard
from transformers import AutoTokenizer

from rlhf import ppo, pretrain, reward, sft, training
from rlhf.cli import main, run_stage
from rlhf.config import to_dict
from rlhf.data.encode import encode_prompts
from rlhf.registry import Registry, RegistryError
from rlhf.training import COMPLETE, TrainingError, work_folder

STAGES = {  # module, folder in the registry, its parent, arguments
    "pretrain": (pretrain, "base", (), tiny.pretrain_args),
    "sft": (sft, "sft", ("base",), tiny.sft_args),
    "reward": (reward, "rm", ("sft",), tiny.reward_args),
}


@pytest.fixture
def registry(tmp_path):
    return Registry(tmp_path / "runs")


def checkpoint(args, registry, step, *, complete=True, seconds=0):
    """The folder of a checkpoint in the work folder of `args`, as a killed run leaves it."""
    folder = registry.work_dir("tiny", "sft") / training._fingerprint(args)
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(to_dict(args)))
    if complete:
        training.mark_complete(path)
        os.utime(path / COMPLETE, (1e9 + seconds, 1e9 + seconds))
    return path


# Work folders


def test_a_run_in_progress_keeps_a_second_launch_out(tmp_path, registry):
    args = tiny.sft_args(tmp_path)
    with work_folder(args, registry, "sft") as (folder, resume):
        assert resume is None
        (folder / "model").write_text("mine")
        with (
            pytest.raises(TrainingError, match=r"another process is training in .*; wait for it, or change run_name"),
            work_folder(args, registry, "sft"),
        ):
            pass
        assert (folder / "model").read_text() == "mine"  # the refused launch cleared nothing
        with work_folder(dataclasses.replace(args, seed=1), registry, "sft") as (other, _):
            assert other != folder  # other settings are another run
        assert folder.exists()
    assert not registry.root.exists()


def test_another_process_that_holds_the_folder_keeps_this_one_out(tmp_path, registry):
    args = tiny.sft_args(tmp_path)
    folder = registry.work_dir("tiny", "sft") / training._fingerprint(args)
    folder.mkdir(parents=True)
    holder = """
import filelock, sys
with filelock.FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", holder, str(folder / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(TrainingError, match="another process"), work_folder(args, registry, "sft"):
            pass
        process.kill()
    with work_folder(args, registry, "sft"):  # a lock goes with its process
        pass


def test_a_run_that_is_through_or_fails_at_its_start_leaves_nothing(tmp_path, registry):
    args = tiny.sft_args(tmp_path)
    with work_folder(args, registry, "sft") as (folder, _):
        (folder / "checkpoint-1").mkdir()
        training.mark_complete(folder / "checkpoint-1")
    assert not registry.root.exists()
    for error in (TrainingError("no data"), KeyboardInterrupt()):
        with pytest.raises(type(error)), work_folder(args, registry, "sft") as (folder, _):
            (folder / "checkpoint-1").mkdir()  # torn
            raise error
        assert not registry.root.exists()


def test_a_failure_spares_what_others_can_resume_from(tmp_path, registry):
    args = tiny.sft_args(tmp_path)
    other = checkpoint(dataclasses.replace(args, seed=1), registry, 4)
    with pytest.raises(TrainingError), work_folder(args, registry, "sft") as (folder, _):
        raise TrainingError("no data")
    assert (other / COMPLETE).exists() and not folder.exists()
    with pytest.raises(TrainingError), work_folder(args, registry, "sft") as (folder, _):
        (folder / "checkpoint-2").mkdir()
        training.mark_complete(folder / "checkpoint-2")
        raise TrainingError("the disk is full")
    assert (folder / "checkpoint-2" / COMPLETE).exists()


def test_a_new_start_clears_what_a_killed_run_left(tmp_path, registry):
    args = tiny.sft_args(tmp_path)
    old = checkpoint(args, registry, 4)
    with work_folder(args, registry, "sft") as (folder, resume):
        assert resume is None and folder == old.parent
        assert sorted(p.name for p in folder.iterdir()) == [".lock", "config.json"]


@pytest.mark.parametrize("place", ["a file", "a folder in a file", "a folder that nobody can make"])
def test_an_output_folder_that_cannot_be_written(tmp_path, place):
    (tmp_path / "file").write_text("")
    root = {"a file": tmp_path / "file", "a folder in a file": tmp_path / "file" / "runs"}.get(
        place, Path("/proc/runs")
    )
    args = tiny.pretrain_args(tmp_path, output_dir=str(root))
    with pytest.raises(TrainingError, match=rf"cannot write to {root}.*; set output_dir to a folder that can be$"):
        pretrain.run(args)


# Resuming: which checkpoint


def test_latest_is_the_newest_complete_one(tmp_path, registry):
    args = tiny.sft_args(tmp_path, resume_from_checkpoint="latest")
    checkpoint(args, registry, 8, seconds=1)  # of an attempt before
    newest = checkpoint(args, registry, 6, seconds=2)
    checkpoint(args, registry, 12, complete=False)
    with work_folder(args, registry, "sft") as (folder, resume):
        assert (resume, folder) == (newest, newest.parent)


def test_latest_without_a_checkpoint_starts_from_the_beginning(tmp_path, registry, capsys):
    tiny.published(tmp_path, "base")
    artifact = sft.run(tiny.sft_args(tmp_path, resume_from_checkpoint="latest", max_steps=1))
    assert "no complete checkpoint in" in capsys.readouterr().err
    assert artifact.ref == "tiny/sft/v1"


def test_a_checkpoint_is_refused_for_other_settings(tmp_path, registry):
    args = tiny.sft_args(tmp_path)
    path = checkpoint(args, registry, 4)
    changed = dataclasses.replace(
        args, learning_rate=0.5, max_length=32, resume_from_checkpoint="latest", logging_steps=7
    )
    with pytest.raises(TrainingError) as error, work_folder(changed, registry, "sft"):
        pass
    assert "other settings: learning_rate (0.001 -> 0.5), max_length (2048 -> 32); set them back" in str(error.value)
    assert "logging_steps" not in str(error.value) and (path / COMPLETE).exists()
    saving = {"save_steps": 3, "save_total_limit": 5}  # where a run is saved changes nothing in it
    free = dataclasses.replace(args, logging_steps=7, disable_tqdm=False, resume_from_checkpoint="latest", **saving)
    with work_folder(free, registry, "sft") as (_, resume):
        assert resume == path


def test_a_checkpoint_by_its_folder(tmp_path, registry):
    args = tiny.sft_args(tmp_path)
    earlier, later = checkpoint(args, registry, 4), checkpoint(args, registry, 6)
    torn = checkpoint(args, registry, 8, complete=False)
    with (
        pytest.raises(TrainingError, match=r"checkpoint-8 is not a complete checkpoint; `latest` takes the newest one"),
        work_folder(dataclasses.replace(args, resume_from_checkpoint=str(torn)), registry, "sft"),
    ):
        pass
    named = dataclasses.replace(args, resume_from_checkpoint=str(earlier))
    with work_folder(named, registry, "sft") as (_, resume):
        assert resume == earlier
        assert not (later / COMPLETE).exists()  # it is about to be written again


def test_a_checkpoint_whose_settings_are_gone(tmp_path, registry):
    args = tiny.sft_args(tmp_path, resume_from_checkpoint="latest")
    path = checkpoint(args, registry, 4)
    (path.parent / "config.json").unlink()
    with pytest.raises(TrainingError, match=r"config\.json cannot be read"), work_folder(args, registry, "sft"):
        pass


def test_the_newest_complete_checkpoints_are_kept_and_torn_ones_do_not_count(tmp_path, registry):
    args = tiny.sft_args(tmp_path)
    first, second, third = (checkpoint(args, registry, step, seconds=step) for step in (2, 4, 6))
    torn_before, torn_after = (checkpoint(args, registry, step, complete=False) for step in (5, 8))
    training.keep_newest(third.parent, 2)
    assert not first.exists() and not torn_before.exists()
    assert all(path.exists() for path in (second, third, torn_after))
    training.keep_newest(third.parent, 1, best=str(second))  # early stopping goes back to it
    assert (second / COMPLETE).exists() and (third / COMPLETE).exists()
    training.keep_newest(third.parent, 1)
    assert not second.exists() and (third / COMPLETE).exists()


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_goes_only_once_the_next_one_is_marked(tmp_path, monkeypatch, stage):
    """With one kept: a kill at any point of a save must leave one to resume from."""
    module, _, parents, make = STAGES[stage]
    tiny.published(tmp_path, *parents)
    there = []
    mark = training.mark_complete

    def look(path):
        there.append(sorted(found.parent.name for found in path.parent.glob(f"*/{COMPLETE}")))
        mark(path)

    monkeypatch.setattr(training, "mark_complete", look)
    module.run(make(tmp_path, max_steps=3, save_steps=1, save_total_limit=1))
    assert there == [[], ["checkpoint-1"], ["checkpoint-2"]]


@pytest.fixture
def inputs(tmp_path, registry):
    """What a run was trained from, written down, and a checkpoint to resume from."""
    resume = checkpoint(tiny.sft_args(tmp_path), registry, 2)
    models = {"model_name_or_path": ("gpt2", None)}
    data = [{"kind": "demonstrations", "name": "d", "records": 8, "sha256": "a" * 64}]
    training.pin_inputs(resume.parent, None, models, data)
    return resume, models, data


def test_a_run_resumes_from_what_it_was_trained_from(inputs):
    resume, models, data = inputs
    training.pin_inputs(resume.parent, resume, models, data)
    other = [data[0] | {"sha256": "b" * 64}]
    with pytest.raises(
        TrainingError, match=r"demonstrations of d \(8 records aaaaaaaaaaaa -> 8 records bbbbbbbbbbbb\); give"
    ):
        training.pin_inputs(resume.parent, resume, models, other)
    with pytest.raises(TrainingError, match=r"model_name_or_path \(gpt2 -> gpt3\)"):
        training.pin_inputs(resume.parent, resume, {"model_name_or_path": ("gpt3", None)}, data)
    text = {"kind": "text", "name": "t", "records": 1, "sha256": "c" * 64}
    with pytest.raises(TrainingError, match=r"text of t \(none -> 1 records cccccccccccc\)"):
        training.pin_inputs(resume.parent, resume, models, [*data, text])
    (resume.parent / training.INPUTS).write_text("{")
    with pytest.raises(TrainingError, match=r"inputs\.json cannot be read"):
        training.pin_inputs(resume.parent, resume, models, data)


def test_gc_keeps_what_an_unfinished_run_is_trained_from(registry, tmp_path):
    """By the weights: a version of that name that holds others is another one. With the folder of the run goes its claim."""

    def publish(weights):
        with registry.draft("tiny", "base") as draft:
            (draft.path / "model.safetensors").write_bytes(weights)
            return draft.publish()

    first, second, _ = map(publish, (b"1", b"2", b"3"))
    assert registry.prunable(keep=1) == [first, second]
    work = registry.work_dir("tiny", "sft") / "0123"
    work.mkdir(parents=True)
    training.pin_inputs(work, None, {"model_name_or_path": (str(first.path), first), "judge": ("gpt2", None)}, [])
    assert registry.prunable(keep=1) == [second]
    (first.path / "model.safetensors").write_bytes(b"4")
    other = {"sha256": "4" * 64, "size": 1}
    (first.path / "stage.json").write_text(json.dumps(first.manifest | {"files": {"model.safetensors": other}}))
    assert registry.prunable(keep=1) == [first, second]
    (work / training.INPUTS).write_text("{")
    with pytest.raises(RegistryError, match=r"cannot read .*work/0123/inputs\.json .*; mend it or remove .*work/0123"):
        registry.prunable(keep=1)
    shutil.rmtree(work)
    assert registry.prunable(keep=1) == [first, second]


def test_another_number_of_processes_is_refused_where_it_matters(inputs, monkeypatch):
    """A Trainer's batch grows with the processes; PPO's does not."""
    resume, models, data = inputs
    monkeypatch.setattr(training.PartialState(), "num_processes", 2)
    with pytest.raises(TrainingError, match=r"launch \(whole weights on 1 processes -> whole weights on 2 processes\)"):
        training.pin_inputs(resume.parent, resume, models, data)
    training.pin_inputs(resume.parent, None, models, data, any_processes=True)
    monkeypatch.setattr(training.PartialState(), "num_processes", 3)
    training.pin_inputs(resume.parent, resume, models, data, any_processes=True)


def test_another_strategy_that_spreads_the_weights_is_refused(inputs, monkeypatch):
    """Each writes files of its own, one for each process."""
    resume, models, data = inputs
    monkeypatch.setattr(training, "strategy_of_launch", lambda: "zero2")
    training.pin_inputs(resume.parent, None, models, data, any_processes=True)
    training.pin_inputs(resume.parent, resume, models, data, any_processes=True)
    monkeypatch.setattr(training, "strategy_of_launch", lambda: "zero3")
    with pytest.raises(TrainingError, match=r"launch \(under zero2 on 1 processes -> under zero3 on 1 processes\)"):
        training.pin_inputs(resume.parent, resume, models, data, any_processes=True)
    for name in ("single", "ddp"):
        monkeypatch.setattr(training, "strategy_of_launch", lambda name=name: name)
        training.pin_inputs(resume.parent, None if name == "single" else resume, models, data, any_processes=True)


def interrupt(*args):
    raise KeyboardInterrupt


def test_a_newer_parent_or_another_architecture_is_refused_on_resume(tmp_path, capsys):
    registry = tiny.published(tmp_path, "base", "sft")
    args = tiny.reward_args(tmp_path, max_steps=4, save_steps=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            reward, "mean_of_heads", interrupt
        )  # not by exec(): Python would then end the tests by a signal, too
        with pytest.raises(KeyboardInterrupt):
            reward.run(args)
    with registry.draft("tiny", "sft") as draft:
        shutil.copytree(registry.get("tiny/sft/v1").path, draft.path, dirs_exist_ok=True)
        (draft.path / "stage.json").unlink()
        draft.publish(parents=[registry.require("base", "tiny")])
    config = tiny.write_config(tmp_path / "config.yaml", args, resume_from_checkpoint="latest")
    assert "model_name_or_path (tiny/sft/v1 " in run_wrongly("reward", config, [], capsys)
    named = tiny.write_config(
        tmp_path / "named.yaml", args, resume_from_checkpoint="latest", model_name_or_path="tiny/sft/v1"
    )
    (checkpoint,) = registry.work_dir("tiny", "rm").glob("*/checkpoint-4")
    weights = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(weights[:100])
    assert "model.safetensors cannot be read" in run_wrongly("reward", named, [], capsys)
    other = tiny.published(tmp_path / "other", "base", architecture="opt").require("base", "tiny")
    shutil.copy(other.path / "model.safetensors", checkpoint)
    assert "its weights are of another model" in run_wrongly("reward", named, [], capsys)
    (checkpoint / "model.safetensors").write_bytes(weights)
    run_stage("reward", ["--config", named])
    assert registry.require("rm", "tiny").version == 1


# Resuming: real runs, killed

# Each run is a process of its own, forked from one that has the slow imports done, and killed after that step.
KILLED = """
import importlib, json, os, signal, sys
from rlhf import reward, sft, training
from rlhf.config import STAGE_ARGS

def kill(self, args, state, control, **kwargs):
    if state.global_step == last:
        os.kill(os.getpid(), signal.SIGKILL)

training.MarkComplete.on_step_begin = kill  # of the step after it
for stage, last, config in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        importlib.import_module(f"rlhf.{stage}").run(STAGE_ARGS[stage](**config))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(stage, os.waitstatus_to_exitcode(status), flush=True)
"""


def long_run(stage, folder, **changes):
    """Twelve steps in three epochs with a checkpoint every second one, and an evaluation after each epoch; SFT with dropout, so
    that random state matters."""
    _, _, parents, make = STAGES[stage]
    tiny.published(folder, *parents)
    records = {"sft": tiny.demonstrations, "reward": tiny.comparisons}[stage](14)
    settings = {"eval_fraction": 0.3, "max_train_samples": 8, "records": records}
    settings |= {"max_steps": 12, "save_steps": 2, "per_device_train_batch_size": 2, **changes}
    if stage == "sft":
        settings["resid_pdrop"] = 0.2
    return make(folder, **settings)


# The last step of a run -> what is there after it: two are kept.
LAST = {4: ["checkpoint-2", "checkpoint-4"], 7: ["checkpoint-4", "checkpoint-6"]}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Arguments of SFT and reward runs that were killed after step 4, which ends an epoch, and after step 7."""
    cases = [(stage, last) for stage in ("sft", "reward") for last in LAST]
    runs = {case: long_run(case[0], tmp_path_factory.mktemp("killed_{}_{}".format(*case))) for case in cases}
    choices = json.dumps([(*case, to_dict(args)) for case, args in runs.items()])
    result = tiny.launch([sys.executable, "-c", KILLED, choices])
    told = [line for line in result.stdout.splitlines() if line.startswith(("sft ", "reward "))]
    assert told == ["sft -9"] * 2 + ["reward -9"] * 2, result.stderr[-3000:]
    return runs


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The same runs, never killed."""
    return {s: STAGES[s][0].run(long_run(s, tmp_path_factory.mktemp(f"whole_{s}"))) for s in ("sft", "reward")}


@pytest.mark.parametrize("last", LAST)
@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_a_killed_run_resumes_to_the_same_bits(killed, whole, stage, last, capsys):
    module, name, _, _ = STAGES[stage]
    args = killed[stage, last]
    registry = Registry(args.output_dir)
    assert registry.list(stage=name) == []  # nothing half-made is visible
    work = next(registry.work_dir("tiny", name).iterdir())
    marked = sorted(path.parent.name for path in work.glob(f"*/{COMPLETE}"))
    assert marked == LAST[last]
    torn = work / "checkpoint-8"
    shutil.copytree(work / marked[-1], torn, ignore=shutil.ignore_patterns(COMPLETE))
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:1000])

    resumed = module.run(dataclasses.replace(args, resume_from_checkpoint="latest"))
    assert f"resuming after step {marked[-1][-1]} from " in capsys.readouterr().err
    assert resumed.weights_sha256 == whole[stage].weights_sha256
    assert set(tiny.left_over(registry, name)) <= {"evals"}  # the report of the reward model, which stays
    # Each step and each evaluation is told once, as by the run that was never killed.
    mine, theirs = ([told(line) for line in tiny.history(artifact)] for artifact in (resumed, whole[stage]))
    assert mine == theirs and [line["step"] for line in mine if "eval_loss" in line][:3] == [4, 8, 12]


def told(line):
    """A line of the history, without what the clock says, and Trainer's mean loss of the steps of this process."""
    return {name: value for name, value in line.items() if not name.endswith(("runtime", "per_second", "train_loss"))}


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("rows", range(7, 20))
def test_rows_that_accelerate_repeats_are_counted(rows, processes, size):
    """As many as its own batches, dealt to the processes, hold more than once."""
    dealt = torch.utils.data.BatchSampler(range(rows), size, drop_last=False)
    last, new = [], []
    for process in range(processes):
        *earlier, batch = BatchSamplerShard(dealt, processes, process)
        last.append(batch)
        new += itertools.chain(*earlier)
    for process, batch in enumerate(last):
        args = types.SimpleNamespace(train_batch_size=size, world_size=processes, process_index=process)
        args.dataloader_drop_last, args.train_sampling_strategy = False, "random"
        state = types.SimpleNamespace(end_of_dataloader=True)
        accelerator = types.SimpleNamespace(even_batches=True, gradient_state=state)
        trainer = types.SimpleNamespace(args=args, accelerator=accelerator, train_dataset=range(rows))
        kept = batch[: len(batch) - training.repeats(trainer)]
        new += kept
        state.end_of_dataloader = False
        assert training.repeats(trainer) == 0
        args.dataloader_drop_last, state.end_of_dataloader = True, True
        assert training.repeats(trainer) == 0
    assert sorted(new) == list(range(rows))


def test_checkpoints_change_nothing(tmp_path):
    plain = sft.run(long_run("sft", tmp_path / "plain", save_steps=None))
    saved = sft.run(long_run("sft", tmp_path / "saved"))
    assert plain.weights_sha256 == saved.weights_sha256


# Data and evaluation


def test_a_share_of_the_prompts_is_held_out(tmp_path, capsys):
    args = tiny.sft_args(tmp_path, tiny.demonstrations(40), eval_fraction=0.3, dataset_test_split="test")
    train, held_out = training.load_splits(args, "demonstrations")
    assert len(train) + len(held_out) == 40 and 4 < len(held_out) < 20
    assert not set(train["prompt"]) & set(held_out["prompt"])
    assert "a share of 0.3 is held out" in capsys.readouterr().err
    few = dataclasses.replace(args, max_train_samples=3, max_eval_samples=2)
    assert [len(part) for part in training.load_splits(few, "demonstrations")] == [3, 2]


def test_training_arguments_reach_the_trainer_and_are_checked(tmp_path):
    args = tiny.sft_args(tmp_path, training_arguments={"label_smoothing_factor": 0.1}, gradient_checkpointing=True)
    made = training.trainer_arguments(args, tmp_path)
    assert made.label_smoothing_factor == 0.1 and made.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
    assert (made.adam_beta1, made.adam_beta2, made.seed, made.save_strategy) == (0.9, 0.95, 42, "no")
    assert getattr(made, "activation_checkpointing", None) or made.gradient_checkpointing
    for given, says in (
        ({"output_dir": "elsewhere"}, "output_dir is not for here; give it as an option of the stage"),
        ({"report_to": "wandb"}, "report_to is not for here"),
        ({"max_steps": "x"}, "max_steps is 'x', and not of the kind of -1"),
        ({"adam_beta1": "abc"}, "adam_beta1 is 'abc', and not of the kind of 0.9"),
        ({"average_tokens_across_devices": 1}, "average_tokens_across_devices is 1, and not of the kind of True"),
    ):
        with pytest.raises(TrainingError, match=f"^training_arguments: {says}"):
            training.trainer_arguments(dataclasses.replace(args, training_arguments=given), tmp_path)
    given = {"max_grad_norm": 1, "use_cpu": True, "eval_delay": 1}
    whole = dataclasses.replace(args, training_arguments=given)
    assert training.trainer_arguments(whole, tmp_path).max_grad_norm == 1
    with pytest.raises(TrainingError, match="TrainingArguments has no 'warmup'"):
        training.trainer_arguments(dataclasses.replace(args, training_arguments={"warmup": 1}), tmp_path)
    with pytest.raises(TrainingError, match=r"^TrainingArguments: sometimes is not"):
        training.trainer_arguments(
            dataclasses.replace(args, training_arguments={"save_strategy": "sometimes"}), tmp_path
        )


def test_a_disk_that_is_full_at_the_start_leaves_nothing(tmp_path, monkeypatch):
    registry = tiny.published(tmp_path, "base")
    write = Path.write_text

    def full(self, *args, **kwargs):
        if self.name == "config.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        sft.run(tiny.sft_args(tmp_path))
    assert not (registry.root / "tiny" / "sft").exists()


def test_tracker_files_stay_when_the_work_folder_goes(tmp_path):
    pytest.importorskip("tensorboard")
    registry = tiny.published(tmp_path, "base")
    for seed in (1, 2):
        sft.run(tiny.sft_args(tmp_path, report_to=["tensorboard"], max_steps=1, seed=seed))
    assert tiny.left_over(registry, "sft") == ["logs"]
    runs = {path.parent for path in (registry.root / "tiny" / "sft" / "logs").rglob("events.out.tfevents.*")}
    assert len(runs) == 2


def test_processes_that_do_not_synchronise_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainingError, match="2 processes were launched but they do not synchronise"):
        training.check_processes()


# Wrong input: one line and status 2

SFT_LINE = '{"prompt": "a", "completion": "b"}\n'
RM_LINE = '{"prompt": "a", "completions": ["b", "c"], "ranks": [1, 2]}\n'
LONG = "x " * 200


def wrong_inputs():
    """(stage, what the data file holds or None, words on the command line, what the error says)."""
    missing = {"pretrain": "text", "sft": "demonstrations", "reward": "comparisons"}
    for stage, (_, _, parents, _) in STAGES.items():
        data = f"{missing[stage]}.jsonl"
        yield stage, None, ["--run_name", "tiny", "--dataset_name", "nowhere.jsonl"], "nowhere.jsonl"
        yield stage, None, ["--learning_rat", "1"], "did you mean --learning_rate?"
        yield stage, None, ["--learning_rate", "quick"], "--learning_rate: expected float, got 'quick'"
        yield stage, None, ["--training_arguments", "{warmup: 1}"], "has no 'warmup'"
        yield stage, None, ["--lr_scheduler_type", "upwards"], "upwards"
        yield stage, None, ["--report_to", "nonsense"], "report_to: nonsense is no tracker that this stage knows: "
        yield (
            stage,
            None,
            ["--report_to", "mlflow"],
            "report_to: mlflow is not installed; pip install mlflow, or leave it out",
        )
        yield stage, None, ["--optim", "best"], "best"
        yield stage, "", [], data
        yield stage, "{\n", [], f"{data}:1: malformed JSON"
        if parents:
            yield stage, None, ["--run_name", "empty"], f"no {parents[0]} in run 'empty'"
            yield stage, None, ["--model_name_or_path", "empty"], "cannot load empty"
    yield "pretrain", json.dumps({"text": "ox"}), [], "fewer than one block of 16"
    yield "pretrain", None, ["--tokenizer_name", "nowhere"], "cannot load nowhere"
    yield "sft", SFT_LINE + '{"prompt": "a"}\n', [], "demonstrations.jsonl:2"
    yield "sft", json.dumps({"prompt": LONG, "completion": "b"}), [], "all 1 demonstrations are over 64 tokens"
    yield "sft", SFT_LINE, ["--max_prompt_length", "0"], "max_prompt_length"
    yield "reward", RM_LINE + RM_LINE.replace("[1, 2]", "[1]"), [], "comparisons.jsonl:2"
    yield "reward", RM_LINE + RM_LINE.replace("[1, 2]", "[0, 1.5]"), [], "comparisons.jsonl:2"
    yield "reward", RM_LINE.replace('"a"', json.dumps(LONG)), [], "all 1 comparisons are over 64 tokens"


def run_wrongly(stage, config, words, capsys):
    """The one line that run_stage ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        run_stage(stage, ["--config", config, *words])
    assert exit.value.code == 2
    return one_error_line(capsys.readouterr().err)


def one_error_line(stderr):
    lines = stderr.splitlines()
    assert [line for line in lines if line.startswith("error:")] == lines[-1:], stderr
    assert "Traceback" not in stderr
    return lines[-1]


@pytest.mark.parametrize(
    "stage, content, words, said", [pytest.param(*case, id=f"{case[0]}: {case[3]}") for case in wrong_inputs()]
)
def test_wrong_input_is_one_line_and_leaves_nothing(tmp_path, capsys, stage, content, words, said):
    _, name, parents, make = STAGES[stage]
    registry = tiny.published(tmp_path, *parents)
    args = make(tmp_path)
    if content is not None:
        Path(args.dataset_name).write_text(content)
    config = tiny.write_config(tmp_path / "config.yaml", args)
    assert said in run_wrongly(stage, config, words, capsys)
    assert not (registry.root / "tiny" / name).exists()
    assert not (registry.root / "empty").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_wrong_configs_and_folders_are_one_line_too(tmp_path, capsys, stage):
    _, name, parents, make = STAGES[stage]
    registry = tiny.published(tmp_path, *parents)
    args = make(tmp_path)
    unknown = tiny.write_config(tmp_path / "unknown.yaml", args, learning_rat=1.0)
    assert "unknown key 'learning_rat'; did you mean learning_rate?" in run_wrongly(stage, unknown, [], capsys)
    typed = tiny.write_config(tmp_path / "typed.yaml", args, logging_steps=2.7)
    assert "logging_steps: expected int, got 2.7" in run_wrongly(stage, typed, [], capsys)
    registry.root.joinpath("tiny").mkdir(parents=True, exist_ok=True)
    (registry.root / "tiny" / name).write_text("a file where the stage's folder belongs")
    config = tiny.write_config(tmp_path / "config.yaml", args)
    assert "set output_dir to a folder that can be" in run_wrongly(stage, config, [], capsys)


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_a_parent_that_was_tampered_with(tmp_path, capsys, stage):
    """Its weights, then its tokenizer with the manifest mended to match: no file tells, the tokenizer's own hash does."""
    _, name, (parent,), make = STAGES[stage]
    registry = tiny.published(tmp_path, parent)
    config = tiny.write_config(tmp_path / "config.yaml", make(tmp_path))
    folder = registry.require(parent, "tiny").path
    tokenizer = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(tokenizer.replace('"the"', '"hte"', 1).replace('"r"', '"\u00c0"', 1))
    assert (folder / "tokenizer.json").read_text() != tokenizer
    assert "has changed since it was published" in run_wrongly(stage, config, [], capsys)
    manifest = json.loads((folder / "stage.json").read_text())
    data = (folder / "tokenizer.json").read_bytes()
    manifest["files"]["tokenizer.json"] = {"sha256": training.hashlib.sha256(data).hexdigest(), "size": len(data)}
    (folder / "stage.json").write_text(json.dumps(manifest))
    assert "the tokenizer in" in run_wrongly(stage, config, [], capsys)
    assert not (registry.root / "tiny" / name).exists()


def test_scripts_end_in_one_line_and_status_2(tmp_path):
    """Real processes, side by side: a missing stage, a wrong type, an unknown key."""
    sft_config = tiny.write_config(tmp_path / "sft.yaml", tiny.sft_args(tmp_path))
    typed = tiny.write_config(tmp_path / "reward.yaml", tiny.reward_args(tmp_path), seed="one")
    unknown = tiny.write_config(tmp_path / "pretrain.yaml", tiny.pretrain_args(tmp_path), lr=1)
    runs = {
        "sft": (sft_config, "no base in run 'tiny'"),
        "reward": (typed, "seed: expected int, got 'one'"),
        "pretrain": (unknown, "unknown key 'lr'"),
    }
    started = {
        stage: subprocess.Popen(
            [sys.executable, f"scripts/{stage}.py", "--config", config],
            cwd=tiny.ROOT,
            env=tiny.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for stage, (config, _) in runs.items()
    }
    for stage, process in started.items():
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == 2, stderr
        assert runs[stage][1] in one_error_line(stderr)
    assert not (tmp_path / "runs").exists()


# The ways to start a run


def test_make_without_a_recipe_launches_the_demo_s():
    """With RUN=demo, too, which the messages about missing stages say; words of one's own are a run of one's own."""

    def launched(*words):
        done = tiny.launch(["make", "-n", "-o", "setup", *words])
        assert done.returncode == 0, done.stderr
        return done.stdout.split("scripts/")[1]

    assert launched("ppo").split() == launched("ppo", "RUN=demo").split() == ["ppo.py"]
    assert launched("rm", "RUN=hh", "CONFIG=a.yaml").split() == ["reward.py", "--config", "a.yaml", "--run_name", "hh"]
    own = launched("sft", "RUN=demo", "ARGS=--max_steps 3").split()
    assert own == ["sft.py", "--run_name", "demo", "--max_steps", "3"]


def test_conversations_are_their_text_in_every_stage_and_their_template_is_published(tmp_path):
    """Each stage trained on messages gives bit for bit the weights of the one trained on the text that the template makes of
    them, and so does evaluation; plain transformers writes the same tokens from the published folder."""
    asked = [f"Feed {i}" for i in range(16)]
    ways = {
        "messages": lambda text: [{"role": "user", "content": text}],
        "text": lambda text: f"User: {text}\n\nAssistant:\n",
    }
    made = {}
    for way, prompt in ways.items():
        folder = tmp_path / way
        registry = tiny.published(folder, "base")
        rankings = [{**r, "prompt": prompt(text)} for r, text in zip(tiny.comparisons(16, sizes=(2, 3)), asked)]
        shown = [{**r, "prompt": prompt(text)} for r, text in zip(tiny.demonstrations(16), asked)]
        sft.run(tiny.sft_args(folder, shown))
        reward.run(tiny.reward_args(folder, rankings))
        prompts = tiny.write_lines(folder / "asked.jsonl", [{"prompt": prompt(text)} for text in asked])
        ppo.run(test_ppo.ppo_args(folder, dataset_name=prompts, max_prompt_length=40))
        made[way] = [registry.require(stage, "tiny") for stage in ("sft", "rm", "ppo")]
        new = tiny.write_lines(folder / "new.jsonl", rankings)
        assert main(["eval", "tiny/rm", "--root", str(registry.root), "--data", new]) == 0
    for one, other in zip(*made.values()):
        assert tiny.largest_difference(one, other) == 0, one.ref
        published = AutoTokenizer.from_pretrained(one.path)
        conversation = [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Ho"},
            *ways["messages"]("Bye"),
        ]
        ids = published.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
        assert [ids] == encode_prompts(published, [conversation])
    scores = [
        Registry(tmp_path / way / "runs").evals_dir(found[1]) / "rm-new.jsonl.json" for way, found in made.items()
    ]
    one, other = (json.loads(path.read_text()) for path in scores)
    assert one["accuracy"] == other["accuracy"] and one["margins"] == other["margins"]


@pytest.mark.slow
def test_three_ways_to_run_give_one_model(tmp_path):
    """`accelerate launch`, `make` and Python: same settings, same seed, one thread each, same bits."""
    accelerate = tiny.program("accelerate")
    if not Path(accelerate).exists() or shutil.which("make") is None:
        pytest.skip("needs make, and accelerate in the environment of the tests")

    def config(way):
        tiny.published(tmp_path / way, "base")
        return tiny.write_config(tmp_path / f"{way}.yaml", tiny.sft_args(tmp_path / way, resid_pdrop=0.2))

    options = ["--num_processes", "1", "--num_cpu_threads_per_process", "1"]
    launched = tiny.launch([accelerate, "launch", *options, "scripts/sft.py", "--config", config("launch")])
    assert launched.returncode == 0, launched.stderr[-3000:]
    # -o: the environment of the tests is set up already, so that make installs nothing.
    settings = [f"VENV={sys.prefix}", "-o", f"{sys.prefix}/.made", f"ACCELERATE_ARGS={' '.join(options)}"]
    made = tiny.launch(["make", "sft", f"CONFIG={config('make')}", *settings])
    assert made.returncode == 0, made.stderr[-3000:]
    config("python")
    called = sft.run(tiny.sft_args(tmp_path / "python", resid_pdrop=0.2))
    results = [Registry(tmp_path / way / "runs").require("sft", "tiny") for way in ("launch", "make")]
    assert {artifact.weights_sha256 for artifact in results} == {called.weights_sha256}
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("target, script", [("pretrain", "pretrain"), ("sft", "sft"), ("rm", "reward"), ("ppo", "ppo")])
def test_make_launches_the_script_with_what_it_is_given(target, script):
    if shutil.which("make") is None:
        pytest.skip("needs make")
    words = [
        "CONFIG=a.yaml",
        "RUN=hh",
        "ARGS=--seed 3",
        "VENV=env",
        "-o",
        "env/.made",
        "ACCELERATE_ARGS=--num_processes 1",
    ]
    result = tiny.launch(["make", "-n", target, *words])
    (command,) = [line for line in result.stdout.splitlines() if "scripts/" in line]
    assert command.split() == [
        *("env/bin/accelerate", "launch", "--quiet", "--num_processes", "1", f"scripts/{script}.py"),
        *("--config", "a.yaml", "--run_name", "hh", "--seed", "3"),
    ]


@pytest.mark.parametrize(("processes", "size"), [(1, 16), (2, 8), (4, 4)])
def test_batches_of_like_length_are_drawn_for_a_step_of_all_processes(processes, size):
    args = SimpleNamespace(
        train_batch_size=size, gradient_accumulation_steps=2, world_size=processes, seed=3, data_seed=None
    )
    one = SimpleNamespace(args=SimpleNamespace(**vars(args) | {"train_batch_size": 16, "world_size": 1}))
    lengths = [(7 * i) % 40 + 1 for i in range(500)]  # enough that the size of a step changes the order
    found, expected = (list(training.LikeLengths(t, lengths)) for t in (SimpleNamespace(args=args), one))
    assert found == expected


@pytest.mark.parametrize("stage", [sft, reward])
def test_batches_of_like_length_are_the_same_after_a_resume_in_a_later_epoch(tmp_path, monkeypatch, stage):
    tiny.published(tmp_path, "base", "sft")
    make, records = {
        sft: (tiny.sft_args, tiny.demonstrations(12)),
        reward: (tiny.reward_args, tiny.comparisons(12)),
    }[stage]
    grouped = {"train_sampling_strategy": "group_by_length"}
    how = {"max_steps": -1, "num_train_epochs": 3, "save_steps": 1, "per_device_train_batch_size": 2}
    args = make(tmp_path, records, training_arguments=grouped, eval_fraction=0.0, **how)
    orders, draw = [], training.LikeLengths.__iter__
    monkeypatch.setattr(
        training.LikeLengths, "__iter__", lambda self: iter(orders.append(list(draw(self))) or orders[-1])
    )
    whole, first = stage.run(args), list(orders)
    assert len(first) == 3 and len(set(map(tuple, first))) == 3  # each epoch its own
    keep = training.MarkComplete.on_step_end

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 9:  # in the second epoch of six steps
            raise KeyboardInterrupt
        return keep(self, args, state, control, **kwargs)

    monkeypatch.setattr(training.MarkComplete, "on_step_end", stop)
    with pytest.raises(KeyboardInterrupt):
        stage.run(args)
    monkeypatch.setattr(training.MarkComplete, "on_step_end", keep)
    orders.clear()
    resumed = stage.run(dataclasses.replace(args, resume_from_checkpoint="latest"))
    assert orders[-2:] == first[1:]
    assert resumed.weights_sha256 == whole.weights_sha256
