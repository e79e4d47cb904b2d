"""Blocks of a model under gradient checkpointing and under compilation.

A block whose branches are all dropped has nothing to recompute. PyTorch's non-reentrant checkpointing saves nothing
there, so it needs no help. Models in the style of transformers call a checkpoint function that the module holds; it is
bypassed for such blocks. A reentrant checkpoint in a user's own code cannot be bypassed. But if it recomputes a block
that only adds its dropped branches to the residual stream, the block's input can replace its output: only the graph of
the recomputation counts, and that is the identity.

Under `torch.compile` of a whole model, a block is the largest region that can be compiled for all masks: a block of two
branches has four masks, the whole model 2**N.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from dropbp.discovery.structure import Structure
from dropbp.discovery.walks import sources
from dropbp.engine.frozen import run_frozen
from dropbp.engine.patch import Forward, ForwardPatch, WrapperState, named_forward
from dropbp.engine.purity import assigned
from dropbp.engine.recompute import Recomputation, RecomputedBlock, inside_checkpoint
from dropbp.engine.runtime import Runtime, current_node, is_compiling

Function = Callable[..., Any]

_FUNCTION = "_gradient_checkpointing_func"
is_grad_enabled = torch.is_grad_enabled  # bound once, since every block calls it


class BlockState(WrapperState):
    """A block, its branches, and whether it only adds them to its input (None until this was checked)."""

    def __init__(self, module: nn.Module, need: int, runtime: Runtime, recomputed: RecomputedBlock) -> None:
        self.module, self.need, self.runtime, self.recomputed = module, need, runtime, recomputed
        self.running = runtime.running.get
        self.only_adds: bool | None = None

    def is_recomputed_needlessly(self) -> bool:
        """Whether a reentrant checkpoint of this block alone is recomputing it while all its branches are dropped."""
        if self.only_adds is False or not torch.is_grad_enabled():
            return False
        if checkpointed_module(getattr(current_node(), "run_function", None)) is not self.module:
            return False
        return not self.need & ~self.runtime.plan_recomputed().dropped

    def run_recomputed(self, forward: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the block so that its activations are recomputed in the backward."""
        calls = self.runtime.count_call(self.recomputed.name)
        return self.recomputed.run(forward, args, kwargs, again=calls > 0)

    def recompute(self, forward: Callable[[], Any], args: tuple[Any, ...]) -> Any:
        """Return the block's input as its output. The first time, run the block to check that this is allowed."""
        if self.only_adds and args[0].requires_grad:
            return args[0]
        output = forward()
        self.only_adds = bool(args) and _only_added_to(args[0], output)
        return output


def _only_added_to(stream: Any, output: Any) -> bool:
    """Whether the output is the stream plus tensors without gradients: a chain of plain additions of one shape."""
    if not isinstance(stream, torch.Tensor) or not isinstance(output, torch.Tensor):
        return False
    if (stream.shape, stream.dtype) != (output.shape, output.dtype):
        return False
    node: Any = output.grad_fn
    while node is not None and node.name() == "AddBackward0" and node._saved_alpha == 1:
        terms = [source for source in sources(node) if source.name() != "ConnectToAnchorBackward"]
        node = terms[0] if len(terms) == 1 else None
    return node is not None and getattr(node, "variable", None) is stream


def checkpointed_module(function: Any) -> Any:
    """The module whose forward a checkpointed function is: a module, its bound method, or partials of these."""
    while isinstance(function, functools.partial):
        if function.args and isinstance(function.args[0], nn.Module):
            return function.args[0]
        function = function.func
    return function if isinstance(function, nn.Module) else getattr(function, "__self__", None)


def block_forward(original: Forward) -> Forward:
    """Wrap the forward of a block: a graph break for the compiled model, and a shortcut for recomputation."""

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        block: BlockState | None = self._dropbp_block
        if block is None or block.original is not original:
            return original(self, *args, **kwargs)
        if is_compiling():
            if block.runtime.break_at_blocks:
                torch._dynamo.graph_break()
            return original(self, *args, **kwargs)
        plan = block.running()
        if plan is None:
            if block.is_recomputed_needlessly():
                return block.recompute(functools.partial(original, self, *args, **kwargs), args)
            return original(self, *args, **kwargs)
        if is_grad_enabled():
            if plan.checkpointed & block.need and not inside_checkpoint():
                return block.run_recomputed(functools.partial(original, self), args, kwargs)
        elif plan.truncated and plan.kept & block.need:
            block.runtime.note_unrecorded_block(self)
        return original(self, *args, **kwargs) if kwargs else original(self, *args)

    return named_forward(forward)


