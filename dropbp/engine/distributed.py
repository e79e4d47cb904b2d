"""How engines that spread a model over processes must treat dropped branches.

A mask depends only on the seed and the number of the draw, so every rank knows without communication which gradients
are missing on all ranks. For each engine this means:

- `DistributedDataParallel` waits for a gradient of every parameter, unless it was constructed with
  `find_unused_parameters`. Without that flag the step is refused here, instead of failing one step later.
  `KeptGradientsHook` makes it send only the kept parameters.
- `fully_shard` gathers a block's parameters before the block's backward. A block whose branches are all dropped needs
  none; `UnshardControl` switches this off through `FSDPModule.set_unshard_in_backward`. FSDP2 itself does not send
  gradients that are None.
- DeepSpeed ZeRO-3 keeps gradients in a buffer of its own, where old ones must be cleared
  (`zero_partitioned_gradients`).

This module imports neither `torch.distributed.fsdp` nor DeepSpeed: it recognises their modules and parameters by their
attributes.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from dropbp.discovery.cuts import ALWAYS_NEEDED
from dropbp.discovery.module_paths import prefixes
from dropbp.errors import StateError
from dropbp.tensors import tensors_in

WRAPPERS = {
    "DistributedDataParallel": "Enable the model inside, dropbp.enable(wrapped.module), before or after wrapping it, "
    "and wrap it with find_unused_parameters=True, since dropped branches get no gradient.",
    "DataParallel": "It copies the model in each forward, and copies are not enabled. Use DistributedDataParallel with "
    "find_unused_parameters=True, one process for each device.",
    "FullyShardedDataParallel": "Enable the model before wrapping it, with use_orig_params=True; or better, use its "
    "successor, torch.distributed.fsdp.fully_shard, which does not wrap.",
    "DeepSpeedEngine": "Enable the model inside, dropbp.enable(engine.module), before or after deepspeed.initialize.",
}

T = TypeVar("T")


def refuse_wrapper(model: nn.Module) -> None:
    """Raises StateError if the model is an engine's wrapper around the model to enable."""
    advice = WRAPPERS.get(type(model).__name__)
    if advice is not None:
        raise StateError(f"The model is wrapped in {type(model).__name__}. {advice}")
    partitioned = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]
    if partitioned and not any(hasattr(parameter, "_z3_optimizer") for parameter in partitioned):
        raise StateError(
            "The model's parameters are partitioned by deepspeed.zero.Init, and no engine gathers them yet. Build it "
            "first: engine, *_ = deepspeed.initialize(...), then dropbp.enable(engine.module)."
        )


class DDPGuard:
    """Refuses training forwards for which the surrounding `DistributedDataParallel` could not run the backward.

    A replica searches for unused parameters after each forward, and a backward uses the result of the last search. So
    all forwards before one backward must share a mask.
    """

    def __init__(self) -> None:
        self.first: Sequence[bool] | None = None
        self._pending = weakref.WeakSet[_PendingForward]()

    @property
    def has_pending(self) -> bool:
        """Whether a forward in a replica still waits for its backward."""
        return _replica() is not None and len(self._pending) > 0

    def watch(self, outputs: Any, dropped: int) -> None:
        """Track a recorded forward until its backward begins."""
        if _replica() is None:
            return
        waiting = _PendingForward(dropped, self._pending.clear)
        self._pending.add(waiting)
        for tensor in tensors_in(outputs):
            if tensor.grad_fn is not None:
                tensor.register_hook(waiting.begin)

    def check(self, mask: Sequence[bool]) -> None:
        """Check the mask of a training forward.

        Raises StateError if the flags of the running DistributedDataParallel do not allow the mask.
        """
        replica = _replica()
        if replica is None:
            return
        if replica.static_graph:
            self._check_static(mask)
        elif any(mask) and not replica.find_unused_parameters:
            raise StateError(
                "DistributedDataParallel around this model has find_unused_parameters=False: it would wait for the "
                "gradients of dropped branches, which never come. Make it with find_unused_parameters=True "
                "(accelerate: DistributedDataParallelKwargs; transformers: ddp_find_unused_parameters=True)."
            )
        elif any(drop and not waiting.dropped >> i & 1 for waiting in self._pending for i, drop in enumerate(mask)):
            raise StateError(
                "This forward drops branches that an earlier forward, whose backward is still to come, has kept. "
                "DistributedDataParallel treats parameters that the last forward did not use as unused. Use the same "
                "mask for all forwards before one backward: put them into one `with handle.fixed(mask)`."
            )

    def _check_static(self, mask: Sequence[bool]) -> None:
        if self.first is None:
            self.first = mask
        if self.first != mask:
            raise StateError(
                "DistributedDataParallel around this model has static_graph=True, which requires the same parameters "
                "in every step, and this step's mask differs from the first one's. Make it with "
                "find_unused_parameters=True and static_graph=False, or use one mask only (handle.fixed)."
            )


