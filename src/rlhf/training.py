"""What the stages share: processes, trainer arguments, work folders with resumable checkpoints, and publication.

A stage reads: prepare data and model, train, evaluate, `publish`. What is the same in all of them is here; nothing here knows
what a stage optimises.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback, TrainingArguments, get_scheduler
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import IntervalStrategy

from rlhf import RLHFError, adapters, card, curves, hub
from rlhf.bases import check_optimizer
from rlhf.config import StageArgs, TrainerArgs, to_dict
from rlhf.data import load, split_by_key
from rlhf.engine import state_dict
from rlhf.launch import launched_with, strategy_of_launch
from rlhf.models import quiet
from rlhf.registry import INPUTS, Artifact, MissingStage, Registry

COMPLETE = "complete"  # marker file of a checkpoint, written last: one without it is torn and is never resumed from
REFERENCE = r"[^/]+/(base|sft|rm|ppo)(/v\d+|@[^/]+)?"
AVERAGE = r"/[^/]+/ppo/v\d+/ema$"  # of a version's weights
# Choices that do not change what is trained, so that a resumed run may differ in them.
FREE_CHOICES = {
    "resume_from_checkpoint",
    "report_to",
    "disable_tqdm",
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "sample_steps",
    "output_dir",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
    "license",
    "dataset_license",
}
# INPUTS, beside the checkpoints, knows what these stood for, which is what counts.
MODEL_PATHS = {"model_name_or_path", "sft_model_path", "reward_model_path", "critic_path"}


# Before a stage of this process set them for itself.
USERS_LOG_FOLDER = os.environ.get("TENSORBOARD_LOGGING_DIR")
LAUNCHED_PRECISION = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


class TrainingError(RLHFError):
    """The run cannot start or go on as asked."""


# ----------------------------------------------------------------------------------------------------------- processes


def is_main() -> bool:
    """Whether this is the first process of the launch; works before torch.distributed is set up."""
    return int(os.environ.get("RANK", "0")) == 0


def say(*words: Any) -> None:
    """A line for people, from the first process only, on stderr where progress bars are too."""
    if is_main():
        # In one write: under a launcher python is unbuffered, and another process's line would come before the line's end.
        sys.stderr.write(" ".join(map(str, words)) + "\n")
        sys.stderr.flush()


def needs_gloo() -> bool:
    """CPU processes of one launch find each other through gloo, and only if it is named."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available()


