"""Muon: steps of the layers' matrices in which all directions count alike (Jordan et al. 2024), AdamW for all other parameters.

A gradient's matrix has a few large directions; Muon takes the nearest matrix whose singular values are about 1 in its place.
Scaled as in Moonlight (Liu et al. 2025, eq. 4) it steps as far as AdamW does at the same learning rate, so one rate serves both.

PyTorch has `torch.optim.Muon`, for matrices alone and in bfloat16, which a CPU without such units multiplies more than ten
times slower (benchmarks/muon.py). Here matrices of one shape go through the iteration together, on a CPU in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

# Jordan et al. 2024: five steps of a X + (b X X^T + c (X X^T)^2) X bring singular values of 0.01 to 1 near 1 (0.7 to 1.2).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5

Steps: TypeAlias = Callable[
    [Sequence[Tensor], Sequence[Tensor]], list[Tensor]
]  # parameters, their gradients -> their steps


class Muon(torch.optim.AdamW):
    """AdamW, in which the parameters of `matrices` step by Muon at their group's learning rate and weight decay.

    matrices: see `hidden_matrices`. momentum: Muon's own, with Nesterov's look ahead; the betas and eps are AdamW's.
    A group of both kinds becomes two, of which the one with "muon" has the matrices.
    """

    # Set where parameters lie in pieces on several processes: (parameter, its piece of a gradient [n], `steps`) -> its piece of
    # the steps [n], for which `steps` has been asked about whole gradients.
    spread: Callable[[Tensor, Tensor, Steps], Tensor] | None = None

    def __init__(self, params: Any, matrices: dict[Tensor, int], momentum: float = 0.95, **adamw: Any):
        super().__init__(params, **adamw)
        self.matrices, self.momentum = matrices, momentum
        kinds = [(group, muon) for group in self.param_groups for muon in (True, False)]
        chosen = [[p for p in group["params"] if (p in matrices) == muon] for group, muon in kinds]
        self.param_groups = [g | {"params": ps, "muon": muon} for (g, muon), ps in zip(kinds, chosen) if ps]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. Where processes have pieces of matrices, all of them take it at once."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            mine = [p for p in group["params"] if group["muon"] and p.grad is not None]
            ahead = [self._nesterov(p) for p in mine]
            if self.spread is None:
                steps = self.steps(mine, ahead)
            else:
                steps = [self.spread(p, piece, self.steps) for p, piece in zip(mine, ahead)]
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
            found[module.weight] = 3 if name.endswith(".c_attn") else 1
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
