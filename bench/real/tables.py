"""The tables of `docs/learning.md` on a real model, from the result files alone: methods are rows, rates columns."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dropbp.cli.figures import save_figure
from dropbp.errors import ConfigError
from dropbp.files import write_text

from ..common import markdown
from ..common.records import Record
from . import gains

BEGIN, END = "<!-- real: made by dropbp bench real --tables -->", "<!-- end of real -->"
PAGE, PLOT = "learning.md", "real.png"
ORDER = ("plain", "default", "freezing", "nested shelf", "exact")
Group = tuple[str, str, int, int, str]  # task, tuning, plain steps, epochs, quantity held equal
Line = tuple[str, str, float]  # tuning, method, drop rate
PLAIN, LORA_PLAIN = ("full", "plain", 0.0), ("lora", "plain", 0.0)


def write(runs: Sequence[Record], docs: Path) -> None:
    """Write the tables between the markers of the page.

    Raises:
        ConfigError: there is no run, or the page has no markers.
    """
    if not runs:
        raise ConfigError("There is no finished run to make tables of; run dropbp bench real first.")
    page = docs / PAGE
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    if BEGIN not in text or END not in text:
        raise ConfigError(f"{page} lacks the lines {BEGIN} and {END}, between which the tables go. Add them.")
    parts = [part for part in (gains.section(runs), tables(runs)) if part]
    write_text(page, markdown.replaced(text, BEGIN, END, "\n".join(parts)))
    if gains.gains(runs, "flops"):
        save_figure(gains.figure(runs), docs / "img" / PLOT)


def tables(runs: Sequence[Record]) -> str:
    """One table per task and tuning; runs with equal numbers of steps share one table for both tunings."""
    groups: dict[Group, list[Record]] = defaultdict(list)
    for run in runs:
        c = run["configuration"]
        if c["plain_steps"]:
            tuning = c["tuning"] if c["equal"] == "flops" else ""
            groups[c["task"], tuning, c["plain_steps"], c["epochs"], c["equal"]].append(run)
    before = {run["configuration"]["task"]: run["loss"] for run in runs if not run["configuration"]["plain_steps"]}
    return "\n".join(f"{_title(group, found, before)}\n\n{table(found)}\n" for group, found in sorted(groups.items()))


def _title(group: Group, runs: Sequence[Record], before: dict[str, float]) -> str:
    task, tuning, steps, epochs, equal = group
    c = runs[0]["configuration"]
    seeds = len({run["configuration"]["seed"] for run in runs})
    how = {"full": "full fine-tuning", "lora": "LoRA"}.get(tuning, "full fine-tuning and LoRA")
    passes = "each row once" if epochs == 1 else f"{epochs} epochs"
    start = f", untrained {before[task]:.3f}" if task in before else ""
    count = f"{steps} plain steps" if equal == "flops" else f"{steps} steps for every method"
    size = f"{count} of batch {c['batch']}, {passes}; {c['held_out']} held-out rows{start}"
    return f"#### {task}, {how}\n\n{c['model']}, {size}; {seeds} seed{'s' if seeds > 1 else ''} at most."


def table(runs: Sequence[Record]) -> str:
    """Losses of each method at each learning rate, the best in bold, and the cost of a step relative to plain training.

    The cost is processor time, or FLOPs for whole tasks, whose runs shared a device.
    """
    rates = sorted({run["configuration"]["learning_rate"] for run in runs})
    lines: dict[Line, dict[float, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        c = run["configuration"]
        lines[c["tuning"], c["method"], c["drop_rate"]][c["learning_rate"]].append(run)
    shared = any(run["device"]["name"] != "cpu" or run["configuration"]["task"].endswith(" whole") for run in runs)
    plain_s = None if shared else _step_s(_every(lines.get(PLAIN) or lines.get(LORA_PLAIN)))
    cost = "FLOPs of a step" if shared else "CPU time of a step"
    columns = ("method", "p", "steps", cost, *(f"lr {rate:g}" for rate in rates))
    mixed = len({tuning for tuning, _, _ in lines}) > 1
    rows = [_row(_label(line, mixed), line, lines[line], rates, plain_s) for line in sorted(lines, key=_place)]
    return markdown.table(columns, rows)


def _place(line: Line) -> tuple[Any, ...]:
    tuning, method, drop_rate = line
    known = next((place for place, name in enumerate(ORDER) if method.startswith(name)), len(ORDER))
    return tuning, known, method, drop_rate


def _label(line: Line, mixed: bool) -> str:
    return f"LoRA, {line[1]}" if mixed and line[0] == "lora" else line[1]


def _every(found: Mapping[float, Sequence[Record]] | None) -> list[Record]:
    return [run for runs in (found or {}).values() for run in runs]


def _row(
    label: str, line: Line, found: dict[float, list[Record]], rates: Sequence[float], plain_s: float | None
) -> list[str]:
    every = _every(found)
    means = {rate: statistics.fmean(run["loss"] for run in runs) for rate, runs in found.items()}
    step_s = _step_s(every)
    ratio = f"{every[0]['flops_ratio'] if plain_s is None else (step_s or 0) / plain_s:.2f}"
    best = min(means, key=means.__getitem__)
    cells = [_figure(found[rate], bold=rate == best and len(means) > 1) if rate in found else "-" for rate in rates]
    return [label, f"{line[2]:g}" if line[2] else "-", str(every[0]["steps"]), ratio, *cells]


def _step_s(runs: Sequence[Record]) -> float | None:
    """Median over runs of their mean processor time per step; steps of one run differ in depth."""
    means = [statistics.fmean(run["cpu_s"]) for run in runs if run["cpu_s"]]
    return statistics.median(means) if means else None


def _figure(runs: Sequence[Record], bold: bool) -> str:
    losses = [run["loss"] for run in runs]
    spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
    mean = f"{statistics.fmean(losses):.3f}"
    return f"**{mean}**{spread}" if bold else f"{mean}{spread}"