def install_blocks(
    model: nn.Module, blocks: Mapping[str, int], runtime: Runtime, recomputation: Recomputation
) -> list[ForwardPatch]:
    """Put `block_forward` around every block."""
    made = []
    for module, (name, need) in _modules(model, blocks).items():
        state = BlockState(module, need, runtime, RecomputedBlock(name, module, recomputation))
        made.append(ForwardPatch(module, "_dropbp_block", state, block_forward))
    return made


def _modules(model: nn.Module, blocks: Mapping[str, int]) -> dict[nn.Module, tuple[str, int]]:
    """Each block with its first name and its branches; several names may refer to one module."""
    found: dict[nn.Module, tuple[str, int]] = {}
    for name, need in blocks.items():
        module = model.get_submodule(name)
        first, others = found.get(module, (name, 0))
        found[module] = first, others | need
    return found


class CheckpointBypass:
    """Runs blocks whose branches are all dropped outside gradient checkpointing, as they have nothing to recompute.

    Models in the style of transformers call `module._gradient_checkpointing_func(function, *args)`. Switching
    checkpointing on sets this attribute on instances, possibly after `enable`, so each forward looks for it.
    """

    def __init__(self, model: nn.Module, structure: Structure, runtime: Runtime) -> None:
        self.runtime = runtime
        self.hosts = [m.__dict__ for m in model.modules() if hasattr(m, "gradient_checkpointing")]
        self.need = {module: need for module, (_, need) in _modules(model, structure.blocks).items()}

    def refresh(self) -> None:
        """Wrap checkpoint functions that were set since the last forward."""
        for host in self.hosts:
            function = host.get(_FUNCTION)
            if function is not None and type(function) is not _Bypassing:
                host[_FUNCTION] = _Bypassing(self, function)

    def is_on(self) -> bool:
        """Whether the model checkpoints its blocks itself."""
        return any(host.get("gradient_checkpointing") for host in self.hosts)

    def may_be_reentrant(self) -> bool:
        """Whether it does so with a checkpoint function that may be reentrant (`use_reentrant` is not False)."""
        return any(
            host.get("gradient_checkpointing") and _is_maybe_reentrant(host.get(_FUNCTION)) for host in self.hosts
        )

    def remove(self) -> None:
        """Restore the checkpoint functions."""
        for host in self.hosts:
            function = host.get(_FUNCTION)
            if isinstance(function, _Bypassing) and function.owner is self:
                host[_FUNCTION] = function.inner

    def non_reentrant(self) -> contextlib.AbstractContextManager[None]:
        """Make reentrant checkpoint functions non-reentrant inside the context, since reentrant ones hide the graph."""
        present = [host for host in self.hosts if host.get(_FUNCTION) is not None]
        return assigned([(host, _FUNCTION, _not_reentrant(host[_FUNCTION])) for host in present])

    def drops_all_of(self, module: Any) -> bool:
        """Whether the module is a block whose branches are all dropped."""
        need = self.need.get(module, 0)
        return need != 0 and not need & ~self.runtime.plan_now().dropped


class _Bypassing:
    """Stands in for a module's checkpoint function. Copies and pickles contain the original function."""

    def __init__(self, owner: CheckpointBypass, inner: Function) -> None:
        self.owner, self.inner = owner, inner

    def __call__(self, function: Function, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.inner(function, *args, **kwargs)
        module = checkpointed_module(function)
        if self.owner.drops_all_of(module):
            return function(*args, **kwargs)
        scope = getattr(module, "_dropbp_scope", None)
        if scope is not None:  # recomputation may call the class's forward and so skip the wrapper on the instance
            function = functools.partial(run_frozen, scope, function)
        return self.inner(function, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Function:
        return self.inner

    def __reduce__(self) -> Any:
        return functools.partial(self.inner).__reduce__()


def _is_maybe_reentrant(function: Function | None) -> bool:
    inner = function.inner if isinstance(function, _Bypassing) else function
    return not isinstance(inner, functools.partial) or inner.keywords.get("use_reentrant") is not False


def _not_reentrant(function: Function) -> Function:
    inner = function.inner if isinstance(function, _Bypassing) else function
    if isinstance(inner, functools.partial) and inner.keywords.get("use_reentrant"):
        return functools.partial(inner.func, *inner.args, **{**inner.keywords, "use_reentrant": False})
    return function
