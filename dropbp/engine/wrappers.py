"""The forward wrappers: around modules of a branch, its last module, modules that feed the stream, step boundaries.

Each reads the plan of the running forward (`dropbp.engine.runtime`) and calls the original forward unchanged.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dropbp._torch import detached, never_compile, next_sequence, uncompiled
from dropbp.branch_sets import EVERY
from dropbp.discovery.cuts import ALWAYS_NEEDED
from dropbp.discovery.structure import BranchModule, BranchOutput
from dropbp.engine.autograd_functions import ScaleGradient, StepBoundary
from dropbp.engine.frozen import FrozenScopeState, run_frozen
from dropbp.engine.patch import Forward, WrapperState, named_forward
from dropbp.engine.runtime import Runtime, is_compiling
from dropbp.engine.side_outputs import CallPlan
from dropbp.masks.plan import ForwardPlan
from dropbp.tensors import TensorMap, any_requires_grad, is_differentiable, map_tensors, own_output

T = TypeVar("T")

# These are called for every module of every branch, where an attribute look-up costs as much as the call.
is_grad_enabled, set_grad_enabled = torch.is_grad_enabled, torch._C._set_grad_enabled
is_any_autocast_enabled = torch._C._is_any_autocast_enabled


next_entry = itertools.count(1).__next__  # numbers the calls of all modules, in the order in which they begin


class BranchModuleState(WrapperState):
    """A module that runs without recording if all branches in its need are dropped."""

    __slots__ = (
        "calls",
        "entered",
        "flag",
        "name",
        "need",
        "needs",
        "output_places",
        "per_call",
        "running",
        "runtime",
        "users",
    )

    def __init__(self, module: BranchModule, runtime: Runtime, outputs: Sequence[BranchOutput]) -> None:
        self.name, self.needs, self.per_call, self.calls = module.name, module.needs, module.per_call, 0
        self.entered = 0
        self.runtime, self.need = runtime, functools.reduce(lambda a, b: a | b, module.needs)
        self.running, self.flag = runtime.running.get, runtime.flag(self.need)
        self.output_places = {(1 << entry.branch): entry.places for entry in outputs}
        self.users = max((entry.users for entry in outputs), default=1)

    def is_dropped(self) -> bool:
        plan, need = self.this_call()
        return not need & plan.kept

    def this_call(self) -> tuple[ForwardPlan, int]:
        """The plan, and the branches that must all be dropped for this call of the module to be skipped."""
        plan = self.running() or self.runtime.plan_recomputed()
        return plan, self._need_of_this_call() if self.per_call and plan.trained != EVERY else self.need

    def run_detached(self, plan: ForwardPlan, need: int, forward: Callable[[], Any]) -> Any:
        """Run with recording, and detach what the branches of `need` add to the stream."""
        start = next_sequence()
        output = forward()
        if isinstance(plan, CallPlan) and plan.observation is not None:
            plan.observation.note(need, start, next_sequence())
        return self.map_branch_outputs(output, need, lambda x: self.runtime.detached(x, plan, self.name, self.users))

    def map_branch_outputs(self, output: Any, need: int, function: TensorMap) -> Any:
        """The output, with `function` applied to those of its tensors that are the output of a branch."""
        places = self.output_places.get(need)
        if not places:
            return output
        place = itertools.count()
        return map_tensors(output, lambda tensor: function(tensor) if next(place) in places else tensor)

    def _need_of_this_call(self) -> int:
        call = self.runtime.count_call(self.name)
        return self.needs[call] if call < len(self.needs) else ALWAYS_NEEDED


def branch_forward(original: Forward) -> Forward:
    """Wrap a branch's module: it runs without recording if the branch is dropped. Hot path: every look-up counts."""

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state: BranchModuleState | None = self._dropbp_branch
        if state is None or state.original is not original:
            return original(self, *args, **kwargs)
        if is_compiling():
            if state.flag.detached:
                return state.map_branch_outputs(original(self, *args, **kwargs), state.need, torch.Tensor.detach)
            with torch.set_grad_enabled(torch.is_grad_enabled() and not state.flag.dropped):
                return original(self, *args, **kwargs)
        state.calls += 1
        state.entered = next_entry()
        plan = state.running()
        if plan is not None:
            if state.need & plan.trained:  # most calls have no keywords, and a call without them is faster
                return original(self, *args, **kwargs) if kwargs else original(self, *args)
            if not state.need & plan.detached:
                output = _unrecorded(original, self, args, kwargs)
                state.runtime.dropped_end = next_sequence()
                return output
        return _run_under_plan(state, original, self, args, kwargs)

    return named_forward(forward)