@dataclasses.dataclass(eq=False)
class _PendingForward:
    """A forward whose backward has not begun. Its output graph holds this object, so both are freed together."""

    dropped: int
    begun: Callable[[], None]

    def begin(self, gradient: torch.Tensor) -> None:
        self.begun()


def _replica() -> Any:
    """The replica whose forward is running."""
    return DistributedDataParallel._get_active_ddp_module()


class KeptGradientsHook:
    """Communication hook of `DistributedDataParallel` that does not send the gradients of dropped branches.

    The kept gradients of a bucket are packed, averaged over the ranks, and unpacked. The masks since the last reduction
    tell which gradients are missing on every rank, also under gradient accumulation with `no_sync()`.
    """

    def __init__(self, needs: Mapping[nn.Parameter, int], group: Any) -> None:
        self.needs, self.group = dict(needs), group
        self.dropped: int | None = None

    def watch(self, outputs: object, dropped: int) -> None:
        """Note which branches a recorded forward drops."""
        self.dropped = dropped if self.dropped is None else self.dropped & dropped

    def __call__(self, bucket: Any) -> torch.futures.Future[torch.Tensor]:
        pairs = zip(bucket.parameters(), bucket.gradients(), strict=True)
        dropped = 0 if self.dropped is None else self.dropped
        kept = [gradient for parameter, gradient in pairs if self.needs.get(parameter, ALWAYS_NEEDED) & ~dropped]
        if bucket.is_last():
            self.dropped = None
        return self._reduced(bucket.buffer(), kept, all_kept=len(kept) == len(bucket.parameters()))

    def _reduced(
        self, buffer: torch.Tensor, kept: Sequence[torch.Tensor], all_kept: bool
    ) -> torch.futures.Future[torch.Tensor]:
        if not kept:
            done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
            done.set_result(buffer)
            return done
        sent = buffer if all_kept else torch.cat([gradient.reshape(-1) for gradient in kept])
        sent.div_(self.group.size())
        work: Any = torch.distributed.all_reduce(sent, group=self.group, async_op=True)
        back = functools.partial(_unpack, sent, () if all_kept else kept, buffer)
        return work.get_future().then(back)  # type: ignore[no-any-return]


def _unpack(sent: torch.Tensor, kept: Sequence[torch.Tensor], buffer: torch.Tensor, _: Any) -> torch.Tensor:
    for gradient, part in zip(kept, sent.split([g.numel() for g in kept]) if kept else (), strict=True):
        gradient.copy_(part.view_as(gradient))
    return buffer


@dataclasses.dataclass(frozen=True)
class _ShardGroup:
    """Parameters that FSDP2 gathers together: the modules they were passed with, and the branches that need them."""

    modules: tuple[Any, ...]
    need: int


