"""push_to_hub in a stage's config: the published version goes to a Hub on loopback, and a push that fails loses nothing."""

import sys

import huggingface_hub.constants
import pytest
import test_ppo
import tiny
from test_hub import contents, hub, on_hub, waits  # noqa: F401  (fixtures)

from rlhf import cli, ppo, pretrain, reward, sft
from rlhf.config import ConfigError, SFTArgs
from rlhf.hub import HubError

PUSH = {"push_to_hub": True, "hub_model_id": "alice/demo"}
STAGES = {
    "pretrain": (pretrain.run, tiny.pretrain_args),
    "sft": (sft.run, tiny.sft_args),
    "reward": (reward.run, tiny.reward_args),
    "ppo": (ppo.run, test_ppo.ppo_args),
}


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_pushes_what_it_publishes(tmp_path, hub, stage, capsys):  # noqa: F811
    test_ppo.stages(tmp_path)
    run, make = STAGES[stage]
    artifact = run(make(tmp_path, license="mit", dataset_license="apache-2.0", **PUSH))
    assert on_hub(hub) == on_hub(hub, f"rlhf-v{artifact.version}") == contents(artifact.path)
    assert hub.repos["alice/demo"].private
    assert f"pushed {artifact.ref}  {hub.url}/alice/demo  (private)" in capsys.readouterr().err
    text = (artifact.path / "README.md").read_text()
    assert "\nlicense: mit\n" in text and "| apache-2.0 |" in text and 'from_pretrained("alice/demo")' in text


def test_a_public_repository_is_asked_for(tmp_path, hub):  # noqa: F811
    tiny.published(tmp_path, "base")
    sft.run(tiny.sft_args(tmp_path, hub_private_repo=False, **PUSH))
    assert not hub.repos["alice/demo"].private


def test_no_file_and_no_line_of_a_run_holds_the_token(tmp_path, hub, monkeypatch):  # noqa: F811
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)  # which a stage of this process may have set
    registry = tiny.published(tmp_path, "base")
    args = tiny.sft_args(tmp_path, report_to=["tensorboard"], save_steps=1, **PUSH)
    config = tiny.write_config(tmp_path / "sft.json", args)
    variables = {
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "home"),
    }
    command = [sys.executable, "scripts/sft.py", "--config", config]
    done = tiny.launch(command, HF_TOKEN=hub.token, **variables)
    assert done.returncode == 0, done.stderr[-2000:]
    pushed = on_hub(hub)
    assert pushed == contents(registry.require("sft", "tiny").path) and list((tmp_path / "runs").rglob("events.*"))
    everything = {**contents(tmp_path), **pushed, "output": (done.stdout + done.stderr).encode()}
    assert not [name for name, data in everything.items() if hub.token.encode() in data]


def test_a_token_that_may_only_read_is_refused_without_being_told(tmp_path, hub, capsys, caplog, monkeypatch):  # noqa: F811
    registry = tiny.published(tmp_path, "base")
    monkeypatch.setenv("HF_TOKEN", hub.reader_token)
    with pytest.raises(
        HubError, match=r"the token of alice \(role: read\) may not write to alice/demo \(403\)"
    ) as caught:
        sft.run(tiny.sft_args(tmp_path, **PUSH))
    registry.verify("tiny/sft/v1")
    told = "".join((str(caught.value), caplog.text, *capsys.readouterr())).encode()
    assert not [n for n, data in {**contents(tmp_path), "output": told}.items() if hub.reader_token.encode() in data]


def test_a_push_that_fails_keeps_the_version_and_names_the_command(tmp_path, hub, capsys):  # noqa: F811
    registry = tiny.published(tmp_path, "base")
    hub.fail("POST .*/commit/", status=500, times=99)
    with pytest.raises(HubError) as caught:
        sft.run(tiny.sft_args(tmp_path, save_steps=1, **PUSH))
    text = str(caught.value)
    assert text.startswith(f"tiny/sft/v1 is published in {registry.root} and was not pushed: the Hub answers 500")
    again = f"rlhf push {registry.root}/tiny/sft/v1 alice/demo"
    assert f"`{again}` goes on where this stopped" in text and "\n" not in text
    registry.verify("tiny/sft/v1")
    assert tiny.left_over(registry, "sft") == []  # the training is through: no work folder stays
    hub.failures.clear()
    assert cli.main(again.split()[1:]) == 0
    assert on_hub(hub, "rlhf-v1") == contents(registry.get("tiny/sft/v1").path)


def test_a_name_that_exists_is_not_replaced(tmp_path, hub):  # noqa: F811
    registry = tiny.published(tmp_path, "base", "sft")
    assert cli.main(["push", "tiny/base", "alice/demo", "--root", str(registry.root)]) == 0
    before = on_hub(hub)
    with pytest.raises(
        HubError, match=r"alice/demo holds tiny/base, not tiny/sft: .*; then `rlhf push /.*/v2 alice/demo`"
    ):
        sft.run(tiny.sft_args(tmp_path, **PUSH))
    assert on_hub(hub) == before and registry.get("tiny/sft").version == 2


def test_what_cannot_begin_is_refused_before_the_training(tmp_path, hub, monkeypatch):  # noqa: F811
    registry = tiny.published(tmp_path, "base")
    args = tiny.sft_args(tmp_path, **PUSH)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set, so that nothing can be pushed at the end: unset it"):
        sft.run(args)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    with pytest.raises(HubError, match="no Hub token to push with: run `hf auth login`"):
        sft.run(args)
    assert hub.requests == [] and not (registry.root / "tiny" / "sft").exists()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"push_to_hub": True}, "push_to_hub: where to is not said; give hub_model_id"),
        ({"hub_model_id": "demo"}, "hub_model_id: 'demo' is no model repository; write USER/NAME"),
        ({"training_arguments": {"push_to_hub": True}}, "push_to_hub is not for here"),
        ({"training_arguments": {"hub_model_id": "a/b"}}, "hub_model_id is not for here"),
        ({"training_arguments": {"hub_token": "x"}}, "hub_token does not belong in a config"),
    ],
)
def test_options_that_do_not_go(values, says):
    with pytest.raises(ConfigError, match=says):
        SFTArgs(**values)


@pytest.mark.slow
def test_two_processes_push_once(tmp_path, hub):  # noqa: F811
    registry = tiny.published(tmp_path, "base")
    config = tiny.write_config(tmp_path / "sft.json", tiny.sft_args(tmp_path, **PUSH))
    launcher = [tiny.program("accelerate"), "launch", "--config_file", "configs/accelerate/cpu_ddp.yaml"]
    done = tiny.launch(
        [*launcher, "--main_process_port", "0", "scripts/sft.py", "--config", config],
        ACCELERATE_USE_CPU="true",
        **{"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")},
        HF_TOKEN=hub.token,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert on_hub(hub, "rlhf-v1") == contents(registry.require("sft", "tiny").path)
    assert hub.count("POST .*/commit/") == 1