class StemState(WrapperState):
    """A module of the stem, which is frozen if `branch` (a bit) is dropped."""

    __slots__ = ("branch", "runtime")

    def __init__(self, branch: int, runtime: Runtime) -> None:
        self.branch, self.runtime = branch, runtime

    def plan(self) -> ForwardPlan | None:
        """The plan, if the module is frozen under it; None otherwise, as under masks that name branches only."""
        plan = self.runtime.plan_here()
        return plan if plan.stem_frozen and not self.branch & plan.trained else None


def stem_forward(original: Forward) -> Forward:
    """Wrap a module that feeds the stream or stands in it: it runs without recording if a branch above it is dropped.

    Unless the backward is truncated, its output still requires a gradient if it does so in plain training: see
    `dropbp.engine.truncation`.
    """

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state: StemState | None = self._dropbp_stem
        plan = None if state is None or state.original is not original else uncompiled(state.plan)
        if state is None or plan is None:
            return original(self, *args, **kwargs)
        output = map_tensors(_unrecorded(original, self, args, kwargs), _detach_parameter)
        if plan.truncated or not _would_require_grad(self, args, kwargs):
            return output
        return map_tensors(output, functools.partial(state.runtime.connect, alone=True))

    never_compile(forward)
    return named_forward(forward)


def _would_require_grad(module: nn.Module, args: Any, kwargs: Any) -> bool:
    """Whether the output of the module would require a gradient if it were recorded."""
    return any(parameter.requires_grad for parameter in module.parameters()) or any_requires_grad(args, kwargs)


def shared_branch_forward(original: Forward) -> Forward:
    """Wrap a module shared by several branches. Not compiled, as compiled code cannot tell which call this is."""

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state: BranchModuleState | None = self._dropbp_branch
        if state is not None and state.original is original:
            state.calls += 1
            return _run_under_plan(state, original, self, args, kwargs)
        return original(self, *args, **kwargs)

    never_compile(forward)
    return named_forward(forward)


