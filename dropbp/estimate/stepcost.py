"""Time and FLOPs of a step under any mask, from a few timed steps.

A mask saves time in proportion to the FLOPs it drops, so two timed steps suffice: one that drops nothing and one that
drops everything. Blocks that are recomputed in the backward cost their forward once more. With `k` the share of the
branches' FLOPs that a mask keeps and `r` the share that it recomputes,

    time = dropped + k * (kept - dropped) + r * recomputing.

The optimizer's time is proportional to the number of parameters it moves.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from dropbp import branch_sets
from dropbp.device import Device
from dropbp.estimate.footprint import Optimizer
from dropbp.estimate.workload import Workload
from dropbp.flops import Shape, count_flops
from dropbp.masks.registry import Mask
from dropbp.masks.samplers import bits
from dropbp.masks.schedule import Schedule

if TYPE_CHECKING:
    from dropbp.handle import Handle

Clock = Callable[[], float]
ROUNDS = 5
DRAWS = 256
SAMPLED_BYTES = 256 << 20


@dataclasses.dataclass(frozen=True)
class Share:
    """The shares of the branches' FLOPs that a mask keeps and that it recomputes in the backward."""

    kept: float
    recomputed: float


@dataclasses.dataclass(frozen=True)
class Costs:
    """Seconds, or FLOPs, of a step that drops nothing, of one that drops everything, and of recomputing every block.

    If the model checkpoints its own blocks (`checkpoints`), `kept` includes the recomputation.
    """

    kept: float
    dropped: float
    recomputing: float
    checkpoints: bool = False

    def of(self, share: Share) -> float:
        """The cost under a mask."""
        own = self.recomputing if self.checkpoints else 0.0
        return self.dropped + share.kept * (self.kept - own - self.dropped) + share.recomputed * self.recomputing

    def scaled(self, factor: float) -> Costs:
        return Costs(self.kept * factor, self.dropped * factor, self.recomputing * factor, self.checkpoints)


