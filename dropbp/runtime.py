"""What happens during a training step: which branches are dropped right now, and the functions that act on it.

Every training forward of the root gets one set of dropped branches (a bit mask, bit `i` for branch `i`), held in a
thread-local variable while that forward runs. A module asked to run outside any forward of the root is being recomputed
under gradient checkpointing: the autograd engine then says which node it is working on, and the node's number says in
which forward it was made, so that each recomputation sees the mask of its own forward, however many forwards came
since. Compiled code cannot ask such questions; it reads a plain flag on each module, set before the forward.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import logging
import math
import threading
from collections.abc import Callable, Iterable, Mapping, Reversible, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from dropbp.attention import MaskState, mask_forward
from dropbp.branches import Exit, LooseParameter, Site, Structure
from dropbp.compiling import never_compile, pause, resume, resumed
from dropbp.cover import ALIVE
from dropbp.device import dynamo_graph_count
from dropbp.errors import StateError
from dropbp.intercept import Attachment, Forward, Interception
from dropbp.skip import Connect, ScaleGradient, StepBoundary, is_differentiable, map_tensors
from dropbp.trace import tensors_in

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Called for every module of every branch: each look-up in a module costs as much as the call.
is_compiling = torch.compiler.is_compiling
is_grad_enabled, set_grad_enabled = torch.is_grad_enabled, torch._C._set_grad_enabled
is_autocast_cache_enabled = torch.is_autocast_cache_enabled
set_autocast_cache_enabled = torch.set_autocast_cache_enabled

REMEMBERED_FORWARDS = 4096
REMEMBERED_THREADS = 64


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one forward does.

    Attributes:
        dropped: the branches whose backward it drops.
        factors: of the kept branches' gradients; empty where they are not scaled.
        checkpointed: branches whose blocks are recomputed in the backward instead of kept.
        stem_rests: whether what feeds a stream rests when the stream's first branch is dropped.
    """

    dropped: int = 0
    factors: Sequence[float] = ()
    checkpointed: int = 0
    stem_rests: bool = False

    @functools.cached_property
    def kept(self) -> int:
        """The branches it does not drop."""
        return ~self.dropped


WHOLE = Plan()


@dataclasses.dataclass
class ForwardRecord:
    """A forward of the root: the interval of autograd nodes it made in its thread, and what it dropped."""

    start: int
    plan: Plan
    end: float = math.inf

    def made(self, sequence: int) -> bool:
        return self.start <= sequence < self.end


class _Local(threading.local):
    """Per thread: the plan of the forward that is running (None outside), and calls so far of shared modules."""

    plan: Plan | None = None

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}


