"""Whether a run meets its drop rate: messages before and after it."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dropbp.masks.schedule import Schedule

TOLERANCE = 0.02  # of the realised drop rate


def out_of_reach(schedule: Schedule) -> str | None:
    """A message before the run if masks that meet the drop rate would leave nothing to train."""
    at = schedule.at_draw_shape
    edges, every = (at.sampler.edges, schedule.every) if at.total else (None, None)
    if edges is None or every is None:
        return None
    widths = [end - start for start, end in itertools.pairwise((*edges, 1.0))]
    trained = [(width, at.share(mask)) for width, mask in zip(widths, every, strict=True) if schedule.trains(mask)]
    target = at.planned / at.total
    most = max((share for _, share in trained), default=0.0)
    mean = sum(width * share for width, share in trained) / (sum(width for width, _ in trained) or 1.0)
    found = min(target, most) if schedule.anneals else mean
    if target - found <= TOLERANCE:
        return None
    return (
        f"A drop rate of {target:g} is out of reach: masks that drop that much leave nothing to train here, and "
        f"others replace them. About {found:.2f} of the branches' backward FLOPs will be dropped. Use a lower drop "
        "rate, train parameters in the last branches too, or use masks='exact'."
    )


def shortfall(schedule: Schedule) -> str | None:
    """A message at the end of a run that missed its budget."""
    done = schedule.statistics
    target = done.drawn_planned / max(done.drawn_seen, 1.0)
    if abs(done.drawn_rate - target) <= TOLERANCE:
        return None
    return (
        f"in {done.forwards} forwards, {done.drawn_rate:.3f} of the branches' backward FLOPs were dropped (warm-up "
        f"not counted); the target was {target:.3f}. {_cause(schedule)}"
    )


def _cause(schedule: Schedule) -> str:
    """Why a run missed its budget, and what to do."""
    pace = schedule.pace
    if schedule.anneals and not pace.over and pace.now < 1 - pace.width / 2:
        return (
            f"The run ended at {min(1.0, pace.now):.0%} of its length, and annealed masks drop little at first and "
            "much at the end. Pass the true length as steps=..., call handle.progress(share), or do neither."
        )
    unmet = out_of_reach(schedule)
    if unmet is not None:
        return unmet
    at = schedule.at_draw_shape
    drawn = range(min(schedule.draws, 256) if at.total and not schedule.anneals else 0)
    if any(not schedule.trains(at.extend_mask(at.sampler.draw(i))) for i in drawn):
        return (
            "Some masks would have left nothing to train, and others replaced them. Use a lower drop rate, or train "
            "parameters of more branches."
        )
    uneven = [
        what.format(f"{names[0]}{f' and {len(names) - 1} other branches' if names[1:] else ''}")
        for what, found in (("did not run {}", schedule.idle), ("ran {} more or less often", schedule.recurring))
        if (names := [name for i, name in enumerate(schedule.names) if found >> i & 1])
    ]
    if uneven:
        return (
            f"Some forwards {' or '.join(uneven)}, and masks count on every branch as in the forward that found it. In "
            "a run of known length (steps=...) later masks make up for it."
        )
    if schedule.draws * TOLERANCE < 1:
        return f"Only {schedule.draws} masks were drawn; longer runs come closer to the target."
    return (
        "If batches grow shorter or longer toward the end, or rates change there, too few steps are left to make up "
        "for it."
    )