class MaskMix:
    """The masks that a handle draws at one shape, each with its share of the steps.

    They are drawn from a separate schedule, so the handle's own does not change.
    """

    def __init__(self, handle: Handle, shape: Shape, accumulation: int = 1) -> None:
        schedule = handle.fresh_schedule(shape)
        self.handle, self.flops = handle, schedule.at_batch_shape.flops
        self.windows = [tuple(map(schedule.expected_mask, window)) for window in _windows(schedule, accumulation)]
        self.draws = [mask for window in self.windows for mask in window]
        self.weights = {mask: count / len(self.draws) for mask, count in Counter(self.draws).items()}
        self.every = schedule.every or tuple(self.weights)
        self.checkpoints = handle.engine.checkpoints
        self._needs = {**handle.engine.structure.parameters, **handle.engine.parameters.stem_parameters()}

    def share(self, mask: Mask) -> Share:
        """The shares that the mask keeps and recomputes."""
        kept = ~bits(mask) & ((1 << len(mask)) - 1)
        return Share(self._part(kept), self._part(self._recomputed(kept)))

    def mean(self, cost: Callable[[Share], float]) -> float:
        """The mean of a cost over the steps."""
        return self.mean_of(lambda mask: cost(self.share(mask)))

    @property
    def dropped_share(self) -> float:
        """Share of the branches' FLOPs that the steps drop on average."""
        return self.mean(lambda share: 1 - share.kept)

    def cacheable_share(self) -> float:
        """Share of the branches' FLOPs in the lowest blocks that never train again, on average over the steps."""
        always = functools.reduce(operator.and_, map(bits, self.every))
        anneals = self.handle.schedule.anneals
        return self.mean_of(lambda mask: self._part(self._lowest(bits(mask) if anneals else always)))

    def mean_of(self, figure: Callable[[Mask], float]) -> float:
        """The mean of a figure over the steps."""
        return sum(weight * figure(mask) for mask, weight in self.weights.items())

    def _lowest(self, dropped: int) -> int:
        """The branches of the lowest blocks that are dropped completely."""
        blocks = self.handle.engine.structure.blocks.values()
        return sum(itertools.takewhile(lambda need: not need & ~dropped, blocks))

    def peak_memory_masks(self) -> tuple[Mask, ...]:
        """Masks that include the one of highest peak memory: those that keep most activations, or train most."""
        shares = {mask: self.share(mask) for mask in self.every}
        held = sorted(self.every, key=lambda mask: shares[mask].recomputed - shares[mask].kept)[:2]
        most = max(self.every, key=lambda mask: shares[mask].kept)
        return tuple(dict.fromkeys([*held, most]))

    def updated_share(self) -> float:
        """Share of the trained parameters that an optimizer step moves, on average over the steps."""
        sizes = {n: p.numel() for n, p in self.handle.model.named_parameters() if p.requires_grad}
        moved = [sum(sizes[n] for n in self.trained(window, sizes)) for window in self.windows]
        return statistics.fmean(moved) / sum(sizes.values())

    def trained(self, masks: Sequence[Mask], names: Iterable[str]) -> frozenset[str]:
        """Those of these parameters that get a gradient from at least one of the masks."""
        kept = [~bits(mask) for mask in masks]
        needs = {name: self._needs.get(name, 0) for name in names}
        return frozenset(name for name, need in needs.items() if any(need <= 0 or need & each for each in kept))

    def earlier_masks(self, mask: Mask) -> set[tuple[Mask, ...]]:
        """The masks of earlier micro-batches that may precede this mask in an optimizer step."""
        found = {window[:i] for window in self.windows for i, drawn in enumerate(window) if drawn == mask}
        return found or {()}

    def _recomputed(self, kept: int) -> int:
        if not self.checkpoints:
            return self.handle.engine.recomputed(~kept)
        return sum(need for need in self.handle.engine.structure.blocks.values() if need & kept)

    def _part(self, branches: int) -> float:
        return branch_sets.total(branches, self.flops) / sum(self.flops)


