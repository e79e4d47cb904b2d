"""How much of a training is done, and which mask keeps its budget.

Annealed masks are nested masks in order: those that drop little come first, those that drop much last. So the next mask
depends on how much of the training is done, and on what the masks so far have dropped. `Pace` knows both, and `Curve`
turns both into the number that a nested sampler takes. The rule is feedback: the rest of the training must bring the
mean to its target. So the next mask is the first of an ordered sequence of masks that has the mean still needed. If
everything goes as planned, that sequence is the rest of the plan.

Every rank holds the same numbers, because they count draws, shares of training and FLOPs that all ranks share.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

LINGER = 0.95  # the least share of an observed width that the next report keeps
RECENT = 4  # weight of late draws in the mean FLOPs: about the last quarter counts


class Curve:
    """Share of the FLOPs that nested masks drop, by their number from 0 to 1: most at 0, least near 1.

    Each mask drops a share of `dropped`, falling, from its number in `edges`, rising from 0, to that of the next.
    """

    def __init__(self, edges: Sequence[float], dropped: Sequence[float]) -> None:
        self.edges, self.dropped = (*edges, 1.0), tuple(dropped)
        each = zip(dropped, pairwise(self.edges), strict=True)
        self.below = tuple(accumulate((drop * (end - start) for drop, (start, end) in each), initial=0.0))
        self.mean = self.below[-1]
        self._means_below = [-total / edge for total, edge in zip(self.below[1:], self.edges[1:], strict=True)]
        above = zip(self.below[:-1], self.edges[:-1], strict=True)
        self._means_above = [-(self.mean - total) / (1 - edge) for total, edge in above]

    def number(self, wanted: float, left: int) -> float:
        """The first of `left` numbers, in falling order, whose masks drop the share `wanted` on average."""
        low, high = (0.0, self._end(wanted)) if wanted >= self.mean else (self._start(wanted), 1.0)
        return high - (high - low) / (2 * left)

    def _end(self, wanted: float) -> float:
        """The largest number below which the mean is at least `wanted`; 0 if no mask drops so much."""
        i = bisect_right(self._means_below, -wanted)
        if i == len(self.dropped):
            return 1.0
        spare, slope = self.below[i] - wanted * self.edges[i], wanted - self.dropped[i]
        return min(self.edges[i + 1], self.edges[i] + max(0.0, spare) / slope) if slope > 0 else self.edges[i + 1]

    def _start(self, wanted: float) -> float:
        """The smallest number above which the mean is at most `wanted`; 1 if no mask drops so little."""
        i = max(0, bisect_right(self._means_above, -wanted) - 1)
        spare = self.mean - self.below[i] - wanted * (1 - self.edges[i])
        slope = self.dropped[i] - wanted
        return min(self.edges[i + 1], self.edges[i] + max(0.0, spare) / slope) if slope > 0 else self.edges[i + 1]


@dataclass
class Pace:
    """The share of training that is done, and the FLOPs that its masks still owe the budget.

    A share reported by the training loop is exact. Between two reports, or without any, each draw counts for a share as
    wide as those before (see `set_progress`).

    Attributes:
        width: the share of training that a draw is expected to take.
        share: the share of training done at the last report.
        draws: draws since then.
        base: the share at which counting draws began, from which `width` is derived.
        counted: draws from there to the last report.
        owed: FLOPs that the masks so far should have dropped and have not.
        mean: mean FLOPs of a draw, late ones weighing more; 0 before the second draw.
        averaged: draws in that mean.
        taken: FLOPs of the current draw.
    """

    width: float
    share: float = 0.0
    draws: int = 0
    base: float = 0.0
    counted: int = 0
    owed: float = 0.0
    mean: float = 0.0
    averaged: int = 0
    taken: float = 0.0

    @property
    def now(self) -> float:
        """The share of training done at the end of the current draw, as far as known."""
        return self.share + self.draws * self.width

    @property
    def over(self) -> bool:
        """Whether the training should have ended before the current draw."""
        return self.now > 1 + self.width / 2

    def set_progress(self, share: float) -> None:
        """Take a report of the training loop about the share that is done.

        Later draws are assumed to be as wide as those so far, or as the latest ones if these were wider; where draws
        get narrower, the width follows slowly. Then a burst of narrow draws does not overstate how many are left, and
        what is owed is paid in time.
        """
        latest = (share - self.share) / self.draws if self.draws else 0.0
        before = LINGER * self.width if self.counted and self.draws else 0.0
        self.counted, self.draws, self.share = self.counted + self.draws, 0, share
        if self.counted and share > self.base:
            self.width = max((share - self.base) / self.counted, latest, before)
        elif not self.counted or share < self.base:
            self.base, self.counted = share, 0

    def set_width(self, width: float) -> None:
        """Continue with draws that take another share of the training."""
        self.share = self.base = min(self.now, 1.0)
        self.draws = self.counted = 0
        self.width = width

    def begin(self) -> None:
        """Count a new draw."""
        if self.taken:
            self.averaged += 1
            self.mean += (self.taken - self.mean) * RECENT / (self.averaged + RECENT - 1)
        self.draws, self.taken = self.draws + 1, 0.0

    def number(self, curve: Curve, planned: float) -> float:
        """The number of the current draw's nested mask; `planned` is the mean share of FLOPs that a mask drops."""
        left = max(1, 1 + round((1 - self.now) / self.width))
        owed = self.owed / (self.mean * left) if self.mean else 0.0
        return curve.number(planned + owed, left)

    def note(self, planned: float, dropped: float, seen: float) -> None:
        """Count the FLOPs of a forward: those to drop according to the rates, those dropped, and all."""
        self.owed += planned - dropped
        self.taken += seen
