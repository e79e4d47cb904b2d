"""`dropbp bench all`: every part that suits the device, then tables, and how long each part took.

Parts that measure time run one after another, alone on the machine. Parts that only count (bytes on shapes, compiled
graphs) run last and side by side, each in a process of its own with one thread.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from dropbp.device import get_device
from dropbp.errors import DropBPError

from .common.options import device_name, say
from .common.processes import Answer, Worker, stoppable
from .common.records import FILES, RESULTS
from .parts import PARTS, Part, main

EPILOG = """\
Finished runs are kept and not run again, so a stopped run continues where it was. A checkout has the published
result files in bench/results: there `all` runs only what is missing. To reproduce them:
  dropbp bench all --output DIR   into another folder, pages and plots into DIR/docs; continues there if it was stopped
  dropbp bench all --again        in place; git diff shows what differs
  dropbp bench all --part seqlen  one part only
Larger presets: dropbp bench throughput --preset NAME, dropbp bench learning --preset full, and so on (--help)."""


@dataclass(frozen=True)
class Outcome:
    """How a part ended."""

    name: str
    succeeded: bool
    seconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.epilog, parser.formatter_class = EPILOG, argparse.RawDescriptionHelpFormatter
    names = [name for name, part in PARTS.items() if part.devices]
    parser.add_argument("--device", default="cpu", help="cpu, cuda, hpu; never replaced by another one (%(default)s)")
    parser.add_argument("--part", action="append", dest="parts", choices=names, help="only this part; may be repeated")
    parser.add_argument("--output", type=Path, metavar="DIR", help="result files (bench/results)")
    parser.add_argument("--again", action="store_true", help="also runs that are finished already")
    parser.add_argument(
        "--minutes", type=float,
        help="each run stops by then with what it has (10 on accelerators); of the plan for a GPU, how much is done",
    )  # fmt: skip
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, some parts, results thrown away")


def run(args: argparse.Namespace) -> int:
    """Run every part that suits the device. If one fails, the others still run.

    Raises:
        DeviceError: the device is not available.
    """
    get_device(args.device)
    chosen = {name: part for name, part in PARTS.items() if _is_wanted(name, part, args)}
    with _folder(args) as root:
        _note_finished(args, root)
        kind = device_name(args)
        beside = [name for name, part in chosen.items() if kind in part.counts_on]
        outcomes = [_run_one(name, args, root) for name in chosen if name not in beside]
        outcomes += run_beside({name: options_of(name, args, root) for name in beside})
        if not args.smoke:
            outcomes.append(_guarded("tables", lambda: main(["tables", *_tables_options(args, root)])))
    _report(outcomes)
    return 0 if all(outcome.succeeded for outcome in outcomes) else 1


def _is_wanted(name: str, part: Part, args: argparse.Namespace) -> bool:
    suits = device_name(args) in part.devices and (part.smoke or not args.smoke)
    return suits and (not args.parts or name in args.parts)


@contextmanager
def _folder(args: argparse.Namespace) -> Iterator[Path]:
    """The folder for results; for `--smoke` a temporary one, unless one was named."""
    if args.smoke and args.output is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
    else:
        yield args.output or RESULTS


def _note_finished(args: argparse.Namespace, root: Path) -> None:
    count = sum(1 for path in root.rglob(FILES) if path.parent.name != "unfinished") if root.is_dir() else 0
    if count and not args.again:
        say(f"{root} holds {count} result files; finished runs are kept. To measure again: --again, or --output DIR.")


# -- one part


def options_of(name: str, args: argparse.Namespace, root: Path) -> list[str]:
    """The options passed to a part."""
    if name == "learning":
        return _learning_options(args, root)
    options = ["--output", str(root)]
    options += ["--again"] if args.again else []
    options += ["--smoke"] if args.smoke else []
    if name in ("throughput", "seqlen", "gpu"):
        options += ["--device", args.device]
        minutes = "inf" if name == "gpu" and args.minutes is None else args.minutes
        options += ["--minutes", str(minutes)] if minutes is not None else []
    if name == "recipes" and args.output is not None:
        options += ["--docs", str(root / "docs" / "recipes.md")]
    return options


def _learning_options(args: argparse.Namespace, root: Path) -> list[str]:
    """With `--again`, use a separate folder: the short preset must not replace published runs, which are longer."""
    if args.again and args.output is None:
        folder = root / "learning-quick"
        return ["--output", str(folder), "--docs", str(folder / "docs")]
    options = ["--output", str(root / "learning"), *([] if args.again else ["--resume"])]
    return options if args.output is None else [*options, "--docs", str(root / "docs")]


def _tables_options(args: argparse.Namespace, root: Path) -> list[str]:
    return [] if args.output is None else ["--output", str(root), "--docs", str(root / "docs")]


def _run_one(name: str, args: argparse.Namespace, root: Path) -> Outcome:
    say(f"-- {name}")
    return _guarded(name, lambda: main([name, *options_of(name, args, root)]))


def _guarded(name: str, work: Callable[[], int]) -> Outcome:
    began_s = time.perf_counter()
    try:
        succeeded = work() == 0
    except DropBPError as error:
        say(f"dropbp bench {name}: {error}")
        succeeded = False
    return Outcome(name, succeeded, time.perf_counter() - began_s)


def run_beside(commands: Mapping[str, Sequence[str]]) -> list[Outcome]:
    """Run parts with their options, each in a process of its own; all end if this process is told to end.

    Raises:
        KeyboardInterrupt: this process was told to end (SIGINT, SIGTERM).
    """
    began_s, outcomes = time.perf_counter(), []
    with ExitStack() as stack, stoppable() as stop:
        if commands:
            say(f"-- {', '.join(commands)}")
        running: dict[str, Iterator[Answer | None]] = {}
        for name, options in commands.items():
            worker = stack.enter_context(Worker("dropbp.bench.worker", {"OMP_NUM_THREADS": "1"}))
            worker.ask([name, *options])
            running[name] = worker.answers(math.inf, stop)
        for name, answers in running.items():
            answer = next(answers)
            if answer is not None and answer["error"]:
                say(f"dropbp bench {name}: {answer['error']}")
            outcomes.append(Outcome(name, _succeeded(answer), time.perf_counter() - began_s))
    return outcomes


def _succeeded(answer: Answer | None) -> bool:
    return answer is not None and answer["status"] == 0


# -- messages


def _report(outcomes: Sequence[Outcome]) -> None:
    for outcome in outcomes:
        minutes, seconds = divmod(round(outcome.seconds), 60)
        say(f"{outcome.name:<18} {minutes:3d} min {seconds:2d} s{'' if outcome.succeeded else '  failed'}")
    failed = [outcome.name for outcome in outcomes if not outcome.succeeded]
    if failed:
        say(f"dropbp bench: these parts did not run to their end: {', '.join(failed)}")
