"""`dropbp bench real`: a real chat model, real questions, a decaying learning rate; loss and accuracy at equal FLOPs.

Each run writes one JSON file when it ends; finished runs are skipped. Accuracies and losses are measured on rows that
no run trains on. These rows are part of the original validation and test sets, so the figures must not be compared with
published scores.
"""

from __future__ import annotations

import argparse
import functools
from dataclasses import asdict
from pathlib import Path

import torch

from dropbp.cli.libraries import quiet
from dropbp.device import get_device

from ..common import records
from ..common.options import add_run_arguments, device_name, prepare_run, say
from . import tables, training
from .presets import PRESETS
from .tasks import TASKS
from .training import Run, Source, train

KIND = "real"
FIGURES = ("loss", "letter_loss", "accuracy")
_SETTINGS = ("WARMUP_SHARE", "WEIGHT_DECAY", "CLIP_NORM")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--preset", choices=tuple(PRESETS), default="coarse", help="which runs (%(default)s)")
    parser.add_argument(
        "--shard", type=_shard, default=(0, 1), metavar="I/N", help="only each N-th run, from run I on, counted from 0"
    )
    parser.add_argument("--tables", action="store_true", help="train nothing; make the tables from the files")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where tables go (default: %(default)s)")
    parser.set_defaults(threads=1)
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Do all unfinished runs."""
    prepare_run(args)
    if args.tables:
        tables.write(records.read_all(args.output, KIND), args.docs)
        return 0
    store = records.Store(args.output, KIND)
    if device_name(args) != "cpu":
        torch.set_float32_matmul_precision("high")  # as is usual on accelerators; each record says so
    with quiet():
        first, every = args.shard
        wanted = PRESETS[args.preset][first::every]
        missing = [run for run in wanted if args.again or store.finished(run.name, configuration(run)) is None]
        source = Source(args.device) if missing else None
        for run in missing:
            assert source is not None
            with store.run(run.name, configuration(run), get_device(args.device)) as record:
                record["float32_matmul_precision"] = torch.get_float32_matmul_precision()
                record |= train(run, source, functools.partial(_say, run))
            figures = {name: round(record[name], 4) for name in FIGURES if name in record}
            _say(run, None, f"{figures}, CPU {sum(record['cpu_s']):.0f} s")
    return 0


def _shard(text: str) -> tuple[int, int]:
    first, _, every = text.partition("/")
    if not (first.isdecimal() and every.isdecimal() and int(first) < int(every)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I below N, such as 0/4")
    return int(first), int(every)


def configuration(run: Run) -> dict[str, object]:
    """The configuration that identifies a run."""
    settings = {name.lower(): getattr(training, name) for name in _SETTINGS}
    task = TASKS[run.task]
    rows = {"batch": task.batch_size, "longest": task.longest, "held_out": task.held_out}
    return {**asdict(run), **settings, **rows, "model": task.name}


def _say(run: Run, step: int | None, text: str = "") -> None:
    if step is None or step % 10 == 0:
        say(f"{run.name}: {f'step {step}' if step is not None else text}")
