"""The largest size that fits: steps that double away from a guess until the border is passed, then bisection."""

from __future__ import annotations

from collections.abc import Callable


def largest(fits: Callable[[int], bool], *, step: int = 1, most: int, guess: int | None = None) -> int:
    """The largest multiple of `step`, at most `most`, for which `fits` holds; 0 if not even one step does.

    `fits` must be monotone. Without a guess it is asked about O(log(most / step)) sizes, with a right one about two.
    """
    limit = most // step
    first = min(max(1, (guess or step) // step), limit)
    low, high = _bracket(lambda steps: fits(steps * step), first, limit) if limit else (0, 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle)
    return low * step


def _bracket(fits: Callable[[int], bool], first: int, limit: int) -> tuple[int, int]:
    """(a size that fits, a larger one that does not), in steps; 0 is taken to fit, `limit + 1` not to."""
    stride = 1
    if fits(first):
        low = first
        while low < limit:
            higher = min(low + stride, limit)
            if not fits(higher):
                return low, higher
            low, stride = higher, 2 * stride
        return limit, limit + 1
    high = first
    while high > 1:
        lower = max(high - stride, 1)
        if fits(lower):
            return lower, high
        high, stride = lower, 2 * stride
    return 0, high
