"""Mask samplers: which branches are dropped together, at given drop rates.

A mask is a pure function of (sampler, rates, flops, seed, step). Random numbers come from generators keyed by a hash of
seed and step, so the whole state is (seed, step): the same on every rank, platform and Python version, and after a
resume. No global generator is touched. Every sampler drops branch l at its rate p_l. They differ in what else they fix:
the FLOPs of each step (`exact`), the intervals between a branch's drops (`cyclic`), the path of the gradient
(`nested`), the number of different masks (`nested`, `pool`). `independent` is the paper's (arXiv:2402.17812).
"""

from __future__ import annotations

import math
import operator
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from hashlib import blake2b
from itertools import accumulate
from random import Random
from typing import Any, TypeVar

from dropbp.checks import Rates, check_lengths, checked_flops, checked_rates
from dropbp.errors import ConfigError
from dropbp.masks.registry import Draws, Mask, register_sampler, sampler_kind

T = TypeVar("T")

AHEAD = 8  # draws made at once
_TWO_64 = 1 << 64
_FAR = 1 << 40
_DIGITS = b"01" + bytes(254)  # translates the bytes 0 and 1 to digits
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: its multiples fill the unit circle most evenly


class Sampler:
    """Draws the mask of any step from rates, with a mask sampler.

    Args:
        kind: name of a registered mask sampler; see `sampler_kinds()`.
        rates: share of steps in which each branch is dropped, in [0, 1]; 0 is never, 1 always.
        flops: backward FLOPs per branch, in any unit, positive.
        seed: any integer.
        **options: options of the mask sampler, for instance pool_size=8 of "pool".

    Raises:
        ConfigError: rates, FLOPs or seed out of bounds, unequal lengths, unknown mask sampler or option.
    """

    __slots__ = ("_ahead", "_draws", "flops", "kind", "options", "rates", "seed")

    def __init__(
        self, kind: str, rates: Iterable[float], flops: Iterable[float], seed: int = 0, **options: Any
    ) -> None:
        self.kind, self.options = kind, options
        self.flops, self.rates, self.seed = checked_flops(flops), checked_rates(rates), _checked_int("seed", seed)
        check_lengths("rates", self.rates, self.flops)
        self._draws = _build(kind, options)(self.rates, self.flops, self.seed)
        self._ahead: dict[int, Mask] = {}

    def draw(self, step: int) -> Mask:
        """The mask of draw number `step` (0, 1, ...): True = backward dropped. Repeated calls give the same mask."""
        if _checked_int("step", step) < 0:
            raise ConfigError(f"step is {step!r}; allowed is 0 and above. Count draws from 0.")
        mask = self._ahead.get(step)
        if mask is None:  # several at once: the training step evicts caches
            self._ahead = masks = {s: self._draws.draw(s) for s in range(step, step + AHEAD)}
            mask = masks[step]
        return mask

    @property
    def drop_rate(self) -> float:
        """Share of the FLOPs that is dropped on average, sum f_l p_l / sum f_l."""
        return math.fsum(map(operator.mul, self.flops, self.rates)) / math.fsum(self.flops)

    @property
    def distinct_masks(self) -> tuple[Mask, ...] | None:
        """Every mask that can occur, each once; None if the mask sampler does not bound them."""
        return None if self._draws.every is None else tuple(dict.fromkeys(self._draws.every))

    @property
    def edges(self) -> tuple[float, ...] | None:
        """The smallest number of each of `distinct_masks`, if masks follow from one number; else None."""
        return self._draws.edges

    def redraw(self, step: int, attempt: int) -> Mask:
        """The `attempt`-th replacement mask for draw number `step`, from draw numbers that no run reaches."""
        return self._draws.draw(step + attempt * _FAR)

    def __reduce__(self) -> tuple[Callable[..., Sampler], tuple[object, ...]]:
        return partial(Sampler, **self.options), (self.kind, self.rates, self.flops, self.seed)

    def __repr__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return (
            f"Sampler({self.kind!r}, {len(self.rates)} branches, drop_rate={self.drop_rate:.4g}, "
            f"seed={self.seed}{options})"
        )


def bits(mask: Mask) -> int:
    """A mask as an integer: bit i for branch i."""
    return int(b"0" + bytes(mask)[::-1].translate(_DIGITS), 2)


def _build(name: str, options: Mapping[str, Any]) -> Callable[..., Draws]:
    entry = sampler_kind(name)
    for option in options:
        if option not in entry.options:
            allowed = ", ".join(entry.options) or "none"
            raise ConfigError(f"mask sampler {name!r} has no option {option!r}; allowed: {allowed}. Leave it out.")
    return partial(entry.build, **options)


@register_sampler("independent")
def independent(rates: Rates, flops: Rates, seed: int) -> Draws:
    """Each branch is dropped independently (the paper's method); the FLOPs saved vary from step to step."""

    def draw(step: int) -> Mask:
        coin = _generator(seed, "independent", step).random
        return tuple([coin() < rate for rate in rates])

    return Draws(draw)


