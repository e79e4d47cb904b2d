"""Splits optimizer step and gradient clipping by branch, so that the work on each part does not depend on the mask.

A lazy device compiles a graph for each new set of operations. An optimizer or a clipping that handles all gradients at
once, and leaves out those that are None, runs another set of operations for every mask. Split by branch, where all
gradients are present or all are None, each part runs one set of operations or none. Skipped parameters still do not
move; the price is more and smaller launches.

`zero_fill_gradients` is the alternative: it needs few launches, but changes what the optimizer does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch

from dropbp.checks import listed, short
from dropbp.errors import ConfigError

ParameterGroup: TypeAlias = "dict[str, Any]"

_CLIP_EPSILON = 1e-6  # as in torch.nn.utils.clip_grad_norm_


def split_groups(groups: Iterable[ParameterGroup], key: Callable[[torch.Tensor], Any]) -> list[ParameterGroup]:
    """Split each group into one per key of its parameters, in the order of the keys; options are kept."""
    checked = [_checked_group(group) for group in listed("groups", groups)]
    return [part for group in checked for part in _split_group(group, key)]


def _checked_group(group: Any) -> ParameterGroup:
    given = group.get("params") if isinstance(group, Mapping) else None
    parameters = list(given) if isinstance(given, Iterable) else [given]
    if not all(isinstance(parameter, torch.Tensor) for parameter in parameters):
        raise ConfigError(
            f"groups holds {short(group)}; each is a dict whose 'params' is a list of tensors, as optimizers take."
        )
    return {**group, "params": parameters}


def clip_grad_norm_grouped(
    groups: Iterable[Iterable[torch.Tensor]],
    max_norm: float,
    norm_type: float = 2.0,
    *,
    step_boundary: Callable[[], None] | None = None,
) -> torch.Tensor:
    """Clip all gradients by their common norm, group by group: `torch.nn.utils.clip_grad_norm_` in bounded pieces.

    A group without gradients contributes a norm of zero, so that the sum over groups has the same shape for every mask.
    Norms are computed in float32, or in float64 if a parameter has that type; nothing is read back to the host.
    Gradients sharded over ranks (DTensor) are not supported: use PyTorch's function.

    Args:
        groups: the parameters of each group, for instance `[group["params"] for group in optimizer.param_groups]`.
        max_norm: the largest norm that is not clipped.
        norm_type: the order of the norm; may be `inf`.
        step_boundary: called after each piece; `device.step_boundary` on a lazy device.

    Returns:
        The norm of all gradients before clipping, a scalar tensor on the device of the first group.
    """
    boundary = step_boundary or (lambda: None)
    parts = [part for part in map(list, groups) if part]
    if not parts:
        return torch.zeros(())
    wide = any(parameter.dtype is torch.float64 for part in parts for parameter in part)
    dtype, device = torch.float64 if wide else torch.float32, parts[0][0].device
    total = _total_norm(parts, norm_type, dtype, device, boundary)
    scale = torch.clamp(max_norm / (total + _CLIP_EPSILON), max=1.0)
    boundary()
    for part in parts:
        _scale_gradients(part, scale)
        boundary()
    return total


def step_by_group(
    optimizer: torch.optim.Optimizer, step_boundary: Callable[[], None], groups: Sequence[ParameterGroup] | None = None
) -> None:
    """Run one step of an optimizer, a parameter group at a time, with a boundary after each.

    For optimizers that do not call a boundary between groups themselves, such as PyTorch's. The result is that of
    `optimizer.step()` if groups do not depend on each other, as in all optimizers of PyTorch but LBFGS. `groups` are
    used for this step instead of the optimizer's own.
    """
    with marked_groups(optimizer, step_boundary, groups):
        optimizer.step()


@contextmanager
def marked_groups(
    optimizer: torch.optim.Optimizer, step_boundary: Callable[[], None], groups: Iterable[ParameterGroup] | None = None
) -> Iterator[None]:
    """Inside the context, a step goes through these groups, by default the optimizer's, with a boundary after each."""
    own = optimizer.param_groups
    optimizer.param_groups = _MarkedGroups(own if groups is None else groups, step_boundary)
    try:
        yield
    finally:
        optimizer.param_groups = own


class _MarkedGroups(list[ParameterGroup]):
    """Calls a boundary after each group when iterated."""

    def __init__(self, groups: Iterable[ParameterGroup], boundary: Callable[[], None]) -> None:
        super().__init__(groups)
        self.boundary = boundary

    def __iter__(self) -> Iterator[ParameterGroup]:
        for group in super().__iter__():
            yield group
            self.boundary()


@torch.no_grad()
def zero_fill_gradients(parameters: Iterable[torch.Tensor]) -> int:
    """Give every trained parameter whose gradient is None a gradient of zeros; return the number of such parameters.

    The optimizer then does the same work for every mask, but moves skipped parameters. AdamW shrinks them by weight
    decay, moves them along their momentum, lets both moments fade and counts the step; SGD does likewise with weight
    decay and momentum. Under the default, None, a skipped parameter stays where it is.
    """
    missing = [parameter for parameter in parameters if parameter.requires_grad and parameter.grad is None]
    for parameter in missing:
        parameter.grad = torch.zeros_like(parameter)
    return len(missing)


def _split_group(group: ParameterGroup, key: Callable[[torch.Tensor], Any]) -> list[ParameterGroup]:
    parts: dict[Any, list[torch.Tensor]] = {}
    for parameter in group["params"]:
        parts.setdefault(key(parameter), []).append(parameter)
    return [{**group, "params": parts[each]} for each in sorted(parts)]


@torch.no_grad()
def _total_norm(
    parts: Sequence[Sequence[torch.Tensor]],
    norm_type: float,
    dtype: torch.dtype,
    device: torch.device,
    boundary: Callable[[], None],
) -> torch.Tensor:
    norms = []
    for part in parts:
        norms.append(_group_norm(part, norm_type, dtype, device))
        boundary()
    return _norm(torch.stack(norms), norm_type, dtype)


def _group_norm(
    part: Sequence[torch.Tensor], norm_type: float, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    gradients = [parameter.grad for parameter in part if parameter.grad is not None]
    if not gradients:
        return torch.zeros((), dtype=dtype, device=device)
    norms = [_norm(gradient, norm_type, dtype).to(device) for gradient in gradients]
    return _norm(torch.stack(norms), norm_type, dtype)


def _norm(tensor: torch.Tensor, norm_type: float, dtype: torch.dtype) -> torch.Tensor:
    norm: torch.Tensor = torch.linalg.vector_norm(tensor, norm_type, dtype=dtype)
    return norm


@torch.no_grad()
def _scale_gradients(part: Sequence[torch.Tensor], scale: torch.Tensor) -> None:
    for parameter in part:
        if parameter.grad is not None:
            parameter.grad.mul_(scale.to(parameter.grad.device))