def _windows(schedule: Schedule, accumulation: int) -> list[Sequence[int]]:
    """The draws of each optimizer step, spread over the run if masks change in its course."""
    if schedule.config.resample == "step":
        return [(step,) * accumulation for step in range(DRAWS)]
    count = max(1, DRAWS // accumulation)
    whole = schedule.length if schedule.anneals else 0
    stride = max(accumulation, whole // count)
    return [range(start, start + accumulation) for start in range(0, count * stride, stride)]


class Timing:
    """Times steps of several kinds in turns, as they occur in training, and takes medians over the rounds.

    The kinds are: a step that keeps everything, one that drops everything, one that recomputes blocks (if the model
    checkpoints them itself, a forward without recording gives that time), and the optimizer, on copies of parameters.
    """

    def __init__(self, workload: Workload, handle: Handle, shape: Shape, device: Device, clock: Clock) -> None:
        self.workload, self.handle, self.device, self.clock = workload, handle, device, clock
        self.batch = workload.batch(shape)
        self.checkpoints = handle.engine.checkpoints
        self.seconds: dict[str, float] = {}

    def run(self, make: Optimizer, note: Callable[[str], None]) -> tuple[Costs, float]:
        """Seconds of forward and backward at this shape, and of an optimizer step that moves every parameter."""
        optimizer, share = _copied_optimizer(self.workload.model, make)
        kinds: dict[str, Callable[[], object]] = {
            "kept": lambda: self._step(False),
            "dropped": lambda: self._step(True),
            "recomputing": self._unrecorded if self.checkpoints else self._recomputing_step,
            "optimizer": optimizer.step,
        }
        seconds: dict[str, list[float]] = {name: [] for name in kinds}
        for index in range(ROUNDS + 1):  # the first round warms up
            note(f"timing steps, round {index} of {ROUNDS}")
            for name, run in kinds.items():
                seconds[name].append(self._timed(run))
                if name != "optimizer":
                    self.workload.model.zero_grad(set_to_none=True)
        self.seconds = {name: statistics.median(times[1:]) for name, times in seconds.items()}
        dropped = self.seconds["dropped"]
        kept = max(self.seconds["kept"], dropped)
        costs = Costs(kept, dropped, self._recomputing(kept), self.checkpoints)
        return costs, self.seconds["optimizer"] / share

    def _recomputing(self, kept: float) -> float:
        """Seconds of recomputing every block."""
        if self.checkpoints:
            return self.handle.engine.structure.coverage * self.seconds["recomputing"]
        with self.handle.engine.recomputing_all():
            mix = MaskMix(self.handle, self.handle.schedule.shape)
            share = mix.share((False,) * len(self.handle.branches)).recomputed
        return max(0.0, self.seconds["recomputing"] - kept) / share if share else 0.0

    def _step(self, drop: bool) -> None:
        with self.handle.fixed((drop,) * len(self.handle.branches)):
            self.workload.step(self.batch)

    def _recomputing_step(self) -> None:
        with self.handle.engine.recomputing_all():
            self._step(False)

    def _unrecorded(self) -> None:
        with torch.no_grad():
            self.workload.forward(self.batch)

    def _timed(self, run: Callable[[], object]) -> float:
        self.device.synchronize()
        start = self.clock()
        run()
        self.device.synchronize()
        return self.clock() - start


def probe_recomputable_blocks(handle: Handle, step: Callable[[], None]) -> None:
    """Run a step that recomputes every block, if steps ever do, to find out which blocks can be recomputed."""
    if handle.engine.recomputes:
        with handle.engine.recomputing_all(), handle.fixed((False,) * len(handle.branches)):
            step()


def _copied_optimizer(model: nn.Module, make: Optimizer) -> tuple[torch.optim.Optimizer, float]:
    """An optimizer over copies of at most 256 MiB of parameters, and their share of all trained parameters."""
    trained = [p for p in model.parameters() if p.requires_grad]
    sample = _sampled(trained)
    copies = [nn.Parameter(p.detach().clone()) for p in sample]
    for parameter in copies:
        parameter.grad = torch.zeros_like(parameter)
    return make(copies), sum(p.numel() for p in sample) / sum(p.numel() for p in trained)


def counted_flops(workload: Workload, handle: Handle, shape: Shape) -> Costs:
    """FLOPs of forward and backward at this shape."""
    batch, count = workload.batch(shape), len(handle.branches)

    def count_with(drop: bool) -> int:
        with handle.fixed((drop,) * count):
            flops = count_flops(lambda: workload.step(batch))
        workload.model.zero_grad(set_to_none=True)
        return flops

    kept, dropped = count_with(False), count_with(True)
    branches = sum(branch.flops for branch in handle.branches)
    return Costs(kept, dropped, branches, handle.engine.checkpoints)


def rescaled_flops(costs: Costs, counted: Shape, wanted: Shape, branches: tuple[int, int]) -> Costs:
    """Rescale FLOPs from the counted shape to another: branches by their own growth, the rest by the tokens.

    `branches` are the FLOPs of one forward of all branches at either shape.
    """
    tokens = [s.batch_size * max(1, s.sequence_length) for s in (counted, wanted)]
    before, after = branches
    rest = (costs.dropped - before) * tokens[1] / tokens[0]
    backward = (costs.kept - costs.dropped) * after / before
    return Costs(after + rest + backward, after + rest, after, costs.checkpoints)


def _sampled(parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Every n-th parameter, so that the copies stay small."""
    total = sum(p.numel() * p.element_size() for p in parameters)
    stride = max(1, -(-total // SAMPLED_BYTES))
    return list(parameters[:: min(stride, len(parameters))])