@register_sampler("exact")
def exact(rates: Rates, flops: Rates, seed: int) -> Draws:
    """Each step drops the FLOPs budget to within one branch, by pivotal sampling in random order.

    Two branches with rates strictly between 0 and 1 trade FLOPs until one of them is certain. With m = p f, branch i
    gains a = min(f_i - m_i, m_j) from j with probability b / (a + b), or gives j b = min(m_i, f_j - m_j) with
    probability a / (a + b). The sum of m stays, and the expected change is a b / (a + b) - b a / (a + b) = 0, so every
    E[m_l] stays p_l f_l: the marginals are exact. At most one branch is left uncertain. It is dropped if a uniform
    number is below its m / f, which changes the sum by less than its FLOPs and keeps its marginal. That number runs
    through the multiples of the golden ratio from a seeded start: uniform over seeds, independent of the trades, and
    evenly spread over steps, so the error of the mean over T steps falls like 1/T if all FLOPs are equal. Branches of
    equal FLOPs trade among themselves first, so each such class keeps its own count to within one.

    Source: Deville and Tille, Biometrika 85 (1998), "Unequal probability sampling without replacement".
    """
    always = [rate == 1.0 for rate in rates]
    classes = _classes([i for i, rate in enumerate(rates) if 0 < rate < 1], flops)
    masses = [rate * f for rate, f in zip(rates, flops, strict=True)]
    last = _golden(seed, "exact")

    def draw(step: int) -> Mask:
        mask, coin = always.copy(), _generator(seed, "exact", step).random
        order = [i for members in _shuffled(classes, coin) for i in _shuffled(members, coin)]
        left, mass = _pivot(order, masses, flops, mask, coin)
        if order:
            mask[left] = last(step) < mass / flops[left]
        return tuple(mask)

    return Draws(draw)


def _pivot(
    order: Sequence[int], masses: Sequence[float], flops: Sequence[float], mask: list[bool], coin: Callable[[], float]
) -> tuple[int, float]:
    """Settle all but one branch in `mask`; return that one and its FLOPs times its remaining rate."""
    left, mass = (order[0], masses[order[0]]) if order else (-1, 0.0)
    for other in order[1:]:
        room, offered = flops[left] - mass, masses[other]
        other_room = flops[other] - offered
        gain = room if room <= offered else offered  # calling min() would double the time of the loop
        loss = mass if mass <= other_room else other_room
        if coin() * (gain + loss) < loss:
            mask[left] = room <= offered
            if room <= offered:
                left, mass = other, offered - room
            else:
                mass += offered
        elif mass <= other_room:
            left, mass = other, offered + mass
        else:
            mask[other] = True
            mass -= other_room
    return left, mass


@register_sampler("cyclic")
def cyclic(rates: Rates, flops: Rates, seed: int) -> Draws:
    """Each branch is dropped at regular intervals: in any T steps between floor(T p) and ceil(T p) times.

    Branch l is dropped at step t if floor((t+1) p_l + phase_l) > floor(t p_l + phase_l), in exact 64-bit arithmetic.
    Branches of equal rate get phases that cut the unit circle in proportion to their FLOPs, in shuffled order, so
    together they drop their FLOPs budget each step to within one branch. If all rates differ, the phases drift apart
    and the FLOPs of a step vary as under independent masks. Over seeds each phase is uniform: exact marginals.
    """
    turns = [int(rate * _TWO_64) for rate in rates]
    starts = [int(phase * _TWO_64) for phase in _phases(rates, flops, _generator(seed, "cyclic", 0).random)]
    pairs = list(zip(turns, starts, strict=True))
    last = _TWO_64 - 1

    def draw(step: int) -> Mask:
        return tuple([(step * turn + start & last) + turn > last for turn, start in pairs])

    return Draws(draw)


def _phases(rates: Rates, flops: Rates, coin: Callable[[], float]) -> list[float]:
    phases = [0.0] * len(rates)
    for group in _classes(range(len(rates)), rates):
        members, start = _shuffled(group, coin), coin()
        ends = list(accumulate(flops[i] for i in members))
        for i, end in zip(members, ends, strict=True):
            phases[i] = (start + (end - flops[i] / 2) / ends[-1]) % 1.0
    return phases


