"""Speed and memory of a training step: plain, with DropBP, and in the reference's way, taking turns in one process.

Every round gives each variant one step with a new mask, so that a busy machine slows all of them alike. A step is timed
in parts, the optimizer apart: with accumulation it is rare. Beside them runs a forward without recording, and the plain
backward is split where the gradient enters and leaves the blocks: what is needed for the limit (`limits`). Memory is
taken from an untimed step of each variant, in tensor bytes on CPU and from the allocator elsewhere. A variant that runs
out of memory is left out from then on, and the record says so.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dropbp.device import Device, get_device, known_bytes
from dropbp.errors import ConfigError, MissingDependencyError
from dropbp.memory import track_tensor_bytes

from ..common import records
from ..common.options import (
    TimeLimit,
    add_run_arguments,
    add_time_limit,
    check_only,
    device_name,
    limit_of,
    progress,
    settle,
)
from ..common.presets import DEFAULT_THROUGHPUT, THROUGHPUT, ThroughputPreset, Training, chosen
from ..common.setup import (
    PLAIN,
    SAMPLERS,
    Lane,
    Variant,
    build_batch,
    build_model,
    build_optimizer,
    check_packages,
    compiler_of,
    decoder_layers,
    describe_optimizer,
    loss_of,
    many_compilations,
)
from ..memory.probe import (
    Probe,
    Workplace,
    is_border,
    is_out_of_memory,
    largest_batch,
    largest_batch_tried,
    release_memory,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")
KIND, GROWTH_KIND = "throughput", "growth"
SPLIT, UNRECORDED = "split", "unrecorded"
SMALLER, TRIES_AT_BORDER = 15 / 16, 4
Timing = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--preset", action="append", choices=tuple(THROUGHPUT), help="what to run; may be repeated")
    parser.add_argument("--only", metavar="TRAINING", help="only this training of the preset, such as full-bf16")
    parser.add_argument("--rounds", type=int, help="timed steps of each variant")
    growth = parser.add_mutually_exclusive_group()
    growth.add_argument("--no-growth", action="store_true", help="leave out the largest micro-batches")
    growth.add_argument("--growth-only", action="store_true", help="the largest micro-batches alone")
    add_time_limit(parser)
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the presets; what is finished already is left as it is."""
    settle(args)
    if args.rounds is not None and args.rounds < 1:
        raise ConfigError(f"--rounds {args.rounds} must be at least 1.")
    kind = device_name(args)
    names = args.preset or (("smoke",) if args.smoke else DEFAULT_THROUGHPUT.get(kind, ("smoke",)))
    presets = {name: chosen("preset", THROUGHPUT, name) for name in names}
    check_only(args.only, ((*preset.trainings, *preset.growth) for preset in presets.values()))
    failed = 0
    for name, preset in presets.items():
        failed += run_preset(name, replace(preset, rounds=args.rounds or preset.rounds), args)
    return 1 if failed else 0


def run_preset(name: str, preset: ThroughputPreset, args: argparse.Namespace) -> int:
    """All runs of a preset. One that fails is recorded, and the next is run; returns how many failed."""
    device = get_device(device_name(args))
    measured = () if args.growth_only else preset.trainings
    grown = () if args.no_growth else preset.growth
    runs = [(_measure, training) for training in measured] + [(_grow, training) for training in grown]
    failed = 0
    for measure, training in runs:
        if args.only in (None, training.name):
            failed += not _succeeds(partial(measure, name, preset, training, device, args))
    return failed


def _succeeds(measure: Callable[[], None]) -> bool:
    """The other runs do not suffer from one that fails; its record says what happened."""
    try:
        measure()
    except (RuntimeError, MissingDependencyError) as error:  # the first is what PyTorch raises, out of memory included
        logger.warning("a run failed: %s", error)
        return False
    return True


# -- one run


