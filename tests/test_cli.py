"""The `rlhf` command and `run_stage`, as processes: what is printed where, and the exit status."""

import json
import logging
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from accelerate import PartialState
from accelerate.utils.other import clean_state_dict_for_safetensors

from rlhf import __version__, cli
from rlhf.registry import Registry

HEAVY = {"torch", "numpy", "transformers", "datasets", "trl", "accelerate", "huggingface_hub", "rich", "filelock"}


def run(*command, **options):
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=60, **options)


def rlhf(*arguments, **options):
    return run("-m", "rlhf.cli", *map(str, arguments), **options)


def imported(process):
    """Top-level modules that a process started with -X importtime has loaded, and rlhf's own by their full names."""
    names = {line.split("|")[-1].strip() for line in process.stderr.splitlines() if line.startswith("import time:")}
    return {name.split(".")[0] for name in names} | {name for name in names if name.startswith("rlhf.")}


def publish(registry, ref, weights=b"weights", **provenance):
    with registry.draft(*ref.split("/")) as draft:
        (draft.path / "model.safetensors").write_bytes(weights)
        return draft.publish(**provenance)


@pytest.fixture
def registry(tmp_path):
    """sft v1, v2; rm v1 from sft v1; ppo v1 and v2 from sft v1 and rm v1."""
    registry = Registry(tmp_path / "runs")
    data = [{"name": "hh", "records": 10}]
    sft = publish(registry, "demo/sft", base_model="gpt2", config={"lr": 1e-5, "seed": 1}, metrics={"eval_loss": 1.25})
    publish(registry, "demo/sft", b"more", base_model="gpt2", config={"lr": 2e-5, "seed": 1}, metrics={"eval_loss": 1})
    rm = publish(registry, "demo/rm", parents=[sft], metrics={"accuracy": 0.725, "records": 10}, data=data)
    for _ in range(2):
        publish(registry, "demo/ppo", parents=[sft, rm], metrics={"note": "no number", "steps": 3})
    return registry


@pytest.fixture
def command(registry):
    return lambda *arguments: rlhf("registry", "--root", registry.root, *arguments)


def assert_error(process, text):
    """Status 2, nothing but one line on stderr."""
    assert (process.returncode, process.stderr.count("\n")) == (2, 1), process.stderr
    assert process.stderr.startswith("error: ") and text in process.stderr


# --- the command


def test_version_and_help_load_nothing_heavy():
    for option, text in (("--version", f"rlhf {__version__}\n"), ("--help", "registry")):
        process = run("-X", "importtime", "-m", "rlhf.cli", option)
        assert process.returncode == 0 and text in process.stdout
        assert not imported(process) & {*HEAVY, "rlhf.registry", "rlhf.config"}


def test_a_wrong_command_has_status_2():
    for arguments in ((), ("nonsense",), ("registry",), ("registry", "nonsense")):
        process = rlhf(*arguments)
        assert process.returncode == 2 and "usage: rlhf" in process.stderr and "Traceback" not in process.stderr


def test_main_returns_a_status(registry, capsys):
    assert cli.main(["registry", "ls", "--root", str(registry.root)]) == 0
    assert cli.main(["registry", "ls", "nobody", "--root", str(registry.root)]) == 2
    assert capsys.readouterr().err.startswith("error: no versions in run 'nobody'")


def test_libraries_do_not_report_what_a_command_does_not_need(registry, monkeypatch):
    """bitsandbytes names a package that it would like, on each CPU with bfloat16 matrix products."""
    monkeypatch.setattr(logging.getLogger("bitsandbytes"), "level", logging.NOTSET)
    assert cli.main(["registry", "ls", "--root", str(registry.root)]) == 0
    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.WARNING)


