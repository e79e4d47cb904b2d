"""The result of `plan`: the prediction for each drop rate, what it is based on, and its table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from dropbp.errors import ConfigError

GIB = 1 << 30
_COLUMNS = ("drop rate", "step time", "ratio", "FLOPs", "ratio", "peak memory", "ratio", "batch", "sequence")
Entry = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class RatePlan:
    """The prediction for one drop rate.

    Attributes:
        drop_rate: the planned rate; 0 is plain training.
        dropped_share: share of the branches' FLOPs that the masks drop on average.
        forward_backward_s: seconds of forward and backward in an optimizer step, the mean over the masks; None if
            nothing was timed.
        optimizer_s: seconds of the optimizer.
        peak_bytes: peak tensor bytes of a step, the maximum over the masks.
        flops: FLOPs of a step, the mean over the masks.
        largest_batch: rows of the planned length that fit the memory limit; 0 if not even one does.
        largest_sequence: tokens per row that fit at the planned rows; None if the length of the inputs cannot change.
        spared_s: seconds that the activation cache saves in an optimizer step whose rows are all cached; None if
            nothing was timed.
    """

    drop_rate: float
    dropped_share: float
    forward_backward_s: float | None
    optimizer_s: float | None
    peak_bytes: int
    flops: float
    largest_batch: int
    largest_sequence: int | None
    spared_s: float | None = None

    @property
    def known_rows_step_s(self) -> float | None:
        """Seconds of a step whose rows are all in the activation cache, as in every epoch but the first."""
        return None if self.step_s is None or self.spared_s is None else self.step_s - self.spared_s

    @property
    def step_s(self) -> float | None:
        """Seconds of a whole step; None if nothing was timed."""
        if self.forward_backward_s is None or self.optimizer_s is None:
            return None
        return self.forward_backward_s + self.optimizer_s


@dataclasses.dataclass(frozen=True)
class TrainingPlan:
    """The result of `plan`: a prediction for each drop rate, and what it is based on.

    `cache_row_bytes` is the size of a row in the activation cache. `timed_at` is the shape of the timed steps, which is
    smaller than the planned one if plain training of that does not fit the memory limit.
    """

    rates: tuple[RatePlan, ...]
    batch_size: int
    sequence_length: int | None
    accumulation: int
    masks: str
    precision: str | None
    memory_limit_bytes: int
    parameters: int
    trained_parameters: int
    timed_at: tuple[int, int | None] | None
    device: dict[str, Any]
    cache_row_bytes: int = 0

    def fastest(self, epochs: int, *, activation_cache: bool = True) -> RatePlan | None:
        """The drop rate with the shortest whole run; None if nothing was timed."""
        timed = [rate for rate in self.rates if rate.step_s is not None]
        return min(timed, key=lambda rate: _run_s(rate, epochs if activation_cache else 1), default=None)

    def at(self, drop_rate: float) -> RatePlan:
        """The prediction for one drop rate. Raises ConfigError if it was not planned."""
        for entry in self.rates:
            if entry.drop_rate == drop_rate:
                return entry
        planned = ", ".join(f"{entry.drop_rate:g}" for entry in self.rates)
        raise ConfigError(f"drop rate {drop_rate!r} was not planned; planned are {planned}.")

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and strings, ready for JSON."""
        found = dataclasses.asdict(self)
        for entry, rate in zip(found["rates"], self.rates, strict=True):
            entry["step_s"], entry["known_rows_step_s"] = rate.step_s, rate.known_rows_step_s
        return {"kind": "dropbp plan", "format": 1, **found}

    def __str__(self) -> str:
        return plan_table(self.as_dict())


def _run_s(rate: RatePlan, epochs: int) -> float:
    """Seconds for one step from each epoch."""
    assert rate.step_s is not None
    return rate.step_s + (epochs - 1) * (rate.known_rows_step_s or rate.step_s)


# -- the table


def plan_table(found: Mapping[str, Any]) -> str:
    """A plan (as `TrainingPlan.as_dict` gives it) as text; ratios are to the first row."""
    lines = [_COLUMNS, *(_cells(entry, found["rates"][0]) for entry in found["rates"])]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_COLUMNS))]
    rows = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([_head(found), "", *rows, "", *_foot(found)])


def _head(found: Mapping[str, Any]) -> str:
    words = [
        f"micro-batch {_size(found['batch_size'], found['sequence_length'])}",
        f"{found['accumulation']} of them per step" if found["accumulation"] > 1 else "",
        f"{found['masks']} masks",
        str(found["device"]["name"]),
        f"{found['precision']} autocast" if found["precision"] else "",
    ]
    trained = f"{found['trained_parameters']:,} of {found['parameters']:,} parameters trained"
    return f"{', '.join(filter(None, words))}; {trained}"


def _cells(entry: Entry, first: Entry) -> tuple[str, ...]:
    step_s, plain_s = entry["step_s"], first["step_s"]
    return (
        f"{entry['drop_rate']:g}",
        "-" if step_s is None else f"{step_s:.4g} s",
        "-" if step_s is None else f"{step_s / plain_s:.2f}",
        f"{entry['flops'] / 1e9:,.4g} G",
        f"{entry['flops'] / first['flops']:.2f}",
        f"{entry['peak_bytes'] / GIB:.3g} GiB",
        f"{entry['peak_bytes'] / first['peak_bytes']:.2f}",
        f"{entry['largest_batch']:,}",
        "-" if entry["largest_sequence"] is None else f"{entry['largest_sequence']:,}",
    )


def _foot(found: Mapping[str, Any]) -> list[str]:
    limit = f"batch, sequence: the largest that fit {found['memory_limit_bytes'] / GIB:.3g} GiB."
    lines = [f"{limit} Memory is the peak over all masks, in bytes of tensors; time and FLOPs are means."]
    timed = found["timed_at"]
    if timed is not None and tuple(timed) != (found["batch_size"], found["sequence_length"]):
        lines.append(f"Times were measured at {_size(*timed)} and scaled: plain steps of the planned size do not fit.")
    return [*lines, *_cache_lines(found)]


def _cache_lines(found: Mapping[str, Any]) -> list[str]:
    known = [entry for entry in found["rates"] if entry["spared_s"]]
    if not known:
        return []
    times = ", ".join(f"{entry['known_rows_step_s']:.4g} s at {entry['drop_rate']:g}" for entry in known)
    runs = {entry["drop_rate"]: entry["step_s"] + 2 * entry["known_rows_step_s"] for entry in found["rates"]}
    fastest = min(runs, key=lambda rate: runs[rate])
    size = f"{found['cache_row_bytes'] / (1 << 20):.3g} MiB"
    return [
        f"With activation_cache a step whose rows are known takes {times}; a row's state takes {size}.",
        f"Three epochs take the least time at drop rate {fastest:g}.",
    ]


def _size(rows: int, length: int | None) -> str:
    return f"{rows} x {length} tokens" if length else f"{rows} rows"