def check_processes() -> None:
    """Refuses several processes that would each train alone. Call once the distributed state is set up."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    state = PartialState()
    if world > 1 and (state.distributed_type == DistributedType.NO or state.num_processes != world):
        raise TrainingError(
            f"{world} processes were launched but they do not synchronise; on CPUs launch with "
            "--config_file configs/accelerate/cpu_ddp.yaml"
        )


def synchronise() -> None:
    """Waits for all processes, where there are several."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def end_processes() -> None:
    """Ends the processes' group, after which none of them can wait for another. Called by all of them, when all is done."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        synchronise()
        torch.distributed.destroy_process_group()


# --------------------------------------------------------------------------------------------------- trainer arguments

SHARED = [
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "bf16",
    "logging_steps",
    "save_total_limit",
    "seed",
    "disable_tqdm",
    "run_name",
]


def trainer_arguments(
    args: TrainerArgs, work: Path, cls: type[TrainingArguments] = TrainingArguments, **more: Any
) -> TrainingArguments:
    """Our choices as transformers' arguments. `training_arguments` of the config comes last: it may set anything."""
    values: dict[str, Any] = {name: getattr(args, name) for name in SHARED}
    values |= {
        "output_dir": str(work),
        "optim": optimizer_name(args),
        "lr_scheduler_kwargs": args.scheduler_kwargs,
        "report_to": trackers(args) or "none",
        "eval_strategy": _eval_strategy(args),
        "eval_steps": args.eval_steps,
        "save_strategy": "no" if args.save_steps is None else "steps",
        "save_steps": args.save_steps or 500,
        "save_total_limit": None,  # MarkComplete removes them: Trainer would before the new one is marked
        "ddp_backend": "gloo" if needs_gloo() else None,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "restore_callback_states_from_checkpoint": False,
    }
    if args.bf16 and not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        values["use_cpu"] = True  # transformers takes bfloat16 on a CPU only where it is told that none else is meant
    values |= more
    check_optimizer(args.optim)
    known = cls.__dataclass_fields__
    new_name = "activation_checkpointing" in known  # what transformers calls it since 5.20
    values["activation_checkpointing" if new_name else "gradient_checkpointing"] = args.gradient_checkpointing
    for name in args.training_arguments:
        if name not in known:
            raise TrainingError(f"training_arguments: {cls.__name__} has no {name!r}")
        if name in ("deepspeed", "fsdp", "fsdp_config"):
            raise TrainingError(f"training_arguments: {name} is the launch's; choose a file of configs/accelerate")
        if name in ("output_dir", "resume_from_checkpoint", "report_to"):
            raise TrainingError(f"training_arguments: {name} is not for here; give it as an option of the stage")
        default, value = known[name].default, args.training_arguments[name]
        nothing = value is None and "None" in str(known[name].type)
        if (
            isinstance(default, (int, float))
            and not nothing
            and (not isinstance(value, (int, float)) or isinstance(default, bool) != isinstance(value, bool))
        ):
            raise TrainingError(f"training_arguments: {name} is {value!r}, and not of the kind of {default!r}")
    check_scheduler(args)
    settle_precision(args)
    if USERS_LOG_FOLDER is None:
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(log_folder(work))
    try:
        return cls(**values | args.training_arguments)
    except (ValueError, TypeError) as error:
        raise TrainingError(f"{cls.__name__}: {' '.join(str(error).split())}") from error


def settle_precision(args: StageArgs) -> None:
    """The stage's `bf16` decides, and not what the launcher was told: else a run would not be what its manifest says."""
    if LAUNCHED_PRECISION not in ("no", "bf16" if args.bf16 else "no"):
        say(f"the launcher's mixed precision ({LAUNCHED_PRECISION}) is not used; give --bf16 true for bfloat16")
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if args.bf16 else "no"
    dtype = getattr(args, "dtype", "float32")
    # DeepSpeed and FSDP keep float32 besides, and adapters are float32.
    kept = getattr(args, "use_peft", False) or launched_with("DEEPSPEED") or launched_with("FSDP")
    if dtype in ("bfloat16", "float16") and not kept:
        say(f"dtype {dtype}: small steps of weights in 16 bits are lost; give --dtype float32 --bf16 true")


