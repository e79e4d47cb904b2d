"""Finds out how often a forward ran each branch: early exits, layers skipped at random, layers that recur.

Every module of a branch counts its calls. After a forward whose calls differ from those of the recorded forward, a
branch none of whose modules was called is idle: it had no backward to skip. One whose main module was called more or
less often had as much more or less. The counters are then corrected for these branches.
"""

from __future__ import annotations

import functools
import logging
import operator
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from torch import nn

from dropbp.branch_sets import sole
from dropbp.device import dynamo_graph_count
from dropbp.flops import Shape
from dropbp.masks.idle import CountedForward, correct_counters

if TYPE_CHECKING:
    from dropbp.engine.runtime import Runtime
    from dropbp.engine.wrappers import BranchModuleState
    from dropbp.masks.schedule import Schedule

logger = logging.getLogger(__name__)

_calls_of = operator.attrgetter("calls")


class IdleBranches:
    """Compares the number of calls before and after a forward, and corrects the schedule that has counted it.

    The number of calls of modules in `calls_follow_shape` depends on the shape, as with chunks. `prefixes`: masks drop
    the lowest branches. `repeated` is called with the calls of each module and the dropped branches if a module was
    called more often than in the recorded forward.
    """

    def __init__(
        self,
        modules: list[BranchModuleState],
        schedule: Schedule,
        runtime: Runtime,
        calls_follow_shape: frozenset[str],
        prefixes: bool,
        repeated: Callable[[Sequence[int], int], None],
    ) -> None:
        self._modules, self._schedule, self._runtime = modules, schedule, runtime
        self._prefixes, self._repeated = prefixes, repeated
        self._recorded = [len(module.needs) for module in modules]
        self._own = [None if module.per_call else sole(module.need) for module in modules]
        self._observable = functools.reduce(operator.or_, (sole(n) for each in modules for n in each.needs), 0)
        self._graphs = dynamo_graph_count()
        self._main = _main_modules(runtime.model, modules, self._own)
        self._steady = [module.name not in calls_follow_shape for module in modules]
        self._calls_at: dict[tuple[int, Shape], int] = {}
        self._begun: ContextVar[tuple[list[int], CountedForward] | None] = ContextVar("begun", default=None)

    def begin(self) -> None:
        """Note the calls before the forward that the schedule has just counted."""
        self._begun.set((list(map(_calls_of, self._modules)), CountedForward.latest(self._schedule)))

    def end(self, outputs: Any, dropped: int) -> None:
        """Correct the counters for the branches that the forward ran more or less often, or not at all.

        Compiled code counts no calls, and what was compiled since `enable` may be a part of the model. A cache replaces
        the branches that it spares.
        """
        begun = self._begun.get()
        if begun is None:
            return
        self._begun.set(None)
        calls = list(map(operator.sub, map(_calls_of, self._modules), begun[0]))
        if calls == self._recorded or self._runtime.cached_forward is not None:
            return
        if dynamo_graph_count() != self._graphs:
            return
        self._compare_at_shape(calls)
        ran = self._ran(calls)
        if any(ran.values()):
            correct_counters(self._schedule, begun[1], {branch: times for branch, times in ran.items() if times != 1})
            if any(times > 1 for times in ran.values()):
                self._repeated(calls, dropped)

    def _ran(self, calls: Sequence[int]) -> dict[int, float]:
        """How often each branch ran, as a multiple of the recorded forward."""
        ran = {branch: 0.0 for branch in range(self._observable.bit_length()) if self._observable >> branch & 1}
        for place, (module, count, own) in enumerate(zip(self._modules, calls, self._own, strict=True)):
            if own is None:
                self._count_shared(ran, module, count, self._steady[place])
            elif own and count:
                main = self._main[own] == place and self._steady[place]
                times = count / self._recorded[place] if main else 1.0
                ran[own.bit_length() - 1] = times if main else ran[own.bit_length() - 1] or times
        return ran

    def _compare_at_shape(self, calls: Sequence[int]) -> None:
        """Warn once of a module whose calls follow neither the recorded forwards nor the shape, as in adaptive halting.

        Its recorded FLOPs are those of different numbers of calls, so no count can be told from them.
        """
        for place, (module, count) in enumerate(zip(self._modules, calls, strict=True)):
            if self._steady[place] or not count:
                continue
            before = self._calls_at.setdefault((place, self._schedule.shape), count)
            if before != count:
                self._steady = [True] * len(calls)
                logger.warning(
                    "%s was called %d and %d times for inputs of the same shape, and also while dropbp was enabled. "
                    "Its FLOPs are therefore uncertain, and so are the realised drop rate and the saving. Enable while "
                    "the model calls it a fixed number of times.",
                    module.name, before, count,
                )  # fmt: skip
                return

    def _count_shared(self, ran: dict[int, float], module: BranchModuleState, calls: int, steady: bool) -> None:
        """Count the calls of a module that serves a branch in each of them.

        Calls beyond the recorded ones are always recorded for the backward. Under masks that drop the lowest branches,
        their backward still ends with the last of these branches.
        """
        branches = [need.bit_length() - 1 for need in map(sole, module.needs) if need]
        for need in filter(None, map(sole, module.needs[:calls])):
            ran[need.bit_length() - 1] = ran[need.bit_length() - 1] or 1.0
        more = calls - len(module.needs)
        if more > 0 and branches and self._prefixes and steady:
            ran[max(branches)] = max(ran[max(branches)], 1.0 + more)


def _main_modules(model: nn.Module, modules: Sequence[BranchModuleState], own: Sequence[int | None]) -> dict[int, int]:
    """For each branch, as a bit, the place of its module with the most weights."""
    found: dict[int, tuple[int, int]] = {}
    for place, (module, branch) in enumerate(zip(modules, own, strict=True)):
        if branch:
            elements = sum(parameter.numel() for parameter in model.get_submodule(module.name).parameters())
            found[branch] = max(found.get(branch, (-1, 0)), (elements, -place))
    return {branch: -place for branch, (_, place) in found.items()}
