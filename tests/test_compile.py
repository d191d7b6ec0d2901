"""torch_compile: layers are compiled in place, learn the same, and step aside while sampling."""

import pytest
import tiny
import torch
from test_ppo import ppo_args, stages
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

from rlhf import ppo, reward, sft
from rlhf.models import compile_layers, eagerly


@pytest.fixture
def traced(monkeypatch):
    """Compiles without generating C++, which takes minutes; counts the graphs."""
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_(self, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def test_names_and_weights_stay_and_sampling_runs_as_written(checkpoints, traced):
    model = AutoModelForCausalLM.from_pretrained(checkpoints["gpt2"]).eval()
    ids = torch.arange(10, 18)[None]
    names, before = list(model.state_dict()), model(ids, use_cache=False).logits
    compile_layers(model)
    assert list(model.state_dict()) == names
    with eagerly(model):
        assert torch.equal(model(ids, use_cache=False).logits, before) and traced() == 0
    torch.testing.assert_close(model(ids, use_cache=False).logits, before, rtol=0, atol=1e-5)
    assert traced() == 1  # two layers, one piece of code


@pytest.mark.parametrize("checkpointing", [False, True])
def test_ppo_learns_the_same(tmp_path, traced, checkpointing):
    found = {}
    for compiled in (False, True):
        stages(tmp_path / str(compiled))
        args = ppo_args(tmp_path / str(compiled), torch_compile=compiled, gradient_checkpointing=checkpointing)
        found[compiled] = ppo.run(args)
        assert (traced() > 0) == compiled
    assert traced() < 30  # steps of sampling are not compiled
    assert tiny.largest_difference(found[True], found[False]) < 1e-4
    assert tiny.history(found[True])[0]["objective/kl"] == 0


@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_sft_and_the_reward_model_learn_the_same(tmp_path, traced, stage):
    found = {}
    for compiled in (False, True):
        folder = tmp_path / str(compiled)
        tiny.published(folder, "base", "sft")
        if stage == "sft":
            found[compiled] = sft.run(tiny.sft_args(folder, torch_compile=compiled, resid_pdrop=0.0))
        else:
            found[compiled] = reward.run(tiny.reward_args(folder, torch_compile=compiled))
        assert (traced() > 0) == compiled
    assert tiny.largest_difference(found[True], found[False]) < 1e-4