def _measure(name: str, preset: ThroughputPreset, training: Training, device: Device, args: argparse.Namespace) -> None:
    variants = variants_of(preset, training)
    configuration = configuration_of(preset, training, device) | {
        "drop_rates": list(preset.drop_rates),
        "rounds": preset.rounds,
        "warmup_rounds": preset.warmup_rounds,
    }
    store, run_name = records.Store(args.output, KIND), f"{name}--{device.name}--{training.name}"
    if not args.again and store.finished(run_name, configuration) is not None:
        return
    check_packages(training, device.name)
    limit, title = limit_of(args), f"{name} {training.name}"
    with store.run(run_name, configuration, device, goes_on=True) as record, _compiler(training):
        bench = Bench(preset, training, variants, device, record)
        bench.save = lambda: store.save(record)
        record["parameters"] = sum(p.numel() for p in bench.model.parameters())
        record["optimizer"] = describe_optimizer(bench.optimizer)
        record["variants"] = {variant.name: asdict(variant) for variant in variants}
        record["compiled_graphs"], _ = bench.run_rounds(preset.warmup_rounds, 0, title, limit)
        bench.measure_memory(record.setdefault("memory", {}))
        _, late = bench.run_rounds(0, preset.rounds - bench.rounds_done, title, limit)
        record["compiled_graphs_late"] = record.get("compiled_graphs_late", 0) + late


def variants_of(preset: ThroughputPreset, training: Training) -> list[Variant]:
    """Plain and DropBP at each rate; the reference's way, too, where it can run (its masks cannot be compiled)."""
    hows = SAMPLERS if training.compiled else (*SAMPLERS, "detach")
    return [PLAIN, *(Variant(how, rate) for how in hows for rate in preset.drop_rates)]


def configuration_of(preset: ThroughputPreset, training: Training, device: Device) -> dict[str, Any]:
    """What makes a run what it is."""
    return {
        "model": preset.model,
        **training.configuration(),
        "batch_size": preset.batch_size,
        "sequence_length": preset.sequence_length,
        "device": device.name,
        "threads": torch.get_num_threads() if device.name == "cpu" else None,
    }


def _compiler(training: Training) -> Any:
    return many_compilations() if training.compiled else nullcontext()


class Bench:
    """All variants over one set of parameters, and one optimizer.

    Given a record that holds rounds already, further ones go into it, with other masks.
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
        # Hooks that wait for the device would slow a plain step down; where waiting is free they cost nothing.
        self.splits_plain = device.name == "cpu"

    def run_rounds(self, warmup_rounds: int, rounds: int, title: str, limit: TimeLimit) -> tuple[int, int]:
        """Every round all variants, each time in another order, and what the limit of a step needs.

        Rounds end early, after one that counts, where another one would pass the time limit.

        Returns:
            How many graphs the warm-up compiled, and how many the rounds after it.

        Raises:
            torch.OutOfMemoryError: no variant has memory enough.
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
        """If memory is out, note it, give back what the step held, and leave the variant out from now on."""
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self.failures.append({"variant": name, **records.describe_error(error)})
            self.left_out.add(name)
        if name in self.left_out:  # out of the `except`, whose error keeps the tensors of all its frames alive
            self.optimizer.zero_grad(set_to_none=True)
            release_memory()

    def measure_memory(self, memory: dict[str, Any]) -> None:
        """Peak memory of each variant that was not measured yet."""
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
        """One training step, timed in parts."""
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
        """A forward that records nothing."""
        with torch.no_grad():
            _, forward = timed(self.device, lambda: loss_of(lane.model, self.ids_BS))
        return _named("forward", forward)

    def peak(self, lane: Lane) -> dict[str, Any]:
        """Peak memory of a further step with a mask that needs most, and what weights and optimizer hold before it."""
        measured = [self._peak_with(lane, mask) for mask in lane.greedy_masks(1)]
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
    """What the work returns, and its seconds: on the wall, and of this process on all processors."""
    device.synchronize()
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    result = work()
    device.synchronize()
    return result, (time.perf_counter() - wall_s, time.process_time() - cpu_s)


def _named(part: str, seconds: tuple[float, float]) -> Timing:
    return {f"{part}_s": seconds[0], f"{part}_cpu_s": seconds[1]}


class BackwardWatch:
    """Notes when the gradient enters the last block and when it leaves the first, in a plain step."""

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
        """Seconds between the two; until the end where nothing below the first block needs a gradient."""
        if self.entered_s is None:
            return 0.0
        return (self.left_s or ended_s) - self.entered_s


