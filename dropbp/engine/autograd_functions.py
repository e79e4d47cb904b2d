"""Autograd functions for three cases that plain `no_grad` does not cover.

A dropped branch runs under `no_grad`; the residual addition then passes the gradient on. Three cases need an autograd
node of their own, each the identity in the forward: scaling the gradient of a kept branch, telling a lazy device that a
step ends here in forward and backward, and keeping the loss connected if nothing is recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class ScaleGradient(torch.autograd.Function):
    """Identity that multiplies the gradient by a constant; at a branch's output, this scales all its gradients."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, factor: float) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, float], output: torch.Tensor) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient * ctx.factor, None

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor, _: None) -> torch.Tensor:
        return tangent.view_as(tangent)


class StepBoundary(torch.autograd.Function):
    """Identity that calls `boundary()` when the forward and the backward pass through it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, boundary: Callable[[], None]) -> torch.Tensor:
        boundary()
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, Callable[[], None]], output: torch.Tensor) -> None:
        ctx.boundary = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.boundary()
        return gradient, None

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor, _: None) -> torch.Tensor:
        return tangent.view_as(tangent)


class ConnectToAnchor(torch.autograd.Function):
    """Identity on `x`, connected to `anchor`, so that `backward()` works although nothing below was recorded.

    The result shares memory with `x` but is not a view of it: trainers scale losses in place (`loss *= n`), which
    autograd forbids on a view created by a custom function.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        return x.data

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None]:
        return None, None

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor, _: None) -> torch.Tensor:
        return tangent
