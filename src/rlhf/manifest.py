"""What a manifest (`stage.json`) records of a version folder: file hashes, the tokenizer, plain values, the machine.

The registry keeps the versions; this module only looks at one folder. Standard library only.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from contextlib import suppress
from enum import Enum
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from rlhf import RLHFError, __version__

MANIFEST = "stage.json"
PACKAGES = (
    *("torch", "transformers", "datasets", "trl", "peft", "accelerate", "deepspeed", "bitsandbytes"),
    *("tokenizers", "safetensors", "rlhf"),
)


class RegistryError(RLHFError):
    """The registry cannot do what was asked."""


class MissingStage(RegistryError):
    """A stage, a version or a tag that is not there."""


class TornArtifact(RegistryError):
    """A version folder that is not whole: a manifest that cannot be read, files missing or added."""


class HashMismatch(RegistryError):
    """A file, or a parent, that is not what the manifest recorded."""


class TokenizerMismatch(RegistryError):
    """A tokenizer other than the parents'."""


# --- tokenizers


def tokenizer_sha256(folder: str | Path) -> str | None:
    """A hash of what the tokenizer in a folder does to text, and of its EOS; None for a folder without a tokenizer.

    PAD is left out, and with it the settings of padding and truncation: adding PAD is the one change a stage may make.
    """
    folder = Path(folder)
    roles = _special_tokens(folder)
    pad = roles["pad"] if roles["pad"] not in (roles["bos"], roles["eos"], roles["unk"]) else None
    try:
        if (folder / "tokenizer.json").is_file():
            parts = _fast_tokenizer(json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")), pad)
        else:
            parts = _slow_tokenizer(folder, pad)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RegistryError(f"the tokenizer files in {folder} cannot be read ({error}); save it again") from error
    if not parts:
        return None
    text = json.dumps({**parts, "eos": roles["eos"]}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _fast_tokenizer(content: dict[str, Any], pad: str | None) -> dict[str, Any]:
    kept = ("normalizer", "pre_tokenizer", "decoder", "post_processor")
    # transformers writes null, "" or nothing for the same default, and merges as "a b" or ["a", "b"]
    model = {key: value for key, value in content["model"].items() if value not in (None, "") and value is not False}
    if "merges" in model:
        model["merges"] = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    added = [token for token in content.get("added_tokens") or [] if token["content"] != pad]
    added.sort(key=lambda token: token["id"])
    return {"model": model, "added_tokens": added, **{key: content.get(key) for key in kept}}


def _slow_tokenizer(folder: Path, pad: str | None) -> dict[str, Any]:
    names = ["vocab.json", "merges.txt", "vocab.txt", *sorted(path.name for path in folder.glob("*.model"))]
    parts: dict[str, Any] = {name: file_sha256(folder / name) for name in names if (folder / name).is_file()}
    if (folder / "added_tokens.json").is_file():
        added = json.loads((folder / "added_tokens.json").read_text(encoding="utf-8"))
        added.pop(pad, None)
        if added:
            parts["added_tokens.json"] = added
    return parts


def _special_tokens(folder: Path) -> dict[str, str | None]:
    roles: dict[str, str | None] = dict.fromkeys(("pad", "bos", "eos", "unk"))
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        with suppress(OSError, ValueError, AttributeError):
            content = json.loads((folder / name).read_text(encoding="utf-8"))
            for role in roles:
                token = content.get(f"{role}_token")
                token = token.get("content") if isinstance(token, dict) else token
                roles[role] = token or roles[role]
    return roles


# --- values


def check_manifest(manifest: Any) -> None:
    """Raise KeyError, TypeError or ValueError unless the keys that this module reads are there and of their types."""
    if not isinstance(manifest, dict):
        raise ValueError("not an object")
    types = {"stage": str, "run": str, "version": int, "created": str, "files": dict, "parents": list}
    types |= {"config": dict, "metrics": dict, "packages": dict, "data": list}
    for key, kind in types.items():
        if not isinstance(manifest[key], kind):
            raise ValueError(f"{key} is not a {kind.__name__}")
    if not isinstance(manifest["tokenizer_sha256"], (str, type(None))):
        raise ValueError("tokenizer_sha256 is neither text nor null")
    hashes = [recorded["sha256"] for recorded in (*manifest["files"].values(), *manifest["parents"])]
    sizes = [recorded["size"] for recorded in manifest["files"].values()]
    refs = [recorded["ref"] for recorded in manifest["parents"]]
    if not all(isinstance(text, str) for text in hashes + refs) or not all(isinstance(size, int) for size in sizes):
        raise ValueError("files or parents are not as published")
    if not isinstance(manifest.get("extra", {}), dict):
        raise ValueError("extra is not a dict")
    _check_adapters(manifest.get("adapters", {}))


def _check_adapters(adapters: Any) -> None:
    if not isinstance(adapters, dict) or not all(isinstance(base, dict) for base in adapters.values()):
        raise ValueError("adapters is not a dict of dicts")
    for part, base in adapters.items():
        texts = (base["kind"], base["ref"], base["sha256"], base.get("revision") or "")
        well_formed = all(isinstance(text, str) for text in texts) and base["kind"] in ("artifact", "model")
        bias, quantization = base.get("reward_bias", 0.0), base.get("quantization") or {}
        if not (well_formed and isinstance(bias, (int, float)) and isinstance(quantization, dict)):
            raise ValueError(f"adapters[{part!r}] is not as published")


def plain(value: Any, key: str) -> Any:
    """The value as JSON holds it; raises RegistryError naming the key for NaN, infinity and what JSON cannot hold."""
    if isinstance(value, Enum):
        value = value.value
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, Mapping):
        return {str(name): plain(item, f"{key}.{name}") for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{key}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, (set, frozenset)):
        return sorted((plain(item, key) for item in value), key=str)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise RegistryError(
                f"{key} is {value}: a manifest holds finite numbers only; look at the run before publishing"
            )
        return float(value)
    if hasattr(value, "item"):  # a number of numpy or torch
        with suppress(TypeError, ValueError, RuntimeError):
            return plain(value.item(), key)
    raise RegistryError(
        f"{key} is a {type(value).__name__}, which a manifest cannot hold; give a number, text, list or dict"
    )


@functools.lru_cache(maxsize=1)
def provenance() -> dict[str, Any]:
    """What the process runs on; taken once, since a checkout may move on under a long run."""
    packages = {"rlhf": __version__}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    commit, dirty = _git_commit()
    return {
        "packages": packages,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git_commit": commit,
        "git_dirty": dirty,
    }


def _git_commit() -> tuple[str | None, bool | None]:
    """Commit of this source checkout, and whether it was changed; (None, None) for an installed package."""
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / ".git").exists():
        return None, None  # asking git here would name the repository that an environment happens to lie in
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with suppress(OSError, subprocess.SubprocessError):
        environment["GIT_OPTIONAL_LOCKS"] = "0"
        text = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20, check=True).stdout
        return text.strip().removesuffix("-dirty"), text.strip().endswith("-dirty")
    return None, None


