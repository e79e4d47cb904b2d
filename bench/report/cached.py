"""The section of `docs/results.md` on the activation cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..common import records
from ..common.markdown import table
from ..throughput.cached import EPOCHS, KIND, figures

TARGETS = {"full-0.75": 0.30, "full-0.875": 0.17, "lora-0.75": 0.30}  # of a shortened step
SIZE_OF_TARGETS = "llama-8x1024--cpu--"  # and of the small models, which have no prefix
COLUMNS = (
    "run",
    "steps that start at the border",
    "target",
    "the same steps, no cache",
    f"{EPOCHS} epochs",
    "no cache",
    "frozen",
    "loss differs by",
)


def section(root: Path) -> str:
    """One table per model; empty if no run is finished."""
    groups: dict[str, list[records.Record]] = {}
    for run in records.read_all(root, KIND):
        groups.setdefault(_size(run), []).append(run)
    if not groups:
        return ""
    head = [
        "## The activation cache",
        "",
        "All times are relative to plain training in the same run. See [activation cache](activation_cache.md).",
    ]
    return "\n".join([*head, *(_table(size, runs) for size, runs in groups.items())])


def _size(run: records.Record) -> str:
    c = run["configuration"]
    batch = f"sequence {c['sequence_length']}, micro-batch {c['batch_size']}, {c['steps']} steps per epoch"
    named = f"{c['model']} in bfloat16" if "model" in c else f"Llama {c['layers']} x {c['width']}, float32,"
    device = run["device"]
    if device["name"] == "cpu":
        return f"{named} on one {device['generation']} ({device['capability']}), {batch}; CPU time on one thread."
    return f"{named} on one {device['generation']}, {batch}; wall-clock time."


def _table(size: str, runs: Sequence[records.Record]) -> str:
    return "\n".join(["", size, "", table(COLUMNS, map(_row, runs))])


def _row(run: records.Record) -> Sequence[str]:
    found, target = figures(run), TARGETS.get(run["name"].removeprefix(SIZE_OF_TARGETS))
    met = "-" if target is None else f"{target:.2f} ({'met' if found['shortened_step'] <= target else 'missed'})"
    return (
        f"{run['configuration']['tuning']}, p = {run['configuration']['drop_rate']:g}",
        f"{found['shortened_step']:.3f}",
        met,
        f"{found['uncached_step']:.3f}",
        f"{found['run']:.3f}",
        f"{found['uncached_run']:.3f}",
        f"{found['frozen_run']:.3f}",
        f"{found['loss_difference']:.1e}",
    )