def test_deepspeed_does_not_report_a_machine_without_a_gpu(caplog, monkeypatch):
    """Its import makes a logger that writes to stdout, after the level was set."""
    logger = logging.getLogger("DeepSpeed")
    monkeypatch.setattr(logger, "filters", [])
    cli.silence_libraries()
    monkeypatch.setattr(logger, "level", logging.INFO)
    with caplog.at_level(logging.INFO, logger="DeepSpeed"):
        logger.warning("Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it.")
        logger.warning("something else")
    assert caplog.messages == ["something else"]


def test_saving_tied_weights_is_no_news(caplog, monkeypatch):
    PartialState()
    monkeypatch.setattr(logging.getLogger("accelerate.utils.other"), "filters", [])
    tied = torch.zeros(2)
    clean_state_dict_for_safetensors({"head": tied, "embeddings": tied})
    assert "Removed shared tensor" in caplog.text
    caplog.clear()
    cli.silence_libraries()
    clean_state_dict_for_safetensors({"head": tied, "embeddings": tied})
    assert not caplog.records


def test_what_is_no_mistake_of_the_user_keeps_its_traceback(registry, monkeypatch):
    def broken(self, run=None, stage=None):
        raise ZeroDivisionError

    monkeypatch.setattr(Registry, "list", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["registry", "ls"])


