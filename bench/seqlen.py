"""The longest sequence that trains with a micro-batch of one, at each drop rate.

With a budget of memory it is counted on shapes (`probe`), the same on every machine; on an accelerator it is tried,
until memory is out.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import asdict
from typing import Any

from dropbp.device import get_device
from dropbp.errors import ConfigError

from . import records
from .options import add_run_arguments, add_time_limit, device_name, limit_of, progress, settle
from .presets import DEFAULT_SEQLEN, SEQLEN, SeqlenPreset, Training, chosen
from .probe import Probe, Workplace, largest_counted, tried_in_a_process
from .setup import COUPLINGS, PLAIN, Variant

logger = logging.getLogger(__name__)

KIND = "seqlen"
GIB = 1 << 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--preset", action="append", choices=tuple(SEQLEN), help="what to run; may be repeated")
    parser.add_argument("--budget-gib", type=float, help="memory there is, in GiB; counted presets only")
    add_time_limit(parser)
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the presets; what is finished already is left as it is."""
    settle(args)
    kind = device_name(args)
    names = args.preset or (("smoke",) if args.smoke else DEFAULT_SEQLEN.get(kind, ("smoke",)))
    for name in names:
        preset = chosen("preset", SEQLEN, name)
        if kind == "cpu" and not preset.counted:
            counted = [known for known, other in SEQLEN.items() if other.counted]
            raise ConfigError(f"preset {name!r} needs an accelerator; counted on shapes are {', '.join(counted)}.")
        for training in preset.trainings:
            _measure(name, preset, training, args)
    return 0


def _measure(name: str, preset: SeqlenPreset, training: Training, args: argparse.Namespace) -> None:
    device = get_device("meta" if preset.counted else device_name(args))
    budget_bytes = _budget_bytes(preset, args)
    configuration = {
        "model": preset.model,
        **asdict(training),
        "batch_size": 1,
        "drop_rates": list(preset.drop_rates),
        "step": preset.step,
        "max_length": preset.max_length,
        "device": device.name,
        "budget_bytes": budget_bytes,
        "masks": preset.masks,
    }
    store, run_name = records.Store(args.output, KIND), f"{name}--{device.name}--{training.name}"
    if not args.again and store.finished(run_name, configuration) is not None:
        return
    variants = [PLAIN, *(Variant(how, rate) for how in COUPLINGS for rate in preset.drop_rates)]
    with store.run(run_name, configuration, device) as record, progress(len(variants), run_name) as bar:
        record["budget_is"] = "tensor bytes, counted" if preset.counted else "memory of the device, tried"
        record["lengths"] = {}
        place, limit = Workplace(preset.model, training) if preset.counted else None, limit_of(args)
        for index, variant in enumerate(variants):
            share_s = limit.left_s() / (len(variants) - index)
            record["lengths"][variant.name] = (
                longest_tried(preset, training, variant, device.name, share_s)
                if place is None or budget_bytes is None
                else longest_counted(preset, place, variant, budget_bytes)
            )
            bar.update()


def _budget_bytes(preset: SeqlenPreset, args: argparse.Namespace) -> int | None:
    if not preset.counted:
        return None
    budget_gib = args.budget_gib or preset.budget_gib
    if not budget_gib or budget_gib <= 0:
        raise ConfigError(f"--budget-gib {budget_gib} must be above 0.")
    return int(budget_gib * GIB)


def longest_counted(preset: SeqlenPreset, place: Workplace, variant: Variant, budget_bytes: int) -> dict[str, Any]:
    """The longest sequence whose step is within the budget, and the peak of every length that was counted."""
    probe = Probe(place, variant, masks=preset.masks)
    length, counted = largest_counted(probe, lambda size: (1, size), budget_bytes, preset.step, preset.max_length)
    return {"length": length, "asked": counted}


def longest_tried(
    preset: SeqlenPreset, training: Training, variant: Variant, device: str, seconds: float
) -> dict[str, Any]:
    """The longest sequence that trains on an accelerator, of those that could be tried in so long, and all of them."""
    task = {"vary": "sequence_length", "fixed": 1, "step": preset.step, "most": preset.max_length}
    length, tried = tried_in_a_process(preset.model, training, variant, device, {**task, "accumulated": True}, seconds)
    return {"length": length, "asked": tried}
