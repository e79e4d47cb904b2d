"""The command `dropbp bench`, or `python -m bench`: one sub-command for each part of the bench.

Only the module of the part that was asked for is imported. A part is a module with `add_arguments(parser)` and
`run(args) -> int`, or with a `main(argv)` of its own.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

from dropbp.errors import DropBPError


@dataclass(frozen=True)
class Part:
    """A part of the bench, and the devices on which `all` runs it, with the options it gets there."""

    help: str
    devices: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


PARTS = {
    "throughput": Part("time and memory of a step, share of the possible saving", ("cpu", "cuda", "hpu")),
    "seqlen": Part("the longest sequence that trains", ("cpu", "cuda", "hpu")),
    "sensitivity": Part("cost and agreement of sensitivities, rates that follow", ("cpu",)),
    "recipes": Part("compiled graphs and launches on the simulated HPU", ("cpu",)),
    "learning": Part("loss at equal time, FLOPs and memory, against every rival", ("cpu",), ("--resume",)),
    "overhead": Part("what the bookkeeping costs in each step", ("cpu",)),
    "accuracy": Part("fine-tune and evaluate with the paper's tasks and settings"),
    "paper": Part("the published figures beside ours"),
    "tables": Part("tables and plots from the result files alone"),
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
    if args.part == "all":
        return run_all(args)
    return int(module.run(args) or 0) if module is not None else 0


def _parser(chosen: str | None, module: ModuleType | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dropbp bench", description="Measure; one JSON file for each run.")
    parts = parser.add_subparsers(dest="part", metavar="PART", required=True)
    for name, part in PARTS.items():
        subparser = parts.add_parser(name, help=part.help, description=part.help)
        if name == chosen and module is not None:
            module.add_arguments(subparser)
    everything = parts.add_parser("all", help="all parts that suit the device, then tables")
    everything.add_argument("--device", default="cpu", help="cpu, cuda, hpu (%(default)s)")
    everything.add_argument("--output", help="result files of throughput and seqlen (bench/results)")
    everything.add_argument("--smoke", action="store_true", help="tiny sizes, throughput and seqlen only")
    return parser


def run_all(args: argparse.Namespace) -> int:
    """Every part that suits the device; one that fails does not keep the others from running."""
    kind = str(args.device).partition(":")[0]
    failed = [name for name in PARTS if kind in PARTS[name].devices and not _run_part(name, args)]
    if not args.smoke:
        _run_tables(args)
    if failed:
        print(f"dropbp bench: these parts did not run to their end: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _run_part(name: str, args: argparse.Namespace) -> bool:
    own = name in ("throughput", "seqlen")
    if args.smoke and not own:
        return True
    options = list(PARTS[name].options)
    if own:
        options += ["--device", args.device, *(["--smoke"] if args.smoke else [])]
        options += ["--output", args.output] if args.output else []
    print(f"-- {name}", file=sys.stderr, flush=True)
    try:
        return main([name, *options]) == 0
    except DropBPError as error:
        print(f"dropbp bench {name}: {error}", file=sys.stderr)
        return False


def _run_tables(args: argparse.Namespace) -> None:
    main(["tables", *(["--output", args.output] if args.output else [])])


def _load(name: str) -> ModuleType:
    package = __package__ or "bench"
    try:
        return importlib.import_module(f".{name}", package)
    except ModuleNotFoundError as error:
        if error.name == f"{package}.{name}":
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
