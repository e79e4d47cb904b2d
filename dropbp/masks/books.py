"""The books of a handle: what was dropped so far, as a report, a table and a state that can be saved and loaded."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dropbp.checks import check_lengths, short
from dropbp.discovery.structure import Branch
from dropbp.errors import StateError

Mask = tuple[bool, ...]
STATE_VERSION = 1


@dataclass
class Books:
    """Counts over training forwards.

    Attributes:
        counts: how often each branch was dropped.
        forwards: training forwards so far.
        flops_dropped: forward FLOPs of the branches whose backward was skipped.
        flops_seen: those of all branches.
    """

    counts: list[int]
    forwards: int = 0
    flops_dropped: float = 0.0
    flops_seen: float = 0.0

    @property
    def drop_rate(self) -> float:
        """Share of the FLOPs dropped so far; 0 before the first forward."""
        return self.flops_dropped / max(self.flops_seen, 1.0)

    def note(self, mask: Mask, flops: Sequence[int]) -> None:
        """Enter one training forward."""
        self.forwards += 1
        self.counts = list(map(operator.add, self.counts, mask))
        self.flops_dropped += sum(itertools.compress(flops, mask))
        self.flops_seen += sum(flops)

    def of_branch(self, i: int, branch: Branch) -> dict[str, Any]:
        """The entry of one branch in `Handle.report`."""
        return {
            "name": branch.name,
            "modules": list(branch.modules),
            "flops": branch.flops,
            "parameters": branch.parameters,
            "rate": branch.rate,
            "dropped": self.counts[i],
            "realised_rate": self.counts[i] / self.forwards if self.forwards else 0.0,
        }


def table(report: Mapping[str, Any]) -> str:
    """`Handle.report()` as a table of the branches: share of FLOPs, parameters, rates, how often each was dropped."""
    branches = report["branches"]
    width = max(len("branch"), *(len(entry["name"]) for entry in branches))
    total = sum(entry["flops"] for entry in branches)
    head = f"{'branch':<{width}}  {'share of FLOPs':>14}  {'parameters':>12}  {'rate':>6}  {'realised':>8}"
    rows = [
        f"{entry['name']:<{width}}  {entry['flops'] / total:>14.2%}  {entry['parameters']:>12,}  "
        f"{entry['rate']:>6.3f}  {entry['realised_rate']:>8.3f}"
        for entry in branches
    ]
    never = sum(entry["rate"] == 1 for entry in branches)
    foot = (
        f"{len(branches)} branches hold {report['branch_flops_share']:.1%} of the forward's FLOPs; target drop "
        f"rate {report['drop_rate']:g}, realised {report['realised_drop_rate']:.4f} in {report['forwards']} forwards"
    )
    if never:
        foot += f"; {never} branches are never trained (rate 1)"
    return "\n".join([head, *rows, foot])


@dataclass(frozen=True)
class Saved:
    """A handle's state, read and checked."""

    books: Books
    rates: tuple[float, ...]
    draws: int
    mask: Mask | None
    current: Mask | None
    taken_ahead: tuple[Mask, ...]
    sensitivities: tuple[float, ...] | None
    own: tuple[float, ...] | None


def checked_state(state: Any, identity: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state, if it is of this version and of the run that `identity` describes.

    Raises:
        StateError: it is not; the message says in what they differ.
    """
    found = state.get("version") if isinstance(state, Mapping) else type(state).__name__
    if not isinstance(state, Mapping) or not isinstance(found, int) or found != STATE_VERSION:
        raise StateError(f"The DropBP state is of version {short(found)}; this library reads version {STATE_VERSION}.")
    for key, mine in identity.items():
        if type(state.get(key)) is not type(mine) or state[key] != mine:
            raise StateError(
                f"The DropBP state belongs to another run: its {key} are {short(state.get(key))}, this "
                f"model's are {short(mine)}. Enable the same model with the same options before loading."
            )
    return state


def read_state(state: Mapping[str, Any], branches: int) -> Saved:
    """The parts of a state. Raises ArithmeticError, LookupError, TypeError or ValueError where it is damaged."""
    counts = [_count(c) for c in state["counts"]]
    _check_length("counts", counts, branches)
    sums = [_sum(state[k]) for k in ("flops_dropped", "flops_seen")]
    mask, current = (_mask(state[k], branches) for k in ("mask", "current"))
    taken_ahead = tuple(_known_mask(mask, branches) for mask in state.get("taken_ahead", ()))
    sensitivities, own = (_numbers(k, state.get(k), branches) for k in ("sensitivities", "own"))
    books = Books(counts, _count(state["forwards"]), *sums)
    rates = tuple(float(r) for r in state["rates"])
    return Saved(books, rates, _count(state["draws"]), mask, current, taken_ahead, sensitivities, own)


def _mask(mask: Any, branches: int) -> Mask | None:
    return None if mask is None else _known_mask(mask, branches)


def _known_mask(mask: Any, branches: int) -> Mask:
    if not all(isinstance(drop, bool) for drop in mask):
        raise ValueError(f"a mask is {short(mask)}, not a list of bools")
    _check_length("mask", mask, branches)
    return tuple(mask)


def _numbers(name: str, values: Sequence[float] | None, branches: int) -> tuple[float, ...] | None:
    """States of earlier versions have none."""
    if values is None:
        return None
    _check_length(name, values, branches)
    return tuple(float(value) for value in values)


def _check_length(name: str, values: Sequence[Any], branches: int) -> None:
    check_lengths(name, values, range(branches))


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"a count is {short(value)}, not a number of 0 and above")
    return value


def _sum(value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < float("inf"):
        raise ValueError(f"a sum of FLOPs is {short(value)}, not a number of 0 and above")
    return float(value)
