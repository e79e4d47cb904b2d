"""The command `dropbp bench`, or `python -m bench`: one sub-command for each part of the bench.

Only the module of the part that was asked for is imported. A part is a module with `add_arguments(parser)` and
`run(args) -> int`, or with a `main(argv)` of its own.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

from dropbp.errors import DropBPError

from . import everything
from .everything import Part

PARTS = {
    "gpu": Part(
        ".gpu.command", "what a borrowed GPU is worth its minutes for, in order, some minutes at a time", ("cuda",)
    ),
    "throughput": Part(
        ".throughput.command", "time and memory of a step, share of the possible saving", ("cpu", "hpu"), smoke=True
    ),
    "seqlen": Part(".memory.seqlen", "the longest sequence that trains", ("cpu", "hpu"), ("cpu",), smoke=True),
    "invariants": Part(".gpu.invariants", "forward, gradients, compilations and waits of a step, on the device itself"),
    "sensitivity": Part(
        ".analysis.sensitivity", "cost and agreement of sensitivities, rates that follow", ("cpu",), smoke=True
    ),
    "recipes": Part(".recipes.command", "compiled graphs and launches on the simulated HPU", ("cpu",), ("cpu",)),
    "learning": Part(".learning.command", "loss at equal time, FLOPs and memory, against every rival", ("cpu",)),
    "overhead": Part(".overhead.steps", "what the bookkeeping costs in each step", ("cpu",), smoke=True),
    "callback_overhead": Part(".overhead.callback", "what the callback costs a trainer", ("cpu",), smoke=True),
    "accuracy": Part(".learning.accuracy", "fine-tune and evaluate with the paper's tasks and settings"),
    "analysis": Part(".analysis.command", "gradients by path length; bias and variance of each way to draw masks"),
    "paper": Part(".report.paper", "the published figures beside ours"),
    "tables": Part(".report.tables", "tables and plots from the result files alone"),
}
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench with these arguments; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    chosen = next((argument for argument in arguments[:1] if argument in PARTS), None)
    module = _load(chosen) if chosen else None
    if module is not None and not hasattr(module, "run"):
        return int(module.main(arguments[1:]) or 0)
    args = _parser(chosen, module).parse_args(arguments)
    if chosen is None:
        return everything.run(args, PARTS, main)
    return int(module.run(args) or 0) if module is not None else 0


def _parser(chosen: str | None, module: ModuleType | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dropbp bench", description="Measure; one JSON file for each run.")
    parts = parser.add_subparsers(dest="part", metavar="PART", required=True)
    for name, part in PARTS.items():
        subparser = parts.add_parser(name, help=part.help, description=part.help)
        if name == chosen and module is not None:
            module.add_arguments(subparser)
    if chosen is None:
        help_of_all = "all parts that suit the device, then tables"
        everything.add_arguments(parts.add_parser("all", help=help_of_all, description=help_of_all), PARTS)
    return parser


def _load(name: str) -> ModuleType:
    package = __package__ or "bench"
    try:
        return importlib.import_module(PARTS[name].module, package)
    except ModuleNotFoundError as error:
        if error.name == f"{package}{PARTS[name].module}":
            raise DropBPError(f"this installation has no part {name!r}; the parts are {', '.join(PARTS)}.") from error
        raise


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DropBPError as error:
        print(f"dropbp bench: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        print("dropbp bench: interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
