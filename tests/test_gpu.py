"""The stages on a CUDA device (pytest -m gpu): bfloat16, gradient checkpointing, fused AdamW, recorded decoding, torch.compile.

The rule is the float32 run of the same configuration on the CPU, in a process of its own.
"""

import contextlib
import copy
import json
import math
import os
import subprocess
import sys

import pytest
import test_adapters
import test_reward
import tiny
import torch
from conftest import configuration, random_model
from test_ppo import gradient_of_update, ppo_args, stages, trainer_of
from test_rollout import PROMPTS, Setup
from transformers import AutoModelForCausalLM

from rlhf import ppo, reward, rollout, sft, shared_prompt, training, unembed
from rlhf.data.encode import encode_prompts, pad
from rlhf.decoding import Decoder, can_preallocate
from rlhf.models import banned_ids, load_policy, load_tokenizer
from rlhf.muon import orthogonal
from rlhf.objectives import token_logprobs
from rlhf.rollout import generate, generate_in_place, join, response_logp, rows_of, uniforms

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and pytest -m gpu"),
]

ARCHITECTURES = ["gpt2", "opt"]

# Again, by bitsandbytes' CUDA kernels.
test_a_bfloat16_base_has_float32_adapters = test_adapters.test_a_bfloat16_base_has_float32_adapters
test_a_quantised_base_is_trained_through = test_adapters.test_a_quantised_base_is_trained_through
test_quantised_layers_answer_in_16_bits = test_adapters.test_quantised_layers_answer_in_16_bits_under_autocast
FAST = {"bf16": True, "gradient_checkpointing": True}


def stage_run(stage, tmp_path, architecture, **changes):
    """SFT or RM, six small steps without dropout."""
    tiny.published(tmp_path, "base", "sft", architecture=architecture)
    common = {"max_steps": 6, "learning_rate": 2e-4}
    if stage == "sft":
        return sft.run(tiny.sft_args(tmp_path, resid_pdrop=0.0, **common | changes))
    return reward.run(tiny.reward_args(tmp_path, **common | changes))


def losses(artifact):
    return [line["loss"] for line in tiny.history(artifact) if "loss" in line]


def write_reference(folder):
    """Losses of the float32 runs; called in a process that sees no GPU."""
    assert not torch.cuda.is_available()
    found = {}
    for stage in ("sft", "rm"):
        for architecture in ARCHITECTURES:
            place = folder / f"{stage}-{architecture}"
            found[f"{stage}-{architecture}"] = losses(stage_run(stage, place, architecture))
    found["sft-muon"] = losses(stage_run("sft", folder / "muon", "gpt2", optim="muon"))
    (folder / "losses.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cpu")
    code = f"import sys, pathlib; sys.path.insert(0, {str(tiny.ROOT / 'tests')!r}); import test_gpu; "
    code += f"test_gpu.write_reference(pathlib.Path({str(folder)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tiny.ROOT, env=tiny.environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "losses.json").read_text())


@contextlib.contextmanager
def stopping_after(step):
    """Kills a Trainer's run after this many steps."""
    original = training.MarkComplete.on_step_end

    def stop(self, args, state, control, **kwargs):
        if state.global_step == step:
            raise KeyboardInterrupt

    training.MarkComplete.on_step_end = stop
    try:
        yield
    finally:
        training.MarkComplete.on_step_end = original


# ------------------------------------------------------------------------------------------------------------- SFT and RM


@pytest.mark.parametrize("family", test_reward.FAMILIES)
def test_prompts_share_one_call_and_score_as_one_row_a_completion_does(family):
    model, items = test_reward.scalar_model(family), test_reward.random_items()
    plain, _, expected = test_reward.scores_and_gradients(model, items, share=False)
    shared_prompt.enable(model.cuda())
    shared, _, gradients = test_reward.scores_and_gradients(model, items, share=True)
    torch.testing.assert_close(shared, plain, rtol=0, atol=1e-4)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-4, msg=name)


