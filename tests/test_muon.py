"""Muon: its step by hand and beside PyTorch's, which parameters it is for, and that every stage takes it."""

import copy
import importlib

import pytest
import test_ppo
import tiny
import torch
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from rlhf import muon
from rlhf.muon import Muon, dealt, hidden_matrices, orthogonal


def gpt2(**changes):
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=16, n_positions=8, **changes))


def test_singular_values_go_through_the_polynomial_and_singular_vectors_stay():
    """diag(3, 4) divided by its norm is diag(0.6, 0.8): each value five times through 3.4445 x - 4.775 x^3 + 2.0315 x^5."""
    x, y = 0.6, 0.8
    for _ in range(5):
        x, y = (3.4445 * v - 4.775 * v**3 + 2.0315 * v**5 for v in (x, y))
    (found,) = orthogonal([torch.diag(torch.tensor([3.0, 4.0]))])
    torch.testing.assert_close(found, torch.diag(torch.tensor([x, y])), rtol=1e-4, atol=1e-5)


def test_singular_values_become_about_1():
    torch.manual_seed(0)
    matrices = [
        torch.randn(shape) * size for shape, size in [((8, 32), 1e-6), ((32, 8), 1e3), ((8, 32), 1.0), ((16, 16), 1.0)]
    ]
    for matrix, found in zip(matrices, orthogonal(matrices)):
        assert found.shape == matrix.shape
        values = torch.linalg.svdvals(found)
        assert values.max() < 1.25
        assert (found * matrix).sum() > 0.6 * torch.linalg.svdvals(matrix).sum()  # no direction of weight is lost
    torch.testing.assert_close(orthogonal(matrices)[0], orthogonal(matrices[:1])[0])  # together or alone


def test_a_gradient_of_zero_moves_nothing():
    assert torch.equal(orthogonal([torch.zeros(2, 3)])[0], torch.zeros(2, 3))


@pytest.mark.parametrize("shape", [(8, 32), (32, 8), (16, 16)])
def test_steps_are_those_of_pytorch(monkeypatch, shape):
    """torch.optim.Muon with Moonlight's scale, made to multiply in float32."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(shape))
    theirs = torch.nn.Parameter(ours.detach().clone())
    settings = {"lr": 0.02, "weight_decay": 0.1}
    mine = Muon([ours], {ours: 1}, **settings)
    pytorch = torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **settings)
    for _ in range(4):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        mine.step()
        pytorch.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_step_is_as_long_as_one_of_adamw():
    """Liu et al. 2025: a root mean square of 0.2 an element, whatever the matrix's shape."""
    torch.manual_seed(0)
    for shape in [(64, 64), (64, 256)]:
        p = torch.nn.Parameter(torch.zeros(shape))
        p.grad = torch.randn(shape)
        Muon([p], {p: 1}, lr=1.0, weight_decay=0.0).step()
        assert 0.13 < p.square().mean().sqrt() < 0.22


def test_other_parameters_step_as_adamw_has_it():
    ours, theirs = gpt2(), gpt2()
    matrices = hidden_matrices(ours)
    settings = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.9), "eps": 1e-5}
    mine = Muon(ours.parameters(), matrices, **settings)
    adamw = torch.optim.AdamW(theirs.parameters(), **settings)
    for seed in range(3):
        torch.manual_seed(seed)
        for p, q in zip(ours.parameters(), theirs.parameters()):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        mine.step()
        adamw.step()
    for p, q in zip(ours.parameters(), theirs.parameters()):
        assert torch.equal(p, q) != (p in matrices)


def test_query_key_and_value_of_gpt2_are_three_matrices():
    model = gpt2()
    joint = model.transformer.h[0].attn.c_attn.weight
    assert hidden_matrices(model)[joint] == 3
    before = joint.detach().clone()
    joint.grad = torch.randn_like(joint)
    parts = [torch.nn.Parameter(part.clone()) for part in before.chunk(3, dim=1)]
    for part, gradient in zip(parts, joint.grad.chunk(3, dim=1)):
        part.grad = gradient.clone()
    Muon([joint], {joint: 3}, lr=0.1).step()
    Muon(parts, dict.fromkeys(parts, 1), lr=0.1).step()
    torch.testing.assert_close(joint, torch.cat(list(parts), dim=1))


