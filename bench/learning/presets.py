"""The runs of the learning bench: the presets, and the order in which learning rates and seeds are tried."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dropbp.errors import ConfigError

from ..common.records import Record
from . import tasks
from .curves import best_rates, tried_rates


@dataclass(frozen=True)
class Run:
    """One training: what is trained, how, and for how many plain steps."""

    task: str
    method: str
    drop_rate: float
    learning_rate: float
    seed: int
    plain_steps: int

    @property
    def name(self) -> str:
        """Name of its file, without the suffix."""
        method = self.method.replace(" ", "-").replace("+", "-and-").replace(":", "-")
        return f"{self.task}--{method}--p{self.drop_rate:g}--lr{self.learning_rate:g}--seed{self.seed}"


@dataclass(frozen=True)
class Preset:
    """A set of runs: plain training, each method at each drop rate, and `others`, (method, drop rate).

    Each is tried with one seed at the task's learning rates. If the best rate is the lowest or the highest tried, the
    next one is tried too, up to `most_rates` in all. The other seeds are run at the best rate. Methods in `once` have
    the first seed only. Files are in `folder`, inside the results folder.
    """

    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    drop_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    plain_steps: int
    timing_rounds: int
    others: tuple[tuple[str, float], ...] = ()
    once: tuple[tuple[str, float], ...] = ()
    folder: str = ""
    most_rates: int = 6


FRESH = "fresh"
PRESETS = {
    "quick": Preset(("prose-lora",), ("published", "freezing", "default"), (0.5,), (0,), 16, 4, most_rates=2),
    "long": Preset(
        tasks=("c-long",),
        methods=("freezing", "published", "nested shelf", "default"),
        drop_rates=(0.5, 0.875),
        seeds=(0,),
        plain_steps=320,
        timing_rounds=32,
    ),
    "full": Preset(
        tasks=("python", "c-accumulated", "prose-lora"),
        methods=("freezing", "published", "nested shelf", "default", "independent", "exact", "cyclic", "pool"),
        drop_rates=(0.5, 0.75, 0.875),
        seeds=(0, 1, 2),
        plain_steps=64,
        timing_rounds=96,
        others=(
            ("lora", 0.0),
            ("lisa", 0.5),
            ("lisa", 0.75),
            ("lisa", 0.875),
            ("layerdrop", 0.5),
            ("pld", 0.0),
        ),
        once=(
            ("nested geometric", 0.5),
            ("nested geometric", 0.875),
            ("nested shelf slow-deep", 0.5),
            ("nested shelf slow-deep", 0.875),
        ),
    ),
    # Runs that had no part in the choice of the default: other seeds, and a text never used before.
    FRESH: Preset(
        tasks=("python", "c-accumulated", "prose-lora", "prose"),
        methods=("freezing", "published", "default"),
        drop_rates=(0.5, 0.75, 0.875),
        seeds=(3, 4, 5),
        plain_steps=64,
        timing_rounds=96,
        folder=FRESH,
    ),
}


def variants(preset: Preset, task: tasks.Task) -> list[tuple[str, float]]:
    """Methods with their drop rates, plain training first. LoRA is not a rival in tasks that themselves use LoRA."""
    each = [("plain", 0.0), *((name, rate) for name in preset.methods for rate in preset.drop_rates), *preset.others]
    return [(name, rate) for name, rate in each if not (task.lora_rank and name == "lora")]


def first_runs(preset: Preset) -> list[Run]:
    """Every variant on every task with the first seed, at the task's learning rates."""
    return [
        Run(task.name, name, rate, learning_rate, preset.seeds[0], preset.plain_steps)
        for task in map(tasks.task, preset.tasks)
        for name, rate in (*variants(preset, task), *preset.once)
        for learning_rate in rates_for(task, name)
    ]


def rates_for(task: tasks.Task, method: str) -> tuple[float, ...]:
    """Learning rates to try; LoRA as a rival of full fine-tuning uses those of the LoRA task."""
    return tasks.task("prose-lora").learning_rates if method == "lora" else task.learning_rates


def wider_runs(preset: Preset, records: Sequence[Record]) -> list[Run]:
    """The next learning rate for every variant whose best rate was the lowest or the highest tried."""
    best, tried = best_rates(records), tried_rates(records, preset.seeds[0])
    runs = []
    for run in {(run.task, run.method, run.drop_rate): run for run in first_runs(preset)}.values():
        key = (run.task, run.method, run.drop_rate)
        first, *_, last = rates_for(tasks.task(run.task), run.method)
        known, step = tried.get(key, []), last / first
        if len(known) < preset.most_rates and best.get(key) in (*known[:1], *known[-1:]):
            beyond = known[0] / step if best[key] == known[0] else known[-1] * step
            runs.append(dataclasses.replace(run, learning_rate=float(f"{beyond:.1e}")))
    return runs


def further_runs(preset: Preset, records: Iterable[Record]) -> list[Run]:
    """Every variant at its best learning rate, with the other seeds."""
    best = best_rates(records)
    return [
        Run(task.name, name, rate, best[task.name, name, rate], seed, preset.plain_steps)
        for seed in preset.seeds[1:]
        for task in map(tasks.task, preset.tasks)
        for name, rate in variants(preset, task)
        if (task.name, name, rate) in best
    ]


def chosen_tasks(preset: Preset, names: Sequence[str] | None) -> tuple[str, ...]:
    """The named tasks, or all tasks of the preset. Raises ConfigError for one that the preset does not have."""
    missing = [name for name in names or () if name not in preset.tasks]
    if missing:
        raise ConfigError(f"The preset has no task {missing[0]!r}; it has {', '.join(preset.tasks)}.")
    return tuple(names or preset.tasks)
