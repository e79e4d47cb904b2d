"""Corrects the counters after a forward that did not run all branches.

A mask is counted before its forward, which may then leave branches out: an early exit, a tower without input. These
have no backward, so they are no part of the budget, dropped or not. Annealed masks make up for it in later steps. With
several ranks they do not, because each rank may leave out others, and all must draw the same masks.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import compress
from typing import TYPE_CHECKING

from dropbp.masks.at_shape import AtShape
from dropbp.masks.registry import Mask

if TYPE_CHECKING:
    from dropbp.masks.schedule import Schedule


@dataclass(frozen=True)
class CountedForward:
    """What a forward was counted for: its mask, whether that was drawn, and the values at its shape.

    `at_draw_shape` holds the values that its mask was drawn from; None if all ranks draw the same ones.
    """

    mask: Mask
    at_batch_shape: AtShape
    at_draw_shape: AtShape | None
    drawn: bool

    @classmethod
    def latest(cls, schedule: Schedule) -> CountedForward:
        """What the latest forward was counted for."""
        at_draw_shape = None if schedule.multi_rank else schedule.at_draw_shape
        return cls(schedule.mask or (), schedule.at_batch_shape, at_draw_shape, schedule.mask_drawn)


def uncount_idle(schedule: Schedule, counted: CountedForward, idle: int) -> None:
    """Subtract what was counted for these branches, given as bits."""
    schedule.idle |= idle
    schedule.statistics.note_idle(*_shares(counted.at_batch_shape, counted.mask, idle), counted.drawn)
    if counted.drawn and counted.at_draw_shape is not None:
        planned, dropped, total = _shares(counted.at_draw_shape, counted.mask, idle)
        schedule.pace.note(-planned, -dropped, -total)


def _shares(at: AtShape, mask: Mask, idle: int) -> tuple[float, float, float]:
    """The FLOPs of the idle branches: those that a mask drops on average, those that this mask drops, and all."""
    left_out = [weight if idle >> i & 1 else 0.0 for i, weight in enumerate(at.weights)]
    total = sum(left_out)
    return at.planned * total / max(at.total, 1.0), sum(compress(left_out, mask)), total
