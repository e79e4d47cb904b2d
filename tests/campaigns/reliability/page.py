"""docs/reliability.md, from bench/results/reliability.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.campaigns.reliability.registry import CHECKS, FAULTS, INPUTS, LEAKS, LONG

ROOT = Path(__file__).resolve().parents[3]
RESULTS, PAGE = ROOT / "bench" / "results" / "reliability.json", ROOT / "docs" / "reliability.md"
COMMAND = "python -m tests.campaigns.reliability"
HEAD = f"""# Reliability

Each row names a fault or an input, how often it was tried, and what was true every time. A check stops at its first
failure, so every count is a count of successes. All checks ran on a CPU, in at most two processes; none ran on a GPU or
on Gaudi.

`{COMMAND} --write-docs` writes this page from `bench/results/reliability.json`.
`make test` runs the same checks fewer times.
"""
LONG_ROWS = {
    "steps": "steps",
    "drop_rate": "target drop rate",
    "realised_drop_rate": "realised drop rate",
    "largest_deviation_of_a_branch": "largest deviation of a branch's own rate",
    "loss": "loss, first and last 20 steps",
    "early_step_cpu_ms": "CPU time of a step, second fifth (ms, median)",
    "late_step_cpu_ms": "CPU time of a step, last fifth (ms, median)",
    "rss_growth_mib": "growth of memory from the second fifth to the end (MiB)",
    "more_objects": "growth of Python objects",
}
NOTES = {
    "while_a_checkpoint_was_written": "{} of them while a checkpoint was written",
    "longest_wait_s": "longest wait {} s",
    "timeout_s": "timeout {} s",
    "refused": "{} refused",
    "targets": "{} targets",
    "rss_growth_mib": "memory grew by {} MiB",
    "threads": "{} threads",
}


def page(record: dict[str, Any]) -> str:
    """The page as Markdown."""
    checks = record["checks"]
    parts = [HEAD, *(_part(part, checks) for part in (FAULTS, INPUTS, LEAKS)), _long(checks)]
    return "\n".join(parts)


def _part(part: str, checks: dict[str, Any]) -> str:
    rows = [_row(name, checks[name]) for name in CHECKS if name in checks and CHECKS[name].part == part]
    return "\n".join([f"## {part}", "", "| what | times | what held | command |", "|---|---|---|---|", *rows, ""])


def _row(name: str, figures: dict[str, Any]) -> str:
    check = CHECKS[name]
    count = next(figures[key] for key in ("injected", "calls", "inputs", "cycles") if key in figures)
    notes = "; ".join(text.format(f"{figures[key]:,}") for key, text in NOTES.items() if key in figures)
    times = f"{count:,}" + (f" ({notes})" if notes else "")
    return f"| {check.does} | {times} | {check.holds} | `{_command(name, figures)}` |"


def _command(name: str, figures: dict[str, Any]) -> str:
    times = figures["times"]
    return f"{COMMAND} {name}" + ("" if times == CHECKS[name].many else f" --times {times}")


def _long(checks: dict[str, Any]) -> str:
    names = [name for name in CHECKS if name in checks and CHECKS[name].part == LONG]
    head = "| " + " | ".join(["", *(f"`{_command(name, checks[name])}`" for name in names)]) + " |"
    rule = "|" + "---|" * (len(names) + 1)
    rows = [
        "| " + " | ".join([label, *(_cell(checks[name][key]) for name in names)]) + " |"
        for key, label in LONG_ROWS.items()
    ]
    return "\n".join([f"## {LONG}", "", "A Llama of 4 layers, AdamW.", "", head, rule, *rows, ""])


def _cell(value: Any) -> str:
    return " → ".join(map(str, value)) if isinstance(value, list) else f"{value:,}"
