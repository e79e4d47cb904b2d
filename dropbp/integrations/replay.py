"""Computes the loss of a training step again, outside the trainer that computed it.

A callback sees neither the batch nor the loss; with preference trainers the loss is not even an output of the model.
But a trainer's loss reaches the parameters only through the gradient `g = dL/dy` of the model's outputs `y`. So hooks
capture the inputs of one forward and the gradient of its outputs. Then `sum(y * g)` of a new forward on the same inputs
has the same gradients as the trainer's loss. The order of the data does not change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from dropbp.errors import StateError

Closure: TypeAlias = Callable[[], torch.Tensor]


class LossReplay:
    """Captures the next training forwards of a model, at most `limit`, and the gradients of their outputs.

    Forwards in evaluation mode or without gradients are ignored. Call `release` when done.
    """

    def __init__(self, model: nn.Module, limit: int = 1) -> None:
        self._model, self._limit = model, limit
        self._caught: list[_Forward] = []
        self._hook = model.register_forward_hook(self._note_forward, with_kwargs=True)

    def closures(self) -> list[Closure]:
        """One function for each captured forward, which runs it again and returns a loss with the trainer's gradients.

        Raises StateError if no training forward with a backward through its outputs was captured.
        """
        closures = [partial(forward.loss, self._model) for forward in self._caught if forward.gradients]
        if not closures:
            raise StateError("no training forward followed by a backward was captured, so there is no loss to replay.")
        return list(closures)

    def release(self) -> None:
        """Free the batches, and remove the hook from the model."""
        self._hook.remove()
        self._caught.clear()

    def _note_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if len(self._caught) == self._limit or not (module.training and torch.is_grad_enabled()):
            return None
        self._caught.append(_Forward(args, dict(kwargs)))
        return self._caught[-1].watch(output)


@dataclass
class _Forward:
    """The inputs of one forward, and the gradient of each output that received one."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    gradients: dict[int, torch.Tensor] = field(default_factory=dict)

    def loss(self, model: nn.Module) -> torch.Tensor:
        leaves, _ = tree_flatten(model(*self.args, **self.kwargs))
        terms = [(leaves[index] * gradient).sum().float() for index, gradient in self.gradients.items()]
        return torch.stack(terms).sum()

    def watch(self, output: Any) -> Any:
        leaves, spec = tree_flatten(output)
        return tree_unflatten([self._watched(index, leaf) for index, leaf in enumerate(leaves)], spec)

    def _watched(self, index: int, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or not leaf.requires_grad:
            return leaf
        # Only the copy's gradient comes purely from outside the model. The output itself may also feed another output,
        # as the logits feed the loss, and would count that twice. A view fails, because trainers scale losses in place.
        copy = leaf.clone()
        copy.register_hook(partial(self._note_gradient, index))
        return copy

    def _note_gradient(self, index: int, gradient: torch.Tensor) -> None:
        known = self.gradients.get(index)
        self.gradients[index] = gradient.detach() if known is None else known + gradient.detach()
