"""Resets gradients of dropped branches from zero to None, or an optimizer would move the parameters.

With a gradient of zero, weight decay and momentum still move a parameter, and `zero_grad(set_to_none=False)` leaves
zeros, before the forward or after it. So the check runs at the end of a backward: this backward did not write the
gradients of branches that its forwards dropped. Reading a gradient makes the host wait for the device, and a zero
gradient that an earlier backward wrote must stay. So the end of each backward notes all gradients with their versions.
The next one reads only those that something other than a backward has written since, or that an optimizer step has
used. (The version alone does not tell, because some kernels do not raise it.) Loops in C take and compare these notes:
hooks on the parameters would cost more than all other bookkeeping of a step.
"""

from __future__ import annotations

import functools
import itertools
import operator
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from dropbp._torch import transforming
from dropbp.engine.parameters import Parameters
from dropbp.tensors import tensors_in, unsharded

_NONE, _get = itertools.repeat(None), cast(Any, dict.get)
_grad_of, _version_of = operator.attrgetter("grad"), operator.attrgetter("_version")
ParameterSlot = tuple[Mapping[str, nn.Parameter | None], str]  # a module's dictionary of parameters, and a key in it


class ZeroGradients:
    """Sets zero gradients to None for branches that all forwards of a backward have dropped.

    For each set of branches, its smallest trained parameter (the probe) represents all of them.
    """

    def __init__(self, parameters: Parameters) -> None:
        self._parameters = parameters
        self.refresh()
        self._running = weakref.WeakValueDictionary[int, _Backward]()
        self._steps = _Steps()
        self._noted: tuple[list[weakref.ref[Tensor]], list[int], int] = [], [], 0
        self._counting: RemovableHandle | None = None

    def refresh(self) -> None:
        """Choose the probes among the parameters that are trained now."""
        probes = _smallest(self._parameters)
        self._needs = list(probes)
        self._tables, self._names = ([place[i] for place in probes.values()] for i in (0, 1))
        self._types = [nn.Parameter] * len(probes)
        self._found: list[Any] | None = None  # the probes found last; None if an engine has replaced one

    def release(self) -> None:
        """Remove the optimizer hook."""
        if self._counting is not None:
            self._counting.remove()
            self._counting = None

    def watch(self, outputs: Any, dropped: int) -> None:
        """Watch the backward of a recorded forward; `dropped` are its dropped branches."""
        if transforming():
            return
        self._count_steps()
        roots = [tensor.grad_fn for tensor in tensors_in(outputs) if tensor.grad_fn is not None]
        for root in roots:
            root.register_prehook(functools.partial(self._begin, dropped))
        if dropped and not roots:  # its backward would go unnoticed
            self._end(_Backward(dropped, _present(self._gradients()), self._end))

    def _count_steps(self) -> None:
        """Install the optimizer hook. It is global to the process, so it is also removed when this object is freed."""
        if self._counting is None:
            self._counting = register_optimizer_step_post_hook(self._steps.count)
            weakref.finalize(self, self._counting.remove)

    def _begin(self, dropped: int, _: Any) -> None:
        task = torch._C._current_graph_task_id()
        backward = self._running.get(task)
        if backward is None:
            parameters = self._found  # if an engine has replaced one since, `_end` notices
            gradients = self._gradients() if parameters is None else list(map(_grad_of, parameters))
            backward = self._running[task] = _Backward(dropped, _present(gradients), self._end)
            torch.autograd.Variable._execution_engine.queue_callback(backward)
        backward.dropped &= dropped

    def _end(self, backward: _Backward) -> None:
        """Reset the gradients that may need it, and note the gradients that backwards have written."""
        gradients = self._gradients()
        if backward.before:
            unknown = self._unknown(backward.before, gradients)
            resettable = {need for need in unknown if not need & ~backward.dropped}
            if resettable:
                self._reset_zeros(resettable)
                gradients = self._gradients()
            left = unknown - resettable
            gradients = [None if need in left else g for need, g in zip(self._needs, gradients, strict=True)]
        written = _present(gradients)
        self._noted = list(map(weakref.ref, written)), list(map(_version_of, written)), self._steps.made

    def _gradients(self) -> list[Tensor | None]:
        """The gradients of the probes, read in C; one by one if an engine has replaced a probe."""
        parameters = list(map(_get, self._tables, self._names))
        self._found = parameters if list(map(type, parameters)) == self._types else None
        if self._found is not None:
            return list(map(_grad_of, parameters))
        return [p.grad if isinstance(p, nn.Parameter) and p.requires_grad else None for p in parameters]

    def _unknown(self, before: Mapping[int, int], gradients: Sequence[Tensor | None]) -> set[int]:
        """The sets of branches whose gradient no backward has written, or that changed since one did."""
        held, versions, made = self._noted
        known = {id(ref()): version for ref, version in zip(held, versions, strict=True)}
        known = known if made == self._steps.made else {}
        each = ((need, g) for need, g in zip(self._needs, gradients, strict=True) if g is not None and not g.is_meta)
        return {need for need, g in each if before.get(id(g)) == g._version != known.get(id(g))}

    def _reset_zeros(self, needs: set[int]) -> None:
        """Set the gradients of those of these sets of branches to None that are all zero; one transfer per device."""
        each, model = self._parameters.needs_now().items(), self._parameters.model
        present = dict(model.named_parameters(remove_duplicate=False))
        own = [(need, present[name], present[name].grad) for name, need in each if need in needs and name in present]
        held = [(need, p, grad) for need, p, grad in own if grad is not None]
        alive = {need for (need, *_), any_ in zip(held, _any([grad for *_, grad in held]), strict=True) if any_}
        for need, parameter, _ in held:
            if need not in alive:
                parameter.grad = None


