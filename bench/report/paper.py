"""The published figures and ours, row by row, with the device and what could not be run.

Our figure counts as the same measurement only on the published model. Figures of a scaled model on CPU, and those
counted on shapes, have a column of their own.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from ..common import markdown, records
from ..memory.search import is_border
from .derive import figures, grown, length_ratios

P = 0.875
REHEARSALS = ("smoke", "rehearsal")  # tiny models, to test the pipeline
OURS = "exact"  # random sets of branches, as in the paper
NOT_RUN = "not run: needs {device}; `{command}`"


@dataclass(frozen=True)
class Published:
    """A figure of the paper (arXiv:2402.17812): what was measured, on what, and how to read it from our records."""

    what: str
    kind: str
    model: str
    tuning: str
    value: float
    unit: str
    device: str = "cuda"
    preset: str = ""


PUBLISHED = (
    Published("time of a step saved, full", "throughput", "llama2-7b", "full", 57.0, "%", preset="llama2-7b"),
    Published("time of a step saved, LoRA", "throughput", "llama2-7b", "lora", 48.0, "%", preset="llama2-7b"),
    Published("time of a step saved, QLoRA", "throughput", "llama2-70b", "qlora", 44.0, "%", preset="llama2-70b-qlora"),
    Published("throughput, LoRA, A100", "throughput", "llama2-7b", "lora", 1.79, "x", preset="a100"),
    Published("throughput, largest micro-batch, Gaudi2", "growth", "llama2-7b", "full", 2.17, "x", "hpu", "gaudi2"),
    Published("longest sequence, full", "seqlen", "llama2-7b", "full", 7.1, "x", preset="llama2-7b"),
    Published("longest sequence, QLoRA", "seqlen", "llama2-70b", "qlora", 6.2, "x", preset="llama2-70b-qlora"),
)
ELSEWHERE = (
    "A step is forward and backward, without the optimizer. The tables of its run give the shortest possible step.",
    "Published: LLaMA2-70B with QLoRA reaches plain training's perplexity 1.5x faster. See the learning part.",
    "Published: rates from sensitivities gain 1.6 % accuracy over uniform rates (p = .875, lr 3e-4). See that part.",
)


@dataclass(frozen=True)
class Comparison:
    """A published figure and ours: on the same model and kind of device, counted on shapes, or on a scaled model."""

    published: Published
    ours: float | None
    ours_on: str
    otherwise: float | None
    otherwise_on: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--output", type=Path, default=records.RESULTS, metavar="DIR", help="the result files")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the comparison."""
    rows = compare(args.output)
    text = json.dumps([asdict(row) for row in rows], indent=2) if args.json else table(rows)
    sys.stdout.write(text + "\n")
    return 0


def compare(root: Path) -> list[Comparison]:
    """All published figures at p = .875, with the values from the result files."""
    found = {kind: records.read_all(root, kind) for kind in ("throughput", "growth", "seqlen")}
    return [_compare(published, found[published.kind]) for published in PUBLISHED]


def _compare(published: Published, runs: Iterable[records.Record]) -> Comparison:
    alike = [run for run in runs if _plainly_trained(run) and run["configuration"]["tuning"] == published.tuning]
    same = [run for run in alike if run["configuration"]["model"] == published.model]
    real = [run for run in same if run["device"]["name"] == published.device]
    other = [run for run in (*same, *alike) if run not in real]
    ours, ours_on = _best(published, real)
    otherwise, otherwise_on = _best(published, other)
    return Comparison(published, ours, ours_on or _reason(published), otherwise, otherwise_on)


def _plainly_trained(run: records.Record) -> bool:
    configuration = run["configuration"]
    special = configuration["checkpointing"] or configuration["compiled"] or configuration["loss"] != "plain"
    special = special or "kernels" in configuration
    return not special and configuration["dtype"] == "bf16" and not run["name"].startswith(REHEARSALS)


def _best(published: Published, runs: Iterable[records.Record]) -> tuple[float | None, str]:
    """The figure of the first run that has it, and what it ran on."""
    for run in runs:
        value = _READERS[published.kind](run, published.unit)
        if value is not None:
            return value, _place(run) + (", at least: the search was cut short" if _cut_short(run) else "")
    return None, ""


def _cut_short(run: records.Record) -> bool:
    """Whether the search for the length or micro-batch behind the figure was cut short."""
    sizes = run.get("lengths") or run.get("batch_sizes") or {}
    name = f"{OURS}-{P:g}"
    return name in sizes and not is_border(sizes[name]["asked"])


def _place(run: records.Record) -> str:
    device = run["device"]
    if device["name"] == "meta":
        return f"{run['configuration']['model']}, tensor bytes counted on shapes"
    return f"{run['configuration']['model']} on {device.get('generation') or device['name']}"


def _reason(published: Published) -> str:
    device = {"cuda": "a CUDA device", "hpu": "an Intel Gaudi"}[published.device]
    command = f"dropbp bench {published.kind} --device {published.device} --preset {published.preset}"
    return NOT_RUN.format(device=device, command=command.replace(" growth ", " throughput "))


def _read_throughput(run: records.Record, unit: str) -> float | None:
    clock = "cpu" if run["device"]["name"] == "cpu" else "wall"
    ratios = [f.ratio for f in figures(run, clock) if f.how == OURS and f.drop_rate == P and f.ratio is not None]
    if not ratios:
        return None
    return 100 * (1 - ratios[0]) if unit == "%" else 1 / ratios[0]


def _read_growth(run: records.Record, unit: str) -> float | None:
    clock = "cpu" if run["device"]["name"] == "cpu" else "wall"
    return next((row["ratio"] for row in grown(run, clock) if (row["how"], row["drop_rate"]) == (OURS, P)), None)


def _read_seqlen(run: records.Record, unit: str) -> float | None:
    entry = length_ratios(run).get(P)
    return None if entry is None else entry.ratio


_READERS: dict[str, Callable[[records.Record, str], float | None]] = {
    "throughput": _read_throughput,
    "growth": _read_growth,
    "seqlen": _read_seqlen,
}


def table(rows: Iterable[Comparison]) -> str:
    """A Markdown table."""
    head = ("what, p = .875", "published", "ours, same model", "on", "ours, scaled or counted", "on")
    return "\n".join([markdown.table(head, map(_cells, rows), "lrrlrl"), "", *(f"- {line}" for line in ELSEWHERE)])


def _cells(row: Comparison) -> tuple[str, ...]:
    published, unit = row.published, row.published.unit
    return (
        f"{published.what} ({published.model})",
        _shown(published.value, unit),
        _shown(row.ours, unit),
        row.ours_on,
        _shown(row.otherwise, unit),
        row.otherwise_on or "-",
    )


def _shown(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    return f"-{value:.1f} %" if unit == "%" else f"{value:.2f}x"
