"""The plots of `docs/results.md`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dropbp.cli.figures import new_figure, save_figure

from ..common.records import Record
from ..common.setup import SAMPLERS
from .derive import CLOCK_NAMES, Figures, clocks_of, figures, length_ratios, memory_title, parts_of, title_of

COLOURS = {"exact": "#1f6f8b", "nested": "#7fb069", "detach": "#c8553d"}
PANELS_IN_A_ROW = 3  # full, LoRA, QLoRA


def plot_all(throughput: Sequence[Record], lengths: Sequence[Record], folder: Path) -> list[str]:
    """All plots; returns their file names."""
    names = []
    related = [run for run in throughput if parts_of(run) is not None]
    for model, group in _by_model(related).items():
        names.append(f"throughput-{model}.png")
        save_figure(_plot_throughput(group), folder / names[-1])
    for model, group in _by_model(lengths).items():
        names.append(f"seqlen-{model}.png")
        save_figure(_plot_seqlen(group), folder / names[-1])
    return names


def _by_model(runs: Iterable[Record]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for run in runs:
        groups.setdefault(run["configuration"]["model"], []).append(run)
    return groups


def _figure(columns: int, height: float) -> Any:
    return new_figure(max(5.0, 2.6 * columns), height)


def _plot_throughput(runs: Sequence[Record]) -> Any:
    """Step time relative to plain, as bars by rate, with the limit as a line on each bar."""
    columns = min(len(runs), PANELS_IN_A_ROW)
    rows = math.ceil(len(runs) / columns)
    figure = _figure(columns, 3.1 * rows + 0.3)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for ax, run in zip(panels.flat, runs, strict=False):
        _draw_bars(ax, [f for f in figures(run, clocks_of(run)[-1]) if f.how != "plain"])
        ax.set_title(title_of(run).partition(", ")[2].replace(", ", "\n", 1), fontsize=9)
    for ax in panels.flat[len(runs) :]:
        ax.set_axis_off()
    for first in panels[:, 0]:
        first.set_ylabel(f"step time / plain ({CLOCK_NAMES[clocks_of(runs[0])[-1]]})", fontsize=8)
    panels[0, 0].set_ylim(0, 1)
    panels[0, 0].legend(fontsize=8)
    figure.suptitle(runs[0]["configuration"]["model"])
    return figure


def _draw_bars(ax: Any, each: Sequence[Figures]) -> None:
    hows = list(dict.fromkeys(f.how for f in each))
    rates = sorted({f.drop_rate for f in each})
    width = 0.8 / len(hows)
    for f in each:
        x = rates.index(f.drop_rate) + width * (hows.index(f.how) - (len(hows) - 1) / 2)
        first = f.drop_rate == rates[0]
        ax.bar(x, f.ratio, width, color=COLOURS[f.how], label=f.how if first else None)
        ax.hlines(f.limit_ratio, x - width / 2, x + width / 2, color="black", label=_limit_label(f, first, hows))
    ax.set_xticks(range(len(rates)), [f"p = {rate:g}" for rate in rates], fontsize=8)


def _limit_label(f: Figures, first: bool, hows: Sequence[str]) -> str | None:
    return "limit" if first and f.how == hows[0] else None


def _plot_seqlen(runs: Sequence[Record]) -> Any:
    """Longest sequence against the drop rate."""
    figure = _figure(2, 4.0)
    ax = figure.subplots()
    for index, run in enumerate(runs):
        for how, style in zip(SAMPLERS, ("-", ":"), strict=True):
            lengths = {rate: entry.length for rate, entry in length_ratios(run, how).items()}
            label = title_of(run).partition(", ")[2] if how == SAMPLERS[0] else None
            ax.plot(list(lengths), list(lengths.values()), style, marker="o", color=f"C{index}", label=label)
    ax.set_xlabel(f"drop rate ({SAMPLERS[0]} masks; dotted: {SAMPLERS[1]})")
    ax.set_ylabel("longest sequence, tokens")
    ax.set_yscale("log", base=2)
    ax.legend(fontsize=8)
    ax.set_title(memory_title(runs[0]), fontsize=9)
    return figure
