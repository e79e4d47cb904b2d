"""A model's parameters by the branches that must all be dropped for a step to skip them."""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from dropbp.discovery.structure import Rests, Structure
from dropbp.engine.distributed import NEEDED
from dropbp.lazy.grouping import ParameterGroup, split_groups, zero_fill_gradients
from dropbp.masks.plan import ForwardPlan

MARK = "_dropbp_state"  # of a gradient: its version, and the optimizer steps before, when a backward last wrote to it


class Parameters:
    """Looks parameters up by name each time, because engines replace them.

    Args:
        model: the root.
        structure: its branches.
        rests: what rests beside them.
    """

    def __init__(self, model: nn.Module, structure: Structure, rests: Rests) -> None:
        self.model, self.structure, self.rests = model, structure, rests
        self._probes = self._smallest()
        self.held: frozenset[str] | None = None
        self._marking: dict[int, tuple[nn.Parameter, RemovableHandle]] = {}
        self._steps = _Steps()
        self._counting: RemovableHandle | None = None

    def need_of(self, name: str) -> int:
        """The branches that a parameter belongs to, as bits."""
        return self.structure.parameters.get(name, NEEDED)

    def needs(self) -> dict[nn.Parameter, int]:
        """The branches that each parameter of a branch belongs to, as bits."""
        return {self.model.get_parameter(name): need for name, need in self.structure.parameters.items()}

    def forget_zeros(self, dropped: int) -> None:
        """Turn all-zero gradients of these branches, as `zero_grad(set_to_none=False)` leaves them, into None.

        An optimizer would move parameters whose gradients are zero, by decay and momentum. A gradient is looked at,
        which makes the host wait, only where an optimizer has made a step, or something other than a backward has
        written to it, since the last backward or look. (Its version alone does not tell: some kernels leave it.)
        """
        self._count_steps()
        written = set[int]()
        for need, (module, attribute) in self._probes.items():
            probe = module._parameters.get(attribute)
            if not isinstance(probe, nn.Parameter) or not probe.requires_grad:
                continue
            if need not in self._marking or self._marking[need][0] is not probe:
                self._marking[need] = probe, probe.register_post_accumulate_grad_hook(self._steps.mark)
            grad = probe.grad
            if need & ~dropped or grad is None or grad.is_meta:  # on meta there are no values
                continue
            if getattr(grad, MARK, None) != self._steps.state_of(grad):
                written.add(need)
                self._steps.mark(probe)
        if written:
            self._forget(written)

    def _count_steps(self) -> None:
        """The hook is on all optimizers of the process, so it goes with this object if nobody removes it."""
        if self._counting is None:
            self._counting = register_optimizer_step_post_hook(self._steps.count)
            weakref.finalize(self, self._counting.remove)

    def _forget(self, written: set[int]) -> None:
        """Of these sets of branches, those without a gradient other than zero; one transfer tells it of all."""
        own = [(need, p, p.grad) for p, need in self.needs().items() if need in written and p.grad is not None]
        held = _any([grad for _, _, grad in own])
        alive = {need for (need, *_), any_ in zip(own, held, strict=True) if any_}
        for need, parameter, _ in own:
            if need not in alive:
                parameter.grad = None

    def release(self) -> None:
        """Remove the hooks from the parameters and the optimizers."""
        for hook in (self._counting, *(hook for _, hook in self._marking.values())):
            if hook is not None:
                hook.remove()
        self._counting, self._marking = None, {}

    def _smallest(self) -> dict[int, tuple[nn.Module, str]]:
        """The smallest trained parameter of each set of branches: its module and attribute."""
        found: dict[int, tuple[int, nn.Module, str]] = {}
        for name, need in self.structure.parameters.items():
            parameter = self.model.get_parameter(name)
            path, _, attribute = name.rpartition(".")
            smaller = need not in found or parameter.numel() < found[need][0]
            if parameter.requires_grad and smaller and not hasattr(parameter, "ds_id"):
                found[need] = parameter.numel(), self.model.get_submodule(path), attribute
        return {need: (module, attribute) for need, (_, module, attribute) in found.items()}

    def with_gradient(self) -> int:
        """The branches whose parameters have gradients now, from an earlier micro-batch of this step."""
        held = (need for parameter, need in self.needs().items() if parameter.grad is not None)
        return functools.reduce(operator.or_, held, 0)

    def hold(self, parameters: Iterable[nn.Parameter]) -> None:
        """Count only these as trained; if an engine has replaced the parameters, all count."""
        ids = set(map(id, parameters))
        names = frozenset(name for name, parameter in self.model.named_parameters() if id(parameter) in ids)
        self.held = names or None

    def train(self, dropped: int) -> bool:
        """Whether a step that drops these branches leaves a trained parameter with a gradient."""
        resting = self.resting()
        return any(
            parameter.requires_grad
            and self.need_of(name) & ~dropped
            and (self.held is None or name in self.held)
            and resting.get(name, NEEDED) & ~dropped
            for name, parameter in self.model.named_parameters()
        )

    def skipped(self, plan: ForwardPlan) -> Iterator[nn.Parameter]:
        """The parameters that get no gradient in a step under this plan."""
        yield from (parameter for parameter, need in self.needs().items() if not need & ~plan.dropped)
        if plan.stem_rests:
            borders = self.resting().items()
            yield from (self.model.get_parameter(name) for name, border in borders if not border & plan.trained)

    def resting(self) -> dict[str, int]:
        """Parameters that rest as a whole when a branch is dropped, with that branch as a bit.

        Adapters that were put into a resting module since the model was enabled rest with it.
        """
        found = self.rests.bits()
        for path, border in self.rests.modules.items():
            inside = (f"{path}.{name}" for name, _ in self.model.get_submodule(path).named_parameters())
            found |= {name: border for name in inside if name not in self.rests.borders}
        return found

    def grouped(self, groups: Iterable[ParameterGroup] | None) -> list[ParameterGroup]:
        """See `Handle.group_parameters`."""
        if groups is None:
            groups = [{"params": [parameter for parameter in self.model.parameters() if parameter.requires_grad]}]
        keys: dict[int, tuple[int, int]] = {id(parameter): (0, need) for parameter, need in self.needs().items()}
        for name, border in self.resting().items():
            keys.setdefault(id(self.model.get_parameter(name)), (1, border))
        return split_groups(groups, lambda parameter: keys.get(id(parameter), (-1, 0)))

    def fill(self, dropped: int, with_rests: bool, boundary: Callable[[], None] | None) -> None:
        """Zero gradients for parameters that this step skips, so that optimizers see the same set in every step.

        Args:
            dropped: the branches that the step drops, as bits.
            with_rests: whether what rests beside the branches does so in this step.
            boundary: called after each branch's: all at once they would be another recording for each mask.
        """
        resting = self.resting().items() if with_rests else ()
        needs = {**self.needs(), **{self.model.get_parameter(name): need for name, need in resting}}
        by_need: dict[int, list[nn.Parameter]] = {}
        for parameter, need in needs.items():
            if not need & ~dropped and not hasattr(parameter, "ds_id"):
                by_need.setdefault(need, []).append(parameter)
        for parameters in by_need.values():
            if zero_fill_gradients(parameters) and boundary is not None:
                boundary()


class _Steps:
    """Counts the steps of all optimizers, and notes on gradients when a backward wrote to them."""

    def __init__(self) -> None:
        self.made = 0

    def count(self, *_: object) -> None:
        self.made += 1

    def state_of(self, gradient: torch.Tensor) -> tuple[int, int]:
        return gradient._version, self.made

    def mark(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            setattr(parameter.grad, MARK, self.state_of(parameter.grad))


def has_hooks_of_others(parameter: torch.Tensor) -> bool:
    """Whether something besides this module runs when the parameter's gradient is ready."""
    hooks = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
    return any(not isinstance(getattr(hook, "__self__", None), _Steps) for hook in hooks.values())


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
