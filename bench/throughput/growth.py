"""The largest micro-batch that fits at each drop rate, then steps of that size.

On CPU the variants take turns. On an accelerator each variant has the memory to itself, as in the search for its size.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from dropbp.device import Device, known_bytes

from ..common import records
from ..common.models import check_packages
from ..common.options import (
    TimeLimit,
    limit_of,
    progress,
)
from ..common.presets import ThroughputPreset, Training
from ..common.setup import (
    PLAIN,
    SAMPLERS,
    Lane,
    Variant,
    build_batch,
)
from ..memory.probe import Probe, Workplace, release_memory
from ..memory.search import Search
from .rounds import Bench, Timing, configuration_of

KIND = "growth"
SMALLER, TRIES_AT_BORDER = 15 / 16, 4


def grow(name: str, preset: ThroughputPreset, training: Training, device: Device, args: argparse.Namespace) -> None:
    """Find the largest micro-batch that fits at each rate, then time steps of that size."""
    variants = [PLAIN, *(Variant(how, rate) for how in SAMPLERS for rate in preset.drop_rates)]
    configuration = configuration_of(preset, training, device) | {
        "drop_rates": list(preset.drop_rates),
        "rounds": preset.growth_rounds,
        "budget_micro_batches": preset.growth_budget_micro_batches if device.name == "cpu" else None,
    }
    store, run_name = records.Store(args.output, KIND), f"{name}--{device.name}--{training.name}"
    if not args.again and store.finished(run_name, configuration) is not None:
        return
    check_packages(training, device.name)
    with store.run(run_name, configuration, device, goes_on=True) as record:
        place = Workplace(preset.model, training) if device.name == "cpu" else None
        budget_bytes = device.memory_limit_bytes() if place is None else _growth_budget_bytes(preset, place)
        record["budget_bytes"], record["budget_is"] = budget_bytes, _budget_is(device)
        record["variants"] = {variant.name: asdict(variant) for variant in variants}
        counted = None if place is None else (place, known_bytes(budget_bytes, device))
        sizes, limit, save = record.setdefault("batch_sizes", {}), limit_of(args), partial(store.save, record)
        half = TimeLimit(limit.left_s() / 2)  # the other half is for the steps
        search = Search(preset.model, "batch_size", preset.sequence_length)
        with progress(len(variants), f"{preset.model} {training.name} largest micro-batch") as bar:
            for _ in search.every(sizes, variants, training, device.name, half, save, counted):
                bar.update()
        _time_grown(record, preset, training, variants, device, limit, save)


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
    fitting = [variant for variant in variants if sizes[variant.name]]
    groups = [fitting] if device.name == "cpu" else [[variant] for variant in fitting]
    rounds = preset.growth_rounds + 1  # the first warms up
    with progress(rounds * len(fitting), f"{preset.model} {training.name} largest micro-batches") as bar:
        for place, group in enumerate(groups):
            share = TimeLimit(limit.left_s() / (len(groups) - place))
            _time_together(Bench(preset, training, group, device, record), sizes, preset, share, save, bar)
            release_memory()


def _time_together(
    bench: Bench, sizes: dict[str, int], preset: ThroughputPreset, limit: TimeLimit, save: Callable[[], None], bar: Any
) -> None:
    done = max(len(bench.steps.get(lane.variant.name, ())) for lane in bench.lanes)
    for index in range(preset.growth_rounds + 1 - done):
        before_s = limit.left_s()
        for lane in bench.lanes:
            timing = _step_at_border(bench, lane, sizes, preset)
            if timing is not None:
                timed = {"round": done + index, **timing}
                bench.steps.setdefault(lane.variant.name, []).extend([timed] if index else [])
            bar.update()
        save()
        if index and limit.left_s() < before_s - limit.left_s():
            break


def _step_at_border(bench: Bench, lane: Lane, sizes: dict[str, int], preset: ThroughputPreset) -> Timing | None:
    """Time a step of the size found, or of a slightly smaller one if the allocator is fragmented."""
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
