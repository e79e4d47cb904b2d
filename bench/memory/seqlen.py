"""The longest sequence that trains with a micro-batch of one, at each drop rate.

With a memory budget it is counted on shapes (`probe`), the same on every machine. On an accelerator it is tried until
memory runs out.
"""

from __future__ import annotations

import argparse
import functools
import logging
from typing import Any

from dropbp.device import get_device
from dropbp.errors import ConfigError, MissingDependencyError

from ..common import records
from ..common.models import check_packages
from ..common.options import add_run_arguments, add_time_limit, check_only, device_name, limit_of, prepare_run, progress
from ..common.presets import DEFAULT_SEQLEN, ENDLESS, SEQLEN, SeqlenPreset, Training, chosen
from ..common.setup import PLAIN, SAMPLERS, Variant
from .probe import Workplace
from .search import Search

logger = logging.getLogger(__name__)

KIND = "seqlen"
GIB = 1 << 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--preset", action="append", choices=tuple(SEQLEN), help="what to run; may be repeated")
    parser.add_argument("--only", metavar="TRAINING", help="only this training of the preset, such as full-bf16")
    parser.add_argument("--drop-rates", type=float, nargs="+", metavar="P", help="only these drop rates, and plain")
    parser.add_argument("--masks", nargs="+", choices=SAMPLERS, help="only these masks")
    parser.add_argument("--budget-gib", type=float, help="memory there is, in GiB; counted presets only")
    add_time_limit(parser)
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the presets; finished runs are skipped."""
    prepare_run(args)
    kind = device_name(args)
    names = args.preset or (("smoke",) if args.smoke else DEFAULT_SEQLEN.get(kind, ("smoke",)))
    presets = {name: chosen("preset", SEQLEN, name) for name in names}
    check_only(args.only, (preset.trainings for preset in presets.values()))
    failed = 0
    for name, preset in presets.items():
        _check_can_run(name, preset, kind)
        trainings = [training for training in preset.trainings if args.only in (None, training.name)]
        failed += sum(not _succeeds(name, preset, training, args) for training in trainings)
    return 1 if failed else 0


def _check_can_run(name: str, preset: SeqlenPreset, kind: str) -> None:
    """On CPU, memory does not run out in reasonable time, so only a search with an upper end is allowed there."""
    if kind == "cpu" and not preset.counted and preset.max_length == ENDLESS:
        counted = [known for known, other in SEQLEN.items() if other.counted]
        raise ConfigError(f"preset {name!r} needs an accelerator; counted on shapes are {', '.join(counted)}.")


def _succeeds(name: str, preset: SeqlenPreset, training: Training, args: argparse.Namespace) -> bool:
    """Measure; a missing package does not stop the other runs."""
    try:
        return _measure(name, preset, training, args)
    except MissingDependencyError as error:
        logger.warning("%s %s was not run: %s", name, training.name, error)
        return False


def _measure(name: str, preset: SeqlenPreset, training: Training, args: argparse.Namespace) -> bool:
    """Search the border of every variant; returns whether no search died."""
    device = get_device("meta" if preset.counted else device_name(args))
    budget_bytes = _budget_bytes(preset, args)
    rates, samplers, narrowed = _narrowed(preset, args)
    configuration = {
        "model": preset.model,
        **training.configuration(),
        "batch_size": 1,
        "drop_rates": list(rates),
        "step": preset.step,
        "max_length": preset.max_length,
        "device": device.name,
        "budget_bytes": budget_bytes,
        "masks": preset.masks,
        **({"couplings": list(samplers)} if samplers != SAMPLERS else {}),
    }
    store, run_name = records.Store(args.output, KIND), f"{name}--{device.name}--{training.name}{narrowed}"
    if not args.again and store.finished(run_name, configuration) is not None:
        return True
    check_packages(training, device.name)
    variants = [PLAIN, *(Variant(how, rate) for how in samplers for rate in rates)]
    with (
        store.run(run_name, configuration, device, goes_on=True) as record,
        progress(len(variants), run_name) as bar,
    ):
        record["budget_is"] = "tensor bytes, counted" if preset.counted else "memory of the device, tried"
        lengths: dict[str, Any] = record.setdefault("lengths", {})
        counted = None if budget_bytes is None else (Workplace(preset.model, training), budget_bytes)
        search = Search(preset.model, "length", 1, preset.step, preset.max_length, True, preset.masks)
        limit, save = limit_of(args), functools.partial(store.save, record)
        for _ in search.every(lengths, variants, training, device.name, limit, save, counted):
            bar.update()
        died = [name for name, found in lengths.items() if "died" in (found["asked"] or [{}])[-1]]
        record["failures"] += [{"variant": name, **_death(lengths[name]["asked"][-1])} for name in died]
    return not died


def _death(entry: dict[str, Any]) -> dict[str, str]:
    return {"type": "the process died", "message": f"status {entry['died']} {' '.join(entry['message'])}", "where": ""}


def _narrowed(preset: SeqlenPreset, args: argparse.Namespace) -> tuple[tuple[float, ...], tuple[str, ...], str]:
    """Drop rates, masks, and a suffix of the run's name if it is not the whole preset."""
    rates = preset.drop_rates if args.drop_rates is None else tuple(args.drop_rates)
    samplers = tuple(args.masks or SAMPLERS)
    for rate in rates:
        if not 0 < rate < 1:
            raise ConfigError(f"--drop-rates {rate:g} must be above 0 and below 1; plain is always run.")
    words = [] if rates == preset.drop_rates else [f"p{rate:g}" for rate in rates]
    words += [] if samplers == SAMPLERS else list(samplers)
    return rates, samplers, "".join(f"--{word}" for word in words)


def _budget_bytes(preset: SeqlenPreset, args: argparse.Namespace) -> int | None:
    if not preset.counted:
        return None
    budget_gib = args.budget_gib or preset.budget_gib
    if not budget_gib or budget_gib <= 0:
        raise ConfigError(f"--budget-gib {budget_gib} must be above 0.")
    return int(budget_gib * GIB)
