"""Gradients of zero: a dropped branch must have none, or an optimizer would move it by decay and momentum.

`zero_grad(set_to_none=False)` leaves zeros. To look at a gradient makes the host wait for the device. So a gradient is
looked at only where an optimizer has made a step, or something other than a backward has written to it, since the last
backward or look. (Its version alone does not tell: some kernels leave it.) All gradients that a backward has written
are marked at its end: hooks on the parameters would cost more than the rest of a step's bookkeeping.
"""

from __future__ import annotations

import functools
import itertools
import operator
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from dropbp._torch import transforming
from dropbp.engine.parameters import Parameters
from dropbp.tensors import tensors_in

MARK = "_dropbp_state"  # of a gradient: its version, and the optimizer steps before, when a backward last wrote to it
NO_TASK = -1
_NONE, _grad_of, _get = itertools.repeat(None), operator.attrgetter("grad"), cast(Any, dict.get)
Place = tuple[Mapping[str, nn.Parameter | None], str]  # of a parameter: its module's table, and its name there


class ZeroGradients:
    """Turns gradients of zero into None, for the branches that a step drops.

    Of each set of branches the smallest trained parameter stands for all.
    """

    def __init__(self, parameters: Parameters) -> None:
        self._parameters = parameters
        self._probes = _smallest(parameters)
        self._tables, self._names = ([place[i] for place in self._probes.values()] for i in (0, 1))
        self._types = [nn.Parameter] * len(self._probes)
        self._steps, self._task, self._kept = _Steps(), NO_TASK, 0
        self._counting: RemovableHandle | None = None

    def release(self) -> None:
        """Remove the hook from the optimizers."""
        if self._counting is not None:
            self._counting.remove()
            self._counting = None

    def forget(self, dropped: int) -> None:
        """Turn all-zero gradients of these branches into None."""
        self._count_steps()
        if not dropped or not self._any_gradient():
            return
        kept, written = ~dropped, set[int]()
        for need, place in self._probes.items():
            grad = None if need & kept else _gradient(place)
            if grad is not None and not grad.is_meta and getattr(grad, MARK, None) != self._steps.state_of(grad):
                written.add(need)
                self._steps.mark(grad)
        if written:
            self._forget(written)

    def _count_steps(self) -> None:
        """The hook is on all optimizers of the process, so it goes with this object if nobody removes it."""
        if self._counting is None:
            self._counting = register_optimizer_step_post_hook(self._steps.count)
            weakref.finalize(self, self._counting.remove)

    def _any_gradient(self) -> bool:
        """Asked in every forward: a look at each parameter, in C, and a closer one where it is none."""
        parameters = list(map(_get, self._tables, self._names))
        return list(map(type, parameters)) != self._types or any(map(operator.is_not, map(_grad_of, parameters), _NONE))

    def _forget(self, written: set[int]) -> None:
        """Of these sets of branches, those without a gradient other than zero; one transfer tells it of all."""
        needs = self._parameters.needs().items()
        own = [(need, p, p.grad) for p, need in needs if need in written and p.grad is not None]
        held = _any([grad for _, _, grad in own])
        alive = {need for (need, *_), any_ in zip(own, held, strict=True) if any_}
        for need, parameter, _ in own:
            if need not in alive:
                parameter.grad = None

    def watch(self, outputs: Any, dropped: int) -> None:
        """Called after each recorded forward: its backward is to be noted."""
        if not transforming():
            begin = functools.partial(self._begin_backward, ~dropped)
            for tensor in tensors_in(outputs):
                if tensor.grad_fn is not None:
                    tensor.grad_fn.register_prehook(begin)

    def _begin_backward(self, kept: int, gradients: Any) -> None:
        task = torch._C._current_graph_task_id()
        if task == self._task:
            self._kept |= kept
            return
        self._task, self._kept = task, kept
        before = {need: _state(place) for need, place in self._probes.items()} if self._any_gradient() else {}
        torch.autograd.Variable._execution_engine.queue_callback(functools.partial(self._end_backward, before))

    def _end_backward(self, before: Mapping[int, tuple[torch.Tensor | None, int]]) -> None:
        self._task, kept, made = NO_TASK, self._kept, self._steps.made
        for need, (table, name) in self._probes.items():
            if need & kept:
                grad: torch.Tensor | None = getattr(table.get(name), "grad", None)
                held, version = before.get(need, (None, -1))
                if grad is not None and not (grad is held and grad._version == version):
                    setattr(grad, MARK, (grad._version, made))


class _Steps:
    """Counts the steps of all optimizers, and notes on gradients when a backward wrote to them."""

    def __init__(self) -> None:
        self.made = 0

    def count(self, *_: object) -> None:
        self.made += 1

    def state_of(self, gradient: torch.Tensor) -> tuple[int, int]:
        return gradient._version, self.made

    def mark(self, gradient: torch.Tensor) -> None:
        setattr(gradient, MARK, self.state_of(gradient))


def _smallest(parameters: Parameters) -> dict[int, Place]:
    found: dict[int, tuple[int, Place]] = {}
    for name, need in parameters.structure.parameters.items():
        path, _, attribute = name.rpartition(".")
        table = parameters.model.get_submodule(path)._parameters
        parameter = parameters.model.get_parameter(name)
        smaller = need not in found or parameter.numel() < found[need][0]
        if parameter.requires_grad and smaller and not hasattr(parameter, "ds_id"):
            found[need] = parameter.numel(), (table, attribute)
    return {need: place for need, (_, place) in found.items()}


def _gradient(place: Place) -> torch.Tensor | None:
    """Of a trained parameter; None where an engine has put something else there."""
    parameter = place[0].get(place[1])
    return parameter.grad if isinstance(parameter, nn.Parameter) and parameter.requires_grad else None


def _state(place: Place) -> tuple[torch.Tensor | None, int]:
    grad = _gradient(place)
    return grad, -1 if grad is None else grad._version


def _any(tensors: Sequence[torch.Tensor]) -> list[bool]:
    """Whether each holds something other than zero; the host waits once for each device."""
    by_device: dict[torch.device, list[int]] = {}
    for place, tensor in enumerate(tensors):
        by_device.setdefault(tensor.device, []).append(place)
    found = [False] * len(tensors)
    for places in by_device.values():
        for place, any_ in zip(places, torch.stack([_whole(tensors[i].any()) for i in places]).tolist(), strict=True):
            found[place] = any_
    return found


def _whole(value: torch.Tensor) -> torch.Tensor:
    """What all ranks agree on, where a gradient is sharded."""
    whole: torch.Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return whole