class _Backward:
    """A running backward: the branches that all its forwards dropped, and the gradients before it, with their versions.

    Only the backward holds it, as its final callback, so both end together, even on an error.
    """

    def __init__(self, dropped: int, held: Sequence[Tensor], end: Callable[[_Backward], None]) -> None:
        self.dropped, self.held, self.end = dropped, held, end
        self.before = dict(zip(map(id, held), map(_version_of, held), strict=True))

    def __call__(self) -> None:
        self.end(self)


class _Steps:
    """Counts the steps of all optimizers in the process."""

    def __init__(self) -> None:
        self.made = 0

    def count(self, *_: object) -> None:
        self.made += 1


def _present(gradients: Sequence[Tensor | None]) -> list[Tensor]:
    return list(itertools.compress(cast(Sequence[Tensor], gradients), map(operator.is_not, gradients, _NONE)))


def _smallest(parameters: Parameters) -> dict[int, ParameterSlot]:
    found: dict[int, tuple[int, ParameterSlot]] = {}
    present = dict(parameters.model.named_parameters(remove_duplicate=False))
    for name, need in parameters.needs_now().items():
        path, _, attribute = name.rpartition(".")
        if name not in present:  # an adapter has renamed it
            continue
        table, parameter = parameters.model.get_submodule(path)._parameters, present[name]
        smaller = need not in found or parameter.numel() < found[need][0]
        if parameter.requires_grad and smaller and not hasattr(parameter, "ds_id"):
            found[need] = parameter.numel(), (table, attribute)
    return {need: place for need, (_, place) in found.items()}


def _any(tensors: Sequence[Tensor]) -> list[bool]:
    """Whether each tensor has a nonzero element; the host waits once per device."""
    by_device: dict[torch.device, list[int]] = {}
    for place, tensor in enumerate(tensors):
        by_device.setdefault(tensor.device, []).append(place)
    found = [False] * len(tensors)
    for places in by_device.values():
        values = torch.stack([unsharded(tensors[i].any()) for i in places]).tolist()
        for place, value in zip(places, values, strict=True):
            found[place] = value
    return found