def test_sft_never_has_all_logits(tmp_path):
    """64 rows of some ten trained tokens, 200,000 entries: SFTTrainer's head takes 32,768 of them at once."""
    registry = tiny.published(tmp_path, "base")
    base = registry.require("base", "tiny")
    model, tokenizer = tiny.load_causal(base)
    model.resize_token_embeddings(200_000)
    with registry.draft("tiny", "base") as draft:
        model.save_pretrained(draft.path)
        tokenizer.save_pretrained(draft.path)
        draft.publish(parents=[base])
    records = [{"prompt": f"{i}:", "completion": " the river runs north past a mill"} for i in range(64)]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    tokens = []
    with pytest.MonkeyPatch.context() as patch:
        step = sft.CompletionTrainer.compute_loss
        patch.setattr(
            sft.CompletionTrainer,
            "compute_loss",
            lambda self, model, inputs, *a, **k: (
                tokens.append(int((inputs["labels"] != -100).sum())) or step(self, model, inputs, *a, **k)
            ),
        )
        sft.run(tiny.sft_args(tmp_path, records, max_steps=1, per_device_train_batch_size=64, bf16=True))
    assert tokens[0] > 400
    assert torch.cuda.max_memory_allocated() - before < 4 * tokens[0] * 200_000


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_losses_in_bfloat16_are_those_of_float32_on_the_cpu(tmp_path, reference, stage, architecture):
    found = losses(stage_run(stage, tmp_path, architecture, **FAST))
    expected = reference[f"{stage}-{architecture}"]
    assert len(found) == 6 and found == pytest.approx(expected, abs=0.05)
    assert found != expected  # it did run in another precision


@pytest.mark.parametrize("stage, architecture", [("sft", "opt"), ("rm", "gpt2")])
def test_compiled_layers_learn_the_same(tmp_path, reference, stage, architecture):
    found = losses(stage_run(stage, tmp_path, architecture, torch_compile=True, **FAST))
    assert found == pytest.approx(reference[f"{stage}-{architecture}"], abs=0.05)


