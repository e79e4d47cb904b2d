"""Wraps the forward of the enabled model: asks the engine for a plan, and runs the forward under it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dropbp._torch import call_compiled, never_compile, pause_compiler, resume_compiler
from dropbp.engine.patch import Forward, WrapperState, named_forward
from dropbp.engine.runtime import Runtime, current_node
from dropbp.masks.plan import KEEP_ALL, ForwardPlan


class RootState(WrapperState):
    """Asks the engine for a plan and runs the root's forward under it; `owner` is the handle of the enabled model.

    Every module from the root down to the one that contains all blocks has one. If a backbone is called instead of the
    root, below another head, its forward is the training forward.
    """

    def __init__(
        self, begin: Callable[[tuple[Any, ...], dict[str, Any]], ForwardPlan], runtime: Runtime, owner: object
    ) -> None:
        self.begin, self.runtime, self.owner = begin, runtime, owner

    def run(self, original: Forward, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Decide what to drop while compilation is off, then run the forward compiled or not, as it would have run."""
        callback = pause_compiler()
        try:
            forward = functools.partial(call_compiled, callback, original, (module, *args), kwargs)
            return self._run(forward, module, args, kwargs, compiled=callback is not None)
        finally:
            resume_compiler(callback)

    def _run(
        self, forward: Callable[[], Any], module: nn.Module, args: Any, kwargs: dict[str, Any], compiled: bool
    ) -> Any:
        training = module.training and torch.is_grad_enabled()
        inside = self.runtime.running.get() is not None
        if inside and (training or module is not self.runtime.model):
            outputs = forward()
            self.runtime.note_end_of_blocks()
            return outputs
        self.runtime.break_at_blocks = compiled and training
        plan = self._plan(args, kwargs) if training else KEEP_ALL
        if self.runtime.cached_forward is not None and not inside and current_node() is None:
            call = None if compiled else functools.partial(self.original, module)
            forward = self.runtime.cached_forward(call, args, kwargs, plan) or forward
        if training:
            return self.runtime.run(forward, plan)
        outputs = self.runtime.run_keeping_all(forward)
        if not inside and current_node() is None and torch.is_grad_enabled():
            self.runtime.note_evaluation(outputs)
        return outputs

    def _plan(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ForwardPlan:
        """A new plan; if this forward is a recomputation, the plan of the original."""
        node = current_node()
        record = self.runtime.find(node._sequence_nr()) if node is not None else None
        return record.plan if record else self.begin(args, kwargs)


never_compile(RootState.run)


def root_forward(original: Forward) -> Forward:
    """Wrap the root. The wrapper is never compiled, so masks are drawn outside; the functions it calls still are."""

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # None also after removal, for code that took the bound method while the model was enabled, as peft does.
        state: RootState | None = getattr(self, "_dropbp_root", None)
        if state is None or state.original is not original:
            return original(self, *args, **kwargs)
        return state.run(original, self, args, kwargs)

    never_compile(forward)
    return named_forward(forward)
