"""The engine applies the masks of a schedule to one model.

It owns the forward wrappers around the model's modules, their shared state, and everything about the next forward that
only the running model can tell. It asks a schedule what to drop.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dropbp.config import Config
from dropbp.device import Device, refuse_capture
from dropbp.discovery.structure import Stem, Structure
from dropbp.engine.checkpointing import CheckpointBypass, install_blocks
from dropbp.engine.distributed import (
    DDPGuard,
    KeptGradientsHook,
    UnshardControl,
    broadcast_from_rank_0,
    is_multi_rank,
    zero_partitioned_gradients,
)
from dropbp.engine.idle import IdleBranches
from dropbp.engine.install import install, install_boundaries, install_outputs
from dropbp.engine.integrity import PatchCheck, last_modules, refuse_per_sample_gradients
from dropbp.engine.order import BlockOrder
from dropbp.engine.parameters import Parameters
from dropbp.engine.patch import ForwardPatch
from dropbp.engine.recompute import Recomputation
from dropbp.engine.root import RootState, root_forward
from dropbp.engine.runtime import Runtime
from dropbp.engine.side_outputs import CallKinds
from dropbp.engine.stray_gradients import StrayGradients
from dropbp.engine.stream_check import StreamCheck
from dropbp.engine.trained import Trained
from dropbp.engine.truncation import Truncation
from dropbp.engine.zero_gradients import ZeroGradients
from dropbp.errors import ConfigError
from dropbp.flops import shape_of
from dropbp.inputs import CallSignature
from dropbp.lazy.warmup import GraphWarmup, Layer
from dropbp.masks.plan import Conditions, ForwardPlan
from dropbp.masks.registry import Mask, sampler_kind
from dropbp.masks.samplers import bits
from dropbp.masks.schedule import Schedule
from dropbp.tensors import any_requires_grad

logger = logging.getLogger(__name__)


class Engine:
    """Makes a model run as a schedule says, from `start` to `stop`.

    `call_signature` holds the outputs that the forward recorded for discovery was asked for. Raises ConfigError if
    `scaling` is set, but the gradient of a branch cannot be scaled exactly.
    """

    def __init__(
        self, model: nn.Module, structure: Structure, call_signature: CallSignature, config: Config, device: Device
    ) -> None:
        self.model, self.structure, self.config, self.device = model, structure, config, device
        _check_scaling(structure, config)
        defaults = device.defaults()
        self.fills_gradients = (defaults.fill if config.fill == "auto" else config.fill) == "zero"
        self.boundary = defaults.boundary if config.boundary == "auto" else config.boundary
        self.prefixes = sampler_kind(config.masks).prefixes
        self.freezes_stem = config.stem == "rest" or (config.stem == "auto" and self.prefixes)
        self.stem = structure.stem if self.freezes_stem else Stem()
        self.parameters = Parameters(model, structure, self.stem)
        self._zeros = ZeroGradients(self.parameters)
        self.trained = Trained(model, structure, self.freezes_stem)
        self.recomputation = Recomputation(model, structure.blocks, structure.repeated, device.is_lazy())
        self.runtime = Runtime(model)
        self.calls = CallKinds(model, structure, call_signature)
        self.bypass = CheckpointBypass(model, structure, self.runtime)
        self.truncation = Truncation(model, self.runtime, self.bypass, self.may_truncate)
        self.is_abandoned: Callable[[], bool] = lambda: False  # set where a run may end without `Handle.remove`
        self._blocks = [model.get_submodule(name) for name in structure.blocks]
        self._ddp_guard, self._unshard_control = DDPGuard(), UnshardControl(model, self.parameters.need_of)
        self._stray = StrayGradients(self.parameters)
        self.runtime.cut_stray_gradients = self._stray.cut
        self.runtime.after_forward += [self._unshard_control.watch, self._ddp_guard.watch]
        if not self.fills_gradients:
            self.runtime.watch_backward = self._zeros.watch
        self._patches: list[ForwardPatch] = []
        self._lock = threading.Lock()
        self._measuring: Mask | None = None
        self._checked_for_graphs = self._warned_of_inputs = self._recomputes_all = False

    @property
    def may_truncate(self) -> bool:
        """Whether the backward may be truncated: the residual stream has no gradient below the lowest kept branch.

        Not allowed if an attention mask is made from the stream: without a gradient it would select another kernel.
        """
        learned_masks = any(module.learned_mask for module in self.structure.branch_modules)
        return self.freezes_stem and not self.device.is_lazy() and not learned_masks

    @property
    def checkpoints(self) -> bool:
        """Whether the model checkpoints its own blocks."""
        return self.bypass.is_on()

    @property
    def running(self) -> bool:
        """Whether the forward wrappers are in place."""
        return bool(self._patches)

    def start(self, schedule: Schedule, owner: object, refresh_weights: Callable[[bool], bool]) -> None:
        """Install the forward wrappers; `owner` is the handle of the enabled model.

        `refresh_weights`, called with whether parameters were replaced, returns whether others train now.
        """
        self.schedule, self._refresh_weights = schedule, refresh_weights
        self._patches = self._installed(owner)
        modules = [self.model.get_submodule(entry.name) for entry in self.structure.branch_modules]
        states = [module.__dict__["_dropbp_branch"] for module in modules]
        self._order = BlockOrder(self.structure, states if self.prefixes else ())
        self._idle = IdleBranches(
            states, schedule, self.runtime, self.structure.calls_follow_shape, self.prefixes, self._order.note_repeated
        )
        self.runtime.after_forward += [self._idle.end, self._order.end]
        self._stream_check = StreamCheck(self.model, modules)
        self._patch_check = PatchCheck(self.model, last_modules(self.structure))
        if self.recomputes:
            self.recomputation.warn()
        if self.config.rehearse:
            schedule.graph_warmup = _graph_warmup(self.model, self.structure, self.stem, self.recomputed)

    def _installed(self, owner: object) -> list[ForwardPatch]:
        """Install all forward wrappers, innermost first, so that removal in reverse order is exact."""
        model, structure, runtime, step_boundary = self.model, self.structure, self.runtime, self.device.step_boundary
        made = install(model, structure, runtime, self.stem)
        for module in _backbones(model, structure):
            made.append(ForwardPatch(module, "_dropbp_root", RootState(self.begin, runtime, owner), root_forward))
        made += install_blocks(model, structure.blocks, runtime, self.recomputation)
        if self.config.scaling != "none":
            made += install_outputs(model, structure, runtime)
        if self.boundary != "none":
            made += install_boundaries(model, _boundary_modules(structure, self.boundary), step_boundary)
            made += install_boundaries(model, _last_blocks(structure), step_boundary, after=True)
        self.recomputation.inspect()
        return made

    def stop(self) -> None:
        """Remove the forward wrappers and restore the model exactly. A second call does nothing."""
        for patch in reversed(self._patches):
            patch.remove()
        self._patches = []
        self.bypass.remove()
        self._unshard_control.remove()
        self._zeros.release()

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ForwardPlan:
        """The plan of the coming training forward of the root."""
        if self.is_abandoned():
            return ForwardPlan()
        self._patch_check.check()
        self._refuse_graphs()
        if self._measuring is not None:
            return self.calls.plan(ForwardPlan(bits(self._measuring)), args, kwargs)
        with self._lock:
            if self._stream_check.has_other_hooks():
                refuse_per_sample_gradients(self.model)
                self._stray.note_changed_model()
            if self._refresh_weights(self._stream_check.changed()):
                self.parameters.refresh()
                self._zeros.refresh()
                self._stray.note_changed_model()
                self.schedule.recount_weights()
            self.bypass.refresh()
            shape, conditions = shape_of(args, kwargs), self._conditions(args, kwargs)
            if conditions.multi_rank and not self.schedule.agreed:
                self.schedule.agree(broadcast_from_rank_0(shape))
            plan = self.schedule.next(shape, conditions)
            self._idle.begin()
            self._order.begin()
            self._refresh_sharding(self.schedule.mask or ())
        if self.fills_gradients and plan.dropped:
            boundary = self.device.step_boundary if self.boundary != "none" else None
            self.parameters.fill(plan.dropped, conditions.stem_frozen, boundary)
        if self.device.is_lazy():  # recording dropped branches first would compile a graph that is used only once
            return plan
        return self.calls.plan(plan, args, kwargs)

    @contextlib.contextmanager
    def measuring(self, mask: Mask) -> Iterator[None]:
        """Forwards inside the context drop exactly these branches; the schedule does not count them."""
        self._measuring = mask
        try:
            yield
        finally:
            self._measuring = None

    # -- recomputation

    @property
    def recomputes(self) -> bool:
        """Whether a step may recompute blocks to save memory."""
        return (self._activations_limit() or 1) < 1

    def recomputed(self, dropped: int) -> int:
        """Blocks that are recomputed under a mask, as far as known; mask and result are bits of branches."""
        never_recomputed = self.recomputation.never_recomputed
        return (
            self.schedule.checkpointed(dropped, self._activations_limit(), never_recomputed)
            & ~self.recomputation.refused
        )

    @contextlib.contextmanager
    def recomputing_all(self) -> Iterator[None]:
        """Inside the context, steps recompute all their blocks and keep almost no activations."""
        self._recomputes_all = True
        try:
            yield
        finally:
            self._recomputes_all = False

    def _activations_limit(self) -> float | None:
        """Share of all activations that a step may keep; None: no limit."""
        limit = self.config.max_activations
        if self.checkpoints:
            return None
        if self._recomputes_all:
            return sys.float_info.min
        if not isinstance(limit, str):
            return limit
        return 1 - self.config.drop_rate if self.prefixes else None

    # -- several processes

    def reduce_kept(self, replica: DistributedDataParallel) -> None:
        """See `Handle.reduce_kept`."""
        reduction = KeptGradientsHook(self.parameters.needs(), replica.process_group)
        self.runtime.after_forward.append(reduction.watch)
        replica.register_comm_hook(None, lambda _, bucket: reduction(bucket))

    def _refresh_sharding(self, mask: Mask) -> None:
        self._ddp_guard.check(mask)
        self._unshard_control.refresh(self._blocks)
        if any(mask) and "deepspeed" in sys.modules:
            zero_partitioned_gradients(self.model.parameters())

    # -- a forward

    def _conditions(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Conditions:
        # A mask given by the user names only branches; everything else trains, unless `stem="rest"` was chosen.
        freezes_stem = self.config.stem == "rest" or not self.schedule.fixed
        return Conditions(
            limit=self._activations_limit(),
            stem_frozen=freezes_stem,
            truncated=freezes_stem and self.truncation.is_allowed(),
            keep_all=self._input_requires_grad(args, kwargs),
            multi_rank=is_multi_rank(),
            with_gradient=self.parameters.branches_with_gradient,
            never_recomputed=self.recomputation.never_recomputed,
            repeat_mask=self._ddp_guard.has_pending,
        )

    def _refuse_graphs(self) -> None:
        """Refuse CUDA graphs: a captured graph would replay the mask of its recording."""
        if not self._checked_for_graphs:
            self.device.check_model(self.model)
            self._checked_for_graphs = True
        if not self.schedule.fixed:
            refuse_capture()

    def _input_requires_grad(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether an input requires a gradient, which comes through the whole stream and would be biased."""
        if not self.freezes_stem or self.schedule.fixed or not any_requires_grad(args, kwargs):
            return False
        if not self._warned_of_inputs:
            self._warned_of_inputs = True
            logger.warning(
                "An input of %s requires a gradient, which flows through all branches. Such forwards drop nothing, so "
                "that this gradient is exact. Detach the input if you do not need its gradient, or accept the paper's "
                "biased gradient with masks='exact'.",
                type(self.model).__name__,
            )
        return True


