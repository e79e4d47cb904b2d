"""Tells every module which branches are dropped now, and runs the root's forward.

Every training forward of the root has one set of dropped branches (a bit mask, bit `i` for branch `i`), held in a
context variable while it runs. A module that runs outside any forward of the root is being recomputed under gradient
checkpointing. Autograd then tells which node it is executing, and the node's sequence number tells which forward
created it. So each recomputation sees the mask of its own forward, however many forwards came since. Compiled code
cannot ask: it reads a plain flag on each module, set before the forward.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import logging
import math
import sys
import threading
import weakref
from collections.abc import Callable, Reversible
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from dropbp import branch_sets
from dropbp._torch import detached, next_sequence, transforming
from dropbp.device import dynamo_graph_count, save_rng_state
from dropbp.engine.autograd_functions import ConnectToAnchor
from dropbp.engine.patch import Forward
from dropbp.engine.side_outputs import CallPlan
from dropbp.errors import StateError
from dropbp.masks.plan import KEEP_ALL, ForwardPlan
from dropbp.tensors import map_tensors, outputs_by_key, tensors_in

logger = logging.getLogger(__name__)

is_compiling = torch.compiler.is_dynamo_compiling

# Makes a replacement of the root's forward from that forward, its arguments and the plan: see `dropbp.cache`.
CachedForwardFactory = Callable[
    [Forward | None, tuple[Any, ...], dict[str, Any], ForwardPlan], Callable[[], Any] | None
]

REMEMBERED_FORWARDS = 4096
REMEMBERED_THREADS = 64


@dataclasses.dataclass
class ForwardRecord:
    """A forward of the root: the interval of autograd nodes it created in its thread, and its plan."""

    start: int
    plan: ForwardPlan
    end: float = math.inf
    blocks_end: float = math.inf  # end of the module that contains the blocks, if that is not the root
    dropped_end: float = 0  # end of the last module that ran without recording

    def made(self, sequence: int) -> bool:
        return self.start <= sequence < self.end


class _Task:
    """The plan under which a backward recomputes. Only the backward holds it: both end together, even on an error."""

    def __init__(self, plan: ForwardPlan) -> None:
        self.thread, self.plan = threading.get_ident(), plan

    def __call__(self) -> None:
        """Does nothing: registering it as the backward's final callback ties its lifetime to the backward."""


class Flag:
    """Whether all branches of `need` are dropped now, and whether they are detached; compiled code reads it."""

    __slots__ = ("detached", "dropped", "need")

    def __init__(self, need: int) -> None:
        self.need, self.dropped, self.detached = need, False, False


