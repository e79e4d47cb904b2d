"""The cost of the bookkeeping in each step: drawing a mask, counting, and a wrapper around every module of a branch.

The model's branches do almost nothing, so a step is mostly Python. Four variants are compared, interleaved in one run:
the plain model; the model enabled with nothing dropped; the model enabled at a drop rate; and the same masks written by
hand. By hand means `with torch.no_grad()` around dropped branches and nothing else, the cheapest possible way to drop.
The bookkeeping is the difference of enabled and by hand, and of enabled with nothing dropped and plain. Nested masks
would recompute blocks in their deepest steps to limit the activations; here these blocks are kept, since the variant by
hand recomputes nothing either. Times are processor times, so other processes on the machine matter less.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import nn

import dropbp
from dropbp.device import get_device

from ..common import records
from ..common.options import add_run_arguments, prepare_run

KIND = "overhead"
TARGET_MS = 1.0
WIDTH = 4
Mask = tuple[bool, ...]


class Scale(nn.Module):
    """One multiplication: the cheapest module with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


class Block(nn.Module):
    """Two branches, each a norm and a body; `dropped` drops them by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attention, self.mlp = Scale(), Scale(), Scale(), Scale()
        self.dropped = (False, False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.dropped
        with torch.no_grad() if first else contextlib.nullcontext():
            out = self.attention(self.norm1(x))
        x = x + out
        with torch.no_grad() if second else contextlib.nullcontext():
            out = self.mlp(self.norm2(x))
        return torch.add(x, out)


class Net(nn.Module):
    """A stack of blocks after a stem."""

    def __init__(self, branches: int) -> None:
        super().__init__()
        self.stem = Scale()
        self.blocks = nn.ModuleList(Block() for _ in range(branches // 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x

    def drop_by_hand(self, mask: Sequence[bool]) -> None:
        blocks = cast(Iterable[Block], self.blocks)
        for block, pair in zip(blocks, zip(mask[::2], mask[1::2], strict=True), strict=True):
            block.dropped = pair


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--branches", type=int, default=160, help="residual branches of the model (%(default)s)")
    parser.add_argument("--drop-rate", type=float, default=0.5, help="share of FLOPs dropped (%(default)s)")
    parser.add_argument("--masks", default="exact", help="mask sampler (%(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="steps of each kind, interleaved (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the record instead of a table")
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, write the record and print the results."""
    prepare_run(args)
    branches, steps = (8, 5) if args.smoke else (args.branches, args.steps)
    configuration = {"branches": branches, "steps": steps, "drop_rate": args.drop_rate, "masks": args.masks}
    store, name = records.Store(args.output, KIND), f"{branches}-branches--{args.masks}--{args.drop_rate:g}"
    record = store.measured(name, configuration, get_device("cpu"), lambda: measure(**configuration), again=args.again)
    sys.stdout.write(json.dumps(record, indent=2) + "\n" if args.json else _table(record))
    return 0


def measure(branches: int, steps: int, drop_rate: float, masks: str) -> dict[str, Any]:
    """Step times of each variant in seconds, interleaved, and the medians of their differences in milliseconds."""
    ways = _ways(branches, drop_rate, masks)
    step_s: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(steps + 3):
        for name, step in ways.items():
            step_s[name].append(next(step))
    step_s = {name: times[3:] for name, times in step_s.items()}
    return {
        "step_s": step_s,
        "step_ms": {name: _median_ms(times) for name, times in step_s.items()},
        "overhead_ms": _median_difference_ms(step_s["enabled"], step_s["by hand"]),
        "overhead_undisturbed_ms": _fast_ms(step_s["enabled"]) - _fast_ms(step_s["by hand"]),
        "overhead_nothing_dropped_ms": _median_difference_ms(step_s["nothing dropped"], step_s["plain"]),
        "draw_ms": _draw_ms(branches, drop_rate, masks, steps),
        "target_ms": TARGET_MS,
    }


def _ways(branches: int, drop_rate: float, masks: str) -> dict[str, Iterator[float]]:
    x = torch.ones(1, WIDTH)
    enabled, kept = Net(branches), Net(branches)
    handle = dropbp.enable(enabled, drop_rate, masks=masks, example_inputs=x, max_activations=None)
    none = dropbp.enable(kept, 0.0, masks=masks, example_inputs=x)
    return {
        "plain": _steps(Net(branches), x, lambda net: None),
        "nothing dropped": _steps(kept, x, lambda net: None, none),
        "enabled": _steps(enabled, x, lambda net: None, handle),
        "by hand": _steps(Net(branches), x, lambda net: net.drop_by_hand(handle.mask or ())),
    }


def _steps(net: Net, x: torch.Tensor, prepare: Callable[[Net], None], handle: Any = None) -> Iterator[float]:
    """Yield the times of successive training steps; `handle` is kept alive."""
    for _ in itertools.count():
        prepare(net)
        net.zero_grad(set_to_none=True)
        start = time.thread_time()
        net(x).sum().backward()
        yield time.thread_time() - start


def _draw_ms(branches: int, drop_rate: float, masks: str, steps: int) -> float:
    """The mean time per mask, as several masks are drawn at once."""
    from dropbp.masks.samplers import Sampler

    sampler, start = Sampler(masks, [drop_rate] * branches, [1.0] * branches), time.thread_time()
    for step in range(steps):
        sampler.draw(step)
    return (time.thread_time() - start) / steps * 1e3


def _median_ms(times: Sequence[float]) -> float:
    return statistics.median(times) * 1e3


def _fast_ms(times: Sequence[float]) -> float:
    """The tenth percentile, that is, steps that other processes on the machine disturbed least."""
    return statistics.quantiles(times, n=10)[0] * 1e3


def _median_difference_ms(one: Sequence[float], other: Sequence[float]) -> float:
    return _median_ms([a - b for a, b in zip(one, other, strict=True)])


def _table(record: dict[str, Any]) -> str:
    lines = [f"{name:<28}{value:>9.3f} ms" for name, value in record["step_ms"].items()]
    lines.append(f"{'drawing a mask':<28}{record['draw_ms']:>9.3f} ms")
    lines.append(f"{'enabled - by hand':<28}{record['overhead_ms']:>9.3f} ms, target {record['target_ms']:g} ms")
    lines.append(f"{'the same, tenth percentile':<28}{record['overhead_undisturbed_ms']:>9.3f} ms")
    lines.append(f"{'nothing dropped - plain':<28}{record['overhead_nothing_dropped_ms']:>9.3f} ms")
    return "\n".join(lines) + "\n"