def test_interrupting_gives_130(registry, monkeypatch):
    def interrupted(self, run=None, stage=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(Registry, "list", interrupted)
    assert cli.main(["registry", "ls"]) == 130


def test_a_reader_that_stops_early_is_no_error(registry):
    process = subprocess.Popen(
        [sys.executable, "-m", "rlhf.cli", "registry", "--root", str(registry.root), "show", "demo/sft"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout and process.stderr
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_an_output_that_is_full_is_one_line(registry):
    command = [sys.executable, "-m", "rlhf.cli", "registry", "--root", str(registry.root), "show", "demo/sft"]
    with open("/dev/full", "w") as full:
        process = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert process.stderr == "error: cannot write the output: No space left on device; free space there\n"
    assert process.returncode == 2


def test_streams_that_are_closed_are_nowhere(registry, monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert cli.main(["registry", "ls", "--root", str(registry.root)]) == 0
    assert sys.stdin.read() == ""


# --- the registry's commands


def test_ls_prints_a_plain_table_into_a_pipe(command, registry):
    registry.tag(registry.get("demo/sft/v1"), "best")
    lines = command("ls").stdout.splitlines()
    assert [line.split()[0] for line in lines] == [
        *("ref", "demo/sft/v1", "demo/sft/v2", "demo/rm/v1", "demo/ppo/v1", "demo/ppo/v2")
    ]
    assert lines[1].split()[1] == "@best" and lines[1].split()[4:] == ["gpt2", "eval_loss=1.25", "7", "B"]
    assert lines[3].split()[3:] == ["demo/sft/v1", "accuracy=0.725", "7", "B"]
    assert lines[4].split()[3:] == ["demo/sft/v1,", "demo/rm/v1", "steps=3", "7", "B"]
    assert len({line.index(name) for line, name in zip(lines, ("created", *["20"] * 5))}) == 1  # columns are aligned


def test_ls_of_a_run_and_of_nothing(command, registry, tmp_path):
    publish(registry, "other/sft")
    assert command("ls", "other").stdout.count("\n") == 2
    assert_error(command("ls", "nobody"), "no versions in run 'nobody'")
    assert "runs there: demo, other" in command("ls", "nobody").stderr
    assert_error(command("ls", "../runs"), "is no run name")
    (tmp_path / "empty").mkdir()
    empty = rlhf("registry", "ls", cwd=tmp_path / "empty")  # where nothing was trained yet
    assert (empty.returncode, empty.stdout) == (0, f"no versions in {tmp_path / 'empty' / 'runs'}\n")
    assert not any((tmp_path / "empty").iterdir())


def test_a_root_that_is_not_there_or_no_folder(tmp_path, capsys):
    (tmp_path / "file").touch()
    for name, reason in (("nosuch", "No such file or directory"), ("file", "Not a directory")):
        for command in ("ls", "verify", "gc"):
            assert cli.main(["registry", command, "--root", str(tmp_path / name)]) == 2
            assert capsys.readouterr().err == (
                f"error: cannot read {tmp_path / name}: {reason}; name the folder that holds the runs with --root\n"
            )
    assert not (tmp_path / "nosuch").exists()


def test_ls_skips_what_it_cannot_read_and_says_so(command, registry):
    (registry.root / "demo" / "rm" / "v1" / "stage.json").write_text("{")
    process = command("ls")
    assert process.returncode == 0 and "\ndemo/rm/v1" not in process.stdout
    assert process.stderr.count("\n") == 1 and process.stderr.startswith("skipped: cannot read ")


def test_root_is_runs_in_the_current_folder_and_may_stand_last(registry):
    in_place = rlhf("registry", "ls", cwd=registry.root.parent)
    last = rlhf("registry", "ls", "--root", registry.root)
    assert in_place.stdout == last.stdout and in_place.stdout.count("\n") == 6


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_ls_at_a_terminal_shows_brackets_as_they_are(registry):
    publish(registry, "demo/base", base_model="org/[bold]name")
    reader, writer = os.openpty()
    command = [sys.executable, "-m", "rlhf.cli", "registry", "--root", str(registry.root), "ls"]
    environment = {**os.environ, "COLUMNS": "140", "TERM": "xterm"}
    assert subprocess.run(command, stdout=writer, env=environment, timeout=60).returncode == 0
    os.close(writer)
    text = os.read(reader, 1 << 16).decode()
    os.close(reader)
    assert "org/[bold]name" in text and "demo/ppo/v2" in text and "\x1b[1m" in text


def test_show_is_readable_or_json(command, registry):
    lines = command("show", "demo/rm").stdout.splitlines()
    assert lines[0].startswith(f"demo/rm/v1   {registry.root}/demo/rm/v1")
    assert ["accuracy", "0.725"] in map(str.split, lines) and ["[0].records", "10"] in map(str.split, lines)
    assert ["[0].ref", "demo/sft/v1"] in map(str.split, lines)
    assert json.loads(command("show", "demo/rm", "--json").stdout) == registry.get("demo/rm").manifest
    assert_error(command("show", "demo/base"), "train one: accelerate launch scripts/pretrain.py --run_name demo")


def test_lineage_is_a_tree(command, registry):
    sft, rm, ppo = (registry.get(f"demo/{ref}") for ref in ("sft/v1", "rm/v1", "ppo/v2"))
    day = ppo.manifest["created"][:10]
    shutil.rmtree(rm.path)
    assert command("lineage", "demo/ppo").stdout == (
        f"demo/ppo/v2  {ppo.weights_sha256[:12]}  {day}\n"
        f"├── demo/sft/v1  {sft.weights_sha256[:12]}  {day}\n"
        "│   └── gpt2  (outside the registry)\n"
        "└── demo/rm/v1  (not here, or other weights now)\n"
    )


def test_verify_one_and_all(command, registry):
    process = command("verify")
    assert process.returncode == 0 and process.stdout.count("ok   ") == 5
    (registry.root / "demo" / "rm" / "v1" / "model.safetensors").write_bytes(b"WEIGHTS")
    (registry.root / "demo" / "ppo" / "v1" / "stage.json").write_text("{")
    process = command("verify")
    assert_error(process, "2 damaged")
    assert process.stdout.count("ok   ") == 3 and process.stdout.count("bad  ") == 2
    assert "rm/v1/model.safetensors has changed" in process.stdout and "ppo/v1/stage.json" in process.stdout
    assert_error(command("verify", "demo/rm"), "model.safetensors has changed")
    assert command("verify", "demo/sft").stdout == "ok   demo/sft/v2\n"
    (registry.root / "demo" / "sft" / "v1" / "stage.json").unlink()
    process = command("verify")
    assert_error(process, "3 damaged")
    assert f"bad  {registry.root}/demo/sft/v1 holds no stage.json: restore it or remove the folder\n" in process.stdout


def test_diff_shows_only_what_differs(command):
    assert command("diff", "demo/sft/v1", "demo/sft/v2").stdout.splitlines() == [
        "- demo/sft/v1",
        "+ demo/sft/v2",
        "weights: different",
        "",
        "config",
        f"  {'lr':<32} 1e-05  →  2e-05",
        "",
        "metrics",
        f"  {'eval_loss':<32} 1.25  →  1",
        "",
        "files",
        f"  {'model.safetensors':<32} 9a129038d9a0  →  187897ce0afc",  # printf weights | sha256sum, and of more
    ]
    text = command("diff", "demo/sft/v1", "demo/rm").stdout
    assert "weights: the same" in text and f"  {'[0].records':<32} —  →  10" in text
    assert f"  {'[0].ref':<32} —  →  demo/sft/v1" in text and "packages" not in text


def test_diff_shows_files_adapters_and_extra(command, registry):
    """A card tells nothing new, and samples are long."""
    base = registry.get("demo/sft/v1")
    on = {"kind": "artifact", "ref": base, "revision": None, "sha256": base.weights_sha256}
    for template, more in (("{{ a }}", {"reward_bias": 1.0}), ("{{ b }}", {"reward_bias": 2.0})):
        with registry.draft("demo", "rm") as draft:
            (draft.path / "model.safetensors").write_bytes(b"weights")
            (draft.path / "README.md").write_text(template)
            (draft.path / "chat_template.jinja").write_text(template)
            (draft.path / f"{template[3]}.json").write_text("{}")
            samples = [{"prompt": template, "completion": "long " * 99}]
            draft.publish(adapters={"critic": on | more}, extra={"license": template[3], "samples": samples})
    lines = command("diff", "demo/rm/v2", "demo/rm/v3").stdout.splitlines()
    assert lines[2:9] == [
        "weights: the same",
        *("", "adapters", f"  {'critic.reward_bias':<32} 1.0  →  2.0"),
        *("", "extra", f"  {'license':<32} a  →  b"),
    ]
    assert lines[9].startswith("  samples ") and lines[9].count("1 records, ") == 2
    assert [line.split()[0] for line in lines[12:]] == ["a.json", "chat_template.jinja", "b.json"]
    assert lines[12].endswith(" 44136fa355b3  →  —") and lines[14].endswith(" —  →  44136fa355b3")


def test_tag_and_untag(command, registry):
    assert command("tag", "demo/sft/v1", "best").stdout == "demo/sft@best is demo/sft/v1\n"
    assert command("show", "demo/sft@best").stdout.startswith("demo/sft/v1 ")
    assert_error(command("tag", "demo/sft/v1", "v9"), "reads like a version")
    assert command("untag", "demo/sft", "best").returncode == 0
    assert_error(command("untag", "demo/sft/v1", "best"), "no tag 'best'")
    other = rlhf("registry", "--root", registry.root / "other", "tag", registry.get("demo/sft").path, "best")
    assert_error(other, f"--root {registry.root}")


def test_gc_shows_first_and_removes_with_yes(command, registry):
    draft = registry.root / "demo" / "sft" / ".draft-00000000-1-elsewhere"
    draft.mkdir()
    (draft / "model.safetensors").write_bytes(b"half")
    for path in (draft / "model.safetensors", draft):
        os.utime(path, (time.time() - 1e6,) * 2)
    for arguments, verb in ((("--keep", "1"), "would remove"), (("--keep", "1", "--yes"), "removed")):
        assert draft.exists() and len(registry.list()) == 5
        lines = command("gc", *arguments).stdout.splitlines()
        # sft v1 is old, and stays: rm v1 and ppo v2 were trained from it
        assert lines[:2] == [f"{verb}  demo/ppo/v1  7 B", f"{verb}  demo/sft/{draft.name}  (a stale draft)"]
        assert lines[2].startswith("11 B ") and len(lines) == 3
    assert not draft.exists()
    refs = [artifact.ref for artifact in registry.list()]
    assert refs == ["demo/sft/v1", "demo/sft/v2", "demo/rm/v1", "demo/ppo/v2"]
    assert "nothing to remove" in command("gc", "--keep", "1").stdout
    assert_error(command("gc", "--keep", "0"), "keep must be at least 1")


def test_gc_says_what_is_gone_and_no_more(registry, monkeypatch, capsys):
    """The second version cannot be removed."""
    publish(registry, "demo/ppo")
    rename, targets = os.rename, []

    def failing(source, target):
        targets.append(target)
        if len(targets) == 2:
            raise OSError(30, "Read-only file system")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    assert cli.main(["registry", "gc", "--root", str(registry.root), "--keep", "1", "--yes"]) == 2
    out, err = capsys.readouterr()
    assert out == "removed  demo/ppo/v2  7 B\n"
    assert (
        err.startswith(f"error: cannot remove {registry.root}/demo/ppo/v1: Read-only file system;")
        and err.count("\n") == 1
    )


# --- stages

STAGE = """
import sys, types
from rlhf import RLHFError
import rlhf.cli

def fail(args):
    raise {error}

sys.modules["rlhf.config"] = types.SimpleNamespace(parse=lambda stage, argv: print(stage, argv))
sys.modules["rlhf.reward"] = types.SimpleNamespace(run=fail)
rlhf.cli.run_stage("reward", ["--lr", "1"])
"""


def run_stage(error, **environment):
    clean = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK")}
    return run("-c", STAGE.format(error=error), env={**clean, **environment})


def test_a_stage_error_is_one_line_with_status_2():
    process = run_stage("RLHFError('no sft in run x')")
    assert (process.stdout, process.stderr) == ("reward ['--lr', '1']\n", "error: no sft in run x\n")
    assert process.returncode == 2
    assert run_stage("RLHFError('x')", WORLD_SIZE="1", RANK="0").stderr == "error: x\n"
    assert (
        run_stage("RLHFError('x')", WORLD_SIZE="2", RANK="1", ACCELERATE_USE_CPU="true").stderr == "error: [rank 1] x\n"
    )


def test_a_process_that_loses_another_says_so_in_one_line():
    gloo = "RuntimeError('[pair.cc:547] Connection closed by peer [127.0.0.1]:1')"
    process = run_stage(gloo, WORLD_SIZE="2", RANK="0", ACCELERATE_USE_CPU="true")
    assert process.returncode == 2 and process.stderr.startswith(
        "error: [rank 0] reward: another process of this launch is gone;"
    )
    assert process.stderr.count("\n") == 1


def test_other_errors_of_a_stage_keep_their_traceback():
    process = run_stage("ValueError('a bug')")
    assert process.returncode == 1 and "Traceback" in process.stderr
    assert run_stage("KeyboardInterrupt").returncode == 130


def test_run_stage_knows_its_stages():
    with pytest.raises(ValueError, match="no stage"):
        cli.run_stage("os")


@pytest.mark.parametrize("stage", cli.ARTIFACTS)
def test_help_and_typos_of_a_stage_are_answered_before_torch_is_loaded(stage):
    code = f"from rlhf.cli import run_stage; run_stage({stage!r})"
    process = run("-X", "importtime", "-c", code, "--help")
    assert process.returncode == 0 and "--run_name" in process.stdout
    assert "torch" not in imported(process)
    process = run("-X", "importtime", "-c", code, "--no_such_option", "1")
    messages = [line for line in process.stderr.splitlines() if not line.startswith("import time:")]
    assert process.returncode == 2 and "torch" not in imported(process)
    assert len(messages) == 1 and messages[0].startswith("error: ") and "no_such_option" in messages[0]