class Runtime:
    """The state shared by all intercepted modules of one model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.local = _Local()
        self.records: dict[int, collections.deque[ForwardRecord]] = {}
        self.tasks: dict[int, tuple[int, Plan]] = {}
        self.sites: list[SiteState] = []
        self.split = False
        self.watchers: list[Callable[[Any, int], None]] = []
        self._shown = 0
        self._anchor: torch.Tensor | None = None
        self._warned = False

    def plan_now(self) -> Plan:
        """The plan at this point: of the running forward, or of the forward being recomputed."""
        plan = self.local.plan
        return self.plan_recomputed() if plan is None else plan

    def plan_recomputed(self) -> Plan:
        """The plan of the forward that made the autograd node this thread is working on."""
        node = current_node()
        if node is None:
            self._warn_outside()
            return WHOLE
        record = self.find(node._sequence_nr())
        if record is None:
            return self._plan_of_outer_backward()
        self._remember_task(record.plan)
        return record.plan

    def find(self, sequence: int) -> ForwardRecord | None:
        """The forward that made an autograd node.

        Threads number their nodes separately. On CPU a backward runs in the thread that called it, mostly that of the
        forward; elsewhere in a thread of the engine: then all are searched, and one match is as good as another.
        """
        here = threading.get_ident()
        own = _latest(self.records.get(here, ()), sequence)
        if own is not None:
            return own
        others = (_latest(tuple(records), sequence) for ident, records in list(self.records.items()) if ident != here)
        return next((record for record in others if record is not None), None)

    def _remember_task(self, plan: Plan) -> None:
        """Nodes made by a recomputation are in no record, and a backward nested in this one may recompute from them."""
        task = torch._C._current_graph_task_id()
        if task not in self.tasks:
            torch.autograd.Variable._execution_engine.queue_callback(functools.partial(self._forget_task, task))
        self.tasks[task] = threading.get_ident(), plan

    def _forget_task(self, task: int) -> None:
        self.tasks.pop(task, None)

    def _plan_of_outer_backward(self) -> Plan:
        here = threading.get_ident()
        return next((plan for ident, plan in reversed(list(self.tasks.values())) if ident == here), WHOLE)

    def _warn_outside(self) -> None:
        if not self._warned and self.model.training and torch.is_grad_enabled():
            self._warned = True
            logger.warning(
                "A branch of %s ran outside the forward of the model given to dropbp.enable, so nothing is dropped "
                "there. Enable the module whose forward your training loop calls.",
                type(self.model).__name__,
            )

    def count_call(self, key: str) -> int:
        """How often a module shared by several branches ran before in this forward."""
        if self.local.plan is None:
            raise StateError(
                f"Module {key} is shared by several branches, and gradient checkpointing recomputes it: which of its "
                "calls this is cannot be told. Turn gradient checkpointing off for this model."
            )
        call = self.local.calls.get(key, 0)
        self.local.calls[key] = call + 1
        return call

    def run(self, forward: Callable[[], Any], plan: Plan) -> Any:
        """Run a training forward with the plan's branches dropped."""
        outputs = self._recorded(forward, plan)
        return self._connected(outputs) if plan.dropped else outputs

    def run_whole(self, forward: Callable[[], Any]) -> Any:
        """Run a forward in which nothing is dropped and nothing is drawn: evaluation, `no_grad`."""
        return self._recorded(forward, WHOLE) if torch.is_grad_enabled() else self._run_with(forward, WHOLE)

    def _recorded(self, forward: Callable[[], Any], plan: Plan) -> Any:
        record = ForwardRecord(_next_sequence(), plan)
        self._own_records().append(record)
        try:
            outputs = self._run_with(forward, plan)
        finally:
            record.end = _next_sequence()
        if dynamo_graph_count():
            self._show_flags_in_backward(outputs, plan.dropped)
        for watch in self.watchers:
            watch(outputs, plan.dropped)
        return outputs

    def _own_records(self) -> collections.deque[ForwardRecord]:
        here = threading.get_ident()
        if here not in self.records:
            if len(self.records) >= REMEMBERED_THREADS:
                self._forget_ended_threads()
            self.records[here] = collections.deque(maxlen=REMEMBERED_FORWARDS)
        return self.records[here]

    def _forget_ended_threads(self) -> None:
        alive = {thread.ident for thread in threading.enumerate()}
        for ident in [ident for ident in self.records if ident not in alive]:
            self.records.pop(ident, None)

    def _run_with(self, forward: Callable[[], Any], plan: Plan) -> Any:
        local = self.local
        before, calls = local.plan, local.calls
        local.plan, local.calls = plan, {}
        self.show_flags(plan.dropped)
        try:
            return forward()
        finally:
            local.plan, local.calls = before, calls
            if before is not None:
                self.show_flags(before.dropped)

    def show_flags(self, dropped: int) -> None:
        """Set the flags that compiled code reads."""
        if dropped == self._shown:
            return
        self._shown = dropped
        for site in self.sites:
            site.flag = site.need & dropped == site.need

    def _show_flags_in_backward(self, outputs: Any, dropped: int) -> None:
        """Compiled code under gradient checkpointing is recomputed in backward: its flags must be of this forward."""
        for tensor in tensors_in(outputs):
            if tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(lambda gradients: self.show_flags(dropped))

    def _connected(self, outputs: Any) -> Any:
        """Outputs that `backward` accepts, though every trainable parameter was skipped."""
        if not torch.is_grad_enabled() or all(tensor.requires_grad for tensor in tensors_in(outputs)):
            return outputs
        if not any(p.requires_grad for p in self.model.parameters()):
            return outputs
        alone = not any(tensor.requires_grad for tensor in tensors_in(outputs))
        return map_tensors(outputs, functools.partial(self.connect, alone=alone))

    def reconnected(self, output: Any) -> Any:
        """A dropped module's output; a reentrant checkpoint insists that what it recomputes leads somewhere."""
        if self.local.plan is not None or not torch.is_grad_enabled() or not hasattr(current_node(), "run_function"):
            return output
        return map_tensors(output, functools.partial(self.connect, alone=True))

    def connect(self, tensor: torch.Tensor, alone: bool) -> torch.Tensor:
        """Where other outputs are connected already, only a loss is: masks and the like never asked for gradients."""
        if tensor.requires_grad or not (alone or tensor.dim() == 0):
            return tensor
        if self._anchor is None:
            self._anchor = torch.zeros((), requires_grad=True)
        connected: torch.Tensor = Connect.apply(tensor, self._anchor)
        return connected


