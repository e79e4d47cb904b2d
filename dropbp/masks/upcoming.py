"""Which branches the coming masks of a run may keep, as far as known. Sets of branches are bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dropbp.masks.samplers import bits

if TYPE_CHECKING:
    from dropbp.masks.schedule import Schedule


def may_keep_from_now_on(schedule: Schedule) -> int:
    """The branches that coming training forwards may keep.

    An annealed run moves from its current mask toward shallower ones. With batches of unequal lengths it may fall back
    a little; one mask is assumed.
    """
    at, every = schedule.at_draw_shape, (1 << len(schedule.names)) - 1
    if not schedule.dropping or schedule.statistics.forwards < schedule.config.warmup or not at.total:
        return every
    never = [bits(tuple(rate >= 1 for rate in values.rates)) for values in (at, schedule.at_batch_shape)]
    warming_up = schedule.graph_warmup is not None and not schedule.graph_warmup.done
    if not schedule.anneals or schedule.pace.over or warming_up or schedule.current is None:
        return every & ~(never[0] & never[1])
    masks = at.annealing[1]
    place = masks.index(schedule.current) if schedule.current in masks else len(masks) - 1
    return every & ~bits(masks[min(place + 1, len(masks) - 1)])


def may_keep_at_the_end(schedule: Schedule) -> int:
    """The branches that training forwards at the end of the run may keep."""
    at, every = schedule.at_draw_shape, (1 << len(schedule.names)) - 1
    if not at.total:
        return every
    return every & ~bits(at.annealing[1][0] if schedule.anneals else tuple(rate >= 1 for rate in at.rates))
