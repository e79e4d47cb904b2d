"""Group norms on CPU: PyTorch's kernel for channels-last input dies if this input requires no gradient."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dropbp
from tests.common.engine_models import take_gradients

# Shapes: B batch, C channels, H and W height and width.

CHANNELS = 4


class Functional(nn.Module):
    """A group norm that is no `nn.GroupNorm`."""

    def __init__(self, groups: int, channels: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return nn.functional.group_norm(x_BCHW, self.groups, self.weight, self.bias)


class Block(nn.Module):
    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.norm, self.conv = norm(2, CHANNELS), nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW + self.conv(self.norm(x_BCHW).tanh())


def net(norm: type[nn.Module], stem: bool) -> nn.Module:
    torch.manual_seed(1)
    first = nn.Conv2d(CHANNELS, CHANNELS, 1) if stem else Block(nn.Identity)  # else plain training dies there
    return nn.Sequential(first, *(Block(norm) for _ in range(4)), nn.Conv2d(CHANNELS, 2, 1)).train()


def nodes_below(root: Any) -> Iterator[Any]:
    pending, seen = [root], {root}
    while pending:
        yield (node := pending.pop())
        fresh = {source for source, _ in node.next_functions if source is not None} - seen
        seen |= fresh
        pending += fresh


@pytest.mark.parametrize("format_", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("norm", [nn.GroupNorm, Functional])
@pytest.mark.parametrize(("masks", "stem"), [("nested", True), ("nested", False), ("exact", False)])
def test_the_input_of_a_trained_group_norm_requires_a_gradient(
    masks: str, stem: bool, norm: type[nn.Module], format_: Any
) -> None:
    model = net(norm, stem).to(memory_format=format_)
    plain = copy.deepcopy(model)
    x_BCHW = torch.randn(2, CHANNELS, 5, 5).to(memory_format=format_)
    handle = dropbp.enable(model, 0.5, masks=masks, example_inputs=x_BCHW, steps=8)
    lowest = 0
    for _ in range(8):
        loss, expected = model(x_BCHW).square().mean(), plain(x_BCHW).square().mean()
        assert torch.equal(loss, expected)
        norms = [node for node in nodes_below(loss.grad_fn) if node.name().startswith("NativeGroupNorm")]
        dropped_below = handle.mask is not None and handle.mask[0]
        assert not dropped_below or all(node.next_functions[0][0] is not None for node in norms)
        lowest += dropped_below
        found, whole = take_gradients(model, loss), take_gradients(plain, expected)
        assert any(gradient is not None for gradient in found.values())
        for name, gradient in found.items() if masks == "nested" else ():
            if gradient is not None:
                torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-7)
    assert lowest
