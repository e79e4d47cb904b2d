"""The parts of the bench, each a command: `dropbp bench NAME`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from dropbp.cli.commands import Command, add_commands
from dropbp.errors import MissingDependencyError, as_missing_dependency


@dataclass(frozen=True)
class Part(Command):
    """A part of the bench, and when `dropbp bench all` runs it.

    Attributes:
        module: the module that implements it.
        help: what it measures.
        devices: kinds of devices on which it is a part of `all`.
        counts_on: those of them on which it measures no time, so other processes do not disturb it.
        smoke: whether `all --smoke` runs it.
    """

    devices: tuple[str, ...] = ()
    counts_on: tuple[str, ...] = ()
    smoke: bool = False


PARTS = {
    "gpu": Part(
        "dropbp.bench.gpu.command",
        "the most valuable measurements on a borrowed GPU first, a few minutes at a time",
        ("cuda",),
    ),
    "throughput": Part(
        "dropbp.bench.throughput.command",
        "time and memory of a step, and the share of the possible saving it reaches",
        ("cpu", "hpu"),
        smoke=True,
    ),
    "activation_cache": Part(
        "dropbp.bench.throughput.cached", "whole runs with and without the activation cache", ("cpu",), smoke=True
    ),
    "seqlen": Part(
        "dropbp.bench.memory.seqlen", "the longest sequence that trains", ("cpu", "hpu"), ("cpu",), smoke=True
    ),
    "invariants": Part(
        "dropbp.bench.gpu.invariants",
        "checks on the device itself: forward, gradients, compilations and host waits of a step",
    ),
    "sensitivity": Part(
        "dropbp.bench.analysis.sensitivity",
        "cost and accuracy of sensitivities, and the drop rates that follow",
        ("cpu",),
        smoke=True,
    ),
    "recipes": Part(
        "dropbp.bench.recipes.command", "compiled graphs and launches on the simulated HPU", ("cpu",), ("cpu",)
    ),
    "learning": Part(
        "dropbp.bench.learning.command", "loss at equal time, FLOPs and memory, against every rival method", ("cpu",)
    ),
    "real": Part("dropbp.bench.real.command", "fine-tune a pretrained chat model: loss and accuracy at equal FLOPs"),
    "overhead": Part("dropbp.bench.overhead.steps", "time that the bookkeeping adds to a step", ("cpu",), smoke=True),
    "callback_overhead": Part(
        "dropbp.bench.overhead.callback", "time that the callback adds to a trainer's step", ("cpu",), smoke=True
    ),
    "accuracy": Part("dropbp.bench.learning.accuracy", "fine-tune and evaluate with the paper's tasks and settings"),
    "analysis": Part(
        "dropbp.bench.analysis.command", "gradients by path length; bias and variance of each mask sampler"
    ),
    "paper": Part("dropbp.bench.report.paper", "compare our figures with the published ones"),
    "tables": Part("dropbp.bench.report.tables", "make tables and plots from the result files alone"),
    "all": Part("dropbp.bench.everything", "run all parts that suit the device, then make the tables"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options: those of each part."""
    add_commands(parser, "part", PARTS, required=True)


def run(args: argparse.Namespace) -> int:
    """Run the part that was asked for.

    Raises:
        MissingDependencyError: it needs a package that is not installed.
    """
    try:
        return int(PARTS[args.part].load().run(args))
    except ImportError as error:
        missing = as_missing_dependency(error)
        if missing is None or isinstance(error, MissingDependencyError):
            raise
        raise missing from error


def build_parser() -> argparse.ArgumentParser:
    """The parser of `dropbp bench`."""
    parser = argparse.ArgumentParser(
        prog="dropbp bench", description="Measure speed, memory and learning; one JSON file per run."
    )
    add_arguments(parser)
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run the part that these words name, with the options that follow; returns the exit status.

    Raises:
        DropBPError: bad input.
    """
    return run(build_parser().parse_args(arguments))
