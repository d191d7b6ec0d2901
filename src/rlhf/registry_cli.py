"""The commands of `rlhf registry`: each takes parsed arguments and prints to stdout."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf.registry import ROOM, Artifact, Lineage, MissingStage, Registry, RegistryError

# what stands in the table, at most three of them; a stage without any shows its first numbers
MAIN_METRICS = ("win_rate", "accuracy", "eval_accuracy", "reward", "kl", "eval_loss", "perplexity", "loss")
NOTHING = "—"


def ls(args: argparse.Namespace) -> None:
    registry = _there(args)
    artifacts = registry.list(args.name)
    if not artifacts and args.name is not None:
        runs = ", ".join(dict.fromkeys(artifact.run for artifact in registry.list())) or "none"
        raise MissingStage(f"no versions in run {args.name!r} in {registry.root}; runs there: {runs}")
    if not artifacts:
        print(f"no versions in {registry.root}")
        return
    rows = [row(registry, artifact) for artifact in artifacts]
    _print_table(("ref", "created", "parents", "metrics", "size"), rows)


def show(args: argparse.Namespace) -> None:
    artifact = Registry(args.root).get(args.ref, verify=False)
    if args.json:
        print(json.dumps(artifact.manifest, indent=2, ensure_ascii=False))
        return
    print(f"{artifact.ref}   {artifact.path}   {size(bytes_of(artifact))}")
    told = ("run", "stage", "version", "files")
    facts = {key: value for key, value in artifact.manifest.items() if key not in told and value not in (None, {}, [])}
    for key, value in facts.items():
        if not isinstance(value, (dict, list)):
            print(f"  {key:<32} {_text(value)}")
    for key, value in facts.items():
        if isinstance(value, (dict, list)):
            print(f"\n{key}")
            for name, item in _flat(value, ""):
                print(f"  {name:<32} {_text(item)}")
    print(f"\nfiles\n  {'weights (all together)':<32} {artifact.weights_sha256}")
    for name, recorded in artifact.manifest["files"].items():
        print(f"  {name:<32} {recorded['sha256']}  {size(recorded['size'])}")


def lineage(args: argparse.Namespace) -> None:
    for line in tree(Registry(args.root).lineage(args.ref)):
        print(line)


def verify(args: argparse.Namespace) -> None:
    registry = _there(args) if args.ref is None else Registry(args.root)
    if args.ref is not None:
        artifact = registry.get(args.ref, verify=False)
        registry.verify(artifact)
        print(f"ok   {artifact.ref}")
        return
    damaged: list[RegistryError] = []
    checked = 0
    for artifact in registry.scan(on_error=damaged.append):
        checked += 1
        try:
            registry.verify(artifact)
            print(f"ok   {artifact.ref}", flush=True)
        except RegistryError as error:
            damaged.append(error)
    for damage in damaged:
        print(f"bad  {damage}")
    if damaged:
        raise RegistryError(f"{len(damaged)} damaged in {registry.root}: see the lines above")
    print(f"{checked} versions in {registry.root}, all as published")


def diff(args: argparse.Namespace) -> None:
    registry = Registry(args.root)
    a, b = (registry.get(ref, verify=False) for ref in (args.a, args.b))
    print(f"- {a.ref}\n+ {b.ref}")
    print(f"weights: {'the same' if a.weights_sha256 == b.weights_sha256 else 'different'}")
    left, right = map(_compared, (a, b))
    for section in left:
        _print_difference(section, left[section], right[section])


def tag(args: argparse.Namespace) -> None:
    registry = Registry(args.root)
    artifact = registry.own(registry.get(args.ref, verify=False))
    registry.tag(artifact, args.name)
    print(f"{artifact.run}/{artifact.stage}@{args.name} is {artifact.ref}")


def untag(args: argparse.Namespace) -> None:
    run, _, rest = args.ref.partition("/")
    stage = rest.split("/")[0].split("@")[0]
    Registry(args.root).untag(run, stage, args.name)
    print(f"{run}/{stage}@{args.name} is gone")


def gc(args: argparse.Namespace) -> None:
    registry = _there(args)
    artifacts, drafts = registry.prunable(args.keep), registry.stale_drafts()
    freed = sum(map(bytes_of, artifacts)) + sum(map(_folder_bytes, drafts))
    for artifact in reversed(artifacts):  # children first, so that an interruption leaves nothing without its parent
        if args.yes:
            registry.remove(artifact)
        print(f"{'removed' if args.yes else 'would remove'}  {artifact.ref}  {size(bytes_of(artifact))}", flush=True)
    for path in drafts:
        if args.yes:
            _remove_draft(path)
        print(f"{'removed' if args.yes else 'would remove'}  {path.relative_to(registry.root)}  (a stale draft)")
    if not artifacts and not drafts:
        print(f"nothing to remove in {registry.root}")
    else:
        print(f"{size(freed)} freed" if args.yes else f"{size(freed)} in all; remove them with --yes")


def _there(args: argparse.Namespace) -> Registry:
    """The registry that is asked for all it holds; `runs`, the default, may be yet to come."""
    registry = Registry(args.root)
    try:
        os.listdir(registry.root)
    except OSError as error:
        if args.root != "runs" or not isinstance(error, FileNotFoundError):
            told = f"cannot read {registry.root}: {error.strerror}; name the folder that holds the runs with --root"
            raise RegistryError(told) from error
    return registry


# --- text


def row(registry: Registry, artifact: Artifact) -> tuple[str, ...]:
    tags = [
        name for name, version in registry.tags(artifact.run, artifact.stage).items() if version == artifact.version
    ]
    parents = [parent["ref"] for parent in artifact.parents] or [artifact.manifest.get("base_model") or NOTHING]
    return (
        " ".join([artifact.ref, *(f"@{name}" for name in tags)]),
        artifact.manifest["created"][:16].replace("T", " "),
        ", ".join(parents),
        " ".join(f"{name}={value:.4g}" for name, value in _main_metrics(artifact)) or NOTHING,
        size(bytes_of(artifact)),
    )


def _main_metrics(artifact: Artifact) -> list[tuple[str, float]]:
    numbers = {
        name: value
        for name, value in _flat(artifact.manifest["metrics"], "")
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    names = [name for name in MAIN_METRICS if name in numbers] or list(numbers)
    return [(name, numbers[name]) for name in names[:3]]


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns; at a terminal, rich's."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, header_style="bold", pad_edge=False)
        for name in header:
            table.add_column(name, justify="right" if name == "size" else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))  # plain text, so that a name in brackets is no markup
        Console().print(table)
        return
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def tree(node: Lineage) -> Iterator[str]:
    yield _describe(node)
    for i, parent in enumerate(node.parents):
        last = i == len(node.parents) - 1
        first, *others = tree(parent)
        yield ("└── " if last else "├── ") + first
        for line in others:
            yield ("    " if last else "│   ") + line


def _describe(node: Lineage) -> str:
    if node.artifact is not None:
        return f"{node.ref}  {node.artifact.weights_sha256[:12]}  {node.artifact.manifest['created'][:10]}"
    return f"{node.ref}  ({'not here, or other weights now' if node.kind == 'missing' else 'outside the registry'})"


def _compared(artifact: Artifact) -> dict[str, Any]:
    """What `diff` compares, by sections. Cards differ always, and records in `extra` (samples) are told by their hash."""
    manifest = artifact.manifest
    origin = ("parents", "base_model", "base_revision", "adapters", "tokenizer_sha256", "config", "data", "metrics")
    machine = ("packages", "python", "platform", "git_commit", "git_dirty", "device")
    extra = {name: _brief(value) for name, value in (manifest.get("extra") or {}).items()}
    files = {name: entry["sha256"][:12] for name, entry in manifest["files"].items() if not name.endswith(".md")}
    return {
        **{section: manifest.get(section) for section in origin},
        "extra": extra,
        "files": files,
        **{section: manifest.get(section) for section in machine},
    }


def _brief(value: Any) -> Any:
    if not isinstance(value, list) or not any(isinstance(item, (dict, list)) for item in value):
        return value
    return f"{len(value)} records, {hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]}"


def _print_difference(section: str, a: Any, b: Any) -> None:
    left, right = (dict(_flat(value, section)) for value in (a, b))
    names = [name for name in {**left, **right} if left.get(name, NOTHING) != right.get(name, NOTHING)]
    if names:
        print(f"\n{section}")
    for name in names:
        key = name.removeprefix(f"{section}.").removeprefix(section) or section
        print(f"  {key:<32} {_text(left.get(name, NOTHING))}  →  {_text(right.get(name, NOTHING))}")


def _flat(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Nested dicts and lists of dicts as dotted names; a list of plain values stays one; null and [] are left out."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _flat(item, f"{key}.{name}" if key else name)
    elif isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        for i, item in enumerate(value):
            yield from _flat(item, f"{key}[{i}]")
    elif value not in ([], None):
        yield key, value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def bytes_of(artifact: Artifact) -> int:
    return sum(recorded["size"] for recorded in artifact.manifest["files"].values())


def _folder_bytes(folder: Path) -> int:
    return sum(os.path.getsize(path) for path in folder.rglob("*") if os.path.isfile(path))


def _remove_draft(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        pass  # somebody else was faster
    except OSError as error:
        raise RegistryError(f"cannot remove {folder}: {error.strerror or error}; {ROOM}") from error
