"""The `rlhf` command, and what the stage scripts call.

Nothing heavy is imported here: `rlhf --help` answers at once, and a command's module is loaded when the command runs. A
group of commands is one function `add_<name>(commands)` in `GROUPS`; each of its parsers names what runs as
"module:function", and that function takes the parsed arguments and returns the exit status (None for 0).
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rlhf import RLHFError, __version__
from rlhf.data_cli import add_data
from rlhf.hub_cli import add_hub
from rlhf.launch import LaunchError, check_launch, lost_a_process, ran_out_of_memory, ran_out_of_space
from rlhf.reward_cli import add_reward, count

ARTIFACTS = {"pretrain": "base", "sft": "sft", "reward": "rm", "ppo": "ppo"}
INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 2 with one line on stderr where the user can mend what is wrong."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by who started this: nothing comes from there, and nothing goes there
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  # it stays open
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without Unicode shows ? and works
    args = build_parser().parse_args(argv)
    silence_libraries()
    try:
        module, function = args.run.split(":")
        status = getattr(importlib.import_module(module), function)(args)
        sys.stdout.flush()
        return int(status or 0)
    except RLHFError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader (head, less) has gone
        _drop_output()
        return 0
    except OSError as error:
        if not ran_out_of_space(error):
            raise
        _drop_output()
        print(
            f"error: cannot write {error.filename or 'the output'}: {error.strerror}; free space there", file=sys.stderr
        )
        return 2


def _drop_output() -> None:
    """What is still to be written goes nowhere: python would complain again when it closes stdout."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_stage(stage: str, argv: list[str] | None = None, *, last: bool = True) -> None:
    """What scripts/<stage>.py does: parse arguments, run the stage, turn an RLHFError into one line and exit status 2.

    last: no other stage follows in this process. Processes of one launch then part together: one that exits while another still
    listens to it may take that one down, after all is done. A stage that fails does not wait for anyone.
    """
    if stage not in ARTIFACTS:
        raise ValueError(f"{stage!r} is no stage: {', '.join(ARTIFACTS)}")
    args: Any = None
    try:
        # Before torch, so that --help and typos answer at once.
        args = importlib.import_module("rlhf.config").parse(stage, argv)
        silence_libraries()
        check_launch()
        if not (sys.argv[1:] if argv is None else argv):
            _prepare_demo(stage)
        importlib.import_module(f"rlhf.{stage}").run(args)
        if last and os.environ.get("WORLD_SIZE", "1") != "1":
            importlib.import_module("rlhf.training").end_processes()
    except LaunchError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(10)  # the first process says the same; the launcher ends this one when that has
        _fail(str(error))
    except RLHFError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Exception as error:
        if ran_out_of_space(error):
            _fail(
                f"{stage}: no space left to write below {args.output_dir}; free some, or give another --output_dir; a run with "
                "checkpoints goes on with --resume_from_checkpoint latest"
            )
        if "DeepSpeed config values that mismatch" in str(error):
            told = "; ".join(line.strip(" -") for line in str(error).splitlines() if line.startswith("- ds"))
            _fail(f"{stage}: the DeepSpeed file and the stage's options differ ({told}); write auto there")
        if lost_a_process(error):
            _fail(
                f"{stage}: another process of this launch is gone; what it said last, or the launcher's summary, says why"
            )
        if not ran_out_of_memory(error):
            raise
        _fail(importlib.import_module("rlhf.planning.advice").memory_advice(stage, args))


def _fail(text: str) -> NoReturn:
    """One line, with the process's number where there are several, and exit status 2."""
    rank = f"[rank {os.environ.get('RANK', '0')}] " if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    sys.stderr.write(f"error: {rank}{text}\n")  # in one write: other processes' lines are not to come between
    sys.stderr.flush()
    sys.exit(2)


def _prepare_demo(stage: str) -> None:
    """Makes what the demo's recipe of this stage needs and is not there yet: its world, and the stages before it."""
    folder = Path(__file__).resolve().parents[2] / "data"
    if (folder / "demo_world").is_dir():
        sys.path.insert(0, str(folder))
        importlib.import_module("demo_world.demo").ensure(ARTIFACTS[stage])


def silence_libraries() -> None:
    """Keeps libraries from reporting what a machine lacks and the run does not need, and how tied weights are saved."""
    for name in ("bitsandbytes", "DeepSpeed", "torch.distributed.elastic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in ("accelerate.utils.other", "DeepSpeed"):  # DeepSpeed's import sets its level anew
        logging.getLogger(name).addFilter(_is_news)
    # What DeepSpeed calls, once a call and process; and that FSDP's modules return views, which nothing writes into here.
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)


