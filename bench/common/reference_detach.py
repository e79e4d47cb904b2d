"""The reference implementation's way of dropping: a branch runs with autograd on, and its output is detached.

It therefore pays for a graph that is never used, and for the transient memory that the graph holds. Masks are those of
this library (`exact`), the same as in the variants it is compared with. Source: https://github.com/WooSunghyeon/dropbp.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

import dropbp
from dropbp.masks.registry import Mask
from dropbp.masks.samplers import Sampler


class DetachedBranches:
    """Drops branches of a model by detaching their outputs, until `remove()`."""

    def __init__(self, model: nn.Module, drop_rate: float, seed: int = 0) -> None:
        self.branches = dropbp.discover(model)
        rates = [drop_rate] * len(self.branches)
        self._sampler = Sampler("exact", rates, [branch.flops for branch in self.branches], seed)
        self._draws = 0
        self.mask: Mask | None = None
        self._fixed: Mask | None = None
        self._hooks = [model.register_forward_pre_hook(self._draw)]
        for i, branch in enumerate(self.branches):
            last = model.get_submodule(branch.modules[-1])
            self._hooks.append(last.register_forward_hook(self._detacher(i)))

    @contextmanager
    def fixed(self, mask: Mask) -> Iterator[None]:
        """Forwards inside the context use this mask instead of a drawn one."""
        self._fixed = mask
        try:
            yield
        finally:
            self._fixed = None

    def remove(self) -> None:
        """Remove all hooks from the model."""
        for hook in self._hooks:
            hook.remove()

    def _draw(self, module: nn.Module, args: Any) -> None:
        if module.training and torch.is_grad_enabled():
            self.mask = self._sampler.draw(self._draws) if self._fixed is None else self._fixed
            self._draws += self._fixed is None

    def _detacher(self, index: int) -> Any:
        def detach(module: nn.Module, args: Any, output: Any) -> Any:
            return _detached(output) if self.mask is not None and self.mask[index] else output

        return detach


def _detached(output: Any) -> Any:
    if isinstance(output, tuple):
        return tuple(map(_detached, output))
    return output.detach() if isinstance(output, torch.Tensor) else output