def check_scheduler(args: TrainerArgs) -> None:
    """Refuses a schedule, or arguments that it does not take, before anything is trained."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, 0, 10, dict(args.scheduler_kwargs))
    except (TypeError, ValueError) as error:
        raise TrainingError(f"lr_scheduler_type {args.lr_scheduler_type}: {' '.join(str(error).split())}") from error


def optimizer_name(args: StageArgs) -> str:
    """transformers' name of the optimiser: AdamW's fused kernels where there is CUDA, and beside Muon."""
    if args.optim == "muon":
        return "adamw_torch_fused"
    return "adamw_torch_fused" if args.optim == "adamw_torch" and torch.cuda.is_available() else args.optim


def log_folder(work: Path) -> Path:
    """Where trackers write their files: beside the versions, because the work folder goes once the run is through."""
    return work.parent.parent / "logs" / work.name


def _eval_strategy(args: TrainerArgs) -> str:
    if args.eval_fraction == 0 and args.dataset_test_split is None:
        return "no"
    return "epoch" if args.eval_steps is None else "steps"


def held_out_or_none(training_args: TrainingArguments, records: Any) -> Any:
    """`records`, or None where a small data set left none, and then the trainer is told that it has nothing to evaluate."""
    if len(records):
        return records
    training_args.eval_strategy = IntervalStrategy.NO
    return None


def trackers(args: StageArgs) -> list[str]:
    """Names of the trackers asked for; `none` counts for nothing, as in transformers."""
    return [name for name in args.report_to if name != "none"]


# ----------------------------------------------------------------------------------------------------------- data, models


def check_trackers(args: StageArgs) -> None:
    """Refuses a tracker that is not known, or not installed."""
    if not trackers(args):
        return  # what follows imports much
    if isinstance(args, TrainerArgs):
        from transformers.integrations import get_available_reporting_integrations
        from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

        known, installed = set(INTEGRATION_TO_CALLBACK), set(get_available_reporting_integrations())
    else:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

        known, installed = set(LOGGER_TYPE_TO_CLASS), {tracker.value for tracker in get_available_trackers()}
    for name in trackers(args):
        if name != "all" and name not in known:
            raise TrainingError(f"report_to: {name} is no tracker that this stage knows: {', '.join(sorted(known))}")
        if name != "all" and name not in installed:
            raise TrainingError(f"report_to: {name} is not installed; pip install {name}, or leave it out")


def open_registry(args: StageArgs) -> Registry:
    """The registry that the stage works in. A push or tracker that could not be made is refused here, before any work."""
    check_trackers(args)
    if args.push_to_hub:
        hub.check_ready(str(args.hub_model_id))
    return Registry(args.output_dir)


def resolve(registry: Registry, path: str | None, run: str, stage: str) -> tuple[str, Artifact | None]:
    """Where to load from, and the artifact it is: `path` as RUN/STAGE[/vN], a folder or a Hub id; the run's own when None."""
    if path is None:
        artifact = registry.require(stage, run)
    else:
        try:
            is_version, exists = (Path(path) / "stage.json").is_file(), Path(path).exists()
        except OSError as error:
            raise TrainingError(f"cannot read {path[:300]}: {error.strerror}; give another path") from error
        if exists and not is_version and re.search(AVERAGE, str(Path(path).resolve())):
            return path, registry.get(Path(path).resolve().parent)
        if not is_version and (exists or not re.fullmatch(REFERENCE, path)):
            return path, None
        try:
            artifact = registry.get(path)
        except MissingStage as error:
            hint = "" if path.count("/") > 1 or "@" in path else f"; a Hub model of that name: rlhf pull {path}"
            raise MissingStage(f"{error}{hint}") from None
    return str(artifact.path), artifact


def load_splits(args: StageArgs, kind: str, eval_fraction: float | None = None) -> tuple[Dataset, Dataset]:
    """Training and held-out records of `kind`: the test split where there is one, else a stable share of the prompts."""
    name = args.dataset_name
    if name is None:
        raise TrainingError(f"no data: give --dataset_name, or --config configs/{args.stage}/demo.yaml")
    where: dict[str, Any] = {
        "data_dir": args.dataset_dir,
        "config_name": args.dataset_config,
        "format": args.dataset_format,
        "on_error": args.on_error,
    }
    where |= local_overrides(name)
    train = load(kind, name, split=args.dataset_train_split, **where)
    if args.dataset_test_split is not None and not Path(name).is_file():
        held_out = load(kind, name, split=args.dataset_test_split, **where)
    else:
        if args.dataset_test_split is not None:
            say(
                f"dataset_test_split: {name} is one file and has no splits; a share of {args.eval_fraction:g} is held out"
            )
        train, held_out = split_by_key(train, args.eval_fraction if eval_fraction is None else eval_fraction)
    return _at_most(train, args.max_train_samples), _at_most(held_out, args.max_eval_samples)


def local_overrides(name: str) -> dict[str, None]:
    """What a recipe for a Hub data set says of it that does not hold where it is pointed at a local file or folder."""
    if not Path(name).exists():
        return {}
    return {"config_name": None} | ({"data_dir": None} if Path(name).is_file() else {})


def load_text(args: Any) -> Dataset:
    """The raw text of a pretraining mix: ptx_dataset_name."""
    where = {"config_name": args.ptx_dataset_config, "split": args.ptx_dataset_split, "on_error": args.on_error}
    return load("text", args.ptx_dataset_name, **where | local_overrides(args.ptx_dataset_name))


def _at_most(dataset: Dataset, count: int | None) -> Dataset:
    return dataset if count is None else dataset.select(range(min(count, len(dataset))))


