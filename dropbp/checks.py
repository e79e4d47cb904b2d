"""Lists of numbers, one per branch, checked before anything is computed from them.

Allocation and masks take the same kinds of list; a wrong entry is named by its place, so that the branch is found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from dropbp.errors import ConfigError

Rates = tuple[float, ...]


def _checked(name: str, values: Iterable[float], allowed: str, is_allowed: Callable[[float], bool]) -> Rates:
    numbers = tuple(_number(name, place, value) for place, value in enumerate(values))
    for place, number in enumerate(numbers):
        if not is_allowed(number):
            raise ConfigError(f"{name}[{place}] is {number!r}; allowed is {allowed}. Correct this entry.")
    return numbers


def _number(name: str, place: int, value: float) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name}[{place}] is {value!r}; {name} holds one number per branch.") from error


def checked_flops(flops: Iterable[float]) -> Rates:
    """FLOPs per branch as floats. Raises ConfigError unless each is positive and finite and there is at least one."""
    numbers = _checked("flops", flops, "a positive, finite number of FLOPs", lambda x: 0 < x < math.inf)
    if not numbers:
        raise ConfigError("flops is empty; at least one branch is needed. Pass the FLOPs of every branch.")
    return numbers


def checked_rates(rates: Iterable[float]) -> Rates:
    """Drop rates as floats. Raises ConfigError unless each lies in [0, 1]."""
    return _checked("rates", rates, "a number from 0 (never dropped) to 1 (always dropped)", lambda x: 0 <= x <= 1)


def checked_sensitivities(sensitivities: Iterable[float]) -> Rates:
    """Sensitivities as floats. Raises ConfigError for NaN and negative ones; infinity means "never drop"."""
    allowed = "zero, a positive number, or infinity for a branch that is never dropped"
    return _checked("sensitivities", sensitivities, allowed, lambda x: x >= 0)


def checked_share(name: str, value: float, allowed: str, is_allowed: Callable[[float], bool]) -> float:
    """`value` as a float. Raises ConfigError unless `is_allowed`; `allowed` says in words what is."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not is_allowed(number):
        raise ConfigError(f"{name} is {value!r}; allowed is {allowed}. Pass another {name}.")
    return number


def check_lengths(name: str, values: Sequence[object], flops: Sequence[float]) -> None:
    """Raises ConfigError unless `values` has one entry per branch, as `flops` has."""
    if len(values) != len(flops):
        raise ConfigError(
            f"{name} has {len(values)} entries and flops has {len(flops)}; both need one per branch, in the same order."
        )
