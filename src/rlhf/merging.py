"""`rlhf registry merge`: an adapter and its base as whole weights, in a new version."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from rlhf import card
from rlhf.manifest import MANIFEST
from rlhf.registry import Artifact, Registry, RegistryError


def run(args: argparse.Namespace) -> None:
    artifact = merge(Registry(args.root), args.ref)
    print(f"{artifact.ref}  {artifact.path}")


def merge(registry: Registry, ref: str) -> Artifact:
    """Publishes the merged weights of an adapter (a ppo version's critic and average too) as the next version of its stage.

    Raises RegistryError for a version that is no adapter, and for one whose base was quantised.
    """
    artifact = registry.get(ref)
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
        shutil.copytree(artifact.path, draft.path, dirs_exist_ok=True, ignore=_left_out)
        for part in artifact.adapters:
            _save_merged(artifact, part, draft.path)
        manifest = artifact.manifest
        facts: dict[str, Any] = {
            "parents": [artifact],
            "base_model": manifest.get("base_model"),
            "config": manifest["config"],
            "data": manifest["data"],
            "metrics": manifest["metrics"],
            "extra": {**manifest.get("extra", {}), "merged_from": artifact.ref},
        }
        card.write(draft.path, artifact.run, artifact.stage, **facts)
        return draft.publish(**facts, base_revision=manifest.get("base_revision"), device=manifest.get("device"))


def _left_out(folder: str, names: list[str]) -> set[str]:
    return {name for name in names if name in (MANIFEST, "README.md") or name.startswith("adapter_")}


def _save_merged(artifact: Artifact, part: str, target: Path) -> None:
    from rlhf.models import load_policy, load_scalar_model, load_tokenizer, quiet

    tokenizer = load_tokenizer(artifact.path)
    scalar = artifact.stage == "rm" or part == "critic"
    config = artifact.manifest["config"]
    model = (load_scalar_model if scalar else load_policy)(
        artifact.path / part,
        tokenizer,
        dtype=config.get("dtype", "float32"),
        trust_remote_code=config.get("trust_remote_code", False),
    )
    with quiet():
        model.save_pretrained(target / part)