def test_it_is_for_the_matrices_of_layers_that_learn():
    model = gpt2()
    for p in model.transformer.h[1].parameters():
        p.requires_grad_(False)
    names = {p: name for name, p in model.named_parameters()}
    assert {names[p]: count for p, count in hidden_matrices(model).items()} == {
        "transformer.h.0.attn.c_attn.weight": 3,
        "transformer.h.0.attn.c_proj.weight": 1,
        "transformer.h.0.mlp.c_fc.weight": 1,
        "transformer.h.0.mlp.c_proj.weight": 1,
    }
    opt = OPTForCausalLM(
        OPTConfig(hidden_size=8, num_hidden_layers=2, ffn_dim=16, num_attention_heads=2, vocab_size=16)
    )
    names = {p: name for name, p in opt.named_parameters()}
    assert sorted(names[p].split("layers.")[1] for p in hidden_matrices(opt)) == sorted(
        f"{i}.{module}.weight"
        for i in range(2)
        for module in ("fc1", "fc2", "self_attn.k_proj", "self_attn.out_proj", "self_attn.q_proj", "self_attn.v_proj")
    )


def test_goes_on_from_its_state():
    def steps(model, optimizer, seeds):
        for seed in seeds:
            torch.manual_seed(seed)
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()

    def made():
        model = gpt2()
        return model, Muon(model.parameters(), hidden_matrices(model), lr=0.01)

    whole, optimizer = made()
    steps(whole, optimizer, range(2))
    half, _ = made()
    half.load_state_dict(whole.state_dict())
    resumed = Muon(half.parameters(), hidden_matrices(half), lr=0.5)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(whole, optimizer, range(2, 4))
    steps(half, resumed, range(2, 4))
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), half.parameters()))


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward"])
def test_every_stage_trains_by_it(monkeypatch, tmp_path, stage):
    """Its steps are seen, and weights of layers and embeddings have changed."""
    taken = []
    step = Muon.step
    monkeypatch.setattr(Muon, "step", lambda self, *args: (taken.append(len(self.matrices)), step(self, *args))[1])
    tiny.published(tmp_path, "base", "sft")
    args = getattr(tiny, f"{stage}_args")(tmp_path, optim="muon", max_steps=2)
    artifact = importlib.import_module(f"rlhf.{stage}").run(args)
    assert taken == [8, 8]  # two layers of four matrices
    assert artifact.manifest["config"]["optim"] == "muon"


def test_ppo_trains_policy_and_critic_by_it_at_their_rates(tmp_path):
    test_ppo.stages(tmp_path)
    trainer = test_ppo.trainer_of(
        test_ppo.ppo_args(tmp_path, optim="muon", learning_rate=1e-3, critic_learning_rate=2e-3)
    )
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer, Muon) and len(optimizer.matrices) == 16
    rates = [(group["part"], group["muon"], group["lr"]) for group in optimizer.param_groups]
    assert rates == [("policy", True, 1e-3), ("policy", False, 1e-3), ("critic", True, 2e-3), ("critic", False, 2e-3)]


def test_only_gpt_2_s_own_layers_keep_three_matrices_in_one():
    """Others have a linear layer of that name, whose query, key and value lie the other way (GPT-BigCode)."""
    layer = torch.nn.Module()
    layer.attn = torch.nn.Module()
    layer.attn.c_attn = torch.nn.Linear(32, 48)
    assert hidden_matrices(torch.nn.ModuleList([layer])) == {layer.attn.c_attn.weight: 1}
    assert sorted(hidden_matrices(gpt2()).values()) == [1, 1, 1, 1, 1, 1, 3, 3]


def test_matrices_and_other_parameters_are_groups_apart_with_the_settings_of_theirs():
    a, b, c, d, e = (torch.nn.Parameter(torch.zeros(2, 2)) for _ in range(5))
    groups = [{"params": [a, b], "lr": 1.0, "part": "x"}, {"params": [c], "lr": 2.0}, {"params": [d, e], "lr": 2.0}]
    optimizer = Muon(groups, {a: 1, c: 1, e: 1})
    found = [(group["params"], group["muon"], group["lr"], group.get("part")) for group in optimizer.param_groups]
    assert found == [([a], True, 1.0, "x"), ([b], False, 1.0, "x"), ([c, e], True, 2.0, None), ([d], False, 2.0, None)]


def test_work_is_dealt_out_evenly():
    assert dealt([1, 9, 2, 8, 3], 2) == [[1, 4, 0], [3, 2]]
    assert dealt([1], 2) == [[0], []]


# Pieces, as one process has them of a group of three that the test plays.

SHAPES = [(4, 6), (6, 6), (2, 8), (6, 9)]  # 24, 36, 16 and 54 numbers
PROCESSES = 3


