"""A plan as text, from its numbers alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

GIB = 1 << 30
_COLUMNS = ("drop rate", "step time", "ratio", "FLOPs", "ratio", "peak memory", "ratio", "batch", "sequence")
Entry = Mapping[str, Any]


def plan_table(found: Mapping[str, Any]) -> str:
    """The predictions; ratios are to the first row. `batch` and `sequence` are the largest that fit.

    Args:
        found: a plan as `TrainingPlan.as_dict` gives it.
    """
    lines = [_COLUMNS, *(_cells(entry, found["rates"][0]) for entry in found["rates"])]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_COLUMNS))]
    rows = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([_head(found), "", *rows, "", *_foot(found)])


def _head(found: Mapping[str, Any]) -> str:
    words = [
        f"micro-batch {_size(found['batch_size'], found['sequence_length'])}",
        *([f"{found['accumulation']} of them per step"] if found["accumulation"] > 1 else []),
        f"{found['masks']} masks",
        str(found["device"]["name"]),
        *([f"{found['precision']} autocast"] if found["precision"] else []),
    ]
    trained = f"{found['trained_parameters']:,} of {found['parameters']:,} parameters trained"
    return f"{', '.join(words)}; {trained}"


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
    return [*lines, *_of_the_cache(found)]


def _of_the_cache(found: Mapping[str, Any]) -> list[str]:
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