def keep_fitting(kind: str, fits: Sequence[bool], limit: int, *, needed: bool = True) -> list[int]:
    """Indices of the records that fit, with a line that counts those that do not. Raises when none is left but is needed."""
    kept = [i for i, fit in enumerate(fits) if fit]
    if len(kept) < len(fits):
        say(f"dropped {len(fits) - len(kept)} of {len(fits)} {kind}: over {limit} tokens")
    if needed and fits and not kept:
        raise TrainingError(
            f"all {len(fits)} {kind} are over {limit} tokens; raise the limit, or take a model with more context"
        )
    return kept


class Rows(torch.utils.data.Dataset):
    """Tokenised records in memory, as a Trainer takes them."""

    def __init__(self, rows: Sequence[dict[str, Any]]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


# ---------------------------------------------------------------------------------------- work folders and checkpoints


@contextlib.contextmanager
def work_folder(args: StageArgs, registry: Registry, stage: str) -> Iterator[tuple[Path, Path | None]]:
    """The folder of this training run and the checkpoint to resume from, if any; the folder goes once the run is through.

    One folder for one configuration, so that attempts with other settings never mix. Resuming says which settings differ
    from the checkpoint's, and refuses. A lock keeps a second launch of the same run out.
    """
    parent = registry.work_dir(args.run_name, stage)
    folder = parent / _fingerprint(args)
    resume = _find_checkpoint(args, parent)
    if resume is not None:
        folder = resume.parent
        _refuse_changed_settings(args, folder)
        say(f"resuming after {'rollout' if stage == 'ppo' else 'step'} {step_of(resume)} from {resume}")
    if not is_main():
        yield folder, resume
        synchronise()  # a next run in this process must not find a folder that is just going
        return
    with _locked(folder):
        try:
            if resume is None:
                _clear(folder)
                (folder / "config.json").write_text(json.dumps(to_dict(args), indent=1))
            else:
                _unmark_later(resume)
            yield folder, resume
        except BaseException:
            if not any(folder.glob(f"checkpoint-*/{COMPLETE}")):
                _remove(folder, registry.root)
            raise
        # Under the lock: after it, the folder may be another launch's already.
        _remove(folder, registry.root)
    synchronise()


def _remove(folder: Path, root: Path) -> None:
    """Removes a work folder, and the folders above it that are empty without it."""
    shutil.rmtree(folder, ignore_errors=True)
    for parent in folder.parents:
        if parent == root.parent:
            return
        with contextlib.suppress(OSError):
            parent.rmdir()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise TrainingError(f"another process is training in {folder}; wait for it, or change run_name") from None
    except OSError as error:  # of the folder, or of any above it
        raise TrainingError(
            f"cannot write to {folder}: {error.strerror}; set output_dir to a folder that can be"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _clear(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != ".lock":
            entry.unlink()


def _unmark_later(resume: Path) -> None:
    """Checkpoints after the one resumed from will be written again: torn until then."""
    for marker in resume.parent.glob(f"checkpoint-*/{COMPLETE}"):
        if step_of(marker.parent) > step_of(resume):
            marker.unlink()


def _choices(args: StageArgs | dict) -> dict[str, Any]:
    values = args if isinstance(args, dict) else to_dict(args)
    return {name: value for name, value in values.items() if name not in FREE_CHOICES}


def _fingerprint(args: StageArgs) -> str:
    return hashlib.sha256(json.dumps(_choices(args), sort_keys=True).encode()).hexdigest()[:12]


def complete_checkpoints(parent: Path) -> list[Path]:
    """Checkpoints below `parent` that were written to their end, oldest first."""
    found = [marker.parent for marker in parent.glob(f"*/checkpoint-*/{COMPLETE}")]
    return sorted(found, key=lambda path: ((path / COMPLETE).stat().st_mtime_ns, step_of(path)))


def step_of(checkpoint: Path) -> int:
    """The N of checkpoint-N."""
    match = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return int(match[1]) if match else -1


def _find_checkpoint(args: StageArgs, parent: Path) -> Path | None:
    wanted = args.resume_from_checkpoint
    if wanted is None:
        return None
    if wanted == "latest":
        found = complete_checkpoints(parent)
        if not found:
            say(f"no complete checkpoint in {parent}: starting from the beginning")
        return found[-1] if found else None
    path = Path(wanted)
    if not (path / COMPLETE).is_file():
        raise TrainingError(
            f"resume_from_checkpoint: {path} is not a complete checkpoint; `latest` takes the newest one"
        )
    return path


def _refuse_changed_settings(args: StageArgs, folder: Path) -> None:
    try:
        before, now = _choices(json.loads((folder / "config.json").read_text())), _choices(args)
    except (OSError, ValueError) as error:
        raise TrainingError(
            f"cannot resume from {folder}: its config.json cannot be read ({error}); start anew without "
            "--resume_from_checkpoint"
        ) from None
    if before.keys() != now.keys():
        some = ", ".join(sorted(before.keys() ^ now.keys())[:3])
        raise TrainingError(
            f"cannot resume from {folder}: another stage, or another version of rlhf, wrote it (settings that one of them has "
            f"only: {some} …); start anew without --resume_from_checkpoint"
        )
    known = MODEL_PATHS if (folder / INPUTS).is_file() else set()
    changed = [
        f"{key} ({before[key]!r} -> {now[key]!r})" for key in now if key not in known and before[key] != now[key]
    ]
    if changed:
        raise TrainingError(
            f"cannot resume from {folder} with other settings: {', '.join(changed)}; set them back, or start anew without "
            "--resume_from_checkpoint"
        )


def pin_inputs(
    work: Path,
    resume: Path | None,
    models: Mapping[str, tuple[str, Artifact | None]],
    data: Sequence[dict[str, Any]],
    *,
    any_processes: bool = False,
) -> None:
    """Writes down what a run is trained from, and refuses to resume it from anything else: a newer version, other records.

    models: by the option that names them, where they were loaded from and the version that is, or, where a checkpoint does not
    hold all of it, its `fingerprint_of_model`; data: fingerprints. any_processes: the number of processes changes nothing;
    checkpoints of DeepSpeed and FSDP are read by as many as wrote them, under the same strategy.
    """
    now = {name: path if a is None else _told(a, path) for name, (path, a) in models.items()}
    strategy = strategy_of_launch()
    whole = strategy in ("single", "ddp")
    now["launch"] = "whole weights" if whole else f"under {strategy}"
    if not (whole and any_processes):
        now["launch"] += f" on {PartialState().num_processes} processes"
    for found in data:
        now[f"{found['kind']} of {found['name']}"] = f"{found['records']} records {found['sha256'][:12]}"
    if resume is None:
        if is_main():
            (work / INPUTS).write_text(json.dumps(now, indent=1), encoding="utf-8")
        return
    if not (work / INPUTS).is_file():
        return  # of an rlhf that did not write it: the paths of models have been compared as settings
    try:
        before = json.loads((work / INPUTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(
            f"cannot resume from {resume}: its {INPUTS} cannot be read ({error}); start anew without --resume_from_checkpoint"
        ) from None
    names = [
        name for name in [*now, *(name for name in before if name not in now)] if before.get(name) != now.get(name)
    ]
    if names:
        told = ", ".join(f"{name} ({before.get(name, 'none')} -> {now.get(name, 'none')})" for name in names)
        raise TrainingError(
            f"cannot resume from {resume}, which was trained from something else: {told}; give what it was trained from, or "
            "start anew without --resume_from_checkpoint"
        )


def _told(artifact: Artifact, path: str) -> str:
    """A version, or the average in it, as `Registry.prunable` reads it."""
    part = Path(path).name
    return f"{artifact.ref} {artifact.weights_sha256[:12]}" + ("" if part == artifact.path.name else f" {part}")


def refuse_other_architecture(model: Any, checkpoint: Path | None) -> None:
    """Refuses a checkpoint whose weights are not those of `model`; one whose weights DeepSpeed keeps is left to DeepSpeed."""
    if checkpoint is None:
        return
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    ours = {name.replace("_orig_mod.", ""): list(getattr(t, "ds_shape", t.shape)) for name, t in tensors}
    for path in sorted(checkpoint.glob("model*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                theirs = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  # no mapping
        except (OSError, SafetensorError) as error:
            raise TrainingError(
                f"cannot resume from {checkpoint}: {path.name} cannot be read ({error}); take an earlier checkpoint"
            ) from None
        for name, shape in theirs.items():
            here = ours.get(name.replace("_orig_mod.", ""))
            if here != list(shape):
                raise TrainingError(
                    f"cannot resume from {checkpoint}: its weights are of another model ({name} has shape {list(shape)} "
                    f"there and {here or 'is not'} here); give the model that it was trained from, or start anew"
                )


class MarkComplete(TrainerCallback):
    """Marks a Trainer's checkpoint once every process has written its part of it; then the oldest go.

    Trainer would save an epoch's last step before what comes at the end of the epoch, its evaluation, which a run that goes on
    from there would lack: so that one is saved after it.
    """

    def __init__(self, keep: int = 2):
        self.keep = keep
        self.later = False

    def on_step_end(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        steps = max(1, -(-len(train_dataloader) // args.gradient_accumulation_steps))
        if control.should_save and state.global_step % steps == 0:
            control.should_save, self.later = False, True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.later:
            control.should_save, self.later = True, False

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        synchronise()
        if state.is_world_process_zero:
            work = Path(args.output_dir)
            mark_complete(work / f"checkpoint-{state.global_step}")
            keep_newest(work, self.keep, best=state.best_model_checkpoint)


class LikeLengths(LengthGroupedSampler):
    """Rows of like length together, in an order that depends on seed and epoch alone: transformers' own sampler begins a resumed
    epoch with the first epoch's order."""

    def __init__(self, trainer: Any, lengths: Sequence[int]):
        args = trainer.args
        step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        super().__init__(step, lengths=list(lengths))
        self.seed, self.epoch = args.seed if args.data_seed is None else args.data_seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called at each epoch's beginning."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return super().__iter__()


class OnceAnEpoch:
    """A mixin for a Trainer whose rows have `labels`: of an epoch that processes cannot share evenly, accelerate repeats rows at
    its end; they are not learned twice, so that several processes follow one. Packed rows, which have lost their bounds, are."""

    args: Any

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Any:
        for labels in [batch["labels"] for batch in batch_samples[-1:]]:
            if len(labels) == self.args.train_batch_size:
                labels[len(labels) - repeats(self) :] = -100
        return super()._get_num_items_in_batch(batch_samples, device)  # type: ignore[misc]


def repeats(trainer: Any) -> int:
    """How many rows at the end of this process's newest batch accelerate has repeated from the beginning of the epoch.

    The processes' last batches, one behind the other, hold what is left of the epoch and then repetitions.
    """
    args, accelerator = trainer.args, trainer.accelerator
    if args.dataloader_drop_last or args.train_sampling_strategy == "batch_rebalance" or not accelerator.even_batches:
        return 0  # set by training_arguments: nothing is repeated
    size = args.train_batch_size
    # accelerate's own count of what is left is wrong in an epoch that was resumed.
    left = len(trainer.train_dataset) % (size * args.world_size)
    if args.world_size == 1 or left == 0 or not accelerator.gradient_state.end_of_dataloader:
        return 0
    return int(size - min(max(left - size * args.process_index, 0), size))


def mark_complete(checkpoint: Path) -> None:
    """Writes the marker, after everything else is on the disk."""
    for path in checkpoint.rglob("*"):
        if path.is_file():
            _fsync(path)
    marker = checkpoint / COMPLETE
    marker.touch()
    _fsync(marker)


def keep_newest(work: Path, count: int, best: str | None = None) -> None:
    """Removes the complete checkpoints of `work` but for the newest `count` and `best`, and torn ones before the newest.

    Torn ones do not count, or a kill in the middle of a save could leave nothing to resume from.
    """
    found = sorted(work.glob("checkpoint-*"), key=step_of)
    complete = [path for path in found if (path / COMPLETE).is_file()]
    kept = set(complete[-count:])
    for path in found:
        if path not in kept and path.name != Path(best or "").name and step_of(path) < step_of(complete[-1]):
            discard(path)


def discard(checkpoint: Path) -> None:
    """Removes a checkpoint, its marker first: a kill in between must not leave one that looks complete."""
    (checkpoint / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --------------------------------------------------------------------------------------------------------- publication


def publish(
    registry: Registry,
    args: StageArgs,
    stage: str,
    save: Any,
    *,
    parents: Sequence[Artifact] = (),
    base_model: str | None = None,
    data: Sequence[dict[str, Any]] = (),
    metrics: dict[str, Any] | None = None,
    history: Sequence[dict[str, Any]] = (),
    extra: dict[str, Any] | None = None,
    models: dict[str, Any] | None = None,
) -> Artifact | None:
    """A new version of `stage`: `save(folder)` writes the weights and tokenizer, the rest is recorded beside them.

    models: those that may be adapters, by their folder in the version (`here` for its own), so that their bases are recorded.

    Called by every process, since gathering sharded weights takes all of them; the first one writes and gets the artifact.
    `save` is called with None on the others.
    """
    if not is_main():
        save(None)
        synchronise()
        return None
    with registry.draft(args.run_name, stage) as draft:
        save(draft.path)
        if history:
            lines = "".join(json.dumps(line) + "\n" for line in history)
            (draft.path / "metrics.jsonl").write_text(lines, encoding="utf-8")
            curves.draw(history, draft.path / "figures" / "training.png")
        facts: dict[str, Any] = {
            "parents": parents,
            "base_model": base_model,
            "config": to_dict(args),
            "data": _licensed(data, args.dataset_license),
            "metrics": metrics or {},
        }
        extra = {**(extra or {}), **({"license": args.license} if args.license else {})}
        bases = adapters.records(**models or {})
        card.write(draft.path, args.run_name, stage, **facts, extra=extra, adapters=bases)
        revision = args.model_revision if base_model else None
        artifact = draft.publish(**facts, base_revision=revision, device=device_summary(), extra=extra, adapters=bases)
    synchronise()
    say(f"published {artifact.ref}  ({artifact.path})")
    return artifact


def _licensed(data: Sequence[dict[str, Any]], license: str | None) -> list[dict[str, Any]]:
    """The data's entries, the licence with that of dataset_name, which is the first."""
    return [{**entry, "license": license} if i == 0 and license else entry for i, entry in enumerate(data)]


def push_published(args: StageArgs, artifact: Artifact | None) -> Artifact | None:
    """Pushes what was published, where push_to_hub asks for it; returns it. Called by every process, once all else is done.

    The processes part first: an upload may take longer than they wait for each other. A push that fails is a HubError with the
    command that repeats it, and the version stays published.
    """
    if args.push_to_hub:
        end_processes()
        if artifact is not None:
            _push(artifact, str(args.hub_model_id), args.hub_private_repo)
    return artifact


def _push(artifact: Artifact, repo_id: str, private: bool) -> None:
    try:
        pushed = hub.push(artifact, repo_id, private=private)
    except hub.HubError as error:
        again = hub.command(artifact, repo_id, private=private)
        then = "" if again in str(error) else f"; then `{again}`"
        raise hub.HubError(
            f"{artifact.ref} is published in {artifact.root} and was not pushed: {error}{then}"
        ) from None
    say(f"pushed {artifact.ref}  {pushed.url}  ({'private' if pushed.private else 'public'})")


def device_summary() -> str:
    """What the run ran on, in words."""
    state = PartialState()
    kind = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
    return f"{state.num_processes} x {kind}, {state.distributed_type.value}"


def saver(accelerator: Any, model: Any, tokenizer: Any) -> Any:
    """`save` for `publish`: weights gathered from all processes, written as a folder that plain transformers loads."""

    def save(folder: Path | None) -> None:
        state = state_dict(accelerator, model)
        if folder is not None:
            with quiet():
                adapters.save(accelerator.unwrap_model(model), folder, state)
                tokenizer.save_pretrained(folder)

    return save
