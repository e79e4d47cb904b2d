"""How much could be saved at all, and what share of it was.

The forward always runs. So the least that a step at drop rate p can take is the forward, whose dropped share need not
be recorded, (1-p) of the blocks' backward, and the rest of the backward (head, loss, embedding). Each term is measured
in the run whose figure it stands beside.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Parts:
    """Seconds of a plain step without the optimizer, in parts.

    Attributes:
        forward_s: a forward that is recorded for backward.
        unrecorded_forward_s: the same under `no_grad`.
        blocks_backward_s: backward of the blocks, recomputation under gradient checkpointing included.
        rest_backward_s: the rest of the backward.
    """

    forward_s: float
    unrecorded_forward_s: float
    blocks_backward_s: float
    rest_backward_s: float

    @property
    def step_s(self) -> float:
        """The plain step."""
        return self.forward_s + self.blocks_backward_s + self.rest_backward_s


def limit_s(parts: Parts, drop_rate: float) -> float:
    """The least that a step at this drop rate can take. Recording is never counted as costing less than nothing."""
    unrecorded_s = min(parts.unrecorded_forward_s, parts.forward_s)
    forward_s = (1 - drop_rate) * parts.forward_s + drop_rate * unrecorded_s
    return forward_s + (1 - drop_rate) * parts.blocks_backward_s + parts.rest_backward_s


def share_of_possible_saving(plain_s: float, step_s: float, limit_s: float) -> float | None:
    """(plain - step) / (plain - limit); None where nothing could be saved."""
    return (plain_s - step_s) / (plain_s - limit_s) if plain_s > limit_s else None


def median_spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median and quartiles: (first, second, third)."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    first, second, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, second, third
