"""`rlhf eval RUN/rm`: a published reward model on held-out comparisons; and the paper's cross-validation by labelers."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import math
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import set_seed

from rlhf import reward, reward_report
from rlhf.config import RewardArgs
from rlhf.data import load
from rlhf.models import context_length, load_scalar_model, load_tokenizer
from rlhf.registry import Artifact, Registry
from rlhf.training import Rows, TrainingError, load_splits, resolve, say, trainer_arguments


@dataclass
class Version:
    """A published reward model, ready to score."""

    artifact: Artifact
    args: RewardArgs
    tokenizer: Any
    model: Any
    ensemble: dict[str, Any] | None
    score: reward.Score
    limit: int  # tokens


def open_version(artifact: Artifact, batch_size: int = 8) -> Version:
    """Raises one line where the version is no reward model, or its files cannot be read."""
    if artifact.stage != "rm":
        raise TrainingError(f"{artifact.ref} is of stage {artifact.stage}; give a reward model: RUN/rm")
    known = {field.name for field in dataclasses.fields(RewardArgs)}
    args = RewardArgs(**{name: value for name, value in artifact.manifest["config"].items() if name in known})
    tokenizer = load_tokenizer(artifact.path, trust_remote_code=args.trust_remote_code)
    model = load_scalar_model(
        artifact.path,
        tokenizer,
        dtype=args.dtype,
        attn_implementation=args.attn_implementation,
        trust_remote_code=args.trust_remote_code,
    ).eval()
    heads = artifact.path / reward.HEADS
    try:
        ensemble = load_file(heads) if heads.is_file() else None
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{heads} cannot be read ({error}); restore it from a copy") from None
    limit = min(args.max_length, context_length(model) or args.max_length)
    score = reward.scored_by_model(model, tokenizer.pad_token_id, batch_size)
    return Version(artifact, args, tokenizer, model, ensemble, score, limit)


def comparisons_of(
    version: Version, data: str | None, on_error: str = "stop", format: str | None = None
) -> tuple[Dataset, Dataset | None]:
    """(held out, trained on): a file that was never trained on and None, or the splits that the version was trained with."""
    if data is not None:
        return load("comparisons", data, on_error=on_error, format=format), None
    train, held_out = load_splits(version.args, "comparisons")
    if not len(held_out):
        raise TrainingError(
            f"{version.artifact.ref} was trained without holding comparisons out; give some that it has not seen: --data FILE"
        )
    return held_out, train


def at_most(records: Dataset, count: int | None) -> Dataset:
    return records if count is None else records.select(range(min(count, len(records))))


def evaluate(options: argparse.Namespace) -> None:
    """The command: scores, figures and tables; everything is written beside the version."""
    registry = Registry(options.root)
    version = open_version(registry.get(options.ref), options.batch_size)
    held_out, train = comparisons_of(version, options.data, options.on_error, options.format)
    held_out = at_most(held_out, options.max_prompts)
    rows = reward.encode(version.tokenizer, held_out, version.limit)
    if not len(rows):
        raise TrainingError(
            "every held-out comparison is a tie, so that there is nothing to order; give others: --data FILE"
        )
    members = [open_version(registry.get(ref), options.batch_size) for ref in options.members]
    demonstrations = _demonstrations(version, options.demonstrations, held_out if train is None else train)
    report = reward.held_out_report(
        *(version.score, version.model, version.tokenizer, rows, held_out, train, demonstrations, version.ensemble)
    )
    if members:
        report["ensemble"] = ensemble_of([version, *members], held_out)
    if options.cross_validate:
        report["held_out_labelers"] = cross_validate(version.args, options.cross_validate)
    report |= {"version": version.artifact.ref, "data": options.data or version.args.dataset_name}
    path = reward_report.write(report, registry.evals_dir(version.artifact), name_of(options.data))
    reward_report.print_report(
        report, f"{version.artifact.ref} on {Path(report['data']).name}, {report['prompts']} prompts held out"
    )
    print(path)


def name_of(data: str | None, prefix: str = "rm") -> str:
    """The name of an evaluation's files: one for the version's own held-out data, one for each other source."""
    if data is None:
        return prefix
    plain = (
        re.sub(r"[^A-Za-z0-9._-]+", "-", Path(data).name).strip("-.") or hashlib.sha256(data.encode()).hexdigest()[:8]
    )
    return f"{prefix}-{plain}"


def _demonstrations(version: Version, name: str | None, comparisons: Dataset) -> list[list[int]]:
    """Token rows of demonstrations: those given, those the version was centred on, or the best of these comparisons."""
    args = dataclasses.replace(version.args, demonstrations_name=name or version.args.demonstrations_name)
    return reward.demonstration_rows(args, version.tokenizer, comparisons, version.limit)


def ensemble_of(versions: Sequence[Version], records: Dataset) -> dict[str, Any]:
    """Disagreement of several published models (other seeds, other data) on the comparisons that all of them can read."""
    scored = []
    for version in versions:
        rows = reward.encode(version.tokenizer, records, version.limit)
        rankings = reward.held_out_rankings(version.score, version.model, rows, records)
        scored.append({item["record"]: ranking for item, ranking in zip(rows.rows, rankings)})
    shared = [place for place in scored[0] if all(place in each for each in scored)]
    if not shared:
        raise TrainingError(f"no held-out comparison fits into all of {', '.join(v.artifact.ref for v in versions)}")
    rankings = [
        dataclasses.replace(
            scored[0][place],
            scores=[sum(column) / len(column) for column in zip(*(each[place].scores for each in scored))],
            members=list(zip(*(each[place].scores for each in scored))),
        )
        for place in shared
    ]
    return {
        **reward_report.report(rankings, {})["ensemble"],
        "versions": [version.artifact.ref for version in versions],
        "mean": reward_report.accuracy(rankings),
    }


# --- cross-validation by labelers


def cross_validate(args: RewardArgs, groups: int) -> dict[str, Any]:
    """The paper's check that the model learns more than its labelers' own taste (InstructGPT, section 4.1).

    Labelers are put into groups. For each group a model is trained, with the version's settings, on the training prompts as the
    others ranked them; its accuracy is taken on held-out prompts as that group ranked them, and as the others did.
    """
    train, held_out = load_splits(args, "comparisons")
    names = sorted(
        {name for part in (train, held_out) for name in (part["labeler"] if _labelled(part) else []) if name}
    )
    if len(names) < 2 or not len(held_out):
        raise TrainingError(
            f"{args.dataset_name}: cross-validation needs held-out comparisons and two or more labelers (field `labeler`), and "
            f"there are {len(held_out)} and {len(names)}"
        )
    count = min(groups, len(names))
    group_of = {name: place % count for place, name in enumerate(names)}
    folds = [_fold(args, train, held_out, group_of, group) for group in range(count)]
    outside = [fold["held_out_labelers"]["accuracy"] for fold in folds if fold["held_out_labelers"]["pairs"]]
    inside = [fold["training_labelers"]["accuracy"] for fold in folds if fold["training_labelers"]["pairs"]]
    if not outside:
        raise TrainingError(f"{args.dataset_name}: no group of labelers has a held-out pair; raise eval_fraction")
    return {
        "groups": count,
        "mean": _mean(outside),
        "standard_error": _standard_error(outside),
        "training_labelers_mean": _mean(inside) if inside else None,
        "training_labelers_standard_error": _standard_error(inside),
        "folds": folds,
    }


def _labelled(records: Dataset) -> bool:
    return len(records) > 0 and "labeler" in records.column_names


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _standard_error(values: Sequence[float]) -> float | None:
    """Of the mean over groups, as the paper gives it; None for one group."""
    if len(values) < 2:
        return None
    mean = _mean(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def _fold(args: RewardArgs, train: Dataset, held_out: Dataset, group_of: dict[str, int], group: int) -> dict[str, Any]:
    """A model without the labelers of `group`, on held-out prompts as they and as the others ranked them."""

    def part(records: Dataset, inside: bool) -> Dataset:
        labelers = records["labeler"][:] if _labelled(records) else []
        places = [i for i, name in enumerate(labelers) if name and (group_of[name] == group) == inside]
        return records.select(places)

    registry = Registry(args.output_dir)
    path, _ = resolve(registry, args.model_name_or_path, args.run_name, "sft")
    args = dataclasses.replace(args, early_stopping_patience=None, disable_tqdm=True, report_to=[], save_steps=None)
    with tempfile.TemporaryDirectory() as folder:
        settings = trainer_arguments(
            args,
            Path(folder),
            remove_unused_columns=False,
            label_names=["ranks"],
            eval_strategy="no",
            logging_strategy="no",
        )
        set_seed(args.seed)
        tokenizer = load_tokenizer(path, trust_remote_code=args.trust_remote_code)
        model = reward.new_model(args, path, tokenizer)
        limit = min(args.max_length, context_length(model) or args.max_length)
        rows = reward.encode(tokenizer, part(train, False), limit, ties=args.ties)
        if not len(rows):
            raise TrainingError(
                f"{args.dataset_name}: all training comparisons are of one group of labelers; ask for more groups"
            )
        trainer = reward.new_trainer(args, settings, model, tokenizer, rows, Rows([]))
        trainer.train()
        reward.mean_of_heads(trainer)
        score = reward.scored_by_trainer(trainer)
        names = sorted(name for name, own in group_of.items() if own == group)
        found: dict[str, Any] = {"labelers": names}
        for title, inside in (("held_out_labelers", True), ("training_labelers", False)):
            records = part(held_out, inside)
            rows = reward.encode(tokenizer, records, limit, needed=False)
            found[title] = reward_report.accuracy(
                reward.held_out_rankings(score, model, rows, records) if len(rows) else []
            )
    say(f"without {', '.join(names)}: accuracy {found['held_out_labelers']['accuracy']:.3f} on what they ranked")
    return found
