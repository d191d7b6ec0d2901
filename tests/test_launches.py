"""Real launches: every stage under data parallelism and ZeRO 1, 2, 3 and offload follows the same run on one process.

The stages of a launch share its processes, and so do both architectures (tests/launched.py): starting them takes longer than
training.
"""

import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import time

import pytest
import test_ppo
import tiny
import torch
from safetensors.torch import load_file

from rlhf import ppo, pretrain, reward, sft
from rlhf.planning.memory import Job, Setup
from rlhf.planning.search import launch_command
from rlhf.planning.shapes import BUILT_IN
from rlhf.registry import Registry

RUN = {"pretrain": pretrain.run, "sft": sft.run, "reward": reward.run, "ppo": ppo.run}
STRATEGIES = ["cpu_ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2"]
WITHOUT_DEEPSPEED = ["cpu_ddp", "fsdp2"]
ARCHITECTURES = ["gpt2", "opt"]
WITH_ADAPTERS = {"cpu_ddp": "opt", "zero2": "gpt2", "zero3": "opt", "fsdp2": "gpt2"}
WITH_MUON = {
    "cpu_ddp": "gpt2",
    "zero1": "opt",
    "zero2": "gpt2",
    "zero3": "gpt2",
    "fsdp2": "gpt2",
}  # GPT-2 has three matrices in one weight
PROCESSES = 2
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None or shutil.which("g++") is None,
    reason="needs deepspeed, and g++ for its communication between CPU processes",
)


def command(strategy, *words, tmp_path=None):
    """`accelerate launch` of a file of configs/accelerate with two processes, without a network port of its own."""
    options = ["--config_file", f"configs/accelerate/{strategy}.yaml", "--num_processes", str(PROCESSES)]
    if strategy.startswith("zero3"):
        options += ["--deepspeed_config_file", nothing_stays_whole(strategy, tmp_path)]
    if strategy == "fsdp2":
        options += ["--mixed_precision", "no"]  # what is compared is float32
    return [tiny.program("accelerate"), "launch", *options, "--main_process_port", "0", *words]


def nothing_stays_whole(strategy, tmp_path):
    """The DeepSpeed file, but for models of some thousand weights: they are spread, and reduced in several buckets."""
    values = json.loads((tiny.ROOT / f"configs/accelerate/deepspeed/{strategy}.json").read_text())
    values["zero_optimization"] |= {
        "stage3_param_persistence_threshold": 40,  # the norms stay whole, so that both kinds are there
        "reduce_bucket_size": 5000,
        "stage3_prefetch_bucket_size": 5000,
        "stage3_max_live_parameters": 20000,
        "stage3_max_reuse_distance": 20000,
    }
    path = tmp_path / f"{strategy}.json"
    path.write_text(json.dumps(values))
    return str(path)


def variables(strategy):
    return {"ACCELERATE_USE_CPU": "true"} if strategy in WITHOUT_DEEPSPEED else {"DS_ACCELERATOR": "cpu"}


