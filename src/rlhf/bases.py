"""What models are made of: a base, whole or quantised, and the adapter on it where there is one."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from rlhf import RLHFError
from rlhf.launch import launched_with
from rlhf.manifest import MANIFEST, WEIGHT_FILES, sha256_of_weights, shards_of, weight_files
from rlhf.registry import Artifact, Registry, RegistryError, read_manifest

CONFIG = "adapter_config.json"


class AdapterError(RLHFError):
    """An adapter cannot be made, loaded or merged as asked."""


@dataclass(frozen=True)
class Base:
    """Weights that adapters stand on: where they lie, and the version they are where a registry holds them."""

    path: str
    revision: str | None = None
    artifact: Artifact | None = None

    @property
    def name(self) -> str:
        return self.artifact.ref if self.artifact else self.path

    @functools.cached_property
    def sha256(self) -> str:
        """Of its weights, as versions record them."""
        if self.artifact is not None:
            return self.artifact.weights_sha256
        return sha256_of_weights(_weight_files(self))

    def pinned(self) -> Base:
        """With the commit for a revision, where it is a Hub id: that stands for other weights later."""
        if self.artifact is not None or Path(self.path).exists():
            return self
        file = cached_file(
            self.path, "config.json", revision=self.revision, _raise_exceptions_for_missing_entries=False
        )
        return replace(self, revision=extract_commit_hash(file, None) or self.revision)


@dataclass(frozen=True)
class Start:
    """What a model is made of: a base, and the adapter on it where there is one.

    quantization: what the base was quantised to while the adapter was trained, by transformers' names; {} for as it is.
    """

    base: Base
    adapter: Path | None = None
    quantization: Mapping[str, Any] | None = None
    reward_bias: float = 0.0

    @property
    def has_head(self) -> bool:
        """Whether the adapter brings the scalar head."""
        return self.adapter is not None and "score" in (_read_config(self.adapter).get("modules_to_save") or ())


def start_of(path: str | Path, revision: str | None = None) -> Start:
    """What a folder or Hub id holds. Raises AdapterError where the base of an adapter is missing, or is another one now."""
    folder = _adapter_folder(path, revision)
    if folder is None:
        where = str(Path(path).resolve()) if Path(path).is_dir() else str(path)
        return Start(Base(where, revision, _artifact(Path(path))))
    recorded = _recorded(folder)
    if recorded is None:  # published by plain peft: it names its base, and has no record of its weights
        config = _read_config(folder)
        name = config.get("base_model_name_or_path")
        if not isinstance(name, str) or not name:
            raise AdapterError(f"{folder / CONFIG} names no base model; set base_model_name_or_path")
        name = str(Path(name).resolve()) if Path(name).is_dir() else name
        return Start(Base(name, config.get("revision"), _artifact(Path(name))), folder)
    base = _find_base(folder, recorded)
    if Path(base.path).is_absolute() and not Path(base.path).exists():
        raise AdapterError(f"{folder} is an adapter on {base.path}, which is not there; restore that folder")
    if base.sha256 != recorded["sha256"]:
        raise AdapterError(
            f"{folder} is an adapter on other weights than {base.name} holds now (sha256 {recorded['sha256'][:12]}, there "
            f"{base.sha256[:12]}); restore that base, or train the adapter again"
        )
    return Start(base, folder, recorded.get("quantization") or {}, recorded.get("reward_bias", 0.0))


def fingerprint_of_model(path: str, revision: str | None = None) -> str:
    """What a folder or Hub id that is no version holds now, its adapter too, to tell it from another later."""
    start = start_of(path, revision)
    base = start.base.pinned()
    on_hub = base.artifact is None and not Path(base.path).exists()  # where a commit stands for the weights
    told = f"{base.name} {((on_hub and base.revision) or base.sha256)[:12]}"
    if start.adapter is None:
        return told
    return f"{start.adapter} {sha256_of_weights(start.adapter.glob('adapter_model.*'))[:12]} on {told}"


def _adapter_folder(path: str | Path, revision: str | None) -> Path | None:
    if Path(path).exists():
        return Path(path) if (Path(path) / CONFIG).is_file() else None
    try:
        found = cached_file(str(path), CONFIG, revision=revision, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError):
        return None  # the load that follows says what is wrong with the name
    if found is None:
        return None
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(path), revision=revision, allow_patterns=["adapter_*", MANIFEST]))


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if config["peft_type"] != "LORA":
            raise AdapterError(f"{folder} is a {config['peft_type']} adapter; only LoRA is supported")
        return config
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"cannot read {folder / CONFIG} ({error}); restore the folder") from None


def _artifact(folder: Path) -> Artifact | None:
    """The version that a folder is, unverified: who resolved the folder has verified it."""
    if not (folder / MANIFEST).is_file() or len(folder.resolve().parents) < 3:
        return None
    try:
        return Registry(folder.resolve().parents[2]).get(folder.resolve(), verify=False)
    except RegistryError:
        return None


def _recorded(folder: Path) -> dict[str, Any] | None:
    """What the version that a folder is, or is a part of, records of the adapter's base."""
    for version, part in ((folder, "."), (folder.parent, folder.name)):
        if (version / MANIFEST).is_file():
            found: dict[str, Any] | None = read_manifest(version).get("adapters", {}).get(part)
            return found
    return None


