"""Tables and the plot of the learning bench, from its JSON files alone.

Every figure is a validation loss (nats per byte) with the standard deviation over seeds. It is read from a run's curve
at the same steps, FLOPs or time as plain training. Each method is shown at its best learning rate.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dropbp.cli.figures import new_figure, save_figure
from dropbp.errors import ConfigError
from dropbp.files import write_text

from ..common import markdown
from ..common.records import Record
from . import curves, tasks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

BEGIN, END = "<!-- tables: made by dropbp bench learning --tables -->", "<!-- end of tables -->"
FRESH_BEGIN, FRESH_END = (
    "<!-- fresh tables: made by dropbp bench learning --tables -->",
    "<!-- end of fresh tables -->",
)
COLUMNS = (
    "method",
    "p",
    "lr",
    "step time",
    "memory",
    "equal steps",
    "equal FLOPs",
    "equal time",
    "against plain",
    "against freezing",
    "time to plain's loss",
    "short of memory",
)
ORDER = (
    "plain",
    "lora",
    "pld",
    "freezing",
    "default",
    "nested shelf slow-deep",
    "nested shelf",
    "nested geometric",
    "exact",
    "cyclic",
    "pool",
    "independent",
    "published",
    "lisa",
    "layerdrop",
)
COLOURS = {"plain": "black", "freezing": "tab:blue", "default": "tab:green", "published": "tab:orange"}
STYLES = {0.5: "-", 0.75: "--", 0.875: ":"}


@dataclass(frozen=True)
class Entry:
    """A method at one drop rate on one task: its runs at the best learning rate, and its step times."""

    task: str
    method: str
    drop_rate: float
    runs: tuple[Record, ...]
    times: list[Record]
    short_times: list[Record]

    @property
    def learning_rate(self) -> float:
        """Learning rate of its runs."""
        return float(self.runs[0]["config"]["learning_rate"])

    @property
    def step_ratio(self) -> float:
        """Step time relative to plain training."""
        return curves.step_ratio(self.times, self.method, self.drop_rate)

    @property
    def memory_share(self) -> float:
        """The most that a step keeps for its backward, relative to a plain step."""
        return curves.memory_share(self.times, self.method, self.drop_rate)

    def losses(self, axis: str, share: float = 1.0) -> dict[int, float]:
        """Validation loss by seed once the run has used `share` of plain training's time, FLOPs or steps."""
        found = {seed: curves.loss_at(run, axis, share * budget(run, axis)) for seed, run in self._timed()}
        return {seed: loss for seed, loss in found.items() if loss is not None}

    def time_to(self, losses: dict[int, float]) -> dict[int, float | None]:
        """Time until each seed's run reaches the loss given for that seed, as a share of plain training's time."""
        found = {seed: curves.time_to(run, losses[seed]) for seed, run in self._timed() if seed in losses}
        whole = budget(self.runs[0], "time")
        return {seed: None if time is None else time / whole for seed, time in found.items()}

    def _timed(self) -> Iterator[tuple[int, Record]]:
        """Runs by seed, timed with the latest ratio, which may differ from the one that a run was planned with."""
        ratio = self.step_ratio
        for run in self.runs:
            yield run["config"]["seed"], curves.retimed(run, ratio)

    def losses_short_of_memory(self) -> dict[int, float]:
        """Losses by seed at plain training's time if a step may keep only `MEMORY_BUDGET` of what a plain step keeps.

        A method that keeps more is checkpointed, so fewer steps fit in the time; one that keeps less is unchanged.
        Empty if that was not measured.
        """
        steps = self.steps_short_of_memory
        return {} if steps is None else self.losses("time", steps)

    @property
    def steps_short_of_memory(self) -> float | None:
        """Steps that then fit in the same time, as a share of those with memory to spare; None if not measured."""
        if self.memory_share <= curves.MEMORY_BUDGET:
            return 1.0
        variant = curves.short_of_memory(self.method, self.drop_rate)
        try:
            slower = curves.step_ratio(self.short_times, *variant)
        except ConfigError:
            return None
        return min(1.0, self.step_ratio / slower)


def budget(run: Record, axis: str) -> float:
    """The budget of plain training: FLOPs, or steps, which are also the unit of time."""
    return float(run["flops_budget"] if axis == "flops" else run["config"]["plain_steps"])


def entries(records: Sequence[Record]) -> list[Entry]:
    """One entry per (task, method, drop rate) with a finished run, in the order of the presets."""
    best = curves.best_rates(records)
    found: dict[tuple[str, str, float], list[Record]] = {}
    for record in (r for r in records if r["kind"] == "run" and r["status"] == "finished"):
        config = record["config"]
        key = (config["task"], config["method"], config["drop_rate"])
        if best[key] == config["learning_rate"]:
            found.setdefault(key, []).append(record)
    kinds = (curves.MEMORY_TO_SPARE, curves.SHORT_OF_MEMORY)
    made = [Entry(*k, tuple(runs), *(curves.of_kind(records, x, k[0]) for x in kinds)) for k, runs in found.items()]
    return sorted(made, key=lambda e: (_place(e.task, tasks.TASKS), e.drop_rate, _place(e.method, ORDER)))


def _place(name: str, order: Iterable[str]) -> int:
    return next((i for i, known in enumerate(order) if known == name), 99)


# -- tables


