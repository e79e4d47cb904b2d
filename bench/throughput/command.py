"""Speed and memory of a training step: plain, with DropBP, and like the reference implementation, interleaved.

All variants run in one process. In each round every variant takes one step with a new mask, so a busy machine slows all
of them alike. A step is timed in parts. The optimizer is one of them, as it runs rarely with accumulation. For the
limit (`limits`), a forward without recording is timed as well, and the plain backward is split where the gradient
enters and leaves the blocks. Memory is that of an untimed step of each variant: tensor bytes on CPU, allocator bytes
elsewhere. A variant that runs out of memory is excluded from then on, and the record says so.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from dropbp.device import Device, get_device
from dropbp.errors import ConfigError, MissingDependencyError

from ..common import records
from ..common.models import check_packages
from ..common.options import (
    add_run_arguments,
    add_time_limit,
    check_only,
    device_name,
    limit_of,
    prepare_run,
)
from ..common.presets import DEFAULT_THROUGHPUT, THROUGHPUT, ThroughputPreset, Training, chosen
from ..common.setup import (
    PLAIN,
    SAMPLERS,
    Variant,
    describe_optimizer,
    many_compilations,
)
from .growth import grow
from .rounds import Bench, configuration_of

logger = logging.getLogger(__name__)

KIND = "throughput"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--preset", action="append", choices=tuple(THROUGHPUT), help="what to run; may be repeated")
    parser.add_argument("--only", metavar="TRAINING", help="only this training of the preset, such as full-bf16")
    parser.add_argument("--drop-rates", type=float, nargs="+", metavar="P", help="only these drop rates, and plain")
    parser.add_argument("--rounds", type=int, help="timed steps of each variant")
    growth = parser.add_mutually_exclusive_group()
    growth.add_argument("--no-growth", action="store_true", help="leave out the largest micro-batches")
    growth.add_argument("--growth-only", action="store_true", help="the largest micro-batches alone")
    add_time_limit(parser)
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the presets; finished runs are skipped."""
    prepare_run(args)
    if args.rounds is not None and args.rounds < 1:
        raise ConfigError(f"--rounds {args.rounds} must be at least 1.")
    kind = device_name(args)
    names = args.preset or (("smoke",) if args.smoke else DEFAULT_THROUGHPUT.get(kind, ("smoke",)))
    presets = {name: chosen("preset", THROUGHPUT, name) for name in names}
    check_only(args.only, ((*preset.trainings, *preset.growth) for preset in presets.values()))
    failed = 0
    for name, preset in presets.items():
        rates = tuple(args.drop_rates or preset.drop_rates)
        failed += run_preset(name, replace(preset, rounds=args.rounds or preset.rounds, drop_rates=rates), args)
    return 1 if failed else 0


def run_preset(name: str, preset: ThroughputPreset, args: argparse.Namespace) -> int:
    """Do all runs of a preset and return how many failed. A failed run is recorded and does not stop the others."""
    device = get_device(device_name(args))
    measured = () if args.growth_only else preset.trainings
    grown = () if args.no_growth else preset.growth
    runs = [(_measure, training) for training in measured] + [(grow, training) for training in grown]
    failed = 0
    for measure, training in runs:
        if args.only in (None, training.name):
            failed += not _succeeds(partial(measure, name, preset, training, device, args))
    return failed


def _succeeds(measure: Callable[[], None]) -> bool:
    """Measure; an error is logged and does not stop the other runs. The record holds the details."""
    try:
        measure()
    except (RuntimeError, MissingDependencyError) as error:  # PyTorch raises RuntimeError, also when out of memory
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
    """Plain, DropBP at each rate, and the reference's way where it can run (its masks cannot be compiled)."""
    hows = SAMPLERS if training.compiled else (*SAMPLERS, "detach")
    return [PLAIN, *(Variant(how, rate) for how in hows for rate in preset.drop_rates)]


def _compiler(training: Training) -> Any:
    return many_compilations() if training.compiled else nullcontext()
