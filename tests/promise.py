"""What nested masks promise: in every step a gradient is that of a plain backward, or there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from dropbp.discovery.record import tensors_in
from tests.common.engine_models import take_gradients

Loss = Callable[[nn.Module], torch.Tensor]
TOLERANCE = 1e-4


def prefixes(handle: Any) -> Iterator[tuple[bool, ...]]:
    """All masks that drop the bottom of the model and split no parallel branches."""
    count = len(handle.branches)
    for dropped in range(count + 1):
        bits = (1 << dropped) - 1
        if not any(0 < bits & group < group for group in handle.engine.structure.parallel):
            yield tuple(branch < dropped for branch in range(count))


def assert_exact_or_none(handle: Any, model: nn.Module, loss: Loss) -> dict[str, int]:
    """Under every prefix; returns in how many each parameter had a gradient. The handle's stem is `rest`."""
    with handle.fixed([False] * len(handle.branches)):
        plain = take_gradients(model, loss(model))
    counts = dict.fromkeys(plain, 0)
    for mask in prefixes(handle):
        with handle.fixed(mask):
            found = take_gradients(model, loss(model))
        for name, gradient in found.items():
            if gradient is not None:
                assert_equal(name, mask, gradient, plain)
            counts[name] += gradient is not None
    return counts


def assert_equal(name: str, mask: Any, gradient: torch.Tensor, plain: dict[str, Any]) -> None:
    expected = plain[name]
    assert expected is not None, f"{name} has a gradient under {mask} and none in a plain backward"
    largest = max(float(g.abs().max()) for g in plain.values() if g is not None)
    allowed = TOLERANCE * max(float(expected.abs().max()), 1e-3 * largest)
    difference = float((gradient - expected).abs().max())
    assert difference <= allowed, f"{name} under {mask}: off by {difference:.3g}, largest {expected.abs().max():.3g}"


def loss_of(outputs: Any) -> torch.Tensor:
    """One number in which every element of every output has a weight of its own."""
    found = [t for t in tensors_in(outputs) if t.is_floating_point() and t.grad_fn is not None]
    return torch.stack([(t.float() * torch.linspace(-1, 1, t.numel()).view(t.shape)).sum() for t in found]).sum()
