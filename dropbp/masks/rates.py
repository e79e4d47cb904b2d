"""How often each branch is dropped, given the share of the backward FLOPs to save.

There are two ways to the rates p_l. From sensitivities S_l: minimise sum S_l p_l^2 under sum f_l p_l = p sum f_l, 0 <=
p_l <= max. By Karush-Kuhn-Tucker p_l = min(max, lambda f_l / S_l). Branches reach the cap in the order of S_l / f_l, so
lambda is found by walking along that order, with no tolerance. The paper (DropBP, arXiv:2402.17812, section 3.2) walks
the same way in steps of 0.1. From a depth profile: under nested masks, rates that do not fall toward the input are a
distribution of the number of branches, counted from the top, that a step trains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, groupby
from typing import TypeVar

from dropbp.checks import Rates, check_lengths, checked_flops, checked_rates, checked_sensitivities, checked_share
from dropbp.errors import ConfigError

_ROUNDING = 1e-12
_PAPER_STEPS = 10
_BISECTIONS = 100
_SHELF_TO_TAIL = 3.0
_BLOCK = 2  # branches: the last steps of a band train at least an attention and an MLP

T = TypeVar("T")
Allocator = Callable[[Rates, Rates, float, float], Rates]
Profile = Callable[[int, float], list[float]]


def allocate(
    sensitivities: Iterable[float],
    flops: Iterable[float],
    drop_rate: float,
    max_rate: float | None = None,
    *,
    method: str = "exact",
) -> Rates:
    """Drop rates per branch that save `drop_rate` of the FLOPs at the least cost in sensitivity.

    Args:
        sensitivities: S_l >= 0, one per branch, in any unit. 0 means free to drop: such branches are filled first, all
            to the same rate. Infinity means never dropped.
        flops: backward FLOPs per branch, in any unit, positive.
        drop_rate: share of the FLOPs to save on average, in [0, 1).
        max_rate: largest rate of a branch, in (0, 1]. Default max(0.9, (1 + drop_rate) / 2): the paper's cap, raised at
            high drop rates so that sensitive branches can still be dropped less than others.
        method: "exact" (the minimiser of sum S_l p_l^2), "paper" (the paper's greedy method in steps of 0.1, counting
            the FLOPs that a step saves, with a last fractional step to meet the budget), "uniform" (the same rate for
            all).

    Returns:
        One rate per branch, in order; sum f_l p_l equals drop_rate * sum f_l up to rounding. Permuting the branches
        permutes the rates. Less sensitivity per FLOP never gives a lower rate. A higher drop_rate never gives a lower
        rate either, except for the steps of "paper".

    Raises:
        ConfigError: NaN or negative entries, unequal lengths, an unknown method, or a budget that cannot be reached.

    Source: DropBP, arXiv:2402.17812, section 3.2 (objective and greedy method); the exact solution is the KKT point.
    """
    work, scores = checked_flops(flops), checked_sensitivities(sensitivities)
    check_lengths("sensitivities", scores, work)
    share = _checked_drop_rate(drop_rate)
    cap = _checked_cap(max(0.9, (1 + share) / 2) if max_rate is None else max_rate)
    allocator = _lookup("method", method, METHODS)
    return allocator(scores, _shares(work), share, cap)


def _exact(scores: Rates, shares: Rates, drop_rate: float, cap: float) -> Rates:
    prices = _prices(scores, shares, drop_rate, cap)
    level, rate, weights = math.inf, 0.0, [0.0] * len(prices)
    for level in sorted({price for price in prices if price < math.inf}):
        capped = _saved([cap * (price < level) for price in prices], shares)
        weights = [_rate_relative_to(level, price) for price in prices]
        rate = max(0.0, drop_rate - capped) / _saved(weights, shares)
        if rate <= cap:
            break
    return tuple(cap if price < level else min(cap, rate) * w for price, w in zip(prices, weights, strict=True))


def _prices(scores: Rates, shares: Rates, drop_rate: float, cap: float) -> Rates:
    """Sensitivity per share of the FLOPs. Raises ConfigError if the branches of finite price cannot meet the budget."""
    prices = tuple(score / share for score, share in zip(scores, shares, strict=True))
    droppable = math.fsum(share for share, price in zip(shares, prices, strict=True) if price < math.inf)
    _check_reachable(drop_rate, cap, droppable)
    return prices


def _rate_relative_to(level: float, price: float) -> float:
    """Rate of a branch at `price` per unit of the rate at price `level`, while neither is capped."""
    if price < level:
        return 0.0
    return 1.0 if price == level else level / price


def _paper(scores: Rates, shares: Rates, drop_rate: float, cap: float) -> Rates:
    prices = _prices(scores, shares, drop_rate, cap)
    steps = [0] * len(prices)
    while True:
        rates = [_rate_after(count, cap) for count in steps]
        left = drop_rate - _saved(rates, shares)
        cheapest = _cheapest(prices, rates, steps, cap)
        if left <= 0 or not cheapest:
            return tuple(rates)
        rises = {i: _rate_after(steps[i] + 1, cap) - rates[i] for i in cheapest}
        saved = math.fsum(shares[i] * rise for i, rise in rises.items())
        if saved >= left:
            return tuple(p + rises.get(i, 0.0) * (left / saved) for i, p in enumerate(rates))
        steps = [count + (i in rises) for i, count in enumerate(steps)]


def _cheapest(prices: Sequence[float], rates: Sequence[float], steps: Sequence[int], cap: float) -> list[int]:
    """Branches whose next step costs least per FLOP saved. Ties rise together: the order has no effect."""
    costs = {
        i: price * _rate_after(steps[i] + 1, cap)
        for i, price in enumerate(prices)
        if price < math.inf and rates[i] < cap
    }
    least = min(costs.values(), default=0.0)
    return [i for i, cost in costs.items() if cost == least]


def _rate_after(steps: int, cap: float) -> float:
    return min(cap, steps / _PAPER_STEPS)


def _uniform(_scores: Rates, shares: Rates, drop_rate: float, cap: float) -> Rates:
    _check_reachable(drop_rate, cap, 1.0)
    return (drop_rate,) * len(shares)


METHODS: dict[str, Allocator] = {"exact": _exact, "paper": _paper, "uniform": _uniform}


def depth_rates(
    flops: Iterable[float],
    drop_rate: float,
    profile: str = "geometric",
    max_rate: float = 1.0,
    parallel: Iterable[int] = (),
) -> Rates:
    """Drop rates that do not fall toward the input (index 0) and save exactly `drop_rate` of the FLOPs.

    Made for nested masks: a step trains the top of the model down to a random depth D, and 1 - rate is P(D reaches the
    branch). Each profile is a family of distributions of D with one parameter, which the budget determines.

    Args:
        flops: backward FLOPs per branch, from the input upwards, in any unit, positive.
        drop_rate: share of the FLOPs to save on average, in [0, 1).
        profile: "geometric" (P(D >= k) = q^(k-1): the top branch is always trained), "uniform_depth" (D uniform over
            1..m, or over m..N if the budget allows more), "shelf" (P(D >= k) = min(1, q^(k-m)) with m = 3 q / (1-q):
            three quarters of the trained FLOPs are a top that is always trained, one quarter goes to a geometric tail
            below it; a shelf is never shorter than one branch), "linear" (rates on a straight line in depth, as steep
            as the bounds allow), "freeze" (1 below, 0 above, one fractional branch at the border), "band" (D uniform
            over a band around its mean m, from m - d to m + d with d half the distance to the nearer end, less if m - d
            would be under two branches: the top is always trained, the lowest part never).
        max_rate: largest rate of a branch, in (0, 1]; below 1 every branch is trained now and then.
        parallel: sets of neighbouring branches, each as a bit mask, that get one rate.

    Returns:
        One rate per branch, non-increasing; sum f_l p_l equals drop_rate * sum f_l within 1e-12 of it. If the budget is
        smaller than the top branch alone, all profiles but "linear" train that branch in a fraction of the steps and
        drop the rest.

    Raises:
        ConfigError: wrong FLOPs or shares, an unknown profile, or drop_rate above max_rate.
    """
    work = checked_flops(flops)
    parts = _rate_groups(len(work), parallel)
    shares = _shares(tuple(math.fsum(work[i] for i in part) for part in parts))
    share, cap = _checked_drop_rate(drop_rate), _checked_cap(max_rate)
    _check_reachable(share, cap, 1.0)
    keep_from_top = _lookup("profile", profile, PROFILES)

    def rates_at(theta: float) -> list[float]:
        return [min(cap, 1.0 - keep) for keep in reversed(keep_from_top(len(shares), theta))]

    rates = _snapped(_meet_budget(rates_at, shares, share), cap, share)
    return tuple(rate for rate, part in zip(rates, parts, strict=True) for _ in part)


def _rate_groups(count: int, parallel: Iterable[int]) -> list[list[int]]:
    """The branches in groups that get one rate."""
    first = {i: bits for bits in parallel for i in range(count) if bits >> i & 1}
    return [list(part) for _, part in groupby(range(count), key=lambda i: first.get(i, -1 - i))]


def average_over_parallel(rates: Iterable[float], flops: Iterable[float], parallel: Iterable[int]) -> Rates:
    """The rates, with the FLOPs-weighted mean in each of these sets of branches; see `depth_rates`."""
    values, work = list(checked_rates(rates)), checked_flops(flops)
    check_lengths("rates", values, work)
    for part in _rate_groups(len(values), parallel):
        if len({values[i] for i in part}) > 1:
            mean = math.fsum(work[i] * values[i] for i in part) / math.fsum(work[i] for i in part)
            values[part[0] : part[-1] + 1] = [min(1.0, mean)] * len(part)
    return tuple(values)


def _meet_budget(rates_at: Callable[[float], list[float]], shares: Rates, drop_rate: float) -> Rates:
    """Bisect theta in [0, 1] to neighbouring doubles, then mix their two rate vectors so that the budget is exact."""
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if _saved(rates_at(middle), shares) > drop_rate else (low, middle)
    more, less = rates_at(low), rates_at(high)
    above, below = _saved(more, shares), _saved(less, shares)
    mix = min(1.0, max(0.0, (above - drop_rate) / (above - below))) if above > below else 0.0
    return tuple(accumulate((a + mix * (b - a) for a, b in zip(more, less, strict=True)), min))


def _snapped(rates: Rates, cap: float, drop_rate: float) -> Rates:
    """Move rates within rounding error of a bound onto it: a rate of 1e-16 would add a mask that never occurs."""
    noise = _ROUNDING / 10 * drop_rate
    return tuple(cap if cap - rate < noise else 0.0 if rate < noise else rate for rate in rates)


def _geometric(count: int, theta: float) -> list[float]:
    if theta <= 0.5:
        return _only_top(count, 2 * theta)
    return [(2 * theta - 1) ** k for k in range(count)]


def _shelf(count: int, theta: float) -> list[float]:
    """With q = theta the tail's mean length is about q / (1-q), the shelf 3 times that: one branch at q = 1/4."""
    if theta <= 0.125:
        return _only_top(count, 8 * theta)
    if theta <= 0.25:
        return [1.0] + [(8 * theta - 1) * 0.25**k for k in range(1, count)]
    shelf = _SHELF_TO_TAIL * theta / (1 - theta) if theta < 1 else count
    return [theta ** max(0.0, k + 1 - shelf) for k in range(count)]


