"""The costs of a run on the simulated HPU: recipes, recompilations, launches, memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

GIB = 2**30


@dataclass(frozen=True)
class StepCount:
    """The counts of one optimizer step.

    Attributes:
        recompiles: recipes compiled, that is, cache misses.
        launches: graphs run, newly compiled or not.
        host_reads: how often the host waited for a value: `.item()`, a copy to the host, a data-dependent shape.
        peak_bytes: peak device memory since the run began.
    """

    recompiles: int
    launches: int
    host_reads: int
    peak_bytes: int


@dataclass(frozen=True)
class Report:
    """Counts of a run; `steps` holds one entry for each optimizer step, in order.

    Attributes:
        mode: `lazy` or `eager`.
        recipes: number of different graphs compiled.
        launches: graphs run.
        ops: operators that did work on the device.
        host_reads: as in :class:`StepCount`.
        flushes: launches by what ended the graph: `mark_step`, `item`, `copy_to_host`, `dynamic_shape`, `max_ops`,
            `synchronize`; in eager mode `eager` (one operator) or `region` (a compiled region).
        compiled_graphs: graphs passed to `torch.compile(backend="hpu_backend")`, by kind.
        peak_bytes: peak device memory in use.
        in_use_bytes: device memory in use now.
        limit_bytes: device memory available.
        steps: counts per optimizer step.
    """

    mode: str
    recipes: int
    launches: int
    ops: int
    host_reads: int
    flushes: Mapping[str, int]
    compiled_graphs: Mapping[str, int]
    peak_bytes: int
    in_use_bytes: int
    limit_bytes: int
    steps: Sequence[StepCount]

    def recompiles_after(self, step: int) -> int:
        """Recipes compiled in the steps after the first `step` ones."""
        return sum(each.recompiles for each in self.steps[step:])

    @property
    def late_steps(self) -> Sequence[StepCount]:
        """The second half of the steps, in which a bounded design compiles nothing."""
        return self.steps[len(self.steps) // 2 :]

    @property
    def late_recompiles_per_step(self) -> float:
        return fmean(each.recompiles for each in self.late_steps) if self.late_steps else 0.0

    @property
    def launches_per_step(self) -> float:
        """Mean over the late steps, which exclude the warm-up."""
        return fmean(each.launches for each in self.late_steps) if self.late_steps else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Everything, for a JSON file."""
        derived = {
            "late_recompiles_per_step": self.late_recompiles_per_step,
            "launches_per_step": self.launches_per_step,
        }
        return asdict(self) | derived

    def __str__(self) -> str:
        return "\n".join(f"{name:<26}{value}" for name, value in self._lines())

    def _lines(self) -> list[tuple[str, str]]:
        return [
            ("simulated HPU", f"{self.mode} mode"),
            ("optimizer steps", str(len(self.steps))),
            ("recipes compiled", str(self.recipes)),
            ("late recompiles per step", f"{self.late_recompiles_per_step:.2f}   (second half of the steps)"),
            ("launches per step", f"{self.launches_per_step:.1f}   (second half of the steps)"),
            ("graphs flushed by", _counts(self.flushes)),
            ("host reads", str(self.host_reads)),
            ("torch.compile graphs", _counts(self.compiled_graphs)),
            ("peak memory", f"{self.peak_bytes} bytes ({self.peak_bytes / GIB:.3f} of {self.limit_bytes / GIB:g} GiB)"),
        ]


def _counts(counts: Mapping[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {count}" for name, count in ordered) or "none"