def write(records: Sequence[Record], docs: Path, fresh: Sequence[Record] = ()) -> None:
    """Write the tables between the markers of `docs/learning.md`, and the plot to the same folder.

    Args:
        records: records of the runs and of all step times.
        docs: the folder of the page.
        fresh: records of the preset `fresh`, which get tables of their own.
    """
    made = entries(records)
    made_fresh = entries([*fresh, *(record for record in records if record["kind"] != "run")])
    if not made and not made_fresh:
        raise ConfigError("There is no finished run to make tables of; run dropbp bench learning --preset quick.")
    page = docs / "learning.md"
    text = page.read_text(encoding="utf-8") if page.is_file() else "# Learning\n"
    for begin, end, part in ((BEGIN, END, made), (FRESH_BEGIN, FRESH_END, made_fresh)):
        text = markdown.replaced(text, begin, end, tables(part)) if part else text
    write_text(page, text)
    if made:
        plot(made, docs / "img" / "learning.png")


def tables(made: Sequence[Entry]) -> str:
    """One Markdown table per task."""
    parts = []
    for task in dict.fromkeys(entry.task for entry in made):
        mine = [entry for entry in made if entry.task == task]
        seeds = max(len(entry.runs) for entry in mine)
        about = (
            f"{mine[0].runs[0]['config']['plain_steps']} plain steps; at most {seeds} seed{'s' if seeds > 1 else ''}"
        )
        shift = tasks.task(task).shift
        parts.append(f"### {task}\n\n{shift[:1].upper()}{shift[1:]}; {about}.\n\n{table(mine)}\n")
    return "\n".join(parts)


def table(made: Sequence[Entry]) -> str:
    """A Markdown table with one row per entry; losses are mean and standard deviation over seeds."""
    return markdown.table(COLUMNS, [_cells(entry, made) for entry in made])


def _cells(entry: Entry, made: Sequence[Entry]) -> tuple[str, ...]:
    return (
        entry.method,
        f"{entry.drop_rate:g}" if entry.drop_rate else "-",
        f"{entry.learning_rate:g}",
        f"{entry.step_ratio:.2f}",
        f"{entry.memory_share:.2f}",
        _figure(entry.losses("step")),
        _figure(entry.losses("flops")),
        _figure(entry.losses("time")),
        _against(entry, made, "plain", 0.0),
        _against(entry, made, "freezing", entry.drop_rate),
        _time_to_plain(entry, made),
        _figure(entry.losses_short_of_memory()),
    )


def _against(entry: Entry, made: Sequence[Entry], method: str, drop_rate: float) -> str:
    others = [other for other in made if (other.method, other.drop_rate) == (method, drop_rate) and other is not entry]
    return paired(entry.losses("time"), others[0].losses("time")) if others else "-"


def _time_to_plain(entry: Entry, made: Sequence[Entry]) -> str:
    """Mean over the seeds; if not all seeds reached the loss, the number that did."""
    plain = next((other for other in made if other.method == "plain"), None)
    times = list(entry.time_to(plain.losses("time")).values()) if plain and plain is not entry else []
    reached = [time for time in times if time is not None]
    if not times:
        return "-"
    if len(reached) < len(times):
        return f"{len(reached)} of {len(times)}" if reached else "never"
    return f"{statistics.fmean(reached):.2f}"


def _figure(losses: dict[int, float]) -> str:
    values = list(losses.values())
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def paired(losses: dict[int, float], others: dict[int, float]) -> str:
    """Mean difference per seed, with its standard error; runs of one seed saw the same batches."""
    differences = [losses[seed] - others[seed] for seed in losses.keys() & others.keys()]
    if not differences:
        return "-"
    error = f" ± {statistics.stdev(differences) / math.sqrt(len(differences)):.3f}" if len(differences) > 1 else ""
    return f"{statistics.fmean(differences):+.3f}{error}"


# -- the plot


def plot(made: Sequence[Entry], path: Path) -> None:
    """Plot validation loss against time, one panel per task: plain training, freezing, the published masks, and ours.

    Plain training appears twice: the second curve checkpoints every block, as is done where memory is short.
    """
    names = list(dict.fromkeys(entry.task for entry in made))
    rows = math.ceil(len(names) / 2)
    figure = new_figure(10, 3.6 * rows + 0.8)
    lines: dict[str, Line2D] = {}
    for place, name in enumerate(names):
        axes = figure.add_subplot(rows, 2, place + 1)
        for entry in (entry for entry in made if entry.task == name and entry.method in COLOURS):
            lines = {**_drawn(axes, entry), **lines}
        axes.set_title(name)
        axes.set_xlabel("time (share of plain training's)")
        axes.set_ylabel("validation loss (nats per byte)")
    lines = dict(sorted(lines.items()))
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=3, fontsize=8)
    save_figure(figure, path)


def _drawn(axes: Axes, entry: Entry) -> dict[str, Line2D]:
    """The lines of an entry, by label."""
    colour, plain = COLOURS[entry.method], entry.method == "plain"
    label = "plain" if plain else f"{entry.method}, p={entry.drop_rate:g}"
    style = STYLES.get(entry.drop_rate, "-")
    lines = {label: axes.plot(*curve(entry), style, color=colour, linewidth=1.5)[0]}
    short = entry.steps_short_of_memory if plain else None
    if short is not None:
        lines["plain, checkpointed"] = axes.plot(*curve(entry, short), "-.", color="grey", linewidth=1.5)[0]
    return lines


def curve(entry: Entry, steps: float = 1.0) -> tuple[list[float], list[float]]:
    """Mean loss over seeds at equal parts of plain training's time, in which `steps` times as many steps fit."""
    shares = [(i + 1) / curves.CURVE_POINTS for i in range(curves.CURVE_POINTS)]
    means = [entry.losses("time", steps * share) for share in shares]
    return shares, [statistics.fmean(found.values()) if found else math.nan for found in means]
