"""Muon: steps of the layers' matrices in which all directions count alike (Jordan et al. 2024), AdamW for all other parameters.

A gradient's matrix has a few large directions; Muon takes the nearest matrix whose singular values are about 1 in its place.
Scaled as in Moonlight (Liu et al. 2025, eq. 4) it steps as far as AdamW does at the same learning rate, so one rate serves both.

PyTorch has `torch.optim.Muon`, for matrices alone and in bfloat16, which a CPU without such units multiplies more than ten
times slower (benchmarks/muon.py). Here matrices of one shape go through the iteration together, on a CPU in float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

# Jordan et al. 2024: five steps of a X + (b X X^T + c (X X^T)^2) X bring singular values of 0.01 to 1 near 1 (0.7 to 1.2).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5

# Parameters and their gradients -> their steps.
Steps: TypeAlias = Callable[[Sequence[Tensor], Sequence[Tensor]], list[Tensor]]


class Muon(torch.optim.AdamW):
    """AdamW, in which the parameters of `matrices` step by Muon at their group's learning rate and weight decay.

    matrices: see `hidden_matrices`. momentum: Muon's own, with Nesterov's look ahead; the betas and eps are AdamW's.
    A group of both kinds becomes two, of which the one with "muon" has the matrices; groups of like settings become one.
    """

    # On several processes (`spread`): parameters, their gradients, `steps` -> their steps. Of pieces of parameters the pieces of
    # steps, for which `steps` is asked about whole gradients.
    share: Callable[[Sequence[Tensor], Sequence[Tensor], Steps], list[Tensor]] | None = None

    def __init__(self, params: Any, matrices: dict[Tensor, int], momentum: float = 0.95, **adamw: Any):
        super().__init__(params, **adamw)
        self.matrices, self.momentum = matrices, momentum
        groups: list[dict[str, Any]] = []
        for group, muon in itertools.product(self.param_groups, (True, False)):
            mine = group | {"params": [p for p in group["params"] if (p in matrices) == muon], "muon": muon}
            like = [other for other in groups if other | {"params": None} == mine | {"params": None}]
            if like:
                like[0]["params"] += mine["params"]
            elif mine["params"]:
                groups.append(mine)
        self.param_groups = groups
        self.counts = [[matrices.get(p, 0) for p in group["params"]] for group in groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, which all processes take at once."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group, counts in zip(groups, self.counts):
            mine = [p for p in group["params"] if group["muon"] and p.grad is not None]
            share = self.share
            if mine and hasattr(mine[0], "full_tensor"):  # FSDP has put pieces in the place of the parameters
                share, self.matrices = in_pieces, self.matrices | dict(zip(group["params"], counts))
            ahead = [self._nesterov(p) for p in mine]
            steps = share(mine, ahead, self.steps) if share and mine else self.steps(mine, ahead)
            for p, step in zip(mine, steps):
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(step, alpha=-group["lr"])
        return loss

    def steps(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
        """The steps of `parameters` at a learning rate of 1, from their whole gradients."""
        counts = [self.matrices[p] for p in parameters]
        found = iter(orthogonal([part for g, n in zip(gradients, counts) for part in g.chunk(n, dim=1)]))
        parts = [[next(found) for _ in range(n)] for n in counts]
        return [torch.cat([0.2 * max(part.shape) ** 0.5 * part for part in side], dim=1) for side in parts]

    def _nesterov(self, p: nn.Parameter) -> Tensor:
        state, gradient = self.state[p], p.grad
        assert gradient is not None
        if not state:
            state |= {"step": torch.zeros(()), "momentum_buffer": torch.zeros_like(gradient)}
        state["step"] += 1  # AdamW looks for it when it loads a state
        state["momentum_buffer"].lerp_(gradient, 1 - self.momentum)
        return gradient.lerp(state["momentum_buffer"], self.momentum)


def hidden_matrices(model: nn.Module) -> dict[Tensor, int]:
    """The parameters that Muon is for, each with the number of matrices that lie in it side by side.

    They are the trainable weights of linear layers within transformer layers; embeddings and heads are not. GPT-2 keeps
    query, key and value in one weight of three matrices.
    """
    found: dict[Tensor, int] = {}
    for name, module in model.named_modules():
        in_layer = any(part.isdigit() for part in name.split("."))
        if not (in_layer and isinstance(module, (nn.Linear, Conv1D)) and module.weight.requires_grad):
            continue
        shape = getattr(module.weight, "ds_shape", module.weight.shape)  # ZeRO 3 has taken the weight itself away
        if len(shape) == 2:  # not where it is packed in 4 bits
            found[module.weight] = 3 if name.endswith(".c_attn") and isinstance(module, Conv1D) else 1
    return found


def orthogonal(matrices: Sequence[Tensor]) -> list[Tensor]:
    """For each matrix [A, B] one with the same singular vectors, whose singular values are about 1 (Newton-Schulz).

    Matrices of one shape, or its transpose, are taken together.
    """
    shapes: dict[tuple[int, ...], list[int]] = {}
    for i, matrix in enumerate(matrices):
        shapes.setdefault(tuple(sorted(matrix.shape)), []).append(i)
    found: list[Tensor] = list(matrices)
    for places in shapes.values():
        wide = torch.stack([_wide(matrices[i], matrices[i]) for i in places])
        for i, result in zip(places, newton_schulz(wide)):
            found[i] = _wide(result, matrices[i]).to(matrices[i].dtype)
    return found


def _wide(matrix: Tensor, like: Tensor) -> Tensor:
    """The matrix, transposed where `like` has more rows than columns: what makes it wide also turns it back."""
    return matrix.mT if like.shape[0] > like.shape[1] else matrix


def newton_schulz(matrices: Tensor) -> Tensor:
    """[N, A, B] with A <= B; see `orthogonal`. In float32 on a CPU, else in bfloat16, which is enough (Jordan et al. 2024)."""
    x = matrices.float() if matrices.device.type == "cpu" else matrices.bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


# ------------------------------------------------------------------------------------------------------- several processes


def spread(optimizer: Any) -> None:
    """Shares the work of a Muon that accelerate has prepared, if it is one, out to the processes; FSDP's pieces it sees itself.

    Under DDP each takes the steps of some parameters. Under ZeRO a process steps one flat tensor of a group, in which it has its
    pieces of the parameters.
    """
    muon = optimizer.optimizer
    if isinstance(muon, Muon):
        if dist.is_initialized() and dist.get_world_size() > 1:
            muon.share = in_turns
        return
    zero, muon = muon, getattr(muon, "optimizer", None)
    if not isinstance(muon, Muon):
        return
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        flats, groups = zero.fp32_partitioned_groups_flat, zero.fp16_groups
        ways = [partial(share_of_each, zero.dp_process_group, parameters) for parameters in groups]
    else:
        flats, groups = zero.single_partition_of_fp32_groups, zip(zero.bit16_groups, zero.bit16_groups_flat)
        ways = [
            partial(share_of_all, group, [(p, p.storage_offset() - row.storage_offset()) for p in parameters])
            for group, (parameters, row) in zip(zero.real_dp_process_group, groups)
        ]
    way_of = dict(zip(flats, ways))
    muon.share = lambda mine, pieces, steps: [way_of[flat](piece, steps) for flat, piece in zip(mine, pieces)]


def dealt(sizes: Sequence[int], processes: int) -> list[list[int]]:
    """Which of the items each process takes, so that all have about as much to do."""
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    return [order[rank::processes] for rank in range(processes)]


def in_turns(parameters: Sequence[Tensor], gradients: Sequence[Tensor], steps: Steps) -> list[Tensor]:
    """DDP: every process has all gradients, takes the steps of some of them, and gets the others'."""
    sizes = [p.numel() for p in parameters]
    hands = dealt(sizes, dist.get_world_size())
    mine = hands[dist.get_rank()]
    taken = steps([parameters[i] for i in mine], [gradients[i] for i in mine])
    row = gradients[0].new_zeros(max(sum(sizes[i] for i in hand) for hand in hands))
    if taken:
        torch.cat([step.flatten() for step in taken], out=row[: sum(sizes[i] for i in mine)])
    found: list[Tensor] = list(gradients)
    for hand, theirs in zip(hands, everyones(row)):
        for i, step in zip(hand, theirs[: sum(sizes[i] for i in hand)].split([sizes[i] for i in hand])):
            found[i] = step.view_as(parameters[i])
    return found


