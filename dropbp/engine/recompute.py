"""Recomputes blocks in the backward to save memory, except blocks for which this may fail.

The library decides by itself to recompute, so recomputation must not fail where a plain backward works. Therefore
everything that a block saves for its backward is kept until its forward has returned. If the call changed nothing, as
far as `dropbp.engine.purity` can see, the saved tensors are released, and PyTorch's non-reentrant checkpointing
recomputes them in the backward. If the call changed something, the tensors stay, the backward is the plain one, and the
block is not recomputed from then on. At most one block's activations are held at a time, the same as during
recomputation.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import checkpoint as torch_checkpoint

from dropbp.engine.patch import Forward
from dropbp.engine.purity import (
    ReachableState,
    Snapshot,
    any_differs,
    copied_buffers,
    first_mutable,
    known_side_effect,
    other_rng_states,
    temporary_obstacle,
    versions,
)
from dropbp.errors import StateError

logger = logging.getLogger(__name__)

Hooks = tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]

_top_hooks: Callable[[bool], Hooks | None] | None = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", None
)


class Recomputation:
    """The blocks of one model that may be recomputed, and why the others may not.

    Attributes:
        reasons: by block name, why its last call was not recomputed although it should have been.
        never_recomputed: branches, as bits, of the blocks that will never be recomputed.
    """

    def __init__(
        self, model: nn.Module, blocks: Mapping[str, int], repeated: Mapping[str, str], lazy: bool = False
    ) -> None:
        self.blocks, self.reasons, self.lazy = dict(blocks), dict(repeated), lazy
        self.never_recomputed = self._branches_of(repeated)
        self.function_modes = torch._C._len_torch_function_stack()
        self.sharded = any(hasattr(module, "set_unshard_in_backward") for module in model.modules())
        self.recomputed_blocks: list[RecomputedBlock] = []
        self._warned = False

    @property
    def refused(self) -> int:
        """Branches, as bits, of the blocks whose last call was not recomputed."""
        return self._branches_of(self.reasons)

    def inspect(self) -> None:
        """Inspect the blocks once all wrappers are in place."""
        for member in self.recomputed_blocks:
            member.inspect()

    def note(self, name: str, reason: str | None, for_good: bool = False) -> None:
        """Note the result of a block's last call; the reason, if any, says why it is not recomputed."""
        if reason is None:
            self.reasons.pop(name, None)
            return
        self.reasons[name] = reason
        if for_good:
            self.never_recomputed |= self.blocks[name]
        self.warn()

    def warn(self) -> None:
        """Warn once that some blocks are not recomputed."""
        if self.reasons and not self._warned:
            self._warned = True
            name, reason = next(iter(self.reasons.items()))
            logger.warning(
                "%s is not recomputed in the backward, because %s. Deep training steps keep all activations of such "
                "blocks despite max_activations. handle.report()['not_recomputed'] names all of them.",
                name,
                reason,
            )

    def _branches_of(self, names: Mapping[str, str]) -> int:
        return functools.reduce(int.__or__, (self.blocks[name] for name in names), 0)


