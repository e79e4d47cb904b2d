"""Rounds of steps: each variant takes one step per round, timed in parts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dropbp.device import Device
from dropbp.memory import track_tensor_bytes

from ..common import records
from ..common.models import build_model, decoder_layers
from ..common.options import (
    TimeLimit,
    progress,
)
from ..common.presets import ThroughputPreset, Training
from ..common.setup import (
    PLAIN,
    Lane,
    Variant,
    build_batch,
    build_optimizer,
    compiler_of,
    loss_of,
)
from ..memory.probe import (
    is_out_of_memory,
    release_memory,
)

T = TypeVar("T")
SPLIT, UNRECORDED = "split", "unrecorded"
Timing = dict[str, Any]


def configuration_of(preset: ThroughputPreset, training: Training, device: Device) -> dict[str, Any]:
    """The configuration that identifies a run."""
    return {
        "model": preset.model,
        **training.configuration(),
        "batch_size": preset.batch_size,
        "sequence_length": preset.sequence_length,
        "device": device.name,
        "threads": torch.get_num_threads() if device.name == "cpu" else None,
    }


class Bench:
    """All variants over one set of parameters, with one optimizer.

    A record that already holds rounds is extended, with other masks.
    """

    def __init__(
        self,
        preset: ThroughputPreset,
        training: Training,
        variants: Sequence[Variant],
        device: Device,
        record: records.Record | None = None,
    ) -> None:
        record = {} if record is None else record
        self.device = device
        self.save: Callable[[], None] = lambda: None
        self.steps: dict[str, list[Timing]] = record.setdefault("steps", {})
        self.warmup_steps: dict[str, list[Timing]] = record.setdefault("warmup_steps", {})
        self.failures: list[dict[str, Any]] = record.setdefault("failures", [])
        self.rounds_done = max((len(steps) for steps in self.steps.values()), default=0)
        self.left_out = {failure["variant"] for failure in self.failures if "variant" in failure}
        seed = len(record.get("continued", ()))
        self.model = build_model(preset.model, training, device.name)
        backend = compiler_of(preset.model)
        self.lanes = [Lane(variant, self.model, device, training.compiled, seed, backend) for variant in variants]
        self.optimizer = build_optimizer(self.model, training.tuning)
        self.ids_BS = build_batch(preset.model, preset.batch_size, preset.sequence_length, device.name)
        # Hooks that synchronize the device would slow a plain step down; on CPU they cost nothing.
        self.splits_plain = device.name == "cpu"

    def run_rounds(self, warmup_rounds: int, rounds: int, title: str, limit: TimeLimit) -> tuple[int, int]:
        """Run all variants once per round, in rotating order, along with the parts that the limit of a step needs.

        Rounds stop early, after at least one that counts, if another one would exceed the time limit.

        Returns:
            Number of graphs compiled in the warm-up, and in the rounds after it.

        Raises:
            torch.OutOfMemoryError: no variant fits into memory.
        """
        turns, counts = self._turns(), [self.device.compile_count()]
        with progress((warmup_rounds + rounds) * len(turns), title) as bar:
            self._rounds(turns, range(warmup_rounds), self.warmup_steps, TimeLimit(), bar)
            counts.append(self.device.compile_count())
            first = max(warmup_rounds, 1 + max(self._rounds_seen(), default=-1))
            self._rounds(turns, range(first, first + rounds), self.steps, limit, bar)
        start, warm, end = (*counts, self.device.compile_count())
        return warm - start, end - warm

    def _rounds_seen(self) -> Iterable[int]:
        return (steps[-1]["round"] for kept in (self.warmup_steps, self.steps) for steps in kept.values() if steps)

    def _rounds(
        self,
        turns: dict[str, Callable[[], Timing]],
        numbers: range,
        kept: dict[str, list[Timing]],
        limit: TimeLimit,
        bar: Any,
    ) -> None:
        names = list(turns)
        for number in numbers:
            before_s, found = limit.left_s(), {}
            for name in [*names[number % len(names) :], *names[: number % len(names)]] if number else names:
                if name not in self.left_out:
                    with self.or_left_out(name):
                        found[name] = turns[name]()
                bar.update()
            for name, timing in found.items():
                kept.setdefault(name, []).append({"round": number, **timing})
            if not any(lane.variant.name not in self.left_out for lane in self.lanes):
                raise torch.OutOfMemoryError("no variant has memory enough for a step")
            self.save()
            if limit.left_s() < before_s - limit.left_s():
                break

    @contextmanager
    def or_left_out(self, name: str) -> Iterator[None]:
        """If memory runs out, record it, free the memory of the step, and exclude the variant from now on."""
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self.failures.append({"variant": name, **records.describe_error(error)})
            self.left_out.add(name)
        if name in self.left_out:  # outside the `except`, whose error keeps the tensors of all its frames alive
            self.optimizer.zero_grad(set_to_none=True)
            release_memory()

    def measure_memory(self, memory: dict[str, Any]) -> None:
        """Measure the peak memory of each variant that has none yet."""
        for lane in self.lanes:
            name = lane.variant.name
            if name not in memory and name not in self.left_out:
                with self.or_left_out(name):
                    memory[name] = self.peak(lane)
                self.save()

    def _turns(self) -> dict[str, Callable[[], Timing]]:
        turns: dict[str, Callable[[], Timing]] = {}
        for lane in self.lanes:
            split = lane.variant == PLAIN and self.splits_plain
            turns[lane.variant.name] = lambda lane=lane, split=split: self.step(lane, split)  # type: ignore[misc]
        plain = self.lanes[0]
        if not self.splits_plain:
            turns[SPLIT] = lambda: self.step(plain, True)
        turns[UNRECORDED] = lambda: self.unrecorded(plain)
        return turns

    def step(self, lane: Lane, split: bool = False, ids_BS: Tensor | None = None) -> Timing:
        """Run one training step, timed in parts."""
        ids_BS = self.ids_BS if ids_BS is None else ids_BS
        watch = BackwardWatch(lane.model, self.device) if split else None
        with watch or nullcontext():
            loss, forward = timed(self.device, lambda: loss_of(lane.model, ids_BS))
            began_s = time.perf_counter()
            _, backward = timed(self.device, loss.backward)
        del loss
        _, optimizer = timed(self.device, self._update)
        timing = {**_named("forward", forward), **_named("backward", backward), **_named("optimizer", optimizer)}
        if watch is not None:
            timing["blocks_backward_s"] = watch.blocks_backward_s(began_s + backward[0])
        if lane.mask is not None:
            timing |= {"mask": lane.mask, "dropped_share": lane.dropped_share}
        return timing

    def _update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def unrecorded(self, lane: Lane) -> Timing:
        """Time a forward without recording."""
        with torch.no_grad():
            _, forward = timed(self.device, lambda: loss_of(lane.model, self.ids_BS))
        return _named("forward", forward)

    def peak(self, lane: Lane) -> dict[str, Any]:
        """Peak memory of an extra step with the most expensive mask, and that of weights and optimizer before it."""
        measured = [self._peak_with(lane, mask) for mask in lane.peak_memory_masks(1)]
        return max(measured, key=lambda one: int(one["peak_bytes"]))

    def _peak_with(self, lane: Lane, mask: Sequence[bool] | None) -> dict[str, Any]:
        with lane.masked(mask):
            if self.device.name != "cpu" and self.device.max_memory_allocated_bytes() is not None:
                self.device.reset_peak_memory()
                resident_bytes = self.device.memory_allocated_bytes()
                self.step(lane)
                peak_bytes, measure = self.device.max_memory_allocated_bytes(), "allocator"
            else:
                with track_tensor_bytes(self.model, self.optimizer, self.ids_BS) as tracked:
                    resident_bytes = tracked.live_bytes
                    self.step(lane)
                peak_bytes, measure = tracked.peak_bytes, "tensor bytes"
        return {"peak_bytes": peak_bytes, "resident_bytes": resident_bytes, "is": measure, "mask": lane.mask}


def timed(device: Device, work: Callable[[], T]) -> tuple[T, tuple[float, float]]:
    """The result of the work, its wall time, and its processor time over all threads of this process, in seconds."""
    device.synchronize()
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    result = work()
    device.synchronize()
    return result, (time.perf_counter() - wall_s, time.process_time() - cpu_s)


def _named(part: str, seconds: tuple[float, float]) -> Timing:
    return {f"{part}_s": seconds[0], f"{part}_cpu_s": seconds[1]}


class BackwardWatch:
    """Records when the gradient enters the last block and when it leaves the first, in a plain step."""

    def __init__(self, model: nn.Module, device: Device) -> None:
        self.layers, self.device = decoder_layers(model), device
        self.entered_s: float | None = None
        self.left_s: float | None = None

    def __enter__(self) -> BackwardWatch:
        self._hooks = [
            self.layers[0].register_forward_pre_hook(self._at_first, with_kwargs=True),
            self.layers[-1].register_forward_hook(self._at_last),
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _at_first(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream = args[0] if args else kwargs["hidden_states"]
        if stream.requires_grad and stream.grad_fn is not None:
            stream.register_hook(self._leaving)

    def _at_last(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        stream = output[0] if isinstance(output, tuple) else output
        if stream.requires_grad:
            stream.register_hook(self._entering)

    def _entering(self, gradient: Tensor) -> None:
        self.entered_s = self.entered_s or self._now_s()

    def _leaving(self, gradient: Tensor) -> None:
        self.left_s = self._now_s()

    def _now_s(self) -> float:
        self.device.synchronize()
        return time.perf_counter()

    def blocks_backward_s(self, ended_s: float) -> float:
        """Seconds between the two; until the end of the backward if nothing below the first block needs a gradient."""
        if self.entered_s is None:
            return 0.0
        return (self.left_s or ended_s) - self.entered_s
