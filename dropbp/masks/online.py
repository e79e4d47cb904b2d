"""Keeps sensitivities up to date during ordinary training, without an extra pass.

A step's gradients show the branches it kept. The first part of a sensitivity follows an exponential average of the
squared norms of the branch's own gradients. The second part, the loss for the parameters below, is not visible in a
step that drops branches. It comes from the last calibration, scaled by the growth of all gradients since.

Under gradient accumulation, a branch that was kept in k of n forwards has k of n gradients in the sum. Noise dominates
the gradients of small batches, so the square is scaled by n / k; without noise it would be (n / k)^2.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence


@dataclasses.dataclass
class Online:
    """Averages of each branch's own squared gradient norm.

    Attributes:
        sums: exponentially weighted sums of the observations, one per branch.
        weights: the sums of the weights; 0 for a branch that was never kept.
        calls: number of observations so far.
        forwards: training forwards up to the last observation.
        dropped: how often each branch was dropped up to the last observation.
    """

    sums: list[float]
    weights: list[float]
    calls: int
    forwards: int
    dropped: list[int]

    @classmethod
    def new(cls, count: int, forwards: int = 0, dropped: Sequence[int] | None = None) -> Online:
        return cls([0.0] * count, [0.0] * count, 0, forwards, list(dropped or [0] * count))

    def observe(self, squares: Sequence[float], forwards: int, dropped: Sequence[int], decay: float) -> None:
        """Add the squared gradient norms of a step, for the branches that it kept."""
        run = forwards - self.forwards
        for branch, square in enumerate(squares):
            kept = run - (dropped[branch] - self.dropped[branch])
            if kept > 0 and math.isfinite(square):
                self.sums[branch] = decay * self.sums[branch] + (1 - decay) * square * run / kept
                self.weights[branch] = decay * self.weights[branch] + (1 - decay)
        self.calls, self.forwards, self.dropped = self.calls + 1, forwards, list(dropped)

    def own(self) -> tuple[float, ...]:
        """The averages; NaN for a branch that was never kept."""
        pairs = zip(self.sums, self.weights, strict=True)
        return tuple(total / weight if weight else math.nan for total, weight in pairs)

    def sensitivities(
        self, own: Sequence[float], calibrated: Sequence[float] | None, calibrated_own: Sequence[float] | None
    ) -> tuple[float, ...] | None:
        """S_l; None while a branch was neither observed nor calibrated.

        `own` are the averages, or their mean over ranks. `calibrated` are the sensitivities of the last calibration, if
        there was one, and `calibrated_own` their parts from the branches' own parameters.
        """
        if calibrated is None or calibrated_own is None:
            return tuple(own) if all(map(math.isfinite, own)) else None
        growth = _growth(own, calibrated_own)
        own = [o if math.isfinite(o) else growth * c for o, c in zip(own, calibrated_own, strict=True)]
        return tuple(o + growth * (s - c) for o, s, c in zip(own, calibrated, calibrated_own, strict=True))


def _growth(own: Sequence[float], calibrated: Sequence[float]) -> float:
    seen = [(o, c) for o, c in zip(own, calibrated, strict=True) if math.isfinite(o)]
    before = math.fsum(c for _, c in seen)
    return math.fsum(o for o, _ in seen) / before if before else 1.0
