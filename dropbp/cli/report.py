"""A result file of `dropbp finetune`, and the table, sentences and plot derived from it.

The file holds one entry in `runs` for each training; see `dropbp.cli.training.train` for its content.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import fmean, quantiles
from typing import TYPE_CHECKING, Any, TypeAlias

from dropbp.cli.figures import label_axes, new_figure, save_figure
from dropbp.device import get_device
from dropbp.files import write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Run: TypeAlias = dict[str, Any]
Result: TypeAlias = dict[str, Any]
FORMAT = 1
_WARM_UP_STEPS = 2  # allocators and kernels settle in the first steps, so they do not count for the typical step
_BUSY = 1.5  # the 90th percentile of equal steps over the 10th, from which times are not to be trusted
_PACKAGES = ("dropbp", "torch", "transformers", "peft", "accelerate")
_COLUMNS = ("run", "steps", "step time", "tokens/s", "peak memory", "FLOPs/step", "drop rate", "validation loss")


def new_result(config: dict[str, Any], device: str | None, runs: Sequence[Run]) -> Result:
    """A result: configuration, versions, device and the records of the runs."""
    return {
        "kind": "dropbp finetune",
        "format": FORMAT,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "device": get_device(device).describe(),
        "config": {name: str(value) if isinstance(value, Path) else value for name, value in config.items()},
        "runs": list(runs),
    }


def write_result(result: Result, path: Path) -> None:
    """Write a result file, whole or not at all."""
    write_text(path, json.dumps(result, indent=1) + "\n")


def table(result: Result) -> str:
    """Step time (mean, and the range from the 10th to the 90th percentile), memory, FLOPs and loss of each run."""
    lines = [_COLUMNS, *map(_cells, result["runs"])]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_COLUMNS))]
    rule = tuple("-" * width for width in widths)
    return "\n".join(_aligned(line, widths) for line in (_COLUMNS, rule, *lines[1:]))


def verdict(result: Result) -> list[str]:
    """What the comparison of a plain run with one under DropBP says, in favour of whichever it is.

    Empty when there are no two runs to compare.
    """
    runs = {bool(run["drop_rate"]): run for run in result["runs"]}
    if len(runs) < 2 or not all(run["step_s"] for run in runs.values()):
        return []
    plain, dropped = runs[False], runs[True]
    sentences = [_cost_sentence(plain, dropped), *_busy_sentence(plain)]
    if plain["evaluations"] and dropped["evaluations"]:
        amount_s = min(_last(plain, "train_s"), _last(dropped, "train_s"))
        sentences += [
            _loss_sentence(f"after the same {_last(plain, 'step'):.0f} steps", *_at_equal(plain, dropped, "step")),
            _loss_sentence(f"after the same time ({amount_s:.0f} s)", *_at_equal(plain, dropped, "train_s")),
            _loss_sentence("after the same FLOPs", *_at_equal(plain, dropped, "flops")),
        ]
    if "before" in result:
        sentences += [*_reached_sentence(plain, dropped), _accuracy_sentence(result, plain, dropped)]
    return sentences


def shown_answers(result: Result) -> str:
    """What the model answered to the questions that a result holds, before and after; empty where it holds none."""
    lines = []
    for index, question in enumerate(result.get("questions", ())):
        given = {"right": question["answer"], "before": result["before"]["answers"][index]}
        given |= {run["name"]: run["answers"][index] for run in result["runs"]}
        width = max(map(len, given))
        lines += [question["text"], *(f"  {name:<{width}}  {' '.join(text.split())}" for name, text in given.items())]
        lines.append("")
    return "\n".join(lines).rstrip()


def plot(result: Result, path: Path) -> None:
    """Validation loss against time and against FLOPs, and the distribution of step times, as a PNG file."""
    figure = new_figure(13, 4)
    time_axes, flops_axes, steps_axes = figure.subplots(1, 3)
    for run in result["runs"]:
        points = _points(run)
        losses = [point["loss"] for point in points]
        time_axes.plot([point["train_s"] for point in points], losses, marker="o", markersize=3, label=run["name"])
        flops_axes.plot([point["flops"] for point in points], losses, marker="o", markersize=3, label=run["name"])
    label_axes(time_axes, "training time (s)", "validation loss")
    label_axes(flops_axes, "training FLOPs", "validation loss")
    _draw_step_times(steps_axes, result["runs"])
    save_figure(figure, path)


def typical_steps_s(run: Run) -> list[float]:
    """Step times without those in which the run warms up or calibrates."""
    calibrated = set(run["calibrated_steps"])
    later = [s for step, s in enumerate(run["step_s"], 1) if step > _WARM_UP_STEPS and step not in calibrated]
    return later or run["step_s"]


def _cells(run: Run) -> tuple[str, ...]:
    steps_s = typical_steps_s(run)
    step_s = fmean(steps_s) if steps_s else float("nan")
    tokens = sum(run["tokens"]) / max(len(run["tokens"]), 1)
    realised = run["dropbp"]["realised_drop_rate"] if run["dropbp"] else 0.0
    return (
        run["name"],
        str(run["steps"]),
        f"{step_s:.3f} s ({_spread(steps_s)})",
        f"{tokens / step_s:,.0f}",
        f"{run['peak_bytes'] / 2**20:,.0f} MiB",
        f"{tokens * run['flops_per_token'] / 1e9:,.1f} G",
        f"{realised:.3f}",
        f"{run['evaluations'][-1]['loss']:.4f}" if run["evaluations"] else "-",
    )


def _spread(steps_s: Sequence[float]) -> str:
    if len(steps_s) < 2:
        return "one step"
    tenths = quantiles(steps_s, n=10, method="inclusive")
    return f"{tenths[0]:.3f}-{tenths[-1]:.3f}"


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = zip(cells, widths, strict=True)
    return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)])


def _cost_sentence(plain: Run, dropped: Run) -> str:
    time = fmean(typical_steps_s(dropped)) / fmean(typical_steps_s(plain))  # steps of nested masks differ
    memory = dropped["peak_bytes"] / plain["peak_bytes"]
    flops = dropped["flops_per_token"] / plain["flops_per_token"]
    name = dropped["name"]
    shares = f"{time:.0%} of plain training's step time, {flops:.0%} of its FLOPs, {memory:.0%} of its peak memory"
    return f"{name} takes {shares}."


def _busy_sentence(plain: Run) -> list[str]:
    """Plain steps all do the same work, so differences in their times come from other work on the machine."""
    steps_s = typical_steps_s(plain)
    tenths = quantiles(steps_s, n=10, method="inclusive") if len(steps_s) > 1 else [1.0]
    if tenths[-1] <= _BUSY * tenths[0]:
        return []
    factor = f"Times of equal steps differ by a factor of {tenths[-1] / tenths[0]:.1f}"
    return [f"{factor}, so the machine was busy with other work: trust FLOPs and memory more than times."]


def _loss_sentence(when: str, plain: float, dropped: float) -> str:
    if f"{plain:.4f}" == f"{dropped:.4f}":
        return f"Validation loss {when}: equal ({plain:.4f})."
    better = "plain training" if plain < dropped else "DropBP"
    losses = f"plain {plain:.4f}, DropBP {dropped:.4f}"
    return f"Validation loss {when}: {losses}; {better} is lower by {abs(plain - dropped):.4f}."


def _at_equal(plain: Run, dropped: Run, axis: str) -> tuple[float, float]:
    """The two losses at the largest amount that both runs reached, interpolated between evaluations."""
    amount = min(_last(plain, axis), _last(dropped, axis))
    return _interpolated(plain, axis, amount), _interpolated(dropped, axis, amount)


def _interpolated(run: Run, axis: str, amount: float) -> float:
    points = _points(run)
    for before, after in pairwise(points):
        if before[axis] <= amount <= after[axis] and after[axis] > before[axis]:
            share = (amount - before[axis]) / (after[axis] - before[axis])
            return float(before["loss"] + share * (after["loss"] - before["loss"]))
    return float(points[-1]["loss"])


def _reached_sentence(plain: Run, dropped: Run) -> list[str]:
    """When DropBP first reached the final loss of plain training."""
    if not (plain["evaluations"] and dropped["evaluations"]):
        return []
    goal, needed_s = float(_points(plain)[-1]["loss"]), _last(plain, "train_s")
    for before, after in pairwise(_points(dropped)):
        if after["loss"] <= goal < before["loss"]:
            share = (before["loss"] - goal) / (before["loss"] - after["loss"])
            at_s = before["train_s"] + share * (after["train_s"] - before["train_s"])
            return [f"Plain training's final loss {goal:.4f}: plain after {needed_s:.0f} s, DropBP after {at_s:.0f} s."]
    return [f"DropBP did not reach plain training's final loss {goal:.4f}, which plain reached after {needed_s:.0f} s."]


def _accuracy_sentence(result: Result, plain: Run, dropped: Run) -> str:
    before, count = result["before"]["accuracy"], result["config"]["recipe"]["held_out"]
    shares = f"{before:.0%} before, plain {plain['accuracy']:.0%}, DropBP {dropped['accuracy']:.0%}"
    return f"Right answers to {count} held-out questions: {shares}."


def _last(run: Run, axis: str) -> float:
    return float(_points(run)[-1][axis])


def _points(run: Run) -> list[dict[str, float]]:
    return [{**point, "flops": point["tokens"] * run["flops_per_token"]} for point in run["evaluations"]]


def _draw_step_times(axes: Axes, runs: Sequence[Run]) -> None:
    for run in runs:
        steps_s = sorted(typical_steps_s(run))
        shares = [rank / len(steps_s) for rank in accumulate([1] * len(steps_s))]
        axes.step(steps_s, shares, where="post", label=run["name"])
    axes.set_ylim(0, 1.02)
    label_axes(axes, "step time (s)", "cumulative share of steps")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
