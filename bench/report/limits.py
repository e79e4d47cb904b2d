"""The possible saving, and the share of it that was achieved.

The forward always runs. The minimum for a step at drop rate p is therefore the forward, whose dropped share need not be
recorded, (1-p) of the blocks' backward, and the rest of the backward (head, loss, embedding). Each term is measured in
the same run as the figure it limits.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Parts:
    """Seconds of a plain step without the optimizer, in parts.

    Attributes:
        forward_s: a forward recorded for the backward.
        unrecorded_forward_s: the same under `no_grad`.
        blocks_backward_s: backward of the blocks, including recomputation under gradient checkpointing.
        rest_backward_s: the rest of the backward.
    """

    forward_s: float
    unrecorded_forward_s: float
    blocks_backward_s: float
    rest_backward_s: float

    @property
    def step_s(self) -> float:
        """Seconds of the plain step."""
        return self.forward_s + self.blocks_backward_s + self.rest_backward_s


def limit_s(parts: Parts, drop_rate: float) -> float:
    """The minimum time of a step at this drop rate. The cost of recording is never counted as negative."""
    unrecorded_s = min(parts.unrecorded_forward_s, parts.forward_s)
    forward_s = (1 - drop_rate) * parts.forward_s + drop_rate * unrecorded_s
    return forward_s + (1 - drop_rate) * parts.blocks_backward_s + parts.rest_backward_s


def share_of_possible_saving(plain_s: float, step_s: float, limit_s: float) -> float | None:
    """(plain - step) / (plain - limit); None if nothing can be saved."""
    return (plain_s - step_s) / (plain_s - limit_s) if plain_s > limit_s else None


def median_spread(values: Sequence[float]) -> tuple[float, float, float]:
    """The quartiles and the median: (first, second, third)."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    first, second, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, second, third
