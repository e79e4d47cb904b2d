"""Reads the files of the learning bench: step times relative to plain training, and losses at equal time or FLOPs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable

from dropbp.errors import ConfigError

from ..common.records import Record

CURVE_POINTS = 6  # evaluations of a run, within plain training's time
MEMORY_TO_SPARE, SHORT_OF_MEMORY = "step times", "step times short of memory"
MEMORY_BUDGET = 0.6  # half of the activations, and what of the head and the norms cannot be dropped
Variant = tuple[str, float, bool]  # method, drop rate, gradient checkpointing


def of_kind(records: Iterable[Record], kind: str, task_name: str) -> list[Record]:
    """Records of a kind on a task."""
    return [r for r in records if r["kind"] == kind and r["config"]["task"] == task_name]


# -- step times


def step_ratio(times: Iterable[Record], method: str, drop_rate: float, checkpointing: bool = False) -> float:
    """Mean step time of a method over plain training's, from the first record of `step_times` that has it.

    Raises:
        ConfigError: it was not measured.
    """
    row, plain = row_and_plain(times, method, drop_rate, checkpointing)
    return statistics.fmean(row["cpu_s"]) / statistics.fmean(plain["cpu_s"])


def row_and_plain(
    times: Iterable[Record], method: str, drop_rate: float, checkpointing: bool = False
) -> tuple[Record, Record]:
    """The row of a variant and that of plain training measured along with it. Raises ConfigError if there is none."""
    for record in times:
        rows = {(row["method"], row["drop_rate"], row["checkpointing"]): row for row in record["rows"]}
        if (method, drop_rate, checkpointing) in rows:
            return rows[method, drop_rate, checkpointing], rows["plain", 0.0, False]
    raise ConfigError(
        f"No step times of {method!r} at drop rate {drop_rate:g}{' with checkpointing' if checkpointing else ''} are "
        "among those measured; run the preset again."
    )


def memory_share(times: Iterable[Record], method: str, drop_rate: float) -> float:
    """The most that a step keeps for its backward, relative to a plain step."""
    row, plain = row_and_plain(times, method, drop_rate)
    return float(max(row["saved_mib"]) / max(plain["saved_mib"]))


def short_of_memory(method: str, drop_rate: float) -> Variant:
    """How to run a method that keeps more than `MEMORY_BUDGET` if memory is limited: checkpointed.

    Nested masks checkpoint only the blocks of a deep step beyond the budget; other masks checkpoint every block in
    every step.
    """
    nested = method.startswith(("nested", "default"))
    return (f"{method} capped" if nested else method, drop_rate, not nested)


# -- curves


def loss_at(record: Record, axis: str, value: float) -> float | None:
    """Validation loss where the run had used `value` of "flops", "step" or "time" (in plain steps); None if it did not.

    Linear between the two evaluations around it; before the first one that one's.
    """
    points = [(e[axis], e["loss"]) for e in record["evaluations"] if e["loss"] is not None]
    for (x, a), (y, b) in zip([(0.0, points[0][1]), *points] if points else [], points, strict=False):
        if value <= y * (1 + 1e-6):
            return float(a + (b - a) * min(1.0, (value - x) / (y - x)))
    # A run ends with the first whole step beyond its budget, or one step before it where steps do not fit.
    return float(points[-1][1]) if points and value <= points[-1][0] * 1.02 else None


def time_to(record: Record, loss: float) -> float | None:
    """Time, in plain steps, after which the validation loss was down to `loss`; None if it never was.

    Linear between the two evaluations around it; of a run that had it at its first one, the time of that.
    """
    before: tuple[float, float] | None = None
    for evaluation in (e for e in record["evaluations"] if e["loss"] is not None):
        after = float(evaluation["time"]), float(evaluation["loss"])
        if after[1] <= loss:
            if before is None:
                return after[0]
            return before[0] + (after[0] - before[0]) * (before[1] - loss) / (before[1] - after[1])
        before = after
    return None


def retimed(record: Record, ratio: float) -> Record:
    """The record with the times of its evaluations recomputed by another step ratio."""
    return record | {"evaluations": [e | {"time": e["step"] * ratio} for e in record["evaluations"]]}


def equal_time_loss(record: Record) -> float:
    """Validation loss after as much time as plain training took; infinite for a failed run."""
    loss = loss_at(record, "time", record["config"]["plain_steps"])
    return math.inf if loss is None or math.isnan(loss) else loss


# -- learning rates


def best_rates(records: Iterable[Record]) -> dict[tuple[str, str, float], float]:
    """Learning rate with the least loss at equal time, per (task, method, drop rate), by the lowest seed there is."""
    found: dict[tuple[str, str, float], tuple[int, float, float]] = {}
    for record in records:
        if record["kind"] != "run":
            continue
        config = record["config"]
        key = (config["task"], config["method"], config["drop_rate"])
        candidate = (config["seed"], equal_time_loss(record), config["learning_rate"])
        found[key] = min(found.get(key, candidate), candidate)
    return {key: learning_rate for key, (_, _, learning_rate) in found.items()}


def tried_rates(records: Iterable[Record], seed: int) -> dict[tuple[str, str, float], list[float]]:
    """Learning rates that (task, method, drop rate) was run at with a seed, in ascending order."""
    found: dict[tuple[str, str, float], set[float]] = {}
    for config in (r["config"] for r in records if r["kind"] == "run" and r["config"]["seed"] == seed):
        key = (config["task"], config["method"], config["drop_rate"])
        found.setdefault(key, set()).add(config["learning_rate"])
    return {key: sorted(rates) for key, rates in found.items()}