class RecomputedBlock:
    """Runs one block so that it can be recomputed, if that is known to be safe."""

    def __init__(self, name: str, module: nn.Module, shared: Recomputation) -> None:
        self.name, self.module, self.shared = name, module, shared
        shared.recomputed_blocks.append(self)
        self.inspect()
        self.checked_buffers = False

    def inspect(self) -> None:
        """Inspect the block in its current state."""
        self.reachable = ReachableState(self.module)
        self.last = Snapshot(self.reachable)
        self.parameters = self.last.parameters

    def run(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any], again: bool) -> Any:
        """Run the block; `again` says that it ran before in the same forward of the root."""
        effect = known_side_effect(self.module)
        if _top_hooks is None:
            effect = "PyTorch before 2.8 cannot keep saved tensors until the forward is done"
        if effect is not None:
            return self._refuse(effect, forward, args, kwargs, for_good=True)
        before = Snapshot(self.reachable)
        reason = "it runs more than once in a forward" if again else self._obstacle(before, args, kwargs)
        if reason is not None:
            return self._refuse(reason, forward, args, kwargs)
        run = _Run(self, forward, len(args), tuple(kwargs), before)
        output = torch_checkpoint.checkpoint(run, *args, *kwargs.values(), use_reentrant=False)
        run.raise_error()
        return output

    def _refuse(
        self, reason: str, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any], for_good: bool = False
    ) -> Any:
        self.shared.note(self.name, reason, for_good)
        return forward(*args, **kwargs)

    def _obstacle(self, before: Snapshot, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Why this call must not be recomputed, though later calls may be; None if nothing forbids it."""
        given = first_mutable((*args, *kwargs.values()))
        if given is not None:
            return f"it is given a {type(given).__name__}, which a call may change (for a cache: use_cache=False)"
        if not self.shared.sharded and any(map(operator.is_not, before.parameters, self.parameters)):
            return "it runs with other parameters than in dropbp.enable"
        if not before.equals_but_for_parameters(self.last):
            plainly, self.last = before.only_rebinds(self.last, self.reachable), before
            if not plainly:
                self.reachable = ReachableState(self.module)
                self.last = Snapshot(self.reachable)
                return "its attributes have changed since its last call"
        return temporary_obstacle(self.shared.function_modes)

    def changed_nothing(self, before: Snapshot, same_tensors: bool) -> bool:
        """Whether the call that has just returned changed nothing."""
        pure = same_tensors and before.equals(Snapshot(self.reachable))
        self.shared.note(self.name, None if pure else "its forward changes more than its outputs", for_good=True)
        return pure


class _Run:
    """One call of a block: the first run, and its exact repetition in the backward."""

    def __init__(
        self, block: RecomputedBlock, forward: Forward, positional: int, names: tuple[str, ...], before: Snapshot
    ) -> None:
        self.block, self.forward, self.positional, self.names = block, forward, positional, names
        self.before, self.reachable, self.kernels = before, block.reachable, _allowed_kernels()
        self.versions: list[int] = []
        self.done = False
        self._error: BaseException | None = None

    def __call__(self, *values: Any) -> Any:
        args, kwargs = values[: self.positional], dict(zip(self.names, values[self.positional :], strict=True))
        forward = functools.partial(self.forward, *args, **kwargs)
        if self.done:
            return self._recompute(forward, values)
        self.done, self.versions = True, versions(values)
        try:
            return self._record(forward, values)
        except BaseException as error:  # noqa: BLE001
            self._error = error  # raised outside PyTorch's checkpoint, whose hooks would stay in place before 2.13
            return None

    def raise_error(self) -> None:
        """Raise the error of the first run, if any."""
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
        finally:
            del error  # its traceback holds this frame, and with it the activations

    def _record(self, forward: Callable[[], Any], values: tuple[Any, ...]) -> Any:
        # A lazy device would have to wait for the values, and compile extra graphs to compare them.
        copies = [] if self.block.checked_buffers or self.block.shared.lazy else copied_buffers(self.block.module)
        generators = other_rng_states()
        with _keeping_saved_tensors() as kept:
            output = forward()
        same = versions(values) == self.versions and generators == other_rng_states() and not any_differs(copies)
        self.block.checked_buffers = True
        if self.block.changed_nothing(self.before, same):
            for saved in kept:
                saved.tensor = None
        return output

    def _recompute(self, forward: Callable[[], Any], values: tuple[Any, ...]) -> Any:
        with self.before.restored(self.reachable):
            if versions(values) != self.versions or not Snapshot(self.reachable).equals_but_for_parameters(self.before):
                raise StateError(
                    f"{self.block.name} was to be recomputed in the backward, but something that its forward read has "
                    "changed since. Enable the model with max_activations=None, so that nothing is recomputed."
                )
            with _modes(self.reachable.modules, self.before.modes), sdpa_kernel(self.kernels):
                return forward()


class _Saved:
    """A saved tensor in the form of PyTorch's checkpointing, and the tensor itself for as long as it is kept."""

    __slots__ = ("packed", "tensor", "version")

    def __init__(self, packed: Any, tensor: torch.Tensor) -> None:
        self.tensor: torch.Tensor | None
        self.packed, self.tensor, self.version = packed, tensor, versions(tensor)

    def checked(self) -> torch.Tensor:
        """The tensor, after a check for in-place changes, which PyTorch skips if hooks are set."""
        assert self.tensor is not None
        if versions(self.tensor) != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a "
                f"tensor of shape {list(self.tensor.shape)}."
            )
        return self.tensor


@contextlib.contextmanager
def _keeping_saved_tensors() -> Iterator[list[_Saved]]:
    """Inside the context, saved tensors are kept, and passed to the existing hooks as well."""
    assert _top_hooks is not None
    hooks = _top_hooks(False)
    assert hooks is not None, "PyTorch's checkpointing has hooks"
    pack, unpack = hooks
    kept: list[_Saved] = []

    def keep(tensor: torch.Tensor) -> _Saved:
        # A node that saves its own output would keep itself alive after a failed forward, so a detached tensor is kept.
        kept.append(_Saved(pack(tensor), tensor if tensor.is_leaf else tensor.detach()))
        return kept[-1]

    def give(saved: _Saved) -> torch.Tensor:
        return unpack(saved.packed) if saved.tensor is None else saved.checked()

    with saved_tensors_hooks(keep, give):
        yield kept


def inside_checkpoint() -> bool:
    """Whether a checkpoint is recording or recomputing now: a nested one would recompute twice."""
    hooks = None if _top_hooks is None else _top_hooks(False)
    return hooks is not None and getattr(hooks[0], "__module__", None) in (torch_checkpoint.__name__, __name__)


@contextlib.contextmanager
def _modes(modules: Sequence[nn.Module], modes: Sequence[bool]) -> Iterator[None]:
    """Put modules back into the modes in which their forward ran."""
    present = [module.training for module in modules]
    try:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        yield
    finally:
        for module, mode in zip(modules, present, strict=True):
            module.training = mode


def _allowed_kernels() -> list[SDPBackend]:
    """The attention kernels that are enabled now."""
    allowed = {
        SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled(),
        SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled(),
        SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.cudnn_sdp_enabled(),
    }
    return [kernel for kernel, on in allowed.items() if on]
