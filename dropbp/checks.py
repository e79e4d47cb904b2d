"""Checks of lists with one number per branch, as allocation and masks take them.

The message names a wrong entry by its index, which identifies the branch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from dropbp.errors import ConfigError

Rates = tuple[float, ...]
T = TypeVar("T")
MESSAGE_LENGTH = 120  # of a value in a message: a model or a tensor would fill a page


def _checked(name: str, values: Iterable[float], allowed: str, is_allowed: Callable[[float], bool]) -> Rates:
    numbers = tuple(_number(name, place, value) for place, value in enumerate(listed(name, values)))
    for place, number in enumerate(numbers):
        if not is_allowed(number):
            raise ConfigError(f"{name}[{place}] is {number!r}; allowed is {allowed}. Correct this entry.")
    return numbers


def listed(name: str, values: Iterable[T]) -> list[T]:
    """The values as a list. Raises ConfigError if they cannot be listed, as a single number."""
    try:
        return list(values)
    except TypeError as error:
        raise ConfigError(f"{name} is {short(values)}; it needs one entry per branch. Pass a list.") from error


def is_number(value: object) -> bool:
    """Whether the value is an int or a float, but not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_integer(value: object, least: float = -math.inf) -> bool:
    """Whether the value is an integer of at least `least`."""
    return isinstance(value, int) and is_number(value) and value >= least


def short(value: object) -> str:
    """The `repr` of a value, shortened to fit into a message."""
    text = repr(value)
    return text if len(text) <= MESSAGE_LENGTH else f"{text[: MESSAGE_LENGTH - 3]}..."


def _number(name: str, place: int, value: float) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # tensors raise RuntimeError
        raise ConfigError(f"{name}[{place}] is {short(value)}; {name} needs one number per branch.") from error


def checked_flops(flops: Iterable[float]) -> Rates:
    """FLOPs per branch as floats. Raises ConfigError if the list is empty or a value is not positive and finite."""
    numbers = _checked("flops", flops, "a positive, finite number of FLOPs", lambda x: 0 < x < math.inf)
    if not numbers:
        raise ConfigError("flops is empty; at least one branch is needed. Pass the FLOPs of every branch.")
    return numbers


def checked_rates(rates: Iterable[float]) -> Rates:
    """Drop rates as floats. Raises ConfigError unless each lies in [0, 1].

    >>> checked_rates([0, 0.5])
    (0.0, 0.5)
    """
    return _checked("rates", rates, "a number from 0 (never dropped) to 1 (always dropped)", lambda x: 0 <= x <= 1)


def checked_sensitivities(sensitivities: Iterable[float]) -> Rates:
    """Sensitivities as floats. Raises ConfigError for NaN and negative values; infinity means "never drop"."""
    allowed = "zero, a positive number, or infinity for a branch that is never dropped"
    return _checked("sensitivities", sensitivities, allowed, lambda x: x >= 0)


def checked_share(name: str, value: float, allowed: str, is_allowed: Callable[[float], bool]) -> float:
    """`value` as a float. Raises ConfigError unless `is_allowed` accepts it; `allowed` describes what it accepts."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    if not is_allowed(number):
        raise ConfigError(f"{name} is {short(value)}; allowed is {allowed}. Pass another {name}.")
    return number


def checked_drop_rates(drop_rates: Iterable[float]) -> Rates:
    """Drop rates to compare, as floats. Raises ConfigError if the list is empty or a rate is outside [0, 1)."""
    allowed = "a list of numbers with 0 <= drop_rate < 1; 0 is plain training"
    try:
        values = list(drop_rates)
    except TypeError as error:
        raise ConfigError(f"drop_rates is {short(drop_rates)}; allowed is {allowed}.") from error
    if not values:
        raise ConfigError("drop_rates is empty; give at least one, such as 0 for plain training.")
    return tuple(checked_share("drop_rates", value, allowed, lambda rate: 0 <= rate < 1) for value in values)


def check_callables(**functions: object) -> None:
    """Raises ConfigError for a value that is neither None nor callable."""
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise ConfigError(f"{name} is {short(function)}; it must be a function.")


def checked_mask(mask: Iterable[bool]) -> tuple[bool, ...]:
    """A mask as a tuple of bools. Raises ConfigError for entries without a truth value, such as arrays."""
    return tuple(_drops(place, drop) for place, drop in enumerate(listed("mask", mask)))


def _drops(place: int, drop: object) -> bool:
    try:
        return bool(drop)
    except (TypeError, ValueError, RuntimeError) as error:  # an array or a tensor of several numbers
        raise ConfigError(f"mask[{place}] is {short(drop)}; a mask holds one bool per branch.") from error


def check_lengths(name: str, values: Sequence[object], flops: Sequence[float]) -> None:
    """Raises ConfigError unless `values` and `flops` have the same length, one entry per branch."""
    count = len(listed(name, values))
    if count != len(flops):
        raise ConfigError(
            f"{name} has {count} entries and flops has {len(flops)}; both need one per branch, in the same order."
        )