def _is_news(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in ("Removed shared tensor", "Setting accelerator to CPU"))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rlhf", description="The InstructGPT pipeline: what is published, how it was made, how good it is."
    )
    parser.add_argument("--version", action="version", version=f"rlhf {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add in GROUPS:
        add(commands)
    return parser


def command(parsers: Any, name: str, run: str, help: str, **options: Any) -> argparse.ArgumentParser:
    """A subcommand whose arguments go to `run`, "module:function"."""
    parser: argparse.ArgumentParser = parsers.add_parser(name, help=help, description=help, **options)
    parser.set_defaults(run=run)
    return parser


# --- groups


def add_registry(commands: Any) -> None:
    group = commands.add_parser("registry", help="published versions: list, check, compare, clean up")
    group.add_argument("--root", default="runs", help="root folder of the registry (default: %(default)s)")
    parsers = group.add_subparsers(dest="registry_command", metavar="COMMAND", required=True)
    root = argparse.ArgumentParser(add_help=False)  # --root may come after the subcommand, too
    root.add_argument("--root", default=argparse.SUPPRESS, help="root folder of the registry")

    def add(name: str, help: str) -> argparse.ArgumentParser:
        return command(parsers, name, f"rlhf.registry_cli:{name}", help, parents=[root])

    reference = "run/stage, run/stage/vN, run/stage@tag, or the path of a version"
    add("ls", "a table of all versions").add_argument("name", nargs="?", metavar="RUN", help="this run only")
    show = add("show", "what a version was made of")
    show.add_argument("ref", metavar="REF", help=reference)
    show.add_argument("--json", action="store_true", help="the manifest as it is stored")
    add("lineage", "the tree of what a version was trained from").add_argument("ref", metavar="REF", help=reference)
    verify = add("verify", "hash every file and compare with the manifest; all versions when none is named")
    verify.add_argument("ref", metavar="REF", nargs="?", help=reference)
    diff = add("diff", "where config, data, metrics, files and packages of two versions differ")
    diff.add_argument("a", metavar="A", help=reference)
    diff.add_argument("b", metavar="B", help=reference)
    for name, help in (("tag", "name a version; a name in use moves"), ("untag", "take a name away")):
        parser = add(name, help)
        parser.add_argument("ref", metavar="REF", help=reference if name == "tag" else "run/stage")
        parser.add_argument("name", metavar="NAME")
    merged = "whole weights of an adapter and its base, as a new version"
    merge = command(parsers, "merge", "rlhf.merging:run", merged, parents=[root])
    merge.add_argument("ref", metavar="REF", help=reference)
    gc = add("gc", "remove old versions that have no tag and that nothing kept was trained from, and stale drafts")
    gc.add_argument("--keep", type=int, default=3, metavar="N", help="newest versions to keep (default: %(default)s)")
    gc.add_argument("--yes", action="store_true", help="remove them; without it they are only listed")


def temperature(word: str) -> float:
    """An argument that is 0, or a number by which logits may be divided in 32 bits."""
    value = float(word)
    if value and not 1e-6 <= value <= 1e6:
        raise argparse.ArgumentTypeError(f"{word} is neither 0 nor a number from 1e-6 to 1e6")
    return value


def add_chat(commands: Any) -> None:
    parser = command(commands, "chat", "rlhf.chat:run", "talk to a policy, in the terminal or through a pipe")
    add = parser.add_argument
    add("model", metavar="MODEL", help="run/stage, run/stage/vN, run/stage@tag, a folder, or a Hub id")
    add("--root", default="runs", help="root folder of the registry (default: %(default)s)")
    add("--revision", metavar="REVISION", help="of a Hub model")
    add("--system", metavar="TEXT", help="a system message before the conversation")
    form = r"ask plain prompts instead of conversations: {} is the line, \n a new line ('User: {}\nAssistant:')"
    add("--prompt-format", metavar="TEXT", help=form)
    add("--max-new-tokens", type=count, default=256, metavar="N", help="longest answer (default: %(default)s)")
    add("--temperature", type=temperature, default=1.0, metavar="X", help="0 is greedy (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], help="default: the version's own, or float32")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")


def add_plan(commands: Any) -> None:
    parser = command(
        commands, "plan", "rlhf.planning.table:run", "memory a GPU, the smallest configuration that fits, and hours"
    )
    add = parser.add_argument
    add(
        "--model",
        required=True,
        help="facebook/opt-13b, gpt2 …, run/stage[/vN], a folder with a config.json, or a Hub id",
    )
    add("--reward-model", help="the reward model's shape, which is the critic's too (default: --model)")
    add("--root", default="runs", help="root folder of the registry (default: %(default)s)")
    add("--gpus", type=int, default=1, metavar="N", help="GPUs in all (default: %(default)s)")
    add("--gpu-memory", type=float, default=80, metavar="GIB", help="memory of each (default: %(default)s)")
    add("--gpus-per-node", type=int, default=8, metavar="N", help="GPUs of one machine (default: %(default)s)")
    stages = ["sft", "rm", "ppo"]
    add("--stage", nargs="+", choices=stages, default=stages, help="stages to plan (default: all)")
    strategies = ["ddp", "zero1", "zero2", "zero3", "zero3_offload", "lora", "qlora", "fsdp2"]
    add("--strategy", nargs="+", choices=strategies, help="consider these only, in this order (default: all but fsdp2)")
    add("--precision", choices=["bf16", "fp32"], default="bf16", help="default: %(default)s")
    add("--max-length", type=int, metavar="TOKENS", help="sft and rm (default: 2048, or the context)")
    add("--prompt-length", type=int, metavar="TOKENS", help="ppo (default: 1024, or half the context)")
    add("--response-length", type=int, metavar="TOKENS", help="ppo (default: 1024, or half the context)")
    for name, default, help in (
        ("--sft-batch", 32, "demonstrations in an optimiser step"),
        ("--rm-batch", 64, "prompts in an optimiser step"),
        ("--completions", 9, "completions of a prompt in rm, at most"),
        ("--ppo-batch", 512, "episodes in a rollout"),
        ("--num-mini-batches", 8, "optimiser steps of a rollout"),
        ("--rollout-batch", 64, "prompts that a GPU decodes at once, at most"),
    ):
        add(name, type=int, default=default, metavar="N", help=f"{help} (default: %(default)s)")
    add("--no-ema", action="store_true", help="no average of the policy's weights")
    add("--no-ptx", action="store_true", help="no pretraining mix")
    for name, kind, help in (
        ("--tflops", float, "a GPU's dense peak in TFLOP/s (default: 312, an A100 in bf16)"),
        ("--mfu", float, "share of it that training reaches (default: 0.35)"),
        ("--generation-share", float, "generation's share of PPO's time (default: 0.66)"),
        ("--gather-gb-s", float, "GB/s a GPU gets of others' weights, where PPO gathers by layer (default: 25)"),
        ("--reserve", float, "share of the memory that is not for the model (default: 0.08)"),
        ("--demonstrations", int, "(default: 12725, InstructGPT's)"),
        ("--sft-epochs", float, "(default: 16)"),
        ("--comparisons", int, "prompts with rankings (default: 33207)"),
        ("--episodes", int, "(default: 256000)"),
        ("--ptx-ratio", float, "pretraining examples an episode (default: 8)"),
    ):
        add(name, type=kind, metavar="X", help=help)
    add("--json", action="store_true", help="everything in bytes, for programs")


def add_report(commands: Any) -> None:
    help = "one HTML page of a run: lineage, tables, curves, samples; it needs nothing beside it"
    parser = command(commands, "report", "rlhf.report:run", help)
    parser.add_argument(
        "name", metavar="RUN", help="the run; its newest version of each stage is shown, all are listed"
    )
    parser.add_argument("--root", default="runs", help="root folder of the registry (default: %(default)s)")
    parser.add_argument("--out", metavar="FILE", help="the page (default: ROOT/RUN/report.html)")


def add_doctor(commands: Any) -> None:
    help = "what this machine can do: versions, devices, threads, backends, DeepSpeed, disk, Hub; with what to do"
    parser = command(commands, "doctor", "rlhf.doctor:run", help)
    parser.add_argument("--root", default="runs", help="root folder of the registry (default: %(default)s)")


def add_best_of_n(commands: Any) -> None:
    help = "PPO on the plane of reward against KL, beside the best of n samples of its SFT model"
    add = command(commands, "best-of-n", "rlhf.best_of_n:run", help).add_argument
    add("ref", metavar="RUN/ppo[/vN]", help="the policy; of RUN/sft the best of n alone")
    add("--root", default="runs", help="root folder of the registry (default: %(default)s)")
    add("--n", nargs="+", type=count, default=[2, 4, 8, 16], metavar="N", help="samples a prompt (default: 2 4 8 16)")
    add("--reward", metavar="RUN/rm", help="the reward model (default: the one that PPO was trained with)")
    own = "prompts that it was not trained on (default: those that its training held out)"
    add("--data", metavar="FILE", help=own)
    add("--max-prompts", type=count, default=256, metavar="N", help="use at most this many (default: %(default)s)")
    add("--response-length", type=count, metavar="TOKENS", help="longest answer (default: as it was trained)")
    add("--seed", type=int, default=0, metavar="N", help="default: %(default)s")


GROUPS: list[Callable[[Any], None]] = [
    *(add_registry, add_hub, add_report, add_plan, add_data, add_reward, add_best_of_n, add_chat, add_doctor)
]


if __name__ == "__main__":
    sys.exit(main())
