"""Options shared by the parts of the bench, and progress bars."""

from __future__ import annotations

import argparse
import math
import sys
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from dropbp.errors import ConfigError

from .presets import Training
from .records import RESULTS

RUN_MINUTES = 10.0


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to run, and where results go."""
    parser.add_argument("--device", default="cpu", help="cpu, cuda, hpu; never replaced by another one (%(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="result files (bench/results)")
    parser.add_argument("--again", action="store_true", help="also runs that are finished already")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that everything works")
    parser.add_argument("--threads", type=int, help="threads of PyTorch on CPU (as the environment says)")


def add_time_limit(parser: argparse.ArgumentParser) -> None:
    """How long a run may take."""
    parser.add_argument(
        "--minutes", type=float,
        help=f"a run, which is one result file, stops by then with what it has ({RUN_MINUTES:g} on an accelerator)",
    )  # fmt: skip


def check_only(only: str | None, trainings: Iterable[Iterable[Training]]) -> None:
    """Raises ConfigError if `--only` names none of these trainings."""
    known = dict.fromkeys(training.name for each in trainings for training in each)
    if only is not None and only not in known:
        raise ConfigError(f"--only {only!r} is not in the preset; it has {', '.join(known)}.")


def limit_of(args: argparse.Namespace) -> TimeLimit:
    """The time limit of a run that begins now; unlimited on CPU, where shapes are counted and models are small."""
    minutes = args.minutes if args.minutes is not None else math.inf if device_name(args) == "cpu" else RUN_MINUTES
    if minutes <= 0:
        raise ConfigError(f"--minutes {args.minutes:g} must be above 0.")
    return TimeLimit(60 * minutes)


class TimeLimit:
    """A number of seconds from now on."""

    def __init__(self, seconds: float = math.inf) -> None:
        self._ends_s = time.monotonic() + seconds

    def left_s(self) -> float:
        """Seconds left; negative once the limit has passed."""
        return self._ends_s - time.monotonic()


def prepare_run(args: argparse.Namespace) -> None:
    """Set the number of threads, and silence warnings of libraries."""
    if args.threads is not None:
        if args.threads < 1:
            raise ConfigError(f"--threads {args.threads} must be at least 1.")
        torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def device_name(args: argparse.Namespace) -> str:
    """The device's name, without an index."""
    return str(args.device).partition(":")[0]


def progress(total: int, title: str) -> Any:
    """A progress bar on standard error; silent if that is not a terminal."""
    from tqdm import tqdm

    return tqdm(total=total, desc=title, disable=not sys.stderr.isatty(), leave=False)


def say(text: str) -> None:
    """Print a line on standard error at once."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