class Runtime:
    """The state shared by all wrapped modules of one model.

    For the current thread, `running` holds the plan of its forward (None outside), and `calls` counts the calls of
    shared modules in that forward. Context variables are faster than thread-local ones, and modules ask often.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.running: ContextVar[ForwardPlan | None] = ContextVar("running", default=None)
        self.calls: ContextVar[dict[str, int]] = ContextVar("calls")
        self.records: dict[int, collections.deque[ForwardRecord]] = {}
        self.tasks: weakref.WeakValueDictionary[int, _Task] = weakref.WeakValueDictionary()
        self._flags: dict[int, Flag] = {}
        self._flags_by_branch: collections.defaultdict[int, list[Flag]] = collections.defaultdict(list)
        self.break_at_blocks = False
        self.after_forward: list[Callable[[Any, int], None]] = []
        self.cut_stray_gradients: Callable[[Any, ForwardRecord], None] = lambda outputs, record: None
        self.watch_backward: Callable[[Any, int], None] = lambda outputs, dropped: None
        self._flags_set = (0, 0)
        self._anchor: torch.Tensor | None = None
        self._warned = self._evaluated = False
        self.unrecorded_block = False
        self.dropped_end = 0  # the autograd node that came after the latest dropped module
        self.cached_forward: CachedForwardFactory | None = None

    def flag(self, need: int) -> Flag:
        """The flag for modules that are skipped if all these branches are dropped; it is kept up to date."""
        if need not in self._flags:
            self._flags[need] = Flag(need)
            for branch in branch_sets.each(max(need, 0)):  # the flag of a negative `need` never changes
                self._flags_by_branch[branch].append(self._flags[need])
        return self._flags[need]

    def plan_now(self) -> ForwardPlan:
        """The current plan: of the running forward, or of the forward being recomputed."""
        plan = self.running.get()
        return self.plan_recomputed() if plan is None else plan

    def plan_here(self) -> ForwardPlan:
        """The current plan for modules that may run alone, such as an embedding; they then drop nothing."""
        plan = self.running.get()
        if plan is not None:
            return plan
        return KEEP_ALL if current_node() is None else self.plan_recomputed()

    def plan_recomputed(self) -> ForwardPlan:
        """The plan of the forward that created the autograd node that this thread is executing."""
        node = current_node()
        if node is None:
            self._warn_outside()
            return KEEP_ALL
        record = self.find(node._sequence_nr())
        if record is None:
            return self._plan_of_outer_backward()
        self._remember_task(record.plan)
        return record.plan

    def find(self, sequence: int) -> ForwardRecord | None:
        """The forward that created an autograd node.

        Each thread numbers its nodes separately. On CPU a backward runs in the calling thread, usually that of the
        forward. On other devices it runs in a thread of the autograd engine; then all threads are searched, and any
        match serves.
        """
        here = threading.get_ident()
        own = _latest(self.records.get(here, ()), sequence)
        if own is not None:
            return own
        others = (_latest(tuple(records), sequence) for ident, records in list(self.records.items()) if ident != here)
        return next((record for record in others if record is not None), None)

    def _remember_task(self, plan: ForwardPlan) -> None:
        """Remember the plan: nodes created by a recomputation are in no record, and a nested backward may need it."""
        number = torch._C._current_graph_task_id()
        task = self.tasks.get(number)
        if task is None:
            task = self.tasks[number] = _Task(plan)
            torch.autograd.Variable._execution_engine.queue_callback(task)
        task.thread, task.plan = threading.get_ident(), plan

    def _plan_of_outer_backward(self) -> ForwardPlan:
        here = threading.get_ident()
        return next((task.plan for task in reversed(list(self.tasks.values())) if task.thread == here), KEEP_ALL)

    def _warn_outside(self) -> None:
        if not self._warned and self.model.training and torch.is_grad_enabled():
            self._warned = True
            called = _outermost_call(self.model)
            logger.warning(
                "A branch of %s ran outside the forward of the model given to dropbp.enable, so nothing is dropped "
                "there. Enable the module whose forward your training loop calls%s.",
                type(self.model).__name__,
                f": call handle.remove(), then dropbp.enable(model.{called}, ...)" if called else "",
            )

    def note_evaluation(self, outputs: Any) -> None:
        """Warn of a forward in evaluation mode that is recorded for a backward: probably training without `train()`."""
        if not self._evaluated and any(tensor.requires_grad for tensor in tensors_in(outputs)):
            self._evaluated = True
            logger.warning(
                "%s is in evaluation mode, as from_pretrained leaves a model, but its forward was recorded for a "
                "backward. Nothing is dropped in this mode. Call model.train() before training, or evaluate under "
                "torch.no_grad().",
                type(self.model).__name__,
            )

    def note_unrecorded_block(self, block: nn.Module) -> None:
        """Warn of a kept block that ran unrecorded under a truncated backward: a late reentrant checkpoint."""
        if not self.unrecorded_block:
            self.unrecorded_block = True
            logger.warning(
                "%s ran without recording in a training step that keeps its branches, so it gets no gradient in this "
                "step. If you have just switched gradient checkpointing on, later steps take it into account.",
                type(block).__name__,
            )

    def count_call(self, key: str) -> int:
        """Count a call of a module shared by several branches; return how many calls came before it in this forward."""
        if self.running.get() is None:
            raise StateError(
                f"Module {key} is shared by several branches, and gradient checkpointing recomputes it, so it is "
                "unknown which of its calls this is. Turn gradient checkpointing off for this model."
            )
        calls = self.calls.get()
        call = calls.get(key, 0)
        calls[key] = call + 1
        return call

    def run(self, forward: Callable[[], Any], plan: ForwardPlan) -> Any:
        """Run a training forward under the plan."""
        outputs = self._observed(forward, plan) if isinstance(plan, CallPlan) else self._recorded(forward, plan)
        outputs = outputs if plan.trained == branch_sets.EVERY else self._connected(outputs, plan)
        self.watch_backward(outputs, ~plan.trained)
        return outputs

    def _observed(self, forward: Callable[[], Any], plan: CallPlan) -> Any:
        """Run the forward and inspect its outputs; if one is new, run it again with dropped branches recorded."""
        kind = plan.kind
        untried = kind.untried and plan.dropped != 0
        kind.untried = kind.untried and not untried
        restore = save_rng_state(self.model) if untried else None
        outputs = self._recorded_and_learned(forward, plan)
        if plan.observation is None and plan.dropped and kind.has_new(outputs, self.model if untried else None):
            logger.info("%s returned new kinds of outputs, so this forward runs again", type(self.model).__name__)
            plan = kind.observed_again(plan)
            if restore is not None:
                restore()
            outputs = self._recorded_and_learned(forward, plan)
        return outputs

    def _recorded_and_learned(self, forward: Callable[[], Any], plan: CallPlan) -> Any:
        if plan.observation is None:
            return self._recorded(forward, plan)
        try:
            outputs = self._recorded(forward, plan)
            if not transforming():
                plan.kind.update(plan, plan.observation, outputs, self.model)
            return outputs
        finally:
            plan.observation.forget()

    def run_no_grad(self, forward: Callable[[], Any]) -> Any:
        """Run a forward inside another one without recording. It drops nothing, and call counts do not advance."""
        with torch.no_grad():
            return self._run_with(forward, KEEP_ALL)

    def run_keeping_all(self, forward: Callable[[], Any]) -> Any:
        """Run a forward that is no training forward and drops nothing: evaluation, `no_grad`."""
        return self.run(forward, KEEP_ALL) if torch.is_grad_enabled() else self._run_with(forward, KEEP_ALL)

    def _recorded(self, forward: Callable[[], Any], plan: ForwardPlan) -> Any:
        record = ForwardRecord(next_sequence(), plan)
        self._own_records().append(record)
        try:
            outputs = self._run_with(forward, plan)
        finally:
            record.end = next_sequence()
        record.dropped_end = record.blocks_end if dynamo_graph_count() else self.dropped_end  # compiled code notes none
        if dynamo_graph_count():
            self._set_flags_in_backward(outputs, plan)
        self.cut_stray_gradients(outputs, record)
        for watch in self.after_forward:
            watch(outputs, plan.dropped)
        return outputs

    def note_end_of_blocks(self) -> None:
        """Note the end of a module inside the root; the first to end is the one that contains the blocks."""
        records = self._own_records()
        if records and records[-1].blocks_end == math.inf:
            records[-1].blocks_end = next_sequence()

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

    def _run_with(self, forward: Callable[[], Any], plan: ForwardPlan) -> Any:
        before = self.running.get()
        running, calls = self.running.set(plan), self.calls.set({})
        self.set_flags(plan)
        try:
            return forward()
        finally:
            self.running.reset(running)
            self.calls.reset(calls)
            if before is not None:
                self.set_flags(before)

    def set_flags(self, plan: ForwardPlan) -> None:
        """Set the flags that compiled code reads."""
        flags = plan.dropped, plan.detached
        if flags == self._flags_set or "torch._dynamo" not in sys.modules:
            return
        changed, self._flags_set = (flags[0] ^ self._flags_set[0]) | (flags[1] ^ self._flags_set[1]), flags
        for branch in branch_sets.each(changed):
            for flag in self._flags_by_branch[branch]:
                flag.dropped = not flag.need & plan.kept
                flag.detached = not (flag.dropped or flag.need & plan.trained)

    def _set_flags_in_backward(self, outputs: Any, plan: ForwardPlan) -> None:
        """Set this forward's flags in the backward, where checkpointing recomputes compiled code."""
        for tensor in tensors_in(outputs):
            if tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(lambda gradients: self.set_flags(plan))

    def _connected(self, outputs: Any, plan: ForwardPlan) -> Any:
        """Make outputs that `backward` accepts even if every trainable parameter was skipped."""
        if not torch.is_grad_enabled() or all(tensor.requires_grad for tensor in tensors_in(outputs)):
            return outputs
        if transforming() or not any(p.requires_grad for p in self.model.parameters()):
            return outputs
        trained = plan.kind.outputs if isinstance(plan, CallPlan) else {}
        asking = {id(tensor) for key, tensor in outputs_by_key(outputs) if trained.get(key)}
        alone = not any(tensor.requires_grad for tensor in tensors_in(outputs))
        return map_tensors(outputs, lambda tensor: self.connect(tensor, alone or id(tensor) in asking))

    def detached(self, tensor: torch.Tensor, plan: ForwardPlan, module: str, users: int) -> torch.Tensor:
        """The output of a branch, detached from it; an observed forward still shows it in the graph."""
        if not tensor.requires_grad:
            return tensor
        end = detached(tensor)
        if isinstance(plan, CallPlan) and plan.observation is not None and not transforming():
            end = self.connect(end, alone=True)
            plan.observation.note_output(end, module, users)
        return end

    def with_graph(self, output: Any) -> Any:
        """The output of a dropped module. A reentrant checkpoint requires its recomputed output to have a graph."""
        if self.running.get() is not None or not torch.is_grad_enabled() or not hasattr(current_node(), "run_function"):
            return output
        return map_tensors(output, functools.partial(self.connect, alone=True))

    def connect(self, tensor: torch.Tensor, alone: bool) -> torch.Tensor:
        """Connect a tensor to the graph. If another output requires a gradient already, only losses (scalars) are."""
        if tensor.requires_grad or not (alone or tensor.dim() == 0) or transforming():
            return tensor
        if self._anchor is None:
            self._anchor = torch.zeros((), requires_grad=True)
        connected: torch.Tensor = ConnectToAnchor.apply(tensor, self._anchor)
        return connected


def _latest(records: Reversible[ForwardRecord], sequence: int) -> ForwardRecord | None:
    """The last record whose forward created a node, because nested forwards come after the outer one."""
    return next((record for record in reversed(records) if record.made(sequence)), None)


def current_node() -> Any:
    """The node that the autograd engine is executing in this thread; None outside a backward."""
    return torch._C._current_autograd_node()


def _outermost_call(model: nn.Module) -> str:
    """The name of the outermost module of the model that has a method on the call stack; empty if none has."""
    names = {id(module): name for name, module in model.named_modules()}
    found, frame = "", sys._getframe()
    while frame is not None:
        found = names.get(id(frame.f_locals.get("self")), "") or found
        frame = frame.f_back  # type: ignore[assignment]
    return found
