"""`plan` predicts time, memory and FLOPs of a training step at each drop rate, before any training.

It counts the memory of a few small steps (`dropbp.estimate.footprint`), times a few full ones
(`dropbp.estimate.stepcost`), and combines both for the masks that each drop rate draws. Masks differ from step to step,
so a plan shows the peak memory over the masks and the mean time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from dropbp import inputs as example
from dropbp.checks import check_callables, checked_drop_rates, is_integer, is_number, short
from dropbp.device import Device, get_device
from dropbp.errors import ConfigError
from dropbp.estimate.footprint import Footprint, Optimizer, OptimizerBytes, largest, probe_for
from dropbp.estimate.forecast import RatePlan, TrainingPlan
from dropbp.estimate.stepcost import (
    Clock,
    Costs,
    MaskMix,
    Timing,
    counted_flops,
    probe_recomputable_blocks,
    rescaled_flops,
)
from dropbp.estimate.workload import Loss, Workload, in_training, planned_shape, precision_of
from dropbp.flops import Shape
from dropbp.handle import Handle
from dropbp.masks.registry import Mask, sampler_kind
from dropbp.session import enable
from dropbp.tensors import tensors_in

DROP_RATES = (0.0, 0.5, 0.75, 0.875)
MOST_ROWS, MOST_TOKENS = 1 << 20, 1 << 24
Note = Callable[[str], None]


def plan(
    model: nn.Module,
    batch_size: int | None = None,
    sequence_length: int | None = None,
    *,
    drop_rates: Sequence[float] = DROP_RATES,
    masks: str = "nested",
    device: str | torch.device | Device | None = None,
    precision: str | None = None,
    accumulation: int = 1,
    optimizer: Optimizer = torch.optim.AdamW,
    memory_limit: int | None = None,
    example_inputs: Any = None,
    loss: Loss | None = None,
    measure: bool = True,
    clock: Clock = time.perf_counter,
    progress: Note | None = None,
    **options: Any,
) -> TrainingPlan:
    """Predict time, peak memory and FLOPs of a training step at each drop rate, and the largest batch that fits.

    Runs some small steps and, to measure time, a few of full size. Parameters do not move, and the model is restored.
    Weights may be random. Memory is in bytes of tensors; an allocator needs more.

    Args:
        model: as it will be trained (adapters, frozen parameters, gradient checkpointing), on its device.
        batch_size: rows of a micro-batch; 1, or the rows of `example_inputs`.
        sequence_length: tokens per row, for text models; 512, or as many as the model has positions.
        drop_rates: 0 stands for plain training.
        masks: as in `dropbp.enable`.
        device: as in `dropbp.enable`.
        precision: `bf16` or `fp16` for mixed precision (autocast), None for the model's own dtype.
        accumulation: micro-batches per optimizer step; time is that of the whole step.
        optimizer: makes the optimizer from a list of parameters.
        memory_limit: bytes that a step may need; None uses all memory of the device.
        example_inputs: needed if the model does not describe its inputs; their rows are repeated to make a batch.
        loss: computes the loss from the model's output; by default the output's `loss`, or the mean square of its first
            tensor.
        measure: whether to time steps. If not, only small steps run.
        clock: returns seconds; use `time.process_time` on a CPU shared with others.
        progress: called with a line before each part of the work.
        **options: as in `dropbp.enable`.

    Raises:
        ConfigError: an argument has a value that is not allowed, or the model has no weights.
        DiscoveryError: no residual branch was found, or `example_inputs` are needed.
        StateError: the model is already enabled, or nothing in it is trained.
    """
    given = None if example_inputs is None else example.as_inputs(example_inputs)
    text = given is None and example.takes_text(model)
    shape = planned_shape(given, text, batch_size, sequence_length, _positions(model))
    adapter, asked_rates = get_device(device, model), checked_drop_rates(drop_rates)
    check_callables(loss=loss, clock=clock, progress=progress)
    _check(model, accumulation, memory_limit)
    limit = adapter.memory_limit_bytes() if memory_limit is None else memory_limit
    if limit is None:
        raise ConfigError(f"Device {adapter.name!r} does not report its memory; pass memory_limit, in bytes.")
    planner = _Planner(
        Workload(model, given, loss, precision_of(precision)), shape, adapter, optimizer, limit, accumulation,
        {"masks": masks, "device": adapter, "example_inputs": example_inputs, **_freezing_stem(masks, options)},
        progress or (lambda line: None),
    )  # fmt: skip
    with in_training(model):
        rates, timed_at = planner.run(asked_rates, clock if measure else None)
        row_bytes = planner.row_bytes()
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    return TrainingPlan(
        rates=rates, batch_size=shape.batch_size, sequence_length=shape.sequence_length or None,
        accumulation=accumulation, masks=masks, precision=precision, memory_limit_bytes=limit,
        parameters=sum(p.numel() for p in model.parameters()), trained_parameters=sum(trained),
        timed_at=None if timed_at is None else (timed_at.batch_size, timed_at.sequence_length or None),
        device=adapter.describe(), cache_row_bytes=row_bytes,
    )  # fmt: skip


class _Planner:
    """Makes one plan; holds the workload and everything that is counted once for all drop rates."""

    def __init__(
        self,
        workload: Workload,
        shape: Shape,
        device: Device,
        optimizer: Optimizer,
        limit_bytes: int,
        accumulation: int,
        enabling: dict[str, Any],
        note: Note,
    ) -> None:
        self.workload, self.shape, self.device, self.optimizer = workload, shape, device, optimizer
        self.limit_bytes, self.accumulation, self.enabling, self.note = limit_bytes, accumulation, enabling, note
        self.probe = probe_for(shape)
        self.optimizer_bytes = OptimizerBytes(workload.model, optimizer)

    def run(self, drop_rates: Sequence[float], clock: Clock | None) -> tuple[tuple[RatePlan, ...], Shape | None]:
        """Predictions in the order of the rates, and the shape that was timed."""
        with self._enabled(0.0, max_activations=None) as handle:
            flops = self._flops(handle)
            plain = self._memory(handle, (False,) * len(handle.branches), None)
            timed_at, seconds, optimizer_s = None, None, None
            if clock is not None:
                timed_at = self._shape_to_time(plain)
                seconds, optimizer_s = self._seconds(handle, timed_at, clock)
        rates = tuple(self._rate(rate, flops, seconds, optimizer_s) for rate in drop_rates)
        return rates, timed_at

    @contextlib.contextmanager
    def _enabled(self, drop_rate: float, **options: Any) -> Iterator[Handle]:
        """The enabled model after its first step, which differs from later ones (`dropbp.engine.truncation`)."""
        model = self.workload.model
        with enable(model, drop_rate, **{**self.enabling, **options}) as handle:
            smallest = self.workload.batch(self.probe.smallest)
            probe_recomputable_blocks(handle, lambda: self.workload.step(smallest))
            self.workload.step(smallest)
            model.zero_grad(set_to_none=True)
            yield handle

    def _rate(self, drop_rate: float, flops: Costs, seconds: Costs | None, optimizer_s: float | None) -> RatePlan:
        self.note(f"counting memory at drop rate {drop_rate:g}")
        with self._enabled(drop_rate) as handle:
            mix, count = MaskMix(handle, self.shape, self.accumulation), self.accumulation
            memories = [memory for mask in mix.peak_memory_masks() for memory in self._memories(handle, mix, mask)]
            length = self.shape.sequence_length
            planned = RatePlan(
                drop_rate=drop_rate,
                dropped_share=mix.dropped_share,
                forward_backward_s=None,
                optimizer_s=None if optimizer_s is None else mix.updated_share() * optimizer_s,
                peak_bytes=_peak(memories, self.shape),
                flops=count * mix.mean(flops.of),
                largest_batch=self._largest(lambda rows: _peak(memories, Shape(rows, length)), MOST_ROWS),
                largest_sequence=self._largest_sequence(memories) if self.workload.has_lengths else None,
            )
            if seconds is None:
                return planned
            # the forward of all branches, from its share of the FLOPs of a step that drops them all
            forward_s = count * seconds.dropped * flops.recomputing / flops.dropped
            spared_s = forward_s * mix.cacheable_share()
            return dataclasses.replace(planned, forward_backward_s=count * mix.mean(seconds.of), spared_s=spared_s)

    def row_bytes(self) -> int:
        """Bytes of the residual stream for one row."""
        with self._enabled(0.0, max_activations=None) as handle:
            first = next(iter(handle.engine.structure.blocks), None)
            if first is None:
                return 0
            seen: list[Any] = []
            hook = handle.model.get_submodule(first).register_forward_hook(lambda *call: seen.append(call[2]))
            shape = self.probe.smallest
            with hook, torch.no_grad():
                self.workload.forward(self.workload.batch(shape))
            stream = next(tensors_in(seen))
            grown = self.shape.sequence_length / shape.sequence_length if self.workload.has_lengths else 1
            return int(stream.nbytes / shape.batch_size * grown)

    # -- memory

    def _memories(self, handle: Handle, mix: MaskMix, mask: Mask) -> list[Memory]:
        """Footprints of steps under a mask, one for each set of gradients that earlier micro-batches may have left."""
        alone = self._memory(handle, mask, mix)
        if self.accumulation == 1:
            return [alone]
        sizes = {n: p.numel() * p.element_size() for n, p in handle.model.named_parameters() if p.requires_grad}
        held = self._footprint(handle, mask, held_gradients=True)
        found = []
        for earlier in {mix.trained(masks, sizes) for masks in mix.earlier_masks(mask)}:
            both = earlier | mix.trained([mask], sizes)
            absent = sum(size for name, size in sizes.items() if name not in both)
            bounds = (Bound(alone.footprint, sum(sizes[n] for n in earlier)), Bound(held, -absent))
            found.append(Memory(bounds, alone.state_bytes, self.optimizer_bytes.step_bytes(both)))
        return found

    def _memory(self, handle: Handle, mask: Mask, mix: MaskMix | None) -> Memory:
        """Memory of steps under a mask, with optimizer states for all that `mix` trains (None: this mask alone)."""
        footprint = self._footprint(handle, mask)
        ever = footprint.trained if mix is None else mix.trained(mix.every, self.optimizer_bytes.names)
        step_bytes = self.optimizer_bytes.step_bytes(footprint.trained)
        return Memory((Bound(footprint, 0),), self.optimizer_bytes.state_bytes(ever), step_bytes)

    def _footprint(self, handle: Handle, mask: Mask, held_gradients: bool = False) -> Footprint:
        def run(shape: Shape) -> None:
            with handle.fixed(mask):
                self.workload.step(self.workload.batch(shape))

        return Footprint(run, self.probe, self.workload, held_gradients)

    def _shape_to_time(self, plain: Memory) -> Shape:
        """The shape to time: the planned one, or as many of its rows as fit in plain training."""
        length = self.shape.sequence_length
        fitting = self._largest(lambda rows: plain.peak_bytes(Shape(rows, length)), self.shape.batch_size)
        return Shape(fitting, length) if fitting else self.probe.largest

    def _largest(self, peak_bytes: Callable[[int], float], most: int) -> int:
        """The largest size up to `most` within the limit; 0 if none is."""
        return largest(lambda size: peak_bytes(size) <= self.limit_bytes, most=most)

    def _largest_sequence(self, memories: Sequence[Memory]) -> int | None:
        if len(self.probe.lengths) == 1:  # too short to tell how memory grows
            return None
        most = _positions(self.workload.model) or MOST_TOKENS
        rows = self.shape.batch_size
        return self._largest(lambda length: _peak(memories, Shape(rows, length)), most)

    # -- time and FLOPs

    def _flops(self, handle: Handle) -> Costs:
        self.note("counting FLOPs")
        counted = Shape(1, self.probe.lengths[-1])
        costs = counted_flops(self.workload, handle, counted)
        branches = _branch_flops(handle, counted), _branch_flops(handle, self.shape)
        return rescaled_flops(costs, counted, self.shape, branches)

    def _seconds(self, handle: Handle, at: Shape, clock: Clock) -> tuple[Costs, float]:
        timing = Timing(self.workload, handle, at, self.device, clock)
        seconds, optimizer_s = timing.run(self.optimizer, self.note)
        return seconds.scaled(_branch_flops(handle, self.shape) / _branch_flops(handle, at)), optimizer_s


@dataclasses.dataclass(frozen=True)
class Bound:
    """A footprint, and the bytes of gradients held in addition to it."""

    footprint: Footprint
    extra_bytes: int


@dataclasses.dataclass(frozen=True)
class Memory:
    """Peak memory of whole steps under one mask, the optimizer's part included.

    The smallest of several `bounds` holds. With gradients of earlier micro-batches the true peak is below two cases
    that can be counted. Added to a step that starts without gradients, they count twice if the step computes them
    again. In a step that starts with all gradients, its own ones exist too early.
    """

    bounds: tuple[Bound, ...]
    state_bytes: int
    optimizer_step_bytes: int

    @property
    def footprint(self) -> Footprint:
        """The footprint of the first bound."""
        return self.bounds[0].footprint

    def peak_bytes(self, shape: Shape) -> int:
        """Peak tensor bytes."""
        return self.state_bytes + min(self._peak_bytes(bound, shape) for bound in self.bounds)

    def _peak_bytes(self, bound: Bound, shape: Shape) -> int:
        updating = bound.footprint.end_bytes(shape) + self.optimizer_step_bytes
        return bound.extra_bytes + max(bound.footprint.peak_bytes(shape), updating)


def _peak(memories: Iterable[Memory], shape: Shape) -> int:
    return max(memory.peak_bytes(shape) for memory in memories)


def _branch_flops(handle: Handle, shape: Shape) -> int:
    return sum(handle.schedule.at(shape).flops)


def _freezing_stem(masks: str, options: dict[str, Any]) -> dict[str, Any]:
    """Freeze the input embedding as drawn masks do: a plan gives its masks by hand, which would leave it trained."""
    if sampler_kind(masks).prefixes and options.get("stem", "auto") == "auto":
        return {**options, "stem": "rest"}
    return options


def _positions(model: nn.Module) -> int | None:
    most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return most if is_integer(most, 1) else None


def _check(model: nn.Module, accumulation: int, memory_limit: int | None) -> None:
    if any(tensor.device.type == "meta" for tensor in model.parameters()):
        raise ConfigError(
            f"{type(model).__name__} has parameters without data (meta device), but planning runs some small steps. "
            "Give it weights on the device to plan for; random ones will do."
        )
    if not is_integer(accumulation, 1):
        raise ConfigError(f"accumulation is {accumulation!r}; it must be a whole number of micro-batches, at least 1.")
    if memory_limit is not None and not (is_number(memory_limit) and 0 < memory_limit <= sys.float_info.max):
        raise ConfigError(f"memory_limit is {short(memory_limit)}; it must be a number of bytes above 0, or None.")