def in_pieces(parameters: Sequence[Any], gradients: Sequence[Any], steps: Steps) -> list[Tensor]:
    """FSDP: a process has a piece of each parameter. Each takes the steps of some of them, and hands them out."""
    hands = dealt([p.numel() for p in parameters], dist.get_world_size())
    mine = hands[dist.get_rank()]
    wholes = {}
    for i, gradient in enumerate(gradients):
        whole = gradient.full_tensor()
        if i in mine:
            wholes[i] = whole
    taken = dict(zip(mine, steps([parameters[i] for i in mine], [wholes[i] for i in mine])))
    found: list[Tensor] = list(gradients)
    for rank, hand in enumerate(hands):
        for i in hand:
            local = gradients[i].to_local()
            step = taken[i].contiguous() if i in taken else local.new_empty(parameters[i].shape)
            dist.broadcast(step, rank)
            found[i] = piece_of(step, parameters[i].device_mesh)
    return found


def piece_of(whole: Tensor, mesh: Any) -> Tensor:
    """This process's piece of a tensor that all have whole, as FSDP cuts it: along the first dimension.

    `distribute_tensor` would do, but makes the processes' random states one: they would drop out the same places.
    """
    from torch.distributed.tensor import DTensor, Shard

    pieces, rank = whole.chunk(mesh.size()), mesh.get_local_rank()
    mine = pieces[rank] if rank < len(pieces) else whole[:0]
    shape, stride = whole.shape, whole.stride()
    return DTensor.from_local(mine.clone(), mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def share_of_all(group: Any, places: Sequence[tuple[Any, int]], piece: Tensor, steps: Steps) -> Tensor:
    """ZeRO 1 and 2: parameters lie in a row, each at its place, and a process has a share of the row [n].

    A process takes the steps of what it has a piece of. Most lie in one share whole; those on a border are put together.
    """
    size = len(piece)
    start = dist.get_rank(group) * size
    end = start + size
    on_border = [(p, at) for p, at in places if at // size != (at + p.numel() - 1) // size]
    mine = [(p, at) for p, at in places if at < end and at + p.numel() > start]

    def here(p: Any, at: int) -> tuple[slice, slice]:
        """Which numbers of p are in this share, and where in it."""
        first, last = max(at, start), min(at + p.numel(), end)
        return slice(first - at, last - at), slice(first - start, last - start)

    whole = {p: piece.new_zeros(p.numel()) for p, _ in (*on_border, *mine)}
    for p, at in mine:
        inner, outer = here(p, at)
        whole[p][inner] = piece[outer]
    if on_border:
        row = torch.cat([whole[p] for p, _ in on_border])
        dist.all_reduce(row, group=group)
        for (p, _), full in zip(on_border, row.split([p.numel() for p, _ in on_border])):
            whole[p] = full
    found = torch.zeros_like(piece)
    taken = steps([p for p, _ in mine], [whole[p].view(p.shape) for p, _ in mine])
    for (p, at), step in zip(mine, taken):
        inner, outer = here(p, at)
        found[outer] = step.flatten()[inner]
    return found


def share_of_each(group: Any, parameters: Sequence[Any], piece: Tensor, steps: Steps) -> Tensor:
    """ZeRO 3: a process has a share of each parameter, [n] in all. Each gets some parameters whole, and hands out their steps."""
    sizes = [p.partition_numel() for p in parameters]
    hands = dealt(sizes, dist.get_world_size(group))
    mine = hands[dist.get_rank(group)]
    of_each = [sum(sizes[i] for i in hand) for hand in hands]
    of_mine = [sum(sizes[i] for i in mine)] * len(hands)
    order = [i for hand in hands for i in hand]

    shares = piece.split(sizes)
    got = piece.new_empty(sum(of_mine))
    dist.all_to_all_single(got, torch.cat([shares[i] for i in order]), of_mine, of_each, group=group)
    rows = got.view(len(hands), of_mine[0]).split([sizes[i] for i in mine], dim=1)
    whole = [row.flatten()[: parameters[i].ds_numel].view(parameters[i].ds_shape) for i, row in zip(mine, rows)]
    handed = [torch.zeros_like(row) for row in rows]
    for row, step in zip(handed, steps([parameters[i] for i in mine], whole)):
        row.view(-1)[: step.numel()] = step.flatten()
    found = torch.empty_like(piece)
    none = piece.new_empty(len(hands), 0)  # where there are fewer parameters than processes
    handed_out = torch.cat([none, *handed], dim=1).flatten()
    dist.all_to_all_single(found, handed_out, of_each, of_mine, group=group)
    found_of = dict(zip(order, found.split([sizes[i] for i in order])))
    return torch.cat([found_of[i] for i in range(len(parameters))])


def everyones(piece: Tensor) -> Tensor:
    """The pieces [n] of all processes [processes, n]."""
    found = piece.new_empty(dist.get_world_size(), len(piece))
    dist.all_gather(list(found), piece)
    return found