# --- files


def is_weights(name: str) -> bool:
    base = name.rsplit("/", 1)[-1]
    return base != "training_args.bin" and (fnmatch(base, "*.safetensors") or fnmatch(base, "*.bin"))


def weights_sha256(files: Mapping[str, Mapping[str, Any]]) -> str:
    """The hash of all weight files together, from the names and hashes of files."""
    pairs = [[name, files[name]["sha256"]] for name in sorted(files) if is_weights(name)]
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers loads a folder's weights from. Raises OSError where there are none."""
    for name in WEIGHT_FILES:
        path = folder / name
        if path.is_file():
            return [folder / shard for shard in shards_of(path)] if name.endswith(".index.json") else [path]
    raise FileNotFoundError(errno.ENOENT, "no weights", str(folder))


def shards_of(index: Path) -> list[str]:
    """The files that an index of sharded weights lists. Raises OSError where it lists none."""
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise OSError(errno.EINVAL, "no index of weights", str(index)) from None


def sha256_of_weights(files: Iterable[Path]) -> str:
    """The hash of weight files together, as versions record it."""
    return weights_sha256({path.name: {"sha256": file_sha256(path)} for path in files})


def list_files(folder: Path) -> list[str]:
    """Names of all files in a version but its manifest. Links are refused: a version has to stand on its own."""
    names = []
    for where, folders, files in os.walk(folder, onerror=_unreadable):
        for name in (*folders, *files):
            path = Path(where, name)
            if path.is_symlink() or (name in files and not os.path.isfile(path)):
                raise RegistryError(f"{path} is a link or a special file; a version holds plain files only: copy it")
        names += [Path(where, name).relative_to(folder).as_posix() for name in files]
    return sorted(name for name in names if name != MANIFEST)


def _unreadable(error: OSError) -> None:
    raise TornArtifact(f"cannot read {error.filename}: {error.strerror}; see who may") from error


def hash_and_flush(folder: Path) -> dict[str, dict[str, Any]]:
    names = list_files(folder)
    if not any(is_weights(name) for name in names):
        raise RegistryError(f"nothing to publish: {folder} holds no weights (*.safetensors, *.bin)")
    files = {}
    for name in names:
        fsync(folder / name)
        files[name] = {"sha256": file_sha256(folder / name), "size": (folder / name).stat().st_size}
    for where, _, _ in os.walk(folder, topdown=False):
        fsync(Path(where))
    return files


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_json(path: Path, content: dict[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def fsync(path: Path) -> None:
    if os.name == "nt":  # no folder handles, and no fsync of a file open for reading
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
