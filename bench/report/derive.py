"""Figures derived from a throughput record; tables and plots use no other source."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..common.records import Record
from ..memory.search import is_border
from ..throughput.rounds import SPLIT, UNRECORDED
from .limits import Parts, limit_s, median_spread, share_of_possible_saving

CLOCK_NAMES = {"wall": "wall clock", "cpu": "CPU time"}
CLOCKS = {"wall": "_s", "cpu": "_cpu_s"}
GIB = 1 << 30
RESAMPLES = 100
LEAST_STEP = 1e-3  # two steps that keep equal shares give no slope
Steps = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Figures:
    """One variant of a run. A step is forward and backward, without the optimizer. Shares and ratios are to plain.

    Medians over the rounds; under nested masks, whose steps differ in depth by design, the mean. None if plain training
    had too little memory, so that there is nothing to compare with.
    """

    name: str
    how: str
    drop_rate: float
    dropped_share: float
    forward_s: float
    backward_s: float
    optimizer_s: float
    step_s: float
    step_spread_s: tuple[float, float]
    ratio: float | None
    limit_ratio: float | None
    share: float | None
    tokens_per_s: float
    samples_per_s: float
    peak_gib: float | None
    activations_ratio: float | None


def clocks_of(record: Record) -> tuple[str, ...]:
    """On CPU, process time is reported as well as wall time, since other processes on the machine do not add to it."""
    return ("wall", "cpu") if record["device"]["name"] == "cpu" else ("wall",)


def figures(record: Record, clock: str = "wall") -> list[Figures]:
    """Every variant of a throughput run that had enough memory, in the order of the record."""
    parts, steps = parts_of(record, clock), record["steps"]
    return [
        _figures(record, name, variant, parts, clock) for name, variant in record["variants"].items() if steps.get(name)
    ]


def parts_of(record: Record, clock: str = "wall") -> Parts | None:
    """Parts of the plain step; None if it had too little memory.

    The split of the backward is timed by the wall clock, in the variant that has it.
    """
    return _parts(record["steps"], clock)


def _parts(steps: Mapping[str, Steps], clock: str) -> Parts | None:
    ending, split = CLOCKS[clock], steps.get(SPLIT) or steps.get("plain")
    if not split or not steps.get("plain") or not steps.get(UNRECORDED):
        return None
    blocks_share = statistics.median(step["blocks_backward_s"] / step["backward_s"] for step in split)
    backward_s = _median(steps["plain"], f"backward{ending}")
    return Parts(
        forward_s=_median(steps["plain"], f"forward{ending}"),
        unrecorded_forward_s=_median(steps[UNRECORDED], f"forward{ending}"),
        blocks_backward_s=blocks_share * backward_s,
        rest_backward_s=(1 - blocks_share) * backward_s,
    )


def _figures(record: Record, name: str, variant: dict[str, Any], parts: Parts | None, clock: str) -> Figures:
    steps, ending = record["steps"][name], CLOCKS[clock]
    first, _, third = median_spread(_seconds(steps, clock))
    step_s, dropped = _middle(_seconds(steps, clock), variant["how"]), _dropped(steps)
    limit = None if parts is None else limit_s(parts, dropped)
    configuration = record["configuration"]
    samples_per_s = configuration["batch_size"] / step_s
    return Figures(
        name=name,
        how=variant["how"],
        drop_rate=variant["drop_rate"],
        dropped_share=dropped,
        forward_s=_median(steps, f"forward{ending}"),
        backward_s=_median(steps, f"backward{ending}"),
        optimizer_s=_median(steps, f"optimizer{ending}"),
        step_s=step_s,
        step_spread_s=(first, third),
        ratio=None if parts is None else step_s / parts.step_s,
        limit_ratio=None if parts is None or limit is None else limit / parts.step_s,
        share=share_of_possible_saving(parts.step_s, step_s, limit) if parts and limit and dropped else None,
        tokens_per_s=samples_per_s * configuration["sequence_length"],
        samples_per_s=samples_per_s,
        peak_gib=_peak_gib(record, name),
        activations_ratio=_activations_ratio(record, name),
    )


def share_error(record: Record, name: str, clock: str) -> float | None:
    """Standard error of a variant's share of the possible saving; None with fewer than two rounds."""
    how, shares = record["variants"][name]["how"], []
    for steps in _resampled(record):
        parts, step_s = _parts(steps, clock), _middle(_seconds(steps[name], clock), how)
        if parts is None:
            return None
        shares.append(share_of_possible_saving(parts.step_s, step_s, limit_s(parts, _dropped(steps[name]))))
    known = [share for share in shares if share is not None]
    return statistics.stdev(known) if len(known) > 1 else None


def backward_shares(record: Record, how: str, clock: str) -> dict[float, tuple[float, float | None]]:
    """Drop rate -> the achieved share of the possible saving in the backward, and its standard error.

    The forward is left out: no mask changes it, and it scatters as much as the rest. The steps of all rates are pooled.
    A straight line (Theil-Sen) is fitted to the seconds of the backward over the share of FLOPs kept.
    """
    steps = record["steps"]
    variants = {name: variant for name, variant in record["variants"].items() if steps.get(name)}
    names = {name: v["drop_rate"] for name, v in variants.items() if v["how"] == how and v["drop_rate"]}
    if len(names) < 2 or parts_of(record, clock) is None:
        return {}
    again = [_backward_shares(steps, names, clock) for steps in _resampled(record)]
    found = _backward_shares(record["steps"], names, clock)
    errors = {rate: statistics.stdev(one[rate] for one in again) if again else None for rate in found}
    return {rate: (share, errors[rate]) for rate, share in found.items()}