def _uniform_depth(count: int, theta: float) -> list[float]:
    if theta <= 0.5:
        deepest = 2 * theta * count
        return [_clip((deepest - k) / max(deepest, 1.0)) for k in range(count)]
    shallowest = 1 + (2 * theta - 1) * (count - 1)
    return [_clip((count - k) / (count - shallowest + 1)) for k in range(count)]


def _linear(count: int, theta: float) -> list[float]:
    at_top, at_input = max(0.0, 1 - 2 * theta), min(1.0, 2 - 2 * theta)
    slope = (at_input - at_top) / max(1, count - 1)
    return [_clip(1 - at_top - slope * k) for k in range(count)]


def _freeze(count: int, theta: float) -> list[float]:
    return [_clip(theta * count - k) for k in range(count)]


def _band(count: int, theta: float) -> list[float]:
    """D uniform over theta - d to theta + d of the branches, d = min(theta, 1 - theta) / 2, but never below a block."""
    middle = theta * count
    half = min(middle / 2, (count - middle) / 2, middle - _BLOCK)
    if half < _ROUNDING:
        return _freeze(count, theta)
    low, high = middle - half, middle + half
    return [_clip((_trained_below(high - k) - _trained_below(low - k)) / (high - low)) for k in range(count)]


def _trained_below(depth: float) -> float:
    """Integral of min(1, max(0, x)) up to `depth`."""
    return max(0.0, depth) ** 2 / 2 if depth < 1 else depth - 0.5