def stage_args(tmp_path, processes):
    """Arguments of the stages, whose optimiser steps see the same items whatever the number of processes.

    Clipping is on everywhere, SFT and RM accumulate, and nothing is a multiple of anything: rollouts of 9 episodes in minibatches
    of 3, micro-batches of 1, and one held-out prompt, which leaves a process with none.
    """
    each = {"per_device_train_batch_size": 4 // processes // 2, "gradient_accumulation_steps": 2, "max_grad_norm": 0.5}
    each["adam_epsilon"] = 1e-5  # or Adam makes a whole step of a gradient that is rounding only
    prompts = test_ppo.ppo_args(tmp_path).dataset_name
    return {
        "sft": tiny.sft_args(
            tmp_path,
            tiny.demonstrations(40),
            max_steps=4,
            model_name_or_path="tiny/base/v1",
            resid_pdrop=0.0,
            eval_fraction=0.3,
            reward_model_path="tiny/rm/v1",  # chooses the epoch
            response_length=6,
            **each,
        ),
        "reward": tiny.reward_args(
            tmp_path,
            tiny.comparisons(16),
            max_steps=4,
            model_name_or_path="tiny/sft/v1",
            max_train_samples=7,  # steps of four and of three, which two processes cannot share
            eval_fraction=0.2,
            **each,
        ),
        "ppo": test_ppo.ppo_args(
            tmp_path,
            dataset_name=prompts,
            sft_model_path="tiny/sft/v1",
            reward_model_path=["tiny/rm/v1"],
            total_episodes=18,
            batch_size=9,
            num_mini_batches=3,
            num_ppo_epochs=2,
            per_device_train_batch_size=1,
            per_device_ptx_batch_size=1,
            ptx_ratio=1.0,
            eval_fraction=0.3,
            eval_episodes=1,
            kl_target=1.0,
            scale_scores=True,
            ema_decay=0.9,
        ),
    }


def whole_stages(folder, architecture, processes, **changes):
    registry = test_ppo.stages(folder, architecture)
    found = stage_args(folder, processes)
    found["ppo"] = dataclasses.replace(found["ppo"], ds3_gather_for_generation=architecture != "opt")
    return registry, [(stage, dataclasses.replace(args, **changes)) for stage, args in found.items()]


def adapter_stages(folder, architecture, processes):
    """Each trains on from the adapter of the one before, all on one base; SFT trains on with its own merged, too."""
    registry = test_ppo.stages(folder, architecture)
    found = stage_args(folder, processes)
    lora = {"use_peft": True, "lora_r": 4, "lora_dropout": 0.0}
    chain = {
        "sft": {},
        "reward": {"model_name_or_path": "tiny/sft/v2"},
        "ppo": {
            "sft_model_path": "tiny/sft/v2",
            "reward_model_path": ["tiny/rm/v2"],
            "ds3_gather_for_generation": architecture != "opt",
        },
    }
    stages = [(stage, dataclasses.replace(args, **lora, **chain[stage])) for stage, args in found.items()]
    merged = ("sft", dataclasses.replace(found["sft"], model_name_or_path="tiny/sft/v2"))
    return registry, [*stages[:2], merged, stages[2]]


KINDS = {
    "whole": whole_stages,
    "muon": functools.partial(whole_stages, optim="muon"),
    "adapters": adapter_stages,
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process makes of the stages, and of those with adapters, once for each architecture."""
    made = {}

    def of(architecture, kind="whole"):
        if (architecture, kind) not in made:
            stages = KINDS[kind](tmp_path_factory.mktemp(f"alone_{architecture}"), architecture, 1)[1]
            made[architecture, kind] = [RUN[stage](args) for stage, args in stages]
        return made[architecture, kind]

    return of


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy", [pytest.param(s, marks=[] if s in WITHOUT_DEEPSPEED else [needs_deepspeed]) for s in STRATEGIES]
)
def test_two_processes_follow_one(tmp_path, alone, strategy):
    kinds = [(architecture, "whole") for architecture in ARCHITECTURES]
    kinds += [(of[strategy], kind) for kind, of in (("muon", WITH_MUON), ("adapters", WITH_ADAPTERS)) if strategy in of]
    stages, registries = [], {}
    for architecture, kind in kinds:
        made = KINDS[kind](tmp_path / f"{architecture}-{kind}", architecture, PROCESSES)
        registries[architecture, kind] = made[0]
        stages += made[1]
    pretrains = not strategy.startswith("zero3")  # under which a new model's weights are drawn in another order
    if pretrains:
        stages.append(("pretrain", pretrain_args(tmp_path, PROCESSES)))
    words = ["tests/launched.py"]
    for i, (stage, args) in enumerate(stages):
        if stage == "ppo" and strategy == "fsdp2":  # which has but one way
            args = dataclasses.replace(args, ds3_gather_for_generation=True)
        words += [stage, tiny.write_config(tmp_path / f"{i}.json", args)]
    done = tiny.launch(command(strategy, *words, tmp_path=tmp_path), **variables(strategy))
    assert done.returncode == 0, done.stderr[-9000:]
    published = [line for line in done.stderr.splitlines() if line.startswith("published")]
    assert len(published) == len(stages)  # by one of the processes
    for (architecture, kind), registry in registries.items():
        if kind == "adapters":
            assert_adapters_follow(alone(architecture, kind), registry)
        else:
            launched = {"cpu_ddp": "multi_cpu", "fsdp2": "fsdp"}.get(strategy, "deepspeed")
            assert_follows(alone(architecture, kind), registry, launched)
    if pretrains:
        one = pretrain.run(pretrain_args(tmp_path / "alone", 1))
        two = Registry(tmp_path / "runs").require("base", "tiny")
        assert difference(one, two, "") < 2e-6
        follows(tiny.history(one), tiny.history(two))


@pytest.mark.slow
def test_under_fsdp_in_bfloat16_the_reference_starts_equal(tmp_path):
    """Rollout, reference and update see the same bfloat16 weights; those that learn are float32, and are published so."""
    registry = test_ppo.stages(tmp_path)
    args = stage_args(tmp_path, PROCESSES)["ppo"]
    args = dataclasses.replace(args, bf16=True, gradient_checkpointing=True, num_ppo_epochs=1)
    words = ["tests/launched.py", "ppo", tiny.write_config(tmp_path / "ppo.json", args)]
    done = tiny.launch(command("fsdp2", *words), **variables("fsdp2"))
    assert done.returncode == 0, done.stderr[-3000:]
    end = registry.require("ppo", "tiny")
    first, second = tiny.history(end)
    assert first["objective/kl"] == 0 and second["objective/kl_k3"] > 0
    for line in (first, second):
        assert line["policy/first_ratio"] == pytest.approx(1, abs=1e-6)
    for part in ("", "critic", "ema"):
        assert {w.dtype for w in load_file(end.path / part / "model.safetensors").values()} == {torch.float32}


def pretrain_args(folder, processes):
    """Two steps an epoch of seven blocks, which two processes cannot share."""
    batch = {"per_device_train_batch_size": 4 // processes, "adam_epsilon": 1e-5}
    return tiny.pretrain_args(folder, texts=[" ".join(tiny.text())[:540]], max_steps=5, **batch)


def assert_follows(alone, registry, kind):
    """Each stage of two processes is that of one; and PPO has moved its policy and its critic."""
    for one in alone:
        two, stage = registry.require(one.stage, "tiny"), one.stage
        assert two.version == one.version
        assert two.manifest["device"].startswith("2 x cpu") and two.manifest["device"].lower().endswith(kind)
        for part in ["", "critic", "ema"] if stage == "ppo" else [""]:
            assert difference(one, two, part) < 2e-6, f"{stage} {part}"  # sums in another order, and nothing else
        follows(tiny.history(one), tiny.history(two))
        if stage == "rm":  # both have evaluated all held-out prompts
            for name, value in one.manifest["metrics"].items():
                assert two.manifest["metrics"][name] == pytest.approx(value, abs=1e-5), name
    start, end = registry.get("tiny/sft/v1"), registry.require("ppo", "tiny")
    assert tiny.largest_difference(start, end) > 1e-4
    before, after = (
        load_file(path / "model.safetensors") for path in (registry.get("tiny/rm/v1").path, end.path / "critic")
    )
    assert max((before[name] - after[name]).abs().max().item() for name in before) > 1e-4
    held_out = [a.manifest["metrics"] for a in (alone[-1], end)]
    assert held_out[1]["held_out_prompts"] == held_out[0]["held_out_prompts"] == 1
    for name in ("sft_score", "ppo_score", "kl"):
        assert held_out[1][name] == pytest.approx(held_out[0][name], abs=1e-4)
        if name in held_out[0]["ema"]:
            assert held_out[1]["ema"][name] == pytest.approx(held_out[0]["ema"][name], abs=1e-4)


def assert_adapters_follow(alone, registry):
    for one in alone:
        two = registry.get(one.ref)
        for part in ["", "critic", "ema"] if one.stage == "ppo" else [""]:
            assert difference(one, two, part, "adapter_model" if two.adapters else "model") < 2e-6, f"{one.ref} {part}"
        follows(tiny.history(one), tiny.history(two))
    adapter, rm, whole, end = (registry.get(one.ref) for one in alone)
    assert {part["ref"] for two in (adapter, rm, end) for part in two.adapters.values()} == {"tiny/base/v1"}
    assert whole.ref == "tiny/sft/v3" and not whole.adapters
    assert difference(adapter, end, "", "adapter_model") > 1e-4


def difference(one, two, part, name="model"):
    """The largest difference between two versions' weights; both must name the same tensors."""
    a, b = (load_file(artifact.path / part / f"{name}.safetensors") for artifact in (one, two))
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def follows(one, two):
    """Losses, norms, scores of each step are equal in four digits."""
    names = (
        "loss",
        "grad_norm",
        "objective/scores",
        "objective/kl_k3",
        "loss/policy",
        "loss/value",
        "loss/pretraining",
    )
    names += ("policy/grad_norm", "critic/grad_norm", "policy/ratio_max", "objective/kl_coef")
    assert len(one) == len(two)
    compared = 0
    for a, b in zip(one, two):
        for name in names:
            if name in a:
                assert float(b[name]) == pytest.approx(float(a[name]), rel=1e-3, abs=1e-5), name
                compared += 1
    assert compared


# ------------------------------------------------------------------------------------------------------- processes that fail


def sum_of_places(prompts, completions, **columns):
    """A rule; on process 1 its third call fails, in the way that FAIL names: `raise sum_of_places`."""
    fail_the_third_time("sum_of_places")
    return [sum(map(ord, text)) % 7 / 7 for text in completions]


def sum_of_places_again(prompts, completions, **columns):
    """The same for a second run in the processes of the first."""
    fail_the_third_time("sum_of_places_again")
    return [sum(map(ord, text)) % 7 / 7 for text in completions]


def coin(prompts, completions, **columns):
    """Draws from the random state of its process, and fails as the rules above do."""
    fail_the_third_time("coin")
    return [random.random() + torch.rand(1).item() for _ in completions]


def fail_the_third_time(rule):
    how, _, which = os.environ.get("FAIL", "").partition(" ")
    if os.environ.get("RANK") != "1" or which != rule:
        return
    calls.append(1)
    if len(calls) == 3 and how == "raise":
        raise ValueError("no opinion")
    if len(calls) == 3 and how == "die":
        os.kill(os.getpid(), signal.SIGKILL)


calls: list[int] = []


def failing_run(tmp_path, rule, **changes):
    """Four rollouts whose reward is a rule above, with everything on that a checkpoint must carry."""
    changes = {"eval_episodes": 0, "total_episodes": 24, "num_mini_batches": 2, "batch_size": 6, **changes}
    return test_ppo.ppo_args(
        tmp_path,
        reward_functions=[f"test_launches:{rule}"],
        reward_model_path=[],
        critic_path="tiny/rm/v1",
        kl_target=1.0,
        scale_scores=True,
        ema_decay=0.9,
        **changes,
    )


def with_tests_on_the_path(**more):
    return {"PYTHONPATH": os.pathsep.join([str(tiny.ROOT / "tests"), os.environ.get("PYTHONPATH", "")]), **more}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [pytest.param("zero3", marks=needs_deepspeed), "fsdp2"])
def test_every_stage_survives_a_process_that_fails(tmp_path, strategy):
    """Where weights are spread. SFT and the reward model lose process 1 after step 7, PPO's reward function raises there in the
    third rollout, with whole weights and with adapters. Each launch ends with a failure, and the next one goes on from the
    checkpoint.
    """

    def trainers(folder, processes, **changes):
        test_ppo.stages(folder)
        found = stage_args(folder, processes)
        for stage in ("sft", "reward"):
            # All records: the checkpoint of step 6 is then within an epoch.
            changes |= {"max_steps": 10, "save_steps": 2, "max_train_samples": None}
            optim = {"sft": "muon", "reward": "adamw_torch"}[stage]  # each has its own state in a checkpoint
            yield stage, dataclasses.replace(found[stage], optim=optim, **changes)

    expected = [RUN[stage](args) for stage, args in trainers(tmp_path / "alone", 1)]
    configs = {
        stage: [stage, tiny.write_config(tmp_path / f"{stage}.json", args)]
        for stage, args in trainers(tmp_path / "two", PROCESSES, resume_from_checkpoint="latest")
    }
    registry = Registry(tmp_path / "two" / "runs")
    policies = {"model": ("sum_of_places", {}), "adapter_model": ("sum_of_places_again", {"use_peft": True})}
    alone, resumed = {}, {}
    for weights, (rule, changes) in policies.items():
        resumed[weights] = test_ppo.stages(tmp_path / weights)
        args = failing_run(tmp_path / weights, rule, **changes)
        alone[weights] = ppo.run(args)
        config = tiny.write_config(tmp_path / f"{weights}.json", args, resume_from_checkpoint="latest")
        configs[weights] = ["ppo", config]

    launches = [
        (["sft"], {"KILL": "sft"}, None),
        (["sft", "reward"], {"KILL": "reward"}, "resuming after step 6"),
        (["reward", "model"], {"FAIL": "raise sum_of_places"}, "resuming after step 6"),
        (["model", "adapter_model"], {"FAIL": "raise sum_of_places_again"}, "resuming after rollout 2"),
        (["adapter_model"], {}, "resuming after rollout 2"),
    ]
    for names, failure, says in launches:
        words = ["tests/launched.py", *itertools.chain(*(configs[name] for name in names))]
        given = with_tests_on_the_path(**variables(strategy), **failure)
        done = tiny.launch(command(strategy, *words, tmp_path=tmp_path), **given)
        assert (done.returncode != 0) == bool(failure), done.stderr[-3000:]
        assert says is None or says in done.stderr
        if "KILL" in failure:
            assert "exitcode  : -9" in done.stderr, done.stderr[-9000:]
        if "FAIL" in failure:
            rule = failure["FAIL"].split()[1]
            assert f"error: [rank 1] reward function test_launches:{rule} raised ValueError: no opinion" in done.stderr
            assert "error: [rank 0] stopped because of process 1: reward function" in done.stderr
            (checkpoint,) = test_ppo.ppo_checkpoints(resumed[names[-1]])
            assert checkpoint.name == "checkpoint-2" and (checkpoint / "complete").exists()
            kept = sorted(path.name for path in checkpoint.glob("average*"))
            assert kept == [f"average-{r}.safetensors" for r in (0, 1)]
    for one in expected:
        two = registry.require(one.stage, "tiny")
        assert two.version == one.version and not list(registry.work_dir("tiny", one.stage).glob("*"))
        assert difference(one, two, "") < 2e-6
        follows(tiny.history(one), tiny.history(two))
    for weights, one in alone.items():
        two = resumed[weights].require("ppo", "tiny")
        assert two != one and not tiny.left_over(resumed[weights], "ppo")
        for part in ("", "critic", "ema"):
            assert difference(one, two, part, weights) < 2e-6
        follows(tiny.history(one), tiny.history(two))


UNEVEN = """
import contextlib
from types import SimpleNamespace

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf import RLHFError, engine

accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
rank = accelerator.process_index


@contextlib.contextmanager
def gathered(parameters):  # all processes meet, as where ZeRO 3 gathers
    here = torch.tensor(1)
    torch.distributed.all_reduce(here)
    assert here == 2
    yield


engine.gathered = gathered


class Layer(GradientCheckpointingLayer):
    def forward(self, x):
        return x + 1


model = torch.nn.Sequential(Layer(), torch.nn.Identity(), Layer())
zero = SimpleNamespace(device="cpu")
for forwards in ((3, 1), (0, 2), (0, 0)):
    try:
        with engine.layer_by_layer(zero, model):
            for _ in range(forwards[rank]):
                assert model(torch.zeros(1)) == 2
            if rank == 1:
                raise RLHFError("no opinion")
    except RLHFError:
        assert rank == 1
    count = torch.tensor(1 + rank)
    torch.distributed.all_reduce(count)  # were one of them still in a forward, the sum would be another
    assert count == 3
assert not model[0]._forward_pre_hooks and not model[2]._forward_hooks
print("together")
accelerator.end_training()  # without it a process may abort at its exit
"""


@pytest.mark.slow
def test_processes_with_fewer_forwards_pass_the_layers_with_the_others(tmp_path):
    """Also one that fails: the others' forwards end as if it had not."""
    (tmp_path / "uneven.py").write_text(UNEVEN)
    done = tiny.launch(command("cpu_ddp", str(tmp_path / "uneven.py")), **variables("cpu_ddp"))
    assert done.returncode == 0 and done.stdout.count("together") == 2, done.stderr[-3000:]


@pytest.mark.slow
def test_a_process_that_dies_takes_the_others_with_it_and_the_run_resumes_bit_equal(tmp_path):
    """The reward draws random numbers, so that the random state of each process has to come back."""
    registry = test_ppo.stages(tmp_path)
    args = failing_run(tmp_path, "coin", save_steps=1)
    config = tiny.write_config(tmp_path / "ppo.json", args, resume_from_checkpoint="latest")
    words = command("cpu_ddp", "scripts/ppo.py", "--config", config)
    started = time.monotonic()
    failed = tiny.launch(words, **with_tests_on_the_path(**variables("cpu_ddp"), FAIL="die coin"))
    assert failed.returncode != 0 and time.monotonic() - started < 120
    assert "exitcode  : -9" in failed.stderr  # the launcher says which process it was
    assert not registry.list("tiny", "ppo")
    # The killed run, then one from the start.
    words = command("cpu_ddp", "tests/launched.py", *["ppo", config] * 2)
    done = tiny.launch(words, **with_tests_on_the_path(**variables("cpu_ddp")))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("resuming after rollout 2") == 1
    first, second = registry.list("tiny", "ppo")
    assert first.weights_sha256 == second.weights_sha256


@pytest.mark.slow
def test_a_launch_for_gpus_that_are_not_there_is_one_line(tmp_path):
    registry = tiny.published(tmp_path, "base")
    config = tiny.write_config(tmp_path / "sft.json", tiny.sft_args(tmp_path))
    failed = tiny.launch(command("ddp", "scripts/sft.py", "--config", config))
    assert "exitcode  : 2" in failed.stderr and failed.returncode != 0  # the launcher's own status is 1
    (line,) = [line for line in failed.stderr.splitlines() if line.startswith("error:")]
    assert "2 processes were launched for as many GPUs, and there is none" in line
    assert not (registry.root / "tiny" / "sft").exists()


# ---------------------------------------------------------------------------------------------------------------- two hosts


@pytest.fixture
def hosts():
    """Two hosts as words to start a command on each, and the address of the first: network namespaces joined by a cable.

    Where namespaces are not allowed, both are this machine: two launchers that meet on the loopback.
    """
    names = [f"rlhf{os.getpid()}{side}" for side in "ab"]
    cable = [f"r{os.getpid()}{side}" for side in "ab"]
    run = functools.partial(subprocess.run, capture_output=True, check=True)
    try:
        for name in names:
            run(["ip", "netns", "add", name])
        run(["ip", "link", "add", cable[0], "type", "veth", "peer", "name", cable[1]])
        for name, end, address in zip(names, cable, ("10.77.0.1/24", "10.77.0.2/24")):
            run(["ip", "link", "set", end, "netns", name])
            for words in (
                ["addr", "add", address, "dev", end],
                ["link", "set", end, "up"],
                ["link", "set", "lo", "up"],
            ):
                run(["ip", "-n", name, *words])
        yield (
            [(["ip", "netns", "exec", name], {"GLOO_SOCKET_IFNAME": end}) for name, end in zip(names, cable)],
            "10.77.0.1",
        )
    except (OSError, subprocess.CalledProcessError):
        yield [([], {})] * 2, "127.0.0.1"
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def free_port():
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


@pytest.mark.slow
@needs_deepspeed
def test_two_hosts_train_one_model_under_zero_2(tmp_path, hosts, alone):
    registry = test_ppo.stages(tmp_path)
    places, address = hosts
    words = ["tests/launched.py"]
    for stage, args in stage_args(tmp_path, PROCESSES).items():
        if stage != "reward":
            words += [stage, tiny.write_config(tmp_path / f"{stage}.json", args)]
    # The launch that `rlhf plan` prints for two machines, its capitals filled in.
    job = Job(model=BUILT_IN["gpt2"], reward=BUILT_IN["gpt2"], gpus=2, per_node=1)
    planned = launch_command("ppo", job, Setup("zero2"), 1).partition(" scripts/ppo.py")[0].split()[1:]
    filled = {"FIRST_MACHINE": address, "29500": str(free_port())}
    planned = [filled.get(word, word) for word in planned]
    started = [
        subprocess.Popen(
            [*place, tiny.program("accelerate"), *(str(rank) if w == "MACHINE" else w for w in planned), *words],
            cwd=tiny.ROOT,
            env=tiny.environment(**variables("zero2"), **more),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, (place, more) in enumerate(places)
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.terminate()  # the launcher ends what it has started
    assert [process.returncode for process in started] == [0, 0], "\n".join(text[-3000:] for text in said)
    sft_alone, _, ppo_alone = alone("gpt2")
    for one in (sft_alone, ppo_alone):
        two = registry.require(one.stage, "tiny")
        assert two.manifest["device"].startswith("2 x cpu")
        assert difference(one, two, "") < 2e-6