def _latest(records: Reversible[ForwardRecord], sequence: int) -> ForwardRecord | None:
    """The last of the records that made a node: forwards nested in another come after it."""
    return next((record for record in reversed(records) if record.made(sequence)), None)


def current_node() -> Any:
    """The node the autograd engine is working on in this thread, None outside of a backward."""
    return torch._C._current_autograd_node()


def _next_sequence() -> int:
    return int(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]


class RootState(Attachment):
    """Asks the handle for a plan and runs the root's forward with it."""

    def __init__(self, begin: Callable[[tuple[Any, ...], dict[str, Any]], Plan], runtime: Runtime) -> None:
        self.begin, self.runtime = begin, runtime

    def run(self, original: Forward, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Decide what to drop while nothing is compiled, then run the forward as it would have run."""
        callback = pause()
        try:
            forward = functools.partial(resumed, callback, original, (module, *args), kwargs)
            return self._run(forward, module, args, kwargs, compiled=callback is not None)
        finally:
            resume(callback)

    def _run(
        self, forward: Callable[[], Any], module: nn.Module, args: Any, kwargs: dict[str, Any], compiled: bool
    ) -> Any:
        training = module.training and torch.is_grad_enabled()
        if training and self.runtime.local.plan is not None:
            return forward()
        self.runtime.split = compiled and training
        return self.runtime.run(forward, self._plan(args, kwargs)) if training else self.runtime.run_whole(forward)

    def _plan(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Plan:
        """A new plan, unless this forward is the recomputation of an earlier one."""
        node = current_node()
        record = self.runtime.find(node._sequence_nr()) if node is not None else None
        return record.plan if record else self.begin(args, kwargs)


never_compile(RootState.run)


def root_forward(original: Forward) -> Forward:
    """Around the root: never compiled itself, so that masks are drawn outside; what it calls still is."""

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state: RootState | None = self._dropbp_root
        if state is None or state.original is not original:
            return original(self, *args, **kwargs)
        return state.run(original, self, args, kwargs)

    never_compile(forward)
    return named_forward(forward)


class SiteState(Attachment):
    """A module that runs without recording when all branches it needs dropped are dropped."""

    def __init__(self, site: Site, module: nn.Module, runtime: Runtime) -> None:
        self.site, self.module, self.runtime = site, module, runtime
        self.needs = site.needs
        self.per_call = site.per_call
        self.need = functools.reduce(lambda a, b: a | b, site.needs)
        self.local = runtime.local
        self.flag = False

    def is_dropped(self) -> bool:
        plan = self.local.plan or self.runtime.plan_recomputed()
        need = self._need_of_this_call() if self.per_call and plan.dropped else self.need
        return not need & plan.kept

    def rests(self) -> bool:
        """For a stem: whether it is dropped, and not by a mask that names branches only."""
        return (self.local.plan or self.runtime.plan_recomputed()).stem_rests and self.is_dropped()

    def _need_of_this_call(self) -> int:
        call = self.runtime.count_call(self.site.module)
        return self.needs[call] if call < len(self.needs) else ALIVE


def site_forward(original: Forward) -> Forward:
    """Around a branch's module: without recording when the branch is dropped. Called often: every look-up counts."""

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        site: SiteState | None = self._dropbp_site
        if site is None or site.original is not original:
            return original(self, *args, **kwargs)
        if is_compiling():
            with torch.set_grad_enabled(torch.is_grad_enabled() and not site.flag):
                return original(self, *args, **kwargs)
        plan = site.local.plan
        if plan is None:
            if not site.is_dropped():
                return original(self, *args, **kwargs)
            return site.runtime.reconnected(_unrecorded(original, self, args, kwargs))
        if site.need & plan.kept:
            return original(self, *args, **kwargs)
        return _unrecorded(original, self, args, kwargs)

    return named_forward(forward)


def stem_forward(original: Forward) -> Forward:
    """Around what feeds the stream: without recording when the stream's first branch is dropped.

    The stream still asks for a gradient, or a reentrant checkpoint would take the blocks above for frozen.
    """

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        site: SiteState | None = self._dropbp_site
        if site is None or site.original is not original or not _uncompiled(site.rests):
            return original(self, *args, **kwargs)
        output = _unrecorded(original, self, args, kwargs)
        return map_tensors(output, functools.partial(site.runtime.connect, alone=True))

    never_compile(forward)
    return named_forward(forward)


def shared_site_forward(original: Forward) -> Forward:
    """Around a module shared by several branches: which call this is, compiled code cannot tell."""

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        site: SiteState | None = self._dropbp_site
        if site is not None and site.original is original and _uncompiled(site.is_dropped):
            return site.runtime.reconnected(_unrecorded(original, self, args, kwargs))
        return original(self, *args, **kwargs)

    never_compile(forward)
    return named_forward(forward)


def _unrecorded(original: Forward, module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Run under `no_grad`, and keep autocast from caching casts that carry no gradient for later, kept branches."""
    recording, cache = is_grad_enabled(), is_autocast_cache_enabled()
    set_grad_enabled(False)
    set_autocast_cache_enabled(False)
    try:
        return original(module, *args, **kwargs)
    finally:
        set_autocast_cache_enabled(cache)
        set_grad_enabled(recording)


def _uncompiled(function: Callable[[], T]) -> T:
    callback = pause()
    try:
        return function()
    finally:
        resume(callback)


never_compile(_unrecorded)
never_compile(_uncompiled)


class LooseState(Attachment):
    """Parameters frozen while their scope runs with their branches dropped."""

    def __init__(self, loose: Iterable[LooseParameter], model: nn.Module, runtime: Runtime) -> None:
        self.runtime = runtime
        self.entries = [(*_owner(model, entry.name), entry.need) for entry in loose]

    def frozen(self) -> list[nn.Parameter]:
        dropped = self.runtime.plan_now().dropped
        held = [(m._parameters[a], need) for m, a, need in self.entries if need & dropped == need]
        return [p for p, _ in held if p is not None and p.requires_grad]


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def run_frozen(state: LooseState, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function while the parameters of dropped branches are frozen."""
    frozen = _uncompiled(state.frozen)
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        return function(*args, **kwargs)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


never_compile(run_frozen)


def loose_forward(original: Forward) -> Forward:
    """Around the module whose own forward uses parameters of a branch outside of the branch's modules."""

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state: LooseState | None = self._dropbp_loose
        if state is None or state.original is not original:
            return original(self, *args, **kwargs)
        return run_frozen(state, original, self, *args, **kwargs)

    never_compile(forward)
    return named_forward(forward)


class ExitState(Attachment):
    """The last module of one or more branches: where the gradient of a kept branch is scaled."""

    def __init__(self, exits: Sequence[Exit], runtime: Runtime) -> None:
        self.runtime = runtime
        self.name = exits[0].module
        self.branch_of_call = {call: entry.branch for entry in exits for call in entry.calls}
        branches = set(self.branch_of_call.values())
        self.only = branches.pop() if len(branches) == 1 else None

    def factor(self) -> float:
        factors = self.runtime.plan_now().factors
        if not factors:
            return 1.0
        branch = self.only if self.only is not None else self._branch_of_this_call()
        return 1.0 if branch is None else factors[branch]

    def _branch_of_this_call(self) -> int | None:
        return self.branch_of_call.get(self.runtime.count_call(f"{self.name} (exit)"))


def exit_forward(original: Forward) -> Forward:
    """Around a branch's last module: its output's gradient is scaled."""

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state: ExitState | None = self._dropbp_exit
        output = original(self, *args, **kwargs)
        factor = 1.0 if state is None or state.original is not original else _uncompiled(state.factor)
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


class BoundaryState(Attachment):
    """A module before which a lazy device is told that a step ends, in the forward and in the backward."""

    def __init__(self, boundary: Callable[[], None]) -> None:
        self.boundary = boundary


class EndState(BoundaryState):
    """A module after which a lazy device is told the same."""


def boundary_forward(original: Forward) -> Forward:
    """Around a block: its first floating-point input passes a step boundary."""

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state: BoundaryState | None = self._dropbp_boundary
        if state is not None and state.original is original and not torch.compiler.is_compiling():
            args, kwargs = _with_boundary(args, kwargs, state.boundary)
        return original(self, *args, **kwargs)

    return named_forward(forward)


def end_forward(original: Forward) -> Forward:
    """Around the last block: the first floating-point tensor of its output passes a step boundary."""

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state: EndState | None = self._dropbp_end
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


def named_forward(forward: Forward) -> Forward:
    """Bound methods are pickled by name, and `forward` is the name a plain model answers to."""
    forward.__name__ = "forward"
    return forward


def install(model: nn.Module, structure: Structure, runtime: Runtime, root: RootState) -> list[Interception]:
    """Put all functions in place; the innermost first, so that removal in reverse order is exact."""
    return [
        *_install_sites(model, structure.sites, runtime),
        *_install_loose(model, structure.loose, runtime),
        Interception(model, "_dropbp_root", root, root_forward),
    ]


def _install_sites(model: nn.Module, sites: Iterable[Site], runtime: Runtime) -> list[Interception]:
    made = []
    for site in sites:
        module = model.get_submodule(site.module)
        state = SiteState(site, module, runtime)
        runtime.sites.append(state)
        if site.learned_mask:
            mask = MaskState(
                [_owner(model, name) for name in site.learned_mask], lambda: bool(runtime.plan_now().dropped)
            )
            made.append(Interception(module, "_dropbp_mask", mask, mask_forward))
        wrap = shared_site_forward if site.per_call else site_forward
        made.append(Interception(module, "_dropbp_site", state, wrap))
    return made


def install_stems(model: nn.Module, stems: Mapping[str, int], runtime: Runtime) -> list[Interception]:
    """The functions that let what feeds the stream rest."""
    made = []
    for name, need in stems.items():
        module = model.get_submodule(name)
        state = SiteState(Site(name, (need,)), module, runtime)
        made.append(Interception(module, "_dropbp_site", state, stem_forward))
    return made


def _install_loose(model: nn.Module, loose: Iterable[LooseParameter], runtime: Runtime) -> list[Interception]:
    by_scope: dict[str, list[LooseParameter]] = {}
    for entry in loose:
        by_scope.setdefault(entry.scope, []).append(entry)
    return [
        Interception(model.get_submodule(scope), "_dropbp_loose", LooseState(entries, model, runtime), loose_forward)
        for scope, entries in by_scope.items()
    ]


def install_exits(model: nn.Module, structure: Structure, runtime: Runtime) -> list[Interception]:
    """The functions that scale gradients of kept branches."""
    by_module: dict[str, list[Exit]] = {}
    for entry in structure.exits:
        by_module.setdefault(entry.module, []).append(entry)
    return [
        Interception(model.get_submodule(name), "_dropbp_exit", ExitState(exits, runtime), exit_forward)
        for name, exits in by_module.items()
    ]


def install_boundaries(
    model: nn.Module, names: Iterable[str], boundary: Callable[[], None], *, after: bool = False
) -> list[Interception]:
    """The functions that tell a lazy device where steps end: before these modules, or after them."""
    if after:
        ends = ((model.get_submodule(name), EndState(boundary)) for name in names)
        return [Interception(module, "_dropbp_end", state, end_forward) for module, state in ends]
    return [
        Interception(model.get_submodule(name), "_dropbp_boundary", BoundaryState(boundary), boundary_forward)
        for name in names
    ]