@pytest.mark.parametrize("shape", [(64, 256), (256, 64), (128, 128)])
def test_muon_in_bfloat16_steps_where_float32_does(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    (expected,), (found,) = orthogonal([matrix]), orthogonal([matrix.cuda()])
    assert found.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(found.cpu().flatten(), expected.flatten(), dim=0) > 0.999
    assert torch.linalg.svdvals(found).max() < 1.3


def test_muon_learns_as_on_the_cpu(tmp_path, reference):
    found = losses(stage_run("sft", tmp_path, "gpt2", optim="muon", **FAST))
    assert found == pytest.approx(reference["sft-muon"], abs=0.05)
    assert found != pytest.approx(reference["sft-gpt2"], abs=1e-3)  # AdamW's


@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_a_killed_run_resumes(tmp_path, stage):
    changes = {"save_steps": 2, **FAST}
    whole = losses(stage_run(stage, tmp_path / "whole", "gpt2", **changes))
    with stopping_after(5), pytest.raises(KeyboardInterrupt):
        stage_run(stage, tmp_path / "cut", "gpt2", **changes)
    resume = {"resume_from_checkpoint": "latest"}
    args = tiny.sft_args if stage == "sft" else tiny.reward_args
    more = {"resid_pdrop": 0.0} if stage == "sft" else {}
    module = sft if stage == "sft" else reward
    resumed = module.run(args(tmp_path / "cut", max_steps=6, learning_rate=2e-4, **changes, **more, **resume))
    assert losses(resumed) == pytest.approx(whole, abs=0.02)


def test_held_out_rankings_are_scored_in_float32(tmp_path):
    artifact = stage_run("rm", tmp_path, "gpt2", eval_fraction=0.25, records=tiny.comparisons(16), **FAST)
    assert 0 <= artifact.manifest["metrics"]["accuracy"] <= 1
    model, _ = tiny.load_reward(artifact)
    assert model.dtype == torch.float32


def test_adamw_is_fused(tmp_path):
    chosen = training.trainer_arguments(tiny.sft_args(tmp_path), tmp_path / "work")
    assert chosen.optim == "adamw_torch_fused"
    stages(tmp_path)
    trainer = trainer_of(ppo_args(tmp_path, **FAST))
    assert all(group["fused"] for group in trainer.optimizer.param_groups)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


# ------------------------------------------------------------------------------------------------------------------- PPO


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("compiled", [False, True])
def test_ppo_learns_and_its_first_ratio_is_one(tmp_path, architecture, compiled):
    if compiled and architecture == "opt":
        pytest.skip("compiled once is enough: SFT compiles OPT")
    stages(tmp_path, architecture)
    lines = tiny.history(ppo.run(ppo_args(tmp_path, torch_compile=compiled, **FAST)))
    assert len(lines) == 3
    assert lines[0]["objective/kl"] == pytest.approx(0, abs=0.02 if compiled else 1e-6)
    for line in lines:
        assert line["policy/first_ratio"] == pytest.approx(1, abs=0.02)
        assert all(math.isfinite(value) for value in line.values() if isinstance(value, float))
        assert line["policy/grad_norm"] > 0 and line["critic/grad_norm"] > 0


def test_float32_on_the_gpu_samples_and_learns_as_on_the_cpu(tmp_path):
    """The same answers to the same prompts, token by token, with recorded steps on one side and a growing cache on the other."""
    stages(tmp_path)
    trainer = trainer_of(ppo_args(tmp_path))
    assert trainer.actors.policy.device.type == "cuda"
    found = trainer.collect(range(8), 0)
    policy = copy.deepcopy(trainer.actors.policy).cpu()
    keys = [(trainer.args.seed, 0, i) for i in range(8)]
    answers, ended = rollout.sample_responses(
        policy,
        trainer.prompts.ids[:8],
        keys,
        response_length=6,
        temperature=1.0,
        batch_size=8,
        tokenizer=trainer.actors.tokenizer,
        banned=trainer.actors.banned.cpu(),
    )
    assert [row[mask].tolist() for row, mask in zip(found.responses, found.mask)] == answers
    assert found.ended.tolist() == ended
    rows = rows_of(found, torch.arange(8), trainer.pad_token_id)
    logp = rows.fill(response_logp(policy, rows, 1.0, trainer.actors.banned.cpu()))
    torch.testing.assert_close(found.logp, logp.detach(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_gradient_in_bfloat16_points_where_that_in_float32_does(tmp_path, architecture):
    stages(tmp_path, architecture)
    low, found, advantages, returns, _ = gradient_of_update(ppo_args(tmp_path, **FAST))
    trainer = trainer_of(ppo_args(tmp_path))
    full = {}
    trainer.clip_gradients = lambda: (
        full.update({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}) or {}
    )
    trainer.update(found, advantages, returns, torch.arange(4))
    assert low.keys() == full.keys()
    for part in ("policy.", "critic."):
        one, other = (torch.cat([g.flatten() for n, g in x.items() if n.startswith(part)]) for x in (low, full))
        assert torch.nn.functional.cosine_similarity(one, other, dim=0) > 0.97


def test_a_killed_ppo_run_resumes(tmp_path, monkeypatch):
    settings = {"save_steps": 1, "total_episodes": 32, "learning_rate": 2e-4, "critic_learning_rate": 2e-4, **FAST}
    for name in ("whole", "cut"):
        stages(tmp_path / name)
    whole = ppo.run(ppo_args(tmp_path / "whole", **settings))
    report, done = ppo.PPO.report, []

    def stop_at_two(self, *args):
        report(self, *args)
        done.append(self.state.rollouts)
        if done == [1, 2]:
            raise KeyboardInterrupt

    monkeypatch.setattr(ppo.PPO, "report", stop_at_two)
    with pytest.raises(KeyboardInterrupt):
        ppo.run(ppo_args(tmp_path / "cut", **settings))
    resumed = ppo.run(ppo_args(tmp_path / "cut", **settings, resume_from_checkpoint="latest"))
    # Killed before the second checkpoint was written: the second rollout is repeated.
    assert done == [1, 2, 2, 3, 4]
    assert len(tiny.history(resumed)) == 4
    start = tiny.weights(training.Registry(tmp_path / "cut" / "runs").require("sft", "tiny"))
    a, b = tiny.weights(whole), tiny.weights(resumed)
    apart = sum((a[n] - b[n]).abs().sum().item() for n in a)
    moved = sum((a[n] - start[n]).abs().sum().item() for n in a)
    assert apart < 0.5 * moved  # sums run in another order each time


# --------------------------------------------------------------------------------------------------------------- decoding


def gpu_setup(name, tokenizer, bonus=0.0):
    """A policy on the GPU whose EOS is `bonus` nats more frequent."""
    rows = len(tokenizer) + (0 if name == "gpt2" else 7)
    policy = random_model(AutoModelForCausalLM, configuration(name, rows), seed=1)

    def raise_eos(module, inputs, output):
        output = output.clone()
        output[..., tokenizer.eos_token_id] += bonus
        return output

    if bonus:
        policy.get_output_embeddings().register_forward_hook(raise_eos)
    return Setup(policy, tokenizer, encode_prompts(tokenizer, PROMPTS) * 6, banned_ids(policy, tokenizer))


def counted_recordings(monkeypatch):
    """The batch sizes that steps are recorded for from here on."""
    recorded = []
    record = Decoder._record
    monkeypatch.setattr(Decoder, "_record", lambda self: recorded.append(len(self.token)) or record(self))
    return recorded


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_recorded_steps_give_the_answers_of_the_cpu(tokenizer, opt_tokenizer, monkeypatch, name, implementation):
    monkeypatch.setattr(rollout, "CHECK_EVERY", 4)
    recorded = counted_recordings(monkeypatch)
    case = gpu_setup(name, tokenizer if name == "gpt2" else opt_tokenizer, bonus=4.0)
    case.policy.set_attn_implementation(implementation)
    draws = torch.stack([uniforms(0, 0, i, 24) for i in range(len(case.prompts))])
    ends = {"eos_token_id": case.tokenizer.eos_token_id, "pad_token_id": case.tokenizer.pad_token_id}
    given = {"temperature": 1.0, "banned": case.banned, **ends}
    expected = generate(case.policy, case.prompts, draws, **given)
    assert not recorded
    policy = case.policy.cuda()
    assert generate_in_place(policy, case.prompts, draws, **given) == expected
    # Anew each time that half of them has ended.
    assert len(recorded) > 1 and recorded == sorted(recorded, reverse=True)
    assert generate(policy, case.prompts, draws, **given) == expected


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_steps_of_four_bit_layers_are_recorded(tmp_path, monkeypatch, name):
    recorded = counted_recordings(monkeypatch)
    base = tiny.published(tmp_path, "base", architecture=name).require("base", "tiny").path
    tokenizer = load_tokenizer(base)
    options = test_adapters.LORA | test_adapters.QUANTISED["4-bit"]
    policy = load_policy(base, tokenizer, peft=tiny.sft_args(tmp_path, **options)).eval()
    assert can_preallocate(policy)
    given = {"temperature": 1.0, "banned": banned_ids(policy, tokenizer), "eos_token_id": tokenizer.eos_token_id}
    given["pad_token_id"] = tokenizer.pad_token_id
    prompts = encode_prompts(tokenizer, PROMPTS) * 6
    draws = torch.stack([uniforms(0, 0, i, 24) for i in range(len(prompts))])
    expected = generate(policy, prompts, draws, **given)
    assert not recorded
    assert generate_in_place(policy, prompts, draws, **given) == expected
    assert recorded


SPREAD = """
import pathlib, sys
sys.path.insert(0, "tests")
from rlhf import ppo
from rlhf.decoding import Decoder
from test_ppo import ppo_args
record, recorded = Decoder._record, []
Decoder._record = lambda self: recorded.append(len(self.token)) or record(self)
ppo.run(ppo_args(pathlib.Path(sys.argv[1]), ds3_gather_for_generation=sys.argv[2] == "True"))
print("recorded", recorded)
"""


@pytest.mark.parametrize(
    ("launch", "gather", "steps"), [("zero3", True, [8, 8, 8]), ("zero3", False, []), ("fsdp2", True, [8, 8, 8])]
)
def test_steps_of_weights_that_are_gathered_are_recorded(tmp_path, launch, gather, steps):
    """PPO under ZeRO 3 and FSDP, on one GPU, gives the answers of PPO alone and learns as it does."""
    pytest.importorskip("deepspeed")
    for folder in ("alone", "spread"):
        (tmp_path / folder).mkdir()
        registry = stages(tmp_path / folder)
    alone = tiny.history(ppo.run(ppo_args(tmp_path / "alone")))
    (tmp_path / "spread.py").write_text(SPREAD)
    words = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"configs/accelerate/{launch}.yaml"]
    words += ["--num_processes", "1", "--main_process_port", "0"]
    words += [str(tmp_path / "spread.py"), str(tmp_path / "spread"), str(gather)]
    done = tiny.launch(words, CUDA_VISIBLE_DEVICES=os.environ.get("CUDA_VISIBLE_DEVICES", "0"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"recorded {steps}" in done.stdout
    lines = tiny.history(registry.require("ppo", "tiny"))
    assert len(lines) == len(alone) == 3
    for line, expected in zip(lines, alone):
        for name in ("response/length", "objective/kl", "policy/grad_norm", "critic/grad_norm"):
            assert line[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_under_autocast_decoding_sees_what_the_update_sees(tokenizer, opt_tokenizer, name):
    case = gpu_setup(name, tokenizer if name == "gpt2" else opt_tokenizer)
    policy, pad_id = case.policy.cuda(), case.tokenizer.pad_token_id
    ids, mask = (tensor.cuda() for tensor in pad(case.prompts, pad_id, side="left"))
    answers = torch.randint(10, 200, (len(ids), 12), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        decoder = Decoder(policy, ids, mask, 12)
        seen = [decoder.logits.clone(), *(decoder.step(token.cuda()).clone() for token in answers.T[:-1])]
        rows = join(
            *pad(case.prompts, pad_id, side="left"), answers, torch.ones_like(answers, dtype=torch.bool), pad_id
        )
        full = rows.fill(response_logp(policy, rows.to("cuda"), 1.0, case.banned.cuda()).cpu())
    assert decoder.graph is not None
    logits = torch.stack(seen, dim=1).index_fill(-1, case.banned.cuda(), float("-inf"))
    assert logits.dtype == torch.float32
    decoded = token_logprobs(logits, answers.cuda()).cpu()
    assert (decoded - full).abs().mean() < 0.03 and (decoded - full).abs().max() < 0.5


# ------------------------------------------------------------------------------------------------------------ unembedding


def test_log_probabilities_are_those_of_the_cpu_and_never_whole():
    count, width, vocabulary = 3 * unembed.CHUNK + 5, 64, 50_258
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(count, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator) * 0.3
    tokens = torch.randint(vocabulary, (count,), generator=generator)
    banned = torch.tensor([vocabulary - 1])
    tokens[tokens == vocabulary - 1] = 0
    h, w = hidden.cuda().requires_grad_(), weight.cuda().requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    logp = unembed.logprobs(h, w, tokens.cuda(), 0.9, banned.cuda(), torch.bfloat16)
    logp.mean().backward()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 0.75 * count * vocabulary * 4
    some = torch.arange(0, count, 97)
    few = hidden[some].requires_grad_()
    expected = unembed.logprobs(few, weight, tokens[some], 0.9, banned, torch.bfloat16)
    torch.testing.assert_close(logp.detach().cpu()[some], expected.detach(), rtol=0, atol=2e-3)
    (gradient,) = torch.autograd.grad(expected.sum() / count, few)
    torch.testing.assert_close(h.grad.cpu()[some], gradient, rtol=0.02, atol=1e-2 * float(gradient.abs().max()))
    assert w.grad[vocabulary - 1].abs().max() == 0 and w.grad.abs().sum() > 0
