"""`rlhf registry merge`: an adapter and its base as whole weights, in a new version."""

from __future__ import annotations

import argparse
import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from rlhf import card
from rlhf.manifest import MANIFEST
from rlhf.registry import ROOM, Artifact, Registry, RegistryError


def run(args: argparse.Namespace) -> None:
    artifact = merge(Registry(args.root), args.ref)
    print(f"{artifact.ref}  {artifact.path}")


def merge(registry: Registry, ref: str) -> Artifact:
    """Publishes the merged weights of an adapter (a ppo version's critic and average too) as the next version of its stage.

    They are float32: in 16 bits small shares of an adapter would be rounded away. Raises RegistryError for a version that is no
    adapter or lies in another registry, and for one whose merged weights would be another model.
    """
    artifact = registry.own(registry.get(ref))
    if not artifact.adapters:
        raise RegistryError(f"{artifact.ref} is no adapter: its weights are whole, and there is nothing to merge")
    for base in artifact.adapters.values():
        if base.get("quantization"):
            bits = 4 if base["quantization"].get("load_in_4bit") else 8
            raise RegistryError(
                f"{artifact.ref} was trained on {base['ref']} quantised to {bits} bits: merged into whole weights it would be "
                f"another model; use it as an adapter, or train it without load_in_{bits}bit"
            )
    with registry.draft(artifact.run, artifact.stage) as draft:
        with _writing(draft.path):
            shutil.copytree(artifact.path, draft.path, dirs_exist_ok=True, ignore=_left_out)
        for part in artifact.adapters:
            _save_merged(artifact, part, draft.path)
        manifest = artifact.manifest
        facts: dict[str, Any] = {
            "parents": [artifact],
            "base_model": manifest.get("base_model"),
            "config": {**manifest["config"], "push_to_hub": False, "hub_model_id": None},  # that is the adapter
            "data": manifest["data"],
            "metrics": manifest["metrics"],
            "extra": {**manifest.get("extra", {}), "merged_from": artifact.ref},
        }
        with _writing(draft.path):
            card.write(draft.path, artifact.run, artifact.stage, **facts)
        return draft.publish(**facts, base_revision=manifest.get("base_revision"), device=manifest.get("device"))


def _left_out(folder: str, names: list[str]) -> set[str]:
    return {name for name in names if name in (MANIFEST, "README.md") or name.startswith("adapter_")}


def _save_merged(artifact: Artifact, part: str, target: Path) -> None:
    from rlhf import adapters
    from rlhf.models import load_policy, load_scalar_model, load_tokenizer, quiet

    tokenizer = load_tokenizer(artifact.path)
    scalar = artifact.stage == "rm" or part == "critic"
    config = artifact.manifest["config"]
    model = (load_scalar_model if scalar else load_policy)(
        artifact.path / part,
        tokenizer,
        dtype=config.get("dtype", "float32"),
        trust_remote_code=config.get("trust_remote_code", False),
        merge=False,
    )
    if why := adapters.why_apart(model):
        raise RegistryError(f"{artifact.ref} cannot be merged: {why}; use it as an adapter")
    merged = model.float().merge_and_unload()  # on the base as it was rounded to be trained on
    with quiet(), _writing(target):
        merged.save_pretrained(target / part)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turns the failures of a disk into one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # of several files shutil gives (source, target, reason) of each
        reason = error.args[0][0][2] if isinstance(error, shutil.Error) else getattr(error, "strerror", None) or error
        raise RegistryError(f"cannot write to {folder.parent}: {' '.join(str(reason).split())}; {ROOM}") from error
