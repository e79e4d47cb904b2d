"""The paper's algorithm, slow and literal, as a reference for the fast code.

DropBP (arXiv:2402.17812), sections 3.1 and 3.2, written from its text and the description of its code. It has a
residual network x <- x + f_l(x), dropped branches x + f_l(x).detach(), independent Bernoulli masks, gradient-norm
sensitivities from N+1 passes, and rates from a greedy algorithm in steps of 0.1. Faults of the algorithm are kept: the
budget is overshot by up to one step. Accidents of the code raise instead: an empty queue.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

# Shapes: B batch, D width.


class ResidualNet(nn.Module):
    """x <- x + f_l(x) for a few small branches; `mask[l]` True drops the backward of branch l."""

    def __init__(self, branches: int = 4, width: int = 8, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, width)) for _ in range(branches)
        )
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * width**-0.5)

    def forward(self, x_BD: Tensor, mask: Sequence[bool] = ()) -> Tensor:
        """The output, bit-identical for every mask."""
        for place, branch in enumerate(self.branches):
            dropped = place < len(mask) and mask[place]
            x_BD = x_BD + (branch(x_BD).detach() if dropped else branch(x_BD))
        return x_BD


def independent_mask(rates: Sequence[float], generator: random.Random) -> list[bool]:
    """One coin per branch; branch l is dropped with probability p_l."""
    return [generator.random() < rate for rate in rates]


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    """The gradient of every parameter, zeros if it has none."""
    parameters = list(model.parameters())
    return list(torch.autograd.grad(loss, parameters, materialize_grads=True))


def gradient_norm_sensitivities(
    model: nn.Module, loss_of: Callable[[Sequence[bool]], Tensor], branches: int
) -> list[float]:
    """S_l = sum over parameters of (|g| - |g with branch l dropped|)^2, from N+1 forward-backward passes."""
    full = [g.norm() for g in gradients(model, loss_of([False] * branches))]
    sensitivities = []
    for dropped in range(branches):
        mask = [place == dropped for place in range(branches)]
        norms = [g.norm() for g in gradients(model, loss_of(mask))]
        sensitivities.append(sum(float((a - b) ** 2) for a, b in zip(full, norms, strict=True)))
    return sensitivities


def greedy_rates(sensitivities: Sequence[float], flops: Sequence[float], drop_rate: float) -> list[float]:
    """Raise by 0.1 the rate whose next value times its sensitivity is smallest, until the remaining FLOPs meet the
    target.

    Rates are counted in tenths, so that 0.9 is exactly 0.9. Saved FLOPs count towards the target but do not affect the
    choice.
    """
    tenths = [0] * len(flops)
    left, target = sum(flops), (1 - drop_rate) * sum(flops)
    while left > target:
        open_branches = [place for place, count in enumerate(tenths) if count < 9]
        if not open_branches:
            raise ValueError("the queue is empty: no branch is left below a rate of 0.9")
        chosen = min(open_branches, key=lambda place: sensitivities[place] * (tenths[place] + 1))
        tenths[chosen] += 1
        left -= flops[chosen] * 0.1
    return [count / 10 for count in tenths]
