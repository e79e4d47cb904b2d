"""The section of `docs/results.md` on the activation cache."""

from __future__ import annotations

from pathlib import Path

from ..common import records
from ..throughput.cached import EPOCHS, KIND, figures

TARGETS = {"full-0.75": 0.30, "full-0.875": 0.17, "lora-0.75": 0.30}  # of a shortened step
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
    """A row for each run; empty where none is finished."""
    runs = records.read_all(root, KIND)
    if not runs:
        return ""
    c = runs[0]["configuration"]
    size = f"Llama {c['layers']} x {c['width']}, sequence {c['sequence_length']}, micro-batch {c['batch_size']}"
    lines = [
        "## The activation cache",
        "",
        f"{size}, float32, {c['steps']} steps an epoch. All figures are relative to plain training in the same run, in",
        "processor time on one thread. The cache is described in [its page](activation_cache.md).",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|---|{'---:|' * (len(COLUMNS) - 1)}",
        *map(_row, runs),
    ]
    return "\n".join(lines)


def _row(run: records.Record) -> str:
    found, target = figures(run), TARGETS[run["name"]]
    met = "met" if found["shortened_step"] <= target else "missed"
    cells = (
        f"{run['configuration']['tuning']}, p = {run['configuration']['drop_rate']:g}",
        f"{found['shortened_step']:.3f}",
        f"{target:.2f} ({met})",
        f"{found['uncached_step']:.3f}",
        f"{found['run']:.3f}",
        f"{found['uncached_run']:.3f}",
        f"{found['frozen_run']:.3f}",
        f"{found['loss_difference']:.1e}",
    )
    return f"| {' | '.join(cells)} |"