class Everyone:
    """torch.distributed for one process at a time: each call gives what all have handed in, which a first round has noted."""

    def __init__(self, monkeypatch):
        self.noted, self.rank, self.calls = [[] for _ in range(PROCESSES)], 0, 0
        self.replayed = None
        for name in ("get_rank", "get_world_size", "all_gather", "all_reduce", "all_to_all_single"):
            monkeypatch.setattr(muon.dist, name, getattr(self, name))

    def run(self, work):
        """What each process's `work(rank)` returns; rounds go on until what each call gets is what the others hand in."""
        results = None
        for _ in range(4):  # each collective needs one round more
            before, self.noted = self.noted, [[] for _ in range(PROCESSES)]
            self.replayed, results = before, []
            for self.rank in range(PROCESSES):
                self.calls = 0
                results.append(work(self.rank))
        return results

    def get_rank(self, group=None):
        return self.rank

    def get_world_size(self, group=None):
        return PROCESSES

    def _handed_in(self, tensor):
        self.noted[self.rank].append(tensor.clone())
        self.calls += 1
        noted = [one[self.calls - 1] if len(one) >= self.calls else torch.zeros_like(tensor) for one in self.replayed]
        noted[self.rank] = tensor.clone()
        return noted

    def all_gather(self, out, tensor, group=None):
        for place, value in zip(out, self._handed_in(tensor)):
            place.copy_(value)

    def all_reduce(self, tensor, group=None):
        tensor.copy_(sum(self._handed_in(tensor)))

    def all_to_all_single(self, out, tensor, got, given, group=None):
        """The lengths that each gives to the others stand in front of what it hands in."""
        assert len(out) == sum(got) and len(tensor) == sum(given)
        parts = []
        for one in self._handed_in(torch.cat([torch.tensor(given, dtype=tensor.dtype), tensor])):
            lengths = one[:PROCESSES].long().tolist()
            parts.append(one[PROCESSES:].split(lengths)[self.rank] if sum(lengths) == len(one) - PROCESSES else one[:0])
        out.zero_()
        together = torch.cat(parts)
        out[: len(together)] = together[: len(out)]


def whole_and_steps():
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    gradients = [torch.randn(shape) for shape in SHAPES]
    optimizer = Muon(parameters, dict(zip(parameters, (1, 3, 1, 3))), lr=1.0)
    return parameters, gradients, optimizer, optimizer.steps(parameters, gradients)


@pytest.mark.parametrize("count", [4, 2])
def test_under_ddp_each_process_takes_some_steps_and_all_get_all(monkeypatch, count):
    parameters, gradients, optimizer, expected = (x[:count] if isinstance(x, list) else x for x in whole_and_steps())
    asked = []

    def steps(mine, given):
        asked.append(len(mine))
        return optimizer.steps(mine, given)

    for found in Everyone(monkeypatch).run(lambda rank: muon.in_turns(parameters, gradients, steps)):
        for step, one in zip(found, expected):
            torch.testing.assert_close(step, one)
    assert set(asked) == ({1, 2} if count == 4 else {0, 1})  # three processes


@pytest.mark.parametrize("size", [44, 50, 66, 130])
def test_shares_of_a_row_step_as_its_whole_parameters_do(monkeypatch, size):
    """ZeRO 1 and 2: of 130 numbers 44 have three borders in matrices, 130 leave two processes with padding alone."""
    parameters, gradients, optimizer, expected = whole_and_steps()
    places = list(zip(parameters, (0, 24, 60, 76)))
    row = torch.cat([g.flatten() for g in gradients] + [torch.zeros(PROCESSES * size - 130)])
    shares = row.split(size)
    found = Everyone(monkeypatch).run(
        lambda rank: muon.share_of_all(None, places, shares[rank].clone(), optimizer.steps)
    )
    together = torch.cat([step.flatten() for step in expected])
    torch.testing.assert_close(torch.cat(found)[:130], together)
    assert not torch.cat(found)[130:].any()


@pytest.mark.parametrize("count", [4, 2])
def test_shares_of_each_parameter_step_as_the_whole_does(monkeypatch, count):
    """ZeRO 3: a third of each parameter, padded to thirds, on each process."""
    parameters, gradients, optimizer, expected = (x[:count] if isinstance(x, list) else x for x in whole_and_steps())

    def thirds(tensors):
        rows = []
        for tensor in tensors:
            flat = torch.cat([tensor.flatten(), torch.zeros(-tensor.numel() % PROCESSES)])
            rows.append(flat.view(PROCESSES, -1))
        return torch.cat(rows, dim=1)

    for p, shape in zip(parameters, SHAPES):
        p.ds_numel, p.ds_shape = p.numel(), torch.Size(shape)
        p.partition_numel = lambda p=p: -(-p.numel() // PROCESSES)
    shares = thirds(gradients)
    found = Everyone(monkeypatch).run(
        lambda rank: muon.share_of_each(None, parameters, shares[rank].clone(), optimizer.steps)
    )
    torch.testing.assert_close(torch.stack(found), thirds(expected))