def _backward_shares(steps: Mapping[str, Steps], names: Mapping[str, float], clock: str) -> dict[float, float]:
    key, parts = f"backward{CLOCKS[clock]}", _parts(steps, clock)
    assert parts is not None  # the caller has checked it
    points = [(1 - step["dropped_share"], step[key]) for name in names for step in steps[name]]
    slope = statistics.median(
        (y - b) / (x - a) for i, (a, b) in enumerate(points) for x, y in points[i + 1 :] if abs(x - a) > LEAST_STEP
    )
    nothing_kept_s = statistics.median(y - slope * x for x, y in points)
    plain_s = parts.blocks_backward_s + parts.rest_backward_s
    return {p: (plain_s - nothing_kept_s - slope * (1 - p)) / (p * parts.blocks_backward_s) for p in names.values()}


def _resampled(record: Record) -> Iterator[dict[str, Steps]]:
    """The record's rounds, resampled with replacement many times. Rounds and not steps: all variants met the same
    machine.
    """
    by_round = {key: {step["round"]: step for step in steps} for key, steps in record["steps"].items() if steps}
    rounds = sorted(set.intersection(*(set(steps) for steps in by_round.values())))
    chance = random.Random(0)
    for _ in range(RESAMPLES if len(rounds) > 1 else 0):
        drawn = chance.choices(rounds, k=len(rounds))
        yield {key: [found[i] for i in drawn] for key, found in by_round.items()}


def _seconds(steps: Steps, clock: str) -> list[float]:
    return [step[f"forward{CLOCKS[clock]}"] + step[f"backward{CLOCKS[clock]}"] for step in steps]


def _dropped(steps: Steps) -> float:
    return statistics.fmean(step.get("dropped_share", 0.0) for step in steps)


def _peak_gib(record: Record, name: str) -> float | None:
    memory = record.get("memory", {}).get(name)
    return None if memory is None else memory["peak_bytes"] / GIB


def _activations_ratio(record: Record, name: str) -> float | None:
    """Memory of a step beyond weights and optimizer states, relative to plain."""
    memory = record.get("memory", {})
    if name not in memory or name == "plain":
        return None
    if "plain" not in memory:
        return None
    above = {key: memory[key]["peak_bytes"] - memory[key]["resident_bytes"] for key in (name, "plain")}
    return float(above[name] / above["plain"])


def grown(record: Record, clock: str = "wall") -> list[dict[str, Any]]:
    """Each variant of a growth run: its micro-batch, its tokens per second, and their ratio to plain.

    `at_least` means that the search for the micro-batch was cut short, so a larger one may fit.
    """
    length, timed_sizes = record["configuration"]["sequence_length"], record.get("timed_sizes", {})
    rows = []
    for name, variant in record["variants"].items():
        found, steps = record["batch_sizes"][name], record["steps"].get(name, [])
        size, seconds = timed_sizes.get(name, found["batch_size"]), _seconds(steps, clock)
        speed = size * length / _middle(seconds, variant["how"]) if seconds else None
        rows.append({**variant, "batch_size": size, "at_least": not is_border(found["asked"]), "tokens_per_s": speed})
    plain = rows[0]["tokens_per_s"]
    return [{**row, "ratio": row["tokens_per_s"] / plain if plain and row["tokens_per_s"] else None} for row in rows]


def _middle(seconds: Sequence[float], how: str) -> float:
    return statistics.fmean(seconds) if how == "nested" else statistics.median(seconds)


class Length(NamedTuple):
    """A longest sequence, its ratio to plain's, and whether either search was cut short.

    `at_least` then means that a longer one may fit. The ratio is None if plain's length is only such a lower bound.
    """

    length: int
    ratio: float | None
    at_least: bool


def length_ratios(record: Record, how: str = "exact") -> dict[float, Length]:
    """Longest sequences of a seqlen run under one mask sampler, by drop rate; plain is rate 0. Failed ones are left
    out.
    """
    entries = {0.0: record["lengths"].get("plain")}
    for name, entry in record["lengths"].items():
        if name.startswith(f"{how}-"):
            entries[float(name.partition("-")[2])] = entry
    tried = {rate: entry for rate, entry in entries.items() if entry is not None and not _nothing_known(entry)}
    plain = tried.get(0.0)
    known = plain["length"] if plain is not None and is_border(plain["asked"]) else 0
    return {
        rate: Length(entry["length"], entry["length"] / known if known else None, not is_border(entry["asked"]))
        for rate, entry in tried.items()
    }


def _nothing_known(entry: dict[str, Any]) -> bool:
    """Nothing was tried before the search was cut short or its process died; a length of 0 is then no result."""
    return not is_border(entry["asked"]) and not any("size" in asked for asked in entry["asked"])


def _median(steps: Steps, key: str) -> float:
    return float(statistics.median(step[key] for step in steps))


def title_of(run: Record) -> str:
    """A title that says what a run trained, and how."""
    configuration = run["configuration"]
    words = [configuration["model"], configuration["tuning"], configuration["dtype"]]
    words += [word for word in ("checkpointing", "compiled") if configuration[word]]
    words += ["chunked loss"] if configuration["loss"] != "plain" else []
    words += [configuration["kernels"]] if "kernels" in configuration else []
    return ", ".join(words)


def memory_title(run: Record) -> str:
    """What a search for lengths trained, and in how much memory."""
    budget, model = run["configuration"]["budget_bytes"], run["configuration"]["model"]
    where = run["budget_is"] if budget is None else f"{budget / (1 << 30):g} GiB of {run['budget_is']}"
    return f"{model}, {where} ({run['device']['name']})"