def _run_under_plan(state: BranchModuleState, original: Forward, module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Run under the plan of the running forward, or of the one that is recomputed."""
    plan, need = uncompiled(state.this_call)
    if not need & plan.kept:
        output = state.runtime.with_graph(_unrecorded(original, module, args, kwargs))
    elif need & plan.trained:
        return original(module, *args, **kwargs)
    else:
        output = state.run_detached(plan, need, functools.partial(original, module, *args, **kwargs))
    state.runtime.dropped_end = next_sequence()
    return output


never_compile(_run_under_plan)


def _unrecorded(original: Forward, module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Run under `no_grad`, and fill no cache (of casts, of parametrizations) with tensors without a gradient, which
    kept branches would use later. If no cache is active, one that the module opens itself ends with it.
    """
    if is_any_autocast_enabled() or parametrize._cache_enabled:
        original = functools.partial(_uncached, original)
    recording = is_grad_enabled()
    set_grad_enabled(False)
    try:
        output = original(module, *args, **kwargs)
    finally:
        set_grad_enabled(recording)
    if isinstance(output, Tensor):
        return _detach_view(output)
    if type(output) is tuple:  # usually of one tensor, and this is faster
        return tuple(_detach_view(item) if isinstance(item, Tensor) else item for item in output)
    return map_tensors(output, _detach_view)


def _detach_view(tensor: Tensor) -> Tensor:
    """Detach a view, because autograd forbids `tensor += x` on a view made without recording."""
    return detached(tensor) if tensor._is_view() and not tensor.requires_grad else tensor


def _detach_parameter(tensor: Tensor) -> Tensor:
    """Detach a parameter, or a view of one: returned by a frozen module, it would make later operations recorded."""
    return detached(tensor) if tensor.requires_grad and tensor.grad_fn is None else tensor


def _uncached(original: Forward, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    cache, weights = torch.is_autocast_cache_enabled(), parametrize._cache_enabled
    torch.set_autocast_cache_enabled(False)
    parametrize._cache_enabled = 0
    try:
        return original(module, *args, **kwargs)
    finally:
        parametrize._cache_enabled = weights
        torch.set_autocast_cache_enabled(cache)


never_compile(_unrecorded)


def identity_forward(original: Forward) -> Forward:
    """Wrap a module that may return its input (dropout in evaluation mode): its output is then a view of the input.

    Otherwise a gradient would pass through the module although it ran without recording.
    """

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return own_output(original(self, *args, **kwargs), (args, kwargs))

    return named_forward(forward)


def frozen_scope_forward(original: Forward) -> Forward:
    """Wrap a module whose own forward uses parameters of a branch outside the branch's modules."""

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state: FrozenScopeState | None = self._dropbp_scope
        if state is None or state.original is not original:
            return original(self, *args, **kwargs)
        return run_frozen(state, original, self, *args, **kwargs)

    never_compile(forward)
    return named_forward(forward)


class OutputState(WrapperState):
    """The last module of one or more branches, where the gradient of a kept branch is scaled."""

    def __init__(self, outputs: Sequence[BranchOutput], runtime: Runtime) -> None:
        self.runtime = runtime
        self.name = outputs[0].module
        self.branch_of_call = {call: entry.branch for entry in outputs for call in entry.calls}
        branches = set(self.branch_of_call.values())
        self.only = branches.pop() if len(branches) == 1 else None

    def factor(self) -> float:
        factors = self.runtime.plan_now().factors
        if not factors:
            return 1.0
        branch = self.only if self.only is not None else self._branch_of_this_call()
        return 1.0 if branch is None else factors[branch]

    def _branch_of_this_call(self) -> int | None:
        return self.branch_of_call.get(self.runtime.count_call(f"{self.name} (output)"))


def output_forward(original: Forward) -> Forward:
    """Wrap a branch's last module: scale the gradient of its output."""

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state: OutputState | None = self._dropbp_output
        output = original(self, *args, **kwargs)
        factor = 1.0 if state is None or state.original is not original else uncompiled(state.factor)
        if factor == 1.0 or not torch.is_grad_enabled():
            return output
        return map_tensors(output, functools.partial(_scaled, factor=factor))

    never_compile(forward)
    return named_forward(forward)


def _scaled(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    if not tensor.requires_grad:
        return tensor
    scaled: torch.Tensor = ScaleGradient.apply(tensor, factor)
    return scaled


class BoundaryState(WrapperState):
    """A module before or after which a lazy device is told that a step ends, in forward and backward."""

    def __init__(self, boundary: Callable[[], None]) -> None:
        self.boundary = boundary


def boundary_forward(original: Forward) -> Forward:
    """Wrap a block: its first floating-point input passes a step boundary."""

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state: BoundaryState | None = self._dropbp_boundary
        if state is not None and state.original is original and not torch.compiler.is_compiling():
            args, kwargs = _with_boundary(args, kwargs, state.boundary)
        return original(self, *args, **kwargs)

    return named_forward(forward)


def boundary_after_forward(original: Forward) -> Forward:
    """Wrap the last block: the first floating-point tensor of its output passes a step boundary."""

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state: BoundaryState | None = self._dropbp_boundary_after
        output = original(self, *args, **kwargs)
        if state is None or state.original is not original or torch.compiler.is_compiling():
            return output
        if isinstance(output, torch.Tensor):
            return _with_boundary((output,), {}, state.boundary)[0][0]
        return _with_boundary(output, {}, state.boundary)[0] if type(output) is tuple else output

    return named_forward(forward)


def _with_boundary(
    args: tuple[Any, ...], kwargs: dict[str, Any], boundary: Callable[[], None]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    for place, value in enumerate(args):
        if isinstance(value, torch.Tensor) and is_differentiable(value):
            marked = StepBoundary.apply(value, boundary)
            return (*args[:place], marked, *args[place + 1 :]), kwargs
    for name, value in kwargs.items():
        if isinstance(value, torch.Tensor) and is_differentiable(value):
            return args, {**kwargs, name: StepBoundary.apply(value, boundary)}
    return args, kwargs