def _only_top(count: int, keep: float) -> list[float]:
    return [keep] + [0.0] * (count - 1)


PROFILES: dict[str, Profile] = {
    "geometric": _geometric,
    "uniform_depth": _uniform_depth,
    "shelf": _shelf,
    "linear": _linear,
    "freeze": _freeze,
    "band": _band,
}


def _shares(flops: Rates) -> Rates:
    largest = max(flops)
    scaled = [f / largest for f in flops]
    total = math.fsum(scaled)
    return tuple(f / total for f in scaled)


def _saved(rates: Sequence[float], shares: Sequence[float]) -> float:
    return math.fsum(f * p for f, p in zip(shares, rates, strict=True))


def _clip(value: float) -> float:
    return min(1.0, max(0.0, value))


def _checked_drop_rate(drop_rate: float) -> float:
    return checked_share("drop_rate", drop_rate, "a share of the FLOPs from 0 to below 1", lambda x: 0 <= x < 1)


def _checked_cap(max_rate: float) -> float:
    return checked_share("max_rate", max_rate, "a rate above 0 and up to 1", lambda x: 0 < x <= 1)


def _check_reachable(drop_rate: float, cap: float, droppable: float) -> None:
    reachable = cap * droppable
    if drop_rate > reachable + _ROUNDING:
        barred = "" if droppable >= 1 - _ROUNDING else ", or make fewer sensitivities infinite"
        raise ConfigError(
            f"drop_rate {drop_rate:g} cannot be reached: with max_rate {cap:g} and {droppable:.4g} of the FLOPs in "
            f"branches that may be dropped, the largest reachable drop rate is {reachable:.6g}. Lower drop_rate, "
            f"raise max_rate (up to 1){barred}."
        )


def _lookup(kind: str, name: str, known: Mapping[str, T]) -> T:
    if name not in tuple(known):
        raise ConfigError(f"{kind} {name!r} is unknown; known are {', '.join(sorted(known))}. Pass one of these.")
    return known[name]
