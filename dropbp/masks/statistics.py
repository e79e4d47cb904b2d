"""What was dropped so far: counts over training forwards, for the report and its table."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import TYPE_CHECKING, Any

from dropbp.masks.registry import Mask

if TYPE_CHECKING:
    from dropbp.discovery.structure import Branch


@dataclass
class Statistics:
    """Counts over training forwards. FLOPs are forward FLOPs of branches that have a backward.

    Attributes:
        counts: how often each branch was dropped.
        forwards: training forwards so far.
        flops_dropped: FLOPs whose backward was skipped.
        flops_seen: FLOPs of all branches.
        drawn_planned: the FLOPs that the rates of forwards with a drawn mask should drop.
        drawn_dropped: the FLOPs that these forwards dropped.
        drawn_seen: all FLOPs of these forwards.
    """

    counts: list[int]
    forwards: int = 0
    flops_dropped: float = 0.0
    flops_seen: float = 0.0
    drawn_planned: float = 0.0
    drawn_dropped: float = 0.0
    drawn_seen: float = 0.0

    @property
    def drop_rate(self) -> float:
        """Share of the FLOPs dropped so far; 0 before the first forward."""
        return self.flops_dropped / max(self.flops_seen, 1.0)

    @property
    def drawn_rate(self) -> float:
        """The same without the warm-up and masks given by the user."""
        return self.drawn_dropped / max(self.drawn_seen, 1.0)

    def note(self, mask: Mask, flops: Sequence[float], total: float, planned: float | None) -> None:
        """Count one training forward; `planned` are the FLOPs that a drawn mask drops on average."""
        dropped = sum(compress(flops, mask))
        self.forwards += 1
        self.counts = list(map(operator.add, self.counts, mask))
        self.flops_dropped += dropped
        self.flops_seen += total
        if planned is not None:
            self.drawn_planned += planned
            self.drawn_dropped += dropped
            self.drawn_seen += total

    def subtract(self, planned: float, dropped: float, seen: float, drawn: bool) -> None:
        """Subtract FLOPs counted for a forward that did not run them; `drawn` tells whether its mask was drawn."""
        self.flops_dropped -= dropped
        self.flops_seen -= seen
        if drawn:
            self.drawn_planned -= planned
            self.drawn_dropped -= dropped
            self.drawn_seen -= seen

    def of_branch(self, i: int, branch: Branch) -> dict[str, Any]:
        """The entry of one branch in `Handle.report`."""
        return {
            "name": branch.name,
            "modules": list(branch.modules),
            "flops": branch.flops,
            "parameters": branch.parameters,
            "rate": branch.rate,
            "dropped": self.counts[i],
            "realised_rate": self.counts[i] / self.forwards if self.forwards else 0.0,
        }


def table(report: Mapping[str, Any]) -> str:
    """`Handle.report()` as a table of the branches: share of FLOPs, parameters, rates, how often each was dropped."""
    branches = report["branches"]
    width = max(len("branch"), *(len(entry["name"]) for entry in branches))
    total = sum(entry["flops"] for entry in branches)
    head = f"{'branch':<{width}}  {'share of FLOPs':>14}  {'parameters':>12}  {'rate':>6}  {'realised':>8}"
    rows = [
        f"{entry['name']:<{width}}  {entry['flops'] / total:>14.2%}  {entry['parameters']:>12,}  "
        + (f"{entry['rate']:>6.3f}  {entry['realised_rate']:>8.3f}" if entry["weight"] else "     no backward")
        for entry in branches
    ]
    parts = report["not_recorded"]
    without = f", which did not run {', '.join(parts)}: branches there are neither dropped nor counted" if parts else ""
    never = sum(entry["rate"] == 1 for entry in branches)
    foot = (
        f"{len(branches)} branches hold {report['branch_flops_share']:.1%} of the FLOPs of the forward that found "
        f"them{without}; target drop "
        f"rate {report['drop_rate']:g}, realised {report['realised_drop_rate']:.4f} in {report['forwards']} forwards"
    )
    idle = sum(not entry["weight"] for entry in branches)
    if idle:
        foot += f"; {idle} branches have no backward to skip: nothing in them or below them is trained"
    if never:
        foot += f"; {never} branches are never trained (rate 1)"
    kept = report["not_recomputed"]
    if kept:
        name, reason = next(iter(kept.items()))
        foot += f"; {len(kept)} blocks keep all activations in deep steps: {name}, as {reason}"
    return "\n".join([head, *rows, foot])
