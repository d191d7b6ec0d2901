"""Parameter-efficient training through the stages: adapters, quantised bases, 8-bit optimisers, and one base for four models."""

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import tiny
import torch
from test_ppo import ppo_args, trainer_of
from torch.testing import assert_close

from rlhf import RLHFError, adapters, models, ppo, reward, sft
from rlhf.actors import load_models, reward_sources
from rlhf.registry import Registry

LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 16, "lora_dropout": 0.1}
FOUR_BIT, EIGHT_BIT = {"load_in_4bit": True}, {"load_in_8bit": True}
ROWS = [[5, 9, 30, 41, 7], [8, 8, 100, 3], [60, 61, 62, 63, 64, 65, 66]]


def chain(tmp_path, architecture="gpt2", stages=("sft", "rm"), **changes):
    """sft and rm as adapters on tiny/base; returns the registry."""
    registry = tiny.published(tmp_path, "base", architecture=architecture)
    if "sft" in stages:
        sft.run(tiny.sft_args(tmp_path, **LORA | changes))
    if "rm" in stages:
        reward.run(tiny.reward_args(tmp_path, **LORA | changes))
    return registry


@torch.no_grad()
def logits(model):
    return torch.cat([model(input_ids=torch.tensor([row])).logits[0] for row in ROWS])


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_sft_rm_and_ppo_train_adapters_on_one_base(tmp_path, architecture):
    registry = chain(tmp_path, architecture)
    ppo.run(ppo_args(tmp_path, **LORA))


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
@pytest.mark.parametrize("bits", [FOUR_BIT, EIGHT_BIT], ids=["4-bit", "8-bit"])
def test_quantised(tmp_path, architecture, bits):
    registry = chain(tmp_path, architecture, **bits)
    ppo.run(ppo_args(tmp_path, **LORA | bits))