# -- the largest micro-batch


def _grow(name: str, preset: ThroughputPreset, training: Training, device: Device, args: argparse.Namespace) -> None:
    """The largest micro-batch that fits at each rate, then steps of that size, in turns."""
    variants = [PLAIN, *(Variant(how, rate) for how in SAMPLERS for rate in preset.drop_rates)]
    configuration = configuration_of(preset, training, device) | {
        "drop_rates": list(preset.drop_rates),
        "rounds": preset.growth_rounds,
        "budget_micro_batches": preset.growth_budget_micro_batches if device.name == "cpu" else None,
    }
    store, run_name = records.Store(args.output, GROWTH_KIND), f"{name}--{device.name}--{training.name}"
    if not args.again and store.finished(run_name, configuration) is not None:
        return
    check_packages(training, device.name)
    with store.run(run_name, configuration, device, goes_on=True) as record:
        place = Workplace(preset.model, training) if device.name == "cpu" else None
        budget_bytes = device.memory_limit_bytes() if place is None else _growth_budget_bytes(preset, place)
        record["budget_bytes"], record["budget_is"] = budget_bytes, _budget_is(device)
        record["variants"] = {variant.name: asdict(variant) for variant in variants}
        sizes, limit = record.setdefault("batch_sizes", {}), limit_of(args)
        share_s = limit.left_s() / (2 * len(variants))  # half for sizes, half for steps
        for variant in variants:
            known = sizes.get(variant.name, {}).get("asked", [])
            if known and is_border(known):
                continue

            def note(found: dict[str, Any], name: str = variant.name) -> None:
                sizes[name] = {**found, "asked": [*found["asked"], {"ended_after_s": None}]}
                store.save(record)

            sizes[variant.name] = (
                largest_batch_tried(preset, training, variant, device.name, share_s, known, note)
                if place is None
                else largest_batch(preset, place, variant, known_bytes(budget_bytes, device))
            )
            store.save(record)
        _time_grown(record, preset, training, variants, device, limit, lambda: store.save(record))


def _growth_budget_bytes(preset: ThroughputPreset, place: Workplace) -> int:
    plain = Probe(place, PLAIN, accumulated=False)
    return plain.peak_bytes(round(preset.batch_size * preset.growth_budget_micro_batches), preset.sequence_length)


def _budget_is(device: Device) -> str:
    return "tensor bytes of plain training" if device.name == "cpu" else "memory of the device"


def _time_grown(
    record: records.Record,
    preset: ThroughputPreset,
    training: Training,
    variants: Sequence[Variant],
    device: Device,
    limit: TimeLimit,
    save: Callable[[], None],
) -> None:
    sizes = record.setdefault(
        "timed_sizes", {name: found["batch_size"] for name, found in record["batch_sizes"].items()}
    )
    bench = Bench(preset, training, [v for v in variants if sizes[v.name]], device, record)
    rounds = preset.growth_rounds + 1  # the first warms up
    with progress(rounds * len(bench.lanes), f"{preset.model} {training.name} largest micro-batches") as bar:
        for index in range(rounds - bench.rounds_done):
            before_s = limit.left_s()
            for lane in bench.lanes:
                timing = _step_at_border(bench, lane, sizes, preset)
                if timing is not None:
                    timed = {"round": bench.rounds_done + index, **timing}
                    bench.steps.setdefault(lane.variant.name, []).extend([timed] if index else [])
                bar.update()
            save()
            if index and limit.left_s() < before_s - limit.left_s():
                break


def _step_at_border(bench: Bench, lane: Lane, sizes: dict[str, int], preset: ThroughputPreset) -> Timing | None:
    """A step of the size found; a little smaller where other variants beside it leave the allocator in fragments."""
    name = lane.variant.name
    for _ in range(TRIES_AT_BORDER):
        if name in bench.left_out:
            return None
        ids_BS = build_batch(preset.model, sizes[name], preset.sequence_length, bench.device.name)
        with bench.or_left_out(name):
            return bench.step(lane, ids_BS=ids_BS)
        if sizes[name] > 1:
            bench.left_out.discard(name)
            sizes[name] = max(1, int(SMALLER * sizes[name]))
    bench.left_out.add(name)
    return None
