"""Finds out which branches a forward did not run: early exits, layers skipped at random, a tower without input.

Every module of a branch counts its calls. After a forward, a branch none of whose modules was called is idle: it had no
backward to skip. The schedule then no longer counts this branch for the forward.
"""

from __future__ import annotations

import functools
import operator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from dropbp.branch_sets import sole
from dropbp.device import dynamo_graph_count
from dropbp.masks.idle import CountedForward, uncount_idle

if TYPE_CHECKING:
    from dropbp.engine.runtime import Runtime
    from dropbp.engine.wrappers import BranchModuleState
    from dropbp.masks.schedule import Schedule


class IdleBranches:
    """Compares the number of calls before and after a forward, and corrects the schedule that has counted it."""

    def __init__(self, modules: list[BranchModuleState], schedule: Schedule, runtime: Runtime) -> None:
        self._modules, self._schedule, self._runtime = modules, schedule, runtime
        self._own = [None if module.per_call else sole(module.need) for module in modules]
        self._observable = functools.reduce(operator.or_, (sole(n) for each in modules for n in each.needs), 0)
        self._graphs = dynamo_graph_count()
        self._begun: ContextVar[tuple[list[int], CountedForward] | None] = ContextVar("begun", default=None)

    def begin(self) -> None:
        """Note the calls before the forward that the schedule has just counted."""
        self._begun.set(([module.calls for module in self._modules], CountedForward.latest(self._schedule)))

    def end(self, outputs: Any, dropped: int) -> None:
        """Correct the counters for the branches that the forward did not run.

        Compiled code counts no calls, and what was compiled since `enable` may be a part of the model. A cache replaces
        the branches that it spares.
        """
        begun = self._begun.get()
        if begun is None:
            return
        self._begun.set(None)
        ran = self._ran(begun[0])
        counted = self._runtime.cached_forward is None and dynamo_graph_count() == self._graphs
        if ran != self._observable and ran and counted:
            uncount_idle(self._schedule, begun[1], self._observable & ~ran)

    def _ran(self, before: list[int]) -> int:
        """The branches that ran, as bits. On the hot path: once for each module in each forward."""
        ran = 0
        for module, calls, own in zip(self._modules, before, self._own, strict=True):
            if module.calls != calls:
                ran |= _branches_of_first_calls(module, module.calls - calls) if own is None else own
        return ran


def _branches_of_first_calls(module: BranchModuleState, calls: int) -> int:
    return functools.reduce(operator.or_, map(sole, module.needs[:calls]), 0)
