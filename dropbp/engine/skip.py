"""The autograd functions of the skip: what running a branch without recording cannot carry by itself.

A dropped branch simply runs under `no_grad`; the residual addition then passes the gradient. Three things need a node
of their own, each the identity in the forward: scaling the gradient of a kept branch, telling a lazy device that a step
ends here in the forward and in the backward, and keeping the loss connected when nothing at all is recorded.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

TensorMap = Callable[[torch.Tensor], torch.Tensor]


class ScaleGradient(torch.autograd.Function):
    """Identity; multiplies the gradient by a constant. Scaling a branch's output scales its whole backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient * ctx.factor, None


class StepBoundary(torch.autograd.Function):
    """Identity; calls `boundary()` when the forward and when the backward pass through it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, boundary: Callable[[], None]) -> torch.Tensor:
        ctx.boundary = boundary
        boundary()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.boundary()
        return gradient, None


class Connect(torch.autograd.Function):
    """Identity on `x`, connected to `anchor`: `backward()` works although nothing below was recorded.

    The result shares memory with `x` and is no view of it: trainers scale losses in place (`loss *= n`), which autograd
    forbids on a view made here.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        return x.data

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None]:
        return None, None


def is_differentiable(x: torch.Tensor) -> bool:
    """Whether autograd can follow tensors of this type."""
    return x.is_floating_point() or x.is_complex()


def map_tensors(value: Any, function: TensorMap) -> Any:
    """`value` with `function` applied to each differentiable tensor in nested tuples, lists, dicts and objects."""
    if isinstance(value, torch.Tensor):
        return function(value) if is_differentiable(value) else value
    if isinstance(value, Mapping):
        return _map_mapping(value, function)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, function) for item in value))
    if type(value) in (list, tuple):
        return type(value)(map_tensors(item, function) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _map_dataclass(value, function)
    return value


def _map_mapping(value: Any, function: TensorMap) -> Any:
    changed = copy.copy(value)
    for key, item in value.items():
        changed[key] = map_tensors(item, function)
    return changed


def _map_dataclass(value: Any, function: TensorMap) -> Any:
    changed = copy.copy(value)
    for field in dataclasses.fields(value):
        object.__setattr__(changed, field.name, map_tensors(getattr(value, field.name), function))
    return changed
