"""Sets of branches as bit masks held in Python integers: bit `i` is branch `i`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

EVERY = -1  # every branch, however many there are


def lowest(branches: int) -> int:
    """The lowest branch, as a bit; 0 if there is none."""
    return branches & -branches


def each(branches: int) -> Iterator[int]:
    """Every branch as a bit, lowest first."""
    while branches:
        yield lowest(branches)
        branches &= branches - 1


def sole(branches: int) -> int:
    """The branch, as a bit, if the set holds exactly one; else 0. A negative set means that no set is enough."""
    return branches if branches > 0 and not branches & (branches - 1) else 0


def containing(sets: Iterable[int], branch: int) -> int:
    """The first of these sets that shares a branch with the set `branch`; that set itself if none does."""
    return next((bits for bits in sets if bits & branch), branch)


def total(branches: int, values: Sequence[float]) -> float:
    """The sum of the values, one per branch, of these branches."""
    return sum(value for i, value in enumerate(values) if branches >> i & 1)
