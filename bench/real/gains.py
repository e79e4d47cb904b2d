"""Summary of the runs on a pretrained model: the share of plain training's gain that a method reaches.

The gain is the drop of the held-out loss below that of the untrained model. Plain training and each method are taken at
their best learning rates over all seeds. Shares are computed per seed, with standard errors.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dropbp.cli.figures import new_figure

from ..common import markdown
from ..common.records import Record

COMPARISONS = (  # epochs of plain training, the quantity held equal
    (1, "flops", "one epoch, at equal FLOPs"),
    (3, "steps", "three epochs, as many steps as plain training"),
    (3, "flops", "FLOPs of three epochs of plain training"),
)
DRAWN = COMPARISONS[:2]
LINES = (
    ("plain, checkpointed", 0.0),
    ("default", 0.25),
    ("default", 0.5),
    ("default", 0.75),
    ("default, cache", 0.25),
    ("default, cache", 0.5),
    ("freezing", 0.5),
    ("freezing, cache", 0.5),
    ("freezing", 0.75),
    ("nested shelf", 0.5),
    ("exact", 0.5),
    ("published", 0.5),
)
PLAIN = ("plain", 0.0)
COLOURS = ("#6a4c93", "#1f6f8b", "#7fb069", "#c8553d", "#e0a030", "#444444")
Line = tuple[str, float]  # method, drop rate
Setting = tuple[str, str]  # task, tuning
Losses = Mapping[int, float]  # by seed


@dataclass(frozen=True)
class Gain:
    """A share of plain training's gain, and the FLOPs of a step relative to a plain step."""

    shares: Sequence[float]
    flops: float

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.shares)

    @property
    def error(self) -> float:
        """The standard error of the mean; 0 for a single seed."""
        return statistics.stdev(self.shares) / len(self.shares) ** 0.5 if len(self.shares) > 1 else 0.0

    def __str__(self) -> str:
        spread = f" ± {100 * self.error:.1f}" if len(self.shares) > 1 else ""
        return f"{100 * self.mean:.1f}{spread}"


def gains(runs: Iterable[Record], equal: str, epochs: int = 1) -> dict[Line, dict[Setting, Gain]]:
    """Gains by method and setting, for whole tasks whose untrained loss is known.

    Plain training takes its plain steps, so its runs serve either comparison.
    """
    found: dict[Setting, dict[Line, dict[float, dict[int, Record]]]] = defaultdict(lambda: defaultdict(dict))
    untrained: dict[str, float] = {}
    for run in runs:
        c = run["configuration"]
        line = c["method"], c["drop_rate"]
        if not c["task"].endswith(" whole"):
            continue
        if not c["plain_steps"]:
            untrained[c["task"]] = run["loss"]
        elif c["epochs"] == epochs and (c["equal"] == equal or line == PLAIN):
            found[c["task"], c["tuning"]][line].setdefault(c["learning_rate"], {})[c["seed"]] = run
    result: dict[Line, dict[Setting, Gain]] = defaultdict(dict)
    for setting, lines in found.items():
        before, plain = untrained.get(setting[0]), _best(lines.get(PLAIN, {}))
        for line, rates in lines.items() if before is not None and plain and len(lines) > 1 else ():
            best = _best(rates)
            shares = [(before - run["loss"]) / (before - plain[seed]["loss"]) for seed, run in best.items()]
            result[line][setting] = Gain(shares, next(iter(best.values()))["flops_ratio"])
    return result


def _best(rates: Mapping[float, Mapping[int, Record]]) -> Mapping[int, Record]:
    return min(rates.values(), key=lambda runs: statistics.fmean(run["loss"] for run in runs.values()), default={})


def section(runs: Sequence[Record]) -> str:
    """One table per comparison."""
    parts = []
    for epochs, equal, title in COMPARISONS:
        found = gains(runs, equal, epochs)
        settings = _settings(found.values())
        if not settings:
            continue
        head = ["method", "p", *(f"{_short(setting)}, %" for setting in settings)]
        head += [f"FLOPs of a step, {_named(tuning)}" for tuning in _tunings(settings)]
        rows = [_cells(line, found[line], settings) for line in LINES if line in found]
        parts.append(f"#### Share of plain training's gain: {title}\n\n{markdown.table(head, rows)}\n")
    return "\n".join(parts)


def _cells(line: Line, found: Mapping[Setting, Gain], settings: Sequence[Setting]) -> list[str]:
    method, drop_rate = line
    shares = [str(found[setting]) if setting in found else "-" for setting in settings]
    flops = []
    for tuning in _tunings(settings):
        ratios = [gain.flops for (_, how), gain in found.items() if how == tuning]
        flops.append(f"{statistics.fmean(ratios):.2f}" if ratios else "-")
    return [method, f"{drop_rate:g}" if drop_rate else "-", *shares, *flops]


def _settings(found: Iterable[Mapping[Setting, Gain]]) -> list[Setting]:
    return sorted({setting for line in found for setting in line}, key=lambda each: (each[1], each[0]))


def _tunings(settings: Iterable[Setting]) -> list[str]:
    return sorted({tuning for _, tuning in settings})


def _short(setting: Setting) -> str:
    task, tuning = setting
    return f"{task.partition(' ')[0]}, {_named(tuning)}"


def _named(tuning: str) -> str:
    return "LoRA" if tuning == "lora" else tuning


def figure(runs: Sequence[Record]) -> Any:
    """One panel per comparison, one line per method, one point per setting."""
    drawn = new_figure(10.0, 3.6)
    panels = drawn.subplots(1, len(DRAWN), sharey=True)
    lines = [line for line in LINES if line[1] != 0.75 and line[0] != "nested shelf" and "cache" not in line[0]]
    every = [gains(runs, equal, epochs) for epochs, equal, _ in DRAWN]
    colours = dict(zip(_settings(found for each in every for found in each.values()), COLOURS, strict=False))
    for ax, found, (_, _, title) in zip(panels, every, DRAWN, strict=True):
        settings = _settings(found.values())
        for place, setting in enumerate(settings):
            points = [(row, found[line][setting]) for row, line in enumerate(lines) if setting in found.get(line, {})]
            rows = [row + 0.12 * (place - (len(settings) - 1) / 2) for row, _ in points]
            means, errors = [100 * gain.mean for _, gain in points], [100 * gain.error for _, gain in points]
            style: dict[str, Any] = {"fmt": "o", "markersize": 5, "color": colours[setting]}
            ax.errorbar(means, rows, xerr=errors, label=_short(setting), **style)
        ax.axvline(100, color="black", linewidth=0.8)
        ax.set_title(title, fontsize=9)
        ax.set_xlabel("share of plain training's gain, %", fontsize=8)
    panels[0].set_yticks(range(len(lines)), [f"{m}, p = {p:g}" if p else m for m, p in lines], fontsize=8)
    panels[0].invert_yaxis()
    panels[0].legend(fontsize=7, loc="upper left")
    return drawn
