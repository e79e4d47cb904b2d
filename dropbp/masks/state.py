"""The saved state of a schedule: everything a resumed run needs to draw the same masks, written, read and continued.

Each field of `State` is an attribute of `Schedule`. It is written by its name and read by its type, so a new field
takes a line in `State` and a word in `load`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from dropbp.checks import Rates, check_lengths, checked_rates, is_integer, is_number, short
from dropbp.errors import StateError
from dropbp.flops import Shape
from dropbp.masks.online import Online
from dropbp.masks.pace import Pace
from dropbp.masks.registry import Mask
from dropbp.masks.statistics import Statistics

if TYPE_CHECKING:
    from dropbp.masks.schedule import Schedule

logger = logging.getLogger(__name__)

STATE_VERSION = 2
DAMAGE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class State:
    """The progress of a schedule: options that a resumed run may change, rates that were set, and all counters."""

    options: Mapping[str, Any]
    given: Rates | None
    shape: Shape
    agreed: Shape | None
    draws: int
    mask: Mask | None
    current: Mask | None
    pace: Pace
    statistics: Statistics
    sensitivities: Rates | None
    own: Rates | None
    online: Online


def written(schedule: Schedule) -> dict[str, Any]:
    """The state as plain numbers, lists and strings."""
    parts = {field.name: _plain(getattr(schedule, field.name)) for field in dataclasses.fields(State)}
    return {"version": STATE_VERSION, **schedule.identity, **parts}


def _plain(value: Any) -> Any:
    if isinstance(value, Shape):
        return list(dataclasses.astuple(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return list(value) if isinstance(value, tuple) else value


def read(state: Any, schedule: Schedule) -> State:
    """The state, if it is complete, of this version and of a run like the schedule's.

    Otherwise raises StateError, which says how they differ, or what is damaged.
    """
    found = state.get("version") if isinstance(state, Mapping) else type(state).__name__
    if not isinstance(state, Mapping) or not isinstance(found, int) or found != STATE_VERSION:
        raise StateError(f"The DropBP state has version {short(found)}; this library reads version {STATE_VERSION}.")
    for key, mine in schedule.identity.items():
        if type(state.get(key)) is not type(mine) or state[key] != mine:
            raise StateError(
                f"The DropBP state belongs to another run: its {key} are {short(state.get(key))}, this model's are "
                f"{short(mine)}. Enable the same model with the same options before loading."
            )
    try:
        saved = _of(State, state, len(schedule.names))
        if saved.given is not None:
            schedule.check_trains(checked_rates(saved.given))
        if not saved.pace.width > 0:
            raise ValueError(f"a width of {saved.pace.width:g}")
        _check_shares(saved.statistics)
    except DAMAGE as error:
        raise StateError(f"The DropBP state is damaged ({error}); nothing was loaded.") from error
    return saved


def load(schedule: Schedule, state: Any) -> None:
    """Continue in a schedule where the one that wrote the state stopped. See `read` for the errors."""
    saved = read(state, schedule)
    if schedule.statistics.forwards < saved.statistics.forwards:
        schedule.graph_warmup = None  # the run being continued has done its own
    for name in ("draws", "mask", "current", "pace", "statistics", "sensitivities", "own", "online"):
        setattr(schedule, name, getattr(saved, name))
    schedule.agreed = saved.agreed or schedule.agreed
    schedule.set_rates(saved.given)
    schedule.set_shape(saved.shape, schedule.multi_rank)
    _take_over(schedule, {name for name, mine in schedule.options.items() if saved.options.get(name) != mine})


def _take_over(schedule: Schedule, changed: set[str]) -> None:
    """Apply options that differ from those of the saved run; the finished share of the training stays the same."""
    if changed & {"steps", "resample"}:
        schedule.pace.set_width(1 / schedule.length)
    if "resample" in changed:
        schedule.current = None
    if changed & {"drop_rate", "max_rate", "rates"}:
        schedule.pace.owed = 0.0
        schedule.set_rates(None)
        if schedule.sensitivities is not None and isinstance(schedule.config.rates, str):
            schedule.set_rates(schedule.allocated(schedule.sensitivities))
    if changed:
        at = schedule.at_draw_shape
        logger.warning(
            "Resumed at %.0f%% of the run with a different %s. The rest of the run follows the new options, at a "
            "mean drop rate of %g; the steps before are not made up for.",
            100 * min(1.0, schedule.pace.now), ", ".join(sorted(changed)), at.planned / max(at.total, 1.0),
        )  # fmt: skip


def _check_shares(done: Statistics) -> None:
    """Raises ValueError if more was dropped than run, up to rounding."""
    runs, drawn, slack = done.flops_seen, done.drawn_seen, 1 + 1e-6 * abs(done.flops_seen)
    for part, whole in ((done.flops_dropped, runs), (done.drawn_dropped, drawn), (done.drawn_planned, drawn)):
        if not -slack <= part <= whole + slack:
            raise ValueError(f"{part:g} of {whole:g} FLOPs were dropped")


def _of(kind: type[T], values: Mapping[str, Any], branches: int) -> T:
    """Build a dataclass from its fields, all of which must be present."""
    fields = {field.name: str(field.type) for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: _value(type_, name, values[name], branches) for name, type_ in fields.items()})


def _value(type_: str, name: str, value: Any, branches: int) -> Any:
    """One field; a list or tuple must have one entry per branch."""
    optional = type_.removesuffix(" | None")
    if value is None and optional != type_:
        return None
    if optional in _PARTS:
        return _of(_PARTS[optional], value, branches)
    values = _READERS[optional](value)
    if isinstance(values, (list, tuple)):
        check_lengths(name, values, range(branches))
    return values


def _mask(mask: Any) -> Mask:
    if not all(isinstance(drop, bool) for drop in mask):
        raise ValueError(f"a mask is {short(mask)}, not a list of bools")
    return tuple(mask)


def _count(value: Any) -> int:
    if not is_integer(value, 0):
        raise ValueError(f"a count is {short(value)}, not a whole number of at least 0")
    return int(value)


def _number(value: Any) -> float:
    if not is_number(value) or not abs(value) < float("inf"):
        raise ValueError(f"{short(value)} is not a finite number")
    return float(value)


_PARTS: Mapping[str, type[Any]] = {"Online": Online, "Pace": Pace, "Statistics": Statistics}
_READERS: Mapping[str, Callable[[Any], Any]] = {
    "Mapping[str, Any]": dict,
    "Mask": _mask,
    "Rates": lambda values: tuple(map(float, values)),
    "Shape": lambda sizes: Shape(*map(_count, sizes)),
    "float": _number,
    "int": _count,
    "list[float]": lambda values: list(map(_number, values)),
    "list[int]": lambda values: list(map(_count, values)),
}