def _find_base(folder: Path, recorded: Mapping[str, Any]) -> Base:
    if recorded["kind"] == "model":
        return Base(recorded["ref"], recorded.get("revision"))
    version = folder if (folder / MANIFEST).is_file() else folder.parent
    registry = Registry(version.resolve().parents[2])
    try:
        artifact = registry.base_of(recorded)
    except RegistryError as error:
        raise AdapterError(f"{folder} is an adapter on {recorded['ref']}, which is not here ({error})") from None
    return Base(str(artifact.path), None, artifact)


def _weight_files(base: Base) -> list[Path]:
    """The files that transformers loads the base's weights from."""
    with contextlib.suppress(OSError):
        return weight_files(Path(base.path))
    for name in WEIGHT_FILES:
        with contextlib.suppress(OSError, ValueError):
            found = cached_file(base.path, name, revision=base.revision, _raise_exceptions_for_missing_entries=False)
            if found and name.endswith(".index.json"):
                shards = shards_of(Path(found))
                return [Path(str(cached_file(base.path, shard, revision=base.revision))) for shard in shards]
            if found:
                return [Path(found)]
    raise AdapterError(
        f"cannot find the weights of {base.path}, which adapters stand on; restore them, or give another base"
    )


# -------------------------------------------------------------------------------------------------------- quantisation


def quantization(args: Any) -> dict[str, Any]:
    """What the config asks the base to be quantised to; {} for as it is."""
    if args.load_in_8bit:
        return {"load_in_8bit": True}
    if not args.load_in_4bit:
        return {}
    chosen = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": args.bnb_4bit_quant_type,
        "bnb_4bit_compute_dtype": args.dtype,
    }
    if args.dtype == "auto":
        chosen["bnb_4bit_compute_dtype"] = "bfloat16" if args.bf16 else "float32"
    chosen["bnb_4bit_use_double_quant"] = args.use_bnb_nested_quant
    if args.bnb_4bit_quant_storage is not None:
        chosen["bnb_4bit_quant_storage"] = args.bnb_4bit_quant_storage
    return chosen


def loading_quantized(chosen: Mapping[str, Any] | None) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a quantised base."""
    if not chosen:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise AdapterError(
            "load_in_4bit and load_in_8bit need bitsandbytes; pip install 'rlhf[quant]', or leave them out"
        )
    if is_deepspeed_zero3_enabled() or launched_with("FSDP"):
        raise AdapterError(
            "load_in_4bit and load_in_8bit: quantised weights are not spread over processes (ZeRO 3, FSDP); launch with "
            "--config_file configs/accelerate/zero2.yaml, or leave them out"
        )
    device: Any = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    return {"quantization_config": BitsAndBytesConfig(**chosen), "device_map": {"": device}}


def check_optimizer(name: str) -> None:
    """Raises AdapterError where an 8-bit or paged optimiser is asked for and bitsandbytes is not installed."""
    if ("8bit" in name or "bnb" in name or "paged" in name) and importlib.util.find_spec("bitsandbytes") is None:
        raise AdapterError(f"optim: {name} needs bitsandbytes; pip install 'rlhf[quant]', or take adamw_torch")


def keep_embeddings_precise(model: nn.Module) -> None:
    """Of an 8-bit optimiser: 32-bit moments for embeddings, as transformers' Trainer has it (Dettmers et al. 2022)."""
    import bitsandbytes as bnb

    manager = bnb.optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
