"""`rlhf doctor`: what this machine can do for the stages, one line each, with what to do where something is wrong."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf import __version__
from rlhf.registry import Registry

OK, NOTE, BAD = "ok", "note", "BAD"  # BAD: a stage will not run; note: something is not there that a stage may ask for
NEEDED = (
    "torch",
    "transformers",
    "datasets",
    "trl",
    "peft",
    "accelerate",
    "evaluate",
    "safetensors",
    "huggingface_hub",
)
EXTRAS = {"deepspeed": "deepspeed", "bitsandbytes": "quant", "gradio": "label", "tensorboard": "track"}
LEAST_FREE = 10 * 2**30  # bytes: a run of a small model with its checkpoints


@dataclass(frozen=True)
class Finding:
    state: str
    name: str
    text: str

    def __str__(self) -> str:
        return f"{self.state:<4}  {self.name:<12} {self.text}"


def run(args: argparse.Namespace) -> int:
    """Prints every finding; status 1 where one of them keeps the stages from running."""
    worst = 0
    for look in LOOKS:
        for finding in looked(look, args):
            print(finding, flush=True)
            worst = max(worst, int(finding.state == BAD))
    return worst


def looked(look: Callable[[argparse.Namespace], Iterator[Finding]], args: argparse.Namespace) -> Iterator[Finding]:
    """The findings of one look; what breaks in it is a finding too, since this is where broken environments are looked at."""
    try:
        yield from look(args)
    except Exception as error:
        told = " ".join(str(error).split())[:200]
        yield Finding(BAD, look.__name__, f"{type(error).__name__}: {told}")


# --- what is looked at


def python(args: argparse.Namespace) -> Iterator[Finding]:
    yield Finding(OK, "python", f"{sys.version.split()[0]}, rlhf {__version__}, {sys.prefix}")


def packages(args: argparse.Namespace) -> Iterator[Finding]:
    """Versions, against what rlhf itself asks for."""
    asked = _requirements()
    for name in (*NEEDED, *EXTRAS):
        extra = EXTRAS.get(name)
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            how = f"pip install 'rlhf[{extra}]'" if extra else "make setup, or pip install -e '.[all]'"
            yield Finding(NOTE if extra else BAD, name, f"not installed: {how}")
            continue
        wanted = asked.get(name, "")
        if wanted and not _fits(version, wanted):
            yield Finding(BAD, name, f"{version}, and {wanted} is needed: pip install '{name}{wanted}'")
        else:
            yield Finding(OK, name, version)


def _requirements() -> dict[str, str]:
    """Package -> version specifier of the installed rlhf; empty where it runs from a folder without being installed."""
    try:
        lines = importlib.metadata.requires("rlhf") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found = {}
    for line in lines:
        match = re.match(r"([A-Za-z0-9_.-]+)\s*([<>=!~][^;]*)?", line)
        if match:
            found[match[1]] = (match[2] or "").strip()
    return found


def _fits(version: str, wanted: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(wanted).contains(version, prereleases=True)


def devices(args: argparse.Namespace) -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        built = (
            f"torch is built for CUDA {torch.version.cuda} and finds no GPU: look at nvidia-smi"
            if torch.version.cuda
            else ""
        )
        seen = shutil.which("nvidia-smi") and not torch.version.cuda
        why = built or ("nvidia-smi is there, and torch is a CPU build: install the CUDA one" if seen else "")
        yield Finding(NOTE if why else OK, "device", f"CPU only{f'; {why}' if why else ''}")
        return
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        bf16 = facts.major >= 8
        told = "" if bf16 else "; no bfloat16: leave --bf16 false"
        yield Finding(OK if bf16 else NOTE, f"cuda:{i}", f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB{told}")


def threads(args: argparse.Namespace) -> Iterator[Finding]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS")
    text = f"{cores} cores, torch uses {torch.get_num_threads()}; OMP_NUM_THREADS {asked or 'is not set'}"
    if asked is None:
        text += (
            f". accelerate gives each process one thread: OMP_NUM_THREADS={cores} for a process alone on this machine"
        )
    yield Finding(OK, "threads", text)


def processes(args: argparse.Namespace) -> Iterator[Finding]:
    """The backends that several processes find each other by."""
    import torch

    here = {"nccl": torch.distributed.is_nccl_available(), "gloo": torch.distributed.is_gloo_available()}
    needed = "nccl" if torch.cuda.is_available() else "gloo"
    state = ", ".join(f"{name} {'is there' if there else 'is missing'}" for name, there in here.items())
    if not here[needed]:
        yield Finding(
            NOTE, "processes", f"{state}: this torch runs one process only; install another build for several"
        )
        return
    how = "" if needed == "nccl" else "; on CPUs: ACCELERATE_USE_CPU=true and configs/accelerate/cpu_ddp.yaml"
    yield Finding(OK, "processes", f"{state}; {needed} will be used{how}")


def deepspeed(args: argparse.Namespace) -> Iterator[Finding]:
    """What DeepSpeed compiles at its first start: its communication between CPU processes, and Adam for offload."""
    from rlhf.launch import LaunchError, refuse_stale_locks

    try:
        version = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        return  # told among the packages
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        yield Finding(NOTE, "zero", "no C++ compiler: ZeRO on CPUs and offload need one (apt install g++)")
        return
    try:
        refuse_stale_locks()
    except LaunchError as error:
        yield Finding(BAD, "zero", str(error))
        return
    built = sorted(path.parent.name for path in _extensions().glob("*/*/*.so"))
    text = f"deepspeed {version}, {compiler}; compiled so far: {', '.join(built) or 'nothing, the first launch takes longer'}"
    yield Finding(OK, "zero", text)


def _extensions() -> Path:
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")


def memory(args: argparse.Namespace) -> Iterator[Finding]:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Finding(OK, "memory", f"{total / 2**30:.0f} GiB; what a stage needs: rlhf plan --model NAME")


def registry(args: argparse.Namespace) -> Iterator[Finding]:
    """Whether versions can be written, and how much room there is."""
    root = Registry(args.root).root
    there = next(folder for folder in (root, *root.parents) if folder.exists())
    if not there.is_dir():
        yield Finding(BAD, "registry", f"{there} is no folder: give --output_dir to the stages (here: --root)")
        return
    if not os.access(there, os.W_OK):
        yield Finding(BAD, "registry", f"{there} cannot be written to: give --output_dir to the stages (here: --root)")
        return
    free = shutil.disk_usage(there).free
    told = "" if free >= LEAST_FREE else "; checkpoints fill a disk quickly: rlhf registry gc, or another --output_dir"
    yield Finding(OK if free >= LEAST_FREE else NOTE, "registry", f"{root}, {free / 2**30:.0f} GiB free{told}")


def hub(args: argparse.Namespace) -> Iterator[Finding]:
    """The Hub as it is set up here; nobody is asked, and no token is shown."""
    from huggingface_hub import constants, get_token, is_offline_mode

    from rlhf.hub_api import public

    endpoint = public(constants.ENDPOINT)
    if is_offline_mode():
        yield Finding(
            NOTE, "hub", "HF_HUB_OFFLINE is set: nothing is loaded from the Hub and nothing pushed; unset it for that"
        )
    elif get_token() is None:
        yield Finding(NOTE, "hub", f"{endpoint}, no token: `hf auth login` before rlhf push, or for gated models")
    else:
        yield Finding(OK, "hub", f"{endpoint}, a token is set")


LOOKS: tuple[Callable[[Any], Iterator[Finding]], ...] = (
    *(python, packages, devices, threads, processes, deepspeed, memory, registry, hub),
)