class UnshardControl:
    """Keeps FSDP2 from gathering parameters for the backward of blocks whose branches are all dropped.

    FSDP2 has one switch per module, not per forward. So the switch is set when the backward of a forward begins, for
    all forwards whose backwards run together, and reset when that backward ends. A block that is recomputed
    nevertheless (because a checkpoint covers more than the block) gathers its parameters at that time. `need_of` gives
    the branches that must all be dropped for a parameter not to be needed.
    """

    def __init__(self, model: nn.Module, need_of: Callable[[str], int]) -> None:
        self.model, self.need_of = model, need_of
        self.groups: list[_ShardGroup] = []
        self.hooks: list[RemovableHandle] = []
        self.seen: tuple[type, ...] = ()
        self.task: int | None = None
        self.dropped = 0
        self.off: set[nn.Module] = set()

    def refresh(self, blocks: Iterable[nn.Module]) -> None:
        """Find modules under `fully_shard`, which changes their class; does nothing if no class has changed since."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        classes = tuple(type(module) for module in blocks)
        if classes != self.seen:
            self.remove()
            self.seen, self.groups = classes, _shard_groups(self.model, self.need_of)
            modules = [module for group in self.groups for module in group.modules]
            self.hooks = [module.register_forward_pre_hook(self._gather_again) for module in modules]

    def remove(self) -> None:
        """Restore the modules."""
        self._set(0)
        for hook in self.hooks:
            hook.remove()
        self.hooks, self.groups, self.seen = [], [], ()

    def watch(self, outputs: Any, dropped: int) -> None:
        """Set the switches when the backward of a recorded forward begins."""
        if not self.groups:
            return
        if self.off and torch._C._current_graph_task_id() == -1:
            self._set(0)  # the last backward was interrupted
        for tensor in tensors_in(outputs):
            if tensor.requires_grad:
                tensor.register_hook(functools.partial(self._begin_backward, dropped))

    def _begin_backward(self, dropped: int, gradient: torch.Tensor) -> None:
        task = torch._C._current_graph_task_id()
        if task != self.task:
            self.task, self.dropped = task, dropped
            torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)
        self.dropped &= dropped
        self._set(self.dropped)

    def _end_backward(self) -> None:
        self.task = None
        self._set(0)

    def _set(self, dropped: int) -> None:
        for group in self.groups:
            gathered = bool(group.need & ~dropped)
            if gathered == (group.modules[0] in self.off):
                for module in group.modules:
                    module.set_unshard_in_backward(gathered)
                (self.off.difference_update if gathered else self.off.update)(group.modules)

    def _gather_again(self, module: Any, args: Any) -> None:
        """Gather before the forward of a module that was not gathered but is recomputed nevertheless."""
        if module in self.off:
            module.set_unshard_in_backward(True)
            module.unshard()
            module.set_unshard_in_backward(False)


def zero_partitioned_gradients(parameters: Iterable[Any]) -> None:
    """Zero the gradients that DeepSpeed ZeRO-3 holds, at the beginning of an optimizer step.

    ZeRO overwrites its buffer but never clears it, so a step without a gradient would use an earlier one. ZeRO cannot
    hold gradients that are None, so dropped branches get zeros, and momentum and weight decay still move them.
    """
    for parameter in parameters:
        engine = getattr(parameter, "_z3_optimizer", None)
        if engine is None or not parameter.requires_grad:
            continue
        if engine.micro_step_id != 0:
            return
        engine.set_local_grad_for_param(torch.zeros_like(parameter.ds_tensor), parameter)


def is_partitioned(model: nn.Module) -> bool:
    """Whether DeepSpeed ZeRO holds the model's gradients."""
    parameters = model.parameters()
    return any(hasattr(p, "ds_id") or getattr(p, "_hp_mapping", None) is not None for p in parameters)


def _shard_groups(model: nn.Module, need_of: Callable[[str], int]) -> list[_ShardGroup]:
    """The groups that are not needed if some set of branches is dropped."""
    modules = {name: module for name, module in model.named_modules() if hasattr(module, "set_unshard_in_backward")}
    members: dict[int, dict[str, Any]] = {}
    for name, module in modules.items():
        members.setdefault(_group_key(module), {})[name] = module
    needs = dict.fromkeys(members, 0)
    for name, _ in model.named_parameters():
        around = (*reversed(prefixes(name)[:-1]), "")
        owner = next((modules[path] for path in around if path in modules), None)
        if owner is not None:
            needs[_group_key(owner)] |= need_of(name)
    return [_ShardGroup(tuple(members[key].values()), need) for key, need in needs.items() if need > 0]


def _group_key(module: Any) -> int:
    """The identity of a module's FSDP state; modules passed to `fully_shard` as a list share one."""
    state = module._get_fsdp_state() if hasattr(module, "_get_fsdp_state") else module
    return id(state)


def is_multi_rank() -> bool:
    """Whether several processes train together."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def broadcast_from_rank_0(value: T) -> T:
    """The value of rank 0; every rank must call this at the same time."""
    held = [value]
    torch.distributed.broadcast_object_list(held, src=0)
    return held[0]