@register_sampler("nested", rates="shelf", annealed_rates="band", prefixes=True)
def nested(rates: Rates, flops: Rates, seed: int, *, uniform: str = "golden") -> Draws:
    """One uniform number per step drops every branch whose rate exceeds it. At most N+1 different masks.

    With rates that do not fall toward the input (`dropbp.masks.rates.depth_rates`), each step trains the top of the
    model down to a random depth, and every trained branch gets its exact gradient. The FLOPs budget holds on average.
    `uniform="golden"` steps through multiples of the golden ratio from a seeded start: uniform over seeds, and so even
    over steps that a few consecutive ones already cover all depths in proportion. `"random"` draws independently. A run
    of known length takes them in order instead: see `dropbp.masks.pace`.
    """
    numbers: dict[str, Callable[[int], float]] = {
        "golden": _golden(seed, "nested"),
        "random": lambda step: _generator(seed, "nested", step).random(),
    }
    if uniform not in tuple(numbers):
        raise ConfigError(f"uniform is {uniform!r}; allowed is {' or '.join(numbers)}. Pass one of these.")
    number = numbers[uniform]
    edges = sorted({0.0, *rates} - {1.0})
    masks = tuple(tuple([rate > edge for rate in rates]) for edge in edges)
    return Draws(lambda step: masks[bisect_right(edges, number(step)) - 1], masks, tuple(edges))


@register_sampler("pool")
def pool(rates: Rates, flops: Rates, seed: int, *, pool_size: int = 8, pool_of: str = "balanced") -> Draws:
    """`pool_size` masks drawn once, then visited in shuffled laps: each lap visits each mask once.

    `pool_of="balanced"`: branch l is dropped in floor or ceil of K p_l of the K masks (K p_l on average over seeds),
        and each mask keeps the FLOPs budget to within one branch. Otherwise `pool_of` is the name of a mask sampler
        whose first K draws are used. A branch is never trained if all K masks drop it: choose K >= 1 / (1 - p_l).
    """
    size = _checked_int("pool_size", pool_size)
    if size < 1:
        raise ConfigError(f"pool_size is {pool_size}; allowed is 1 and above. Pass how many masks to keep.")
    if pool_of == "pool":
        raise ConfigError("pool_of is 'pool'; allowed is balanced or another mask sampler. Pass one of these.")
    if pool_of == "balanced":
        masks = _balanced(rates, flops, seed, size)
    else:
        masks = tuple(map(sampler_kind(pool_of).build(rates, flops, seed).draw, range(size)))

    def draw(step: int) -> Mask:
        lap, place = divmod(step, size)
        return _shuffled(masks, _generator(seed, "pool", lap).random)[place]

    return Draws(draw, masks)


def _balanced(rates: Rates, flops: Rates, seed: int, size: int) -> tuple[Mask, ...]:
    """Add each branch in turn to the masks that have dropped the fewest FLOPs so far.

    The masks' loads then never differ by more than the largest branch. All masks start alike and ties are broken at
    random, so each contains a branch with the same probability: its count over `size`.
    """
    counts = _rounded([rate * size for rate in rates], flops, seed)
    coin = _generator(seed, "balanced", 0).random
    masks, loads = [[False] * len(rates) for _ in range(size)], [0.0] * size
    for branch in sorted(_shuffled(range(len(rates)), coin), key=lambda i: -flops[i]):
        for place in sorted(_shuffled(range(size), coin), key=loads.__getitem__)[: counts[branch]]:
            masks[place][branch] = True
            loads[place] += flops[branch]
    return tuple(tuple(mask) for mask in masks)


def _rounded(counts: Sequence[float], flops: Rates, seed: int) -> list[int]:
    """Integers next to `counts` and equal to them on average, with the FLOPs-weighted sum within one branch."""
    floors = [math.floor(count) for count in counts]
    parts = tuple(count - floor for count, floor in zip(counts, floors, strict=True))
    return [floor + up for floor, up in zip(floors, exact(parts, flops, seed).draw(0), strict=True)]


def _generator(seed: int, stream: str, step: int) -> Random:
    """A separate generator for each purpose and step; `Random.random` is the same on every Python version."""
    return Random(_key(f"{seed}/{stream}/{step}", 16))


def _golden(seed: int, stream: str) -> Callable[[int], float]:
    """Map a step to a number in [0, 1): a seeded start plus multiples of the golden ratio, modulo 1."""
    start = _key(f"{seed}/{stream}/golden", 8)
    return lambda step: ((start + step * _GOLDEN & _TWO_64 - 1) >> 11) * 2.0**-53


def _key(text: str, size: int) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=size).digest(), "big")


def _shuffled(items: Sequence[T], coin: Callable[[], float]) -> Sequence[T]:
    # Random.shuffle may differ between Python versions; Random.random does not.
    return sorted(items, key=lambda _: coin()) if len(items) > 1 else items


def _classes(branches: Iterable[int], values: Sequence[float]) -> list[list[int]]:
    """Branches grouped by equal value, in the order of their first member."""
    groups: dict[float, list[int]] = {}
    for branch in branches:
        groups.setdefault(values[branch], []).append(branch)
    return list(groups.values())


def _checked_int(name: str, value: int) -> int:
    try:
        return operator.index(value)
    except TypeError as error:
        raise ConfigError(f"{name} is {value!r}; allowed is an integer. Pass a whole number.") from error