def _check_scaling(structure: Structure, config: Config) -> None:
    if config.scaling != "none" and structure.unscalable:
        name, reason = next(iter(structure.unscalable.items()))
        raise ConfigError(f"scaling={config.scaling!r} is not exact for branch {name}: {reason}. Use scaling='none'.")


def _backbones(model: nn.Module, structure: Structure) -> Iterator[nn.Module]:
    """The modules that contain all branches, the root last: those above the first numbered element."""
    paths = (name.split(".")[:-1] for branch in structure.branches for name in branch.modules)
    shared = itertools.takewhile(
        lambda parts: len(set(parts)) == 1 and not parts[0].isdigit(), zip(*paths, strict=False)
    )
    path = [parts[0] for parts in shared]
    for count in range(len(path), -1, -1):
        module = model.get_submodule(".".join(path[:count]))
        if type(module).forward is not nn.Module.forward:  # a ModuleList is never called
            yield module


def _boundary_modules(structure: Structure, boundary: str) -> list[str]:
    names = list(structure.blocks)
    if boundary == "sublayer":
        names += [branch.modules[0] for branch in structure.branches if branch.modules]
    return list(dict.fromkeys(names))


def _last_blocks(structure: Structure) -> list[str]:
    """The last block of each list: after it the head and the loss get a graph of their own."""
    return list({name.rpartition(".")[0]: name for name in structure.blocks}.values())


def _graph_warmup(model: nn.Module, structure: Structure, stem: Stem, recomputed: Callable[[int], int]) -> GraphWarmup:
    """The graph warm-up for a model's blocks, and for modules beside their branches that are frozen at times."""
    parts = [*stem.modules.items(), *structure.blocks.items()]
    layers = [Layer(_graph_kind(model.get_submodule(name)), need) for name, need in parts]
    return GraphWarmup(layers, (1 << len(structure.branches)) - 1, recomputed)


def _graph_kind(block: nn.Module) -> tuple[Any, ...]:
    """A key that is equal for blocks that record the same graphs."""
    return type(block), tuple((tuple(p.shape), p.dtype, p.requires_grad) for p in block.parameters())
