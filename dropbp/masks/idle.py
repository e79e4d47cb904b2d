"""Corrects the counters after a forward that did not run every branch as often as the recorded forward did.

A mask is counted before its forward, which may then leave branches out (an early exit, a tower without input) or run
some repeatedly. The budget is that of the backward of what ran, dropped or not. Annealed masks make up for it in later
steps. With several ranks they do not, because each rank may run others, and all must draw the same masks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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


def correct_counters(schedule: Schedule, counted: CountedForward, ran: Mapping[int, float]) -> None:
    """Correct the counters for branches that ran more or less often: multiples of the recorded forward, or 0."""
    for branch, times in ran.items():
        if times:
            schedule.recurring |= 1 << branch
        else:
            schedule.idle |= 1 << branch
    schedule.statistics.subtract(*_surplus(counted.at_batch_shape, counted.mask, ran), counted.drawn)
    if counted.drawn and counted.at_draw_shape is not None:
        planned, dropped, total = _surplus(counted.at_draw_shape, counted.mask, ran)
        schedule.pace.note(-planned, -dropped, -total)


def _surplus(at: AtShape, mask: Mask, ran: Mapping[int, float]) -> tuple[float, float, float]:
    """FLOPs counted too much: those that a mask drops on average, those that this mask drops, and all."""
    each = [(end, weight * (1 - ran[own])) for end, own, weight in at.parts if own in ran]
    total = sum(weight for _, weight in each)
    return at.planned * total / max(at.total, 1.0), sum(weight for end, weight in each if mask[end]), total
