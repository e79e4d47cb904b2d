"""The schedule of a run: what each training forward drops. It knows no model.

It alone owns the shape of the forwards, FLOPs, rates, sampler, counters and the state that is saved. A forward asks
`next` with its shape and with what only the run can know (`Conditions`), and gets a `ForwardPlan`. The mask is, in this
order: what a `with handle.fixed(mask)` says, the mask of a forward whose backward is still to come where both must be
the same, nothing dropped during the warm-up, the present mask as long as `resample`
keeps it, a mask for a graph that a lazy device has yet to compile, the mask of this point of an annealed run, or a new
draw. With its state in hand it is a pure function of seed and step.

Ranks must draw the same masks, though each sees batches of its own. Where there are several, all that masks depend on
is taken at one shape: that of rank 0 in the first training forward.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import compress
from typing import Any, Protocol, TypeVar

from dropbp.checks import check_lengths, checked_mask, checked_rates, short
from dropbp.config import Config
from dropbp.errors import ConfigError, StateError
from dropbp.flops import Shape
from dropbp.lazy.warmup import LOOKAHEAD, Rehearsal
from dropbp.masks.online import Online
from dropbp.masks.pace import Curve, Pace
from dropbp.masks.plan import Conditions, ForwardPlan
from dropbp.masks.rates import allocate, depth_rates, level
from dropbp.masks.samplers import Mask, Sampler, bits, sampler_kind
from dropbp.masks.statistics import Statistics

logger = logging.getLogger(__name__)

STATE_VERSION = 2
MAX_SHAPES = 32  # whose rates, sampler and plans are remembered
MAX_PLANS = 512  # of one shape
REDRAWS = 64
TOLERANCE = 0.02  # of the realised drop rate

Rates = tuple[float, ...]
T = TypeVar("T")


class CountsFlops(Protocol):
    """FLOPs of every branch at a shape."""

    def at(self, shape: Shape) -> tuple[float, ...]: ...


class AtShape:
    """What follows from a shape: FLOPs, rates, the sampler of masks, and plans made so far.

    Attributes:
        flops: forward FLOPs of every branch.
        weights: those of branches that have a backward, 0 for others: what the budget counts.
        total: sum of the weights.
        rates: drop rates; 0 where the weight is.
        planned: FLOPs that these rates drop on average.
        plans: by what they were made from.
        course: for masks that an annealed run takes in order, the curve that it follows and each of its masks.
    """

    def __init__(self, flops: Sequence[float], weights: Sequence[float], rates: Rates, config: Config) -> None:
        self.flops, self.weights, self.rates, self.config = tuple(map(int, flops)), tuple(weights), rates, config
        self.total = sum(self.weights)
        self.planned = sum(weight * rate for weight, rate in zip(self.weights, rates, strict=True))
        self.live = tuple(weight > 0 for weight in self.weights)
        self.plans: dict[tuple[Any, ...], ForwardPlan] = {}
        self.course: tuple[Curve, tuple[Mask, ...]] | None = None

    @cached_property
    def sampler(self) -> Sampler:
        """Of the branches that have a backward."""
        rates, weights = compress(self.rates, self.live), compress(self.weights, self.live)
        return Sampler(self.config.masks, rates, weights, self.config.seed, **self.config.mask_options)

    def whole(self, mask: Mask) -> Mask:
        """A mask of the branches that have a backward as one of all branches."""
        if len(mask) == len(self.live):
            return mask
        drops = iter(mask)
        return tuple(alive and next(drops) for alive in self.live)

    def share(self, mask: Mask) -> float:
        """Share of the FLOPs that a mask drops."""
        return sum(compress(self.weights, mask)) / self.total


class Schedule:
    """What each training forward of one model drops.

    Args:
        config: the options of `enable`.
        names: of the branches, nearest the input first.
        blocks: each block's branches as a bit mask, nearest the input first.
        flops: counts FLOPs at a shape.
        shape: of the forwards to come; on several ranks, the one that all masks are drawn for until they agree on one.
        weights: counts in the same way what dropping a branch saves; 0 for branches without a backward, which are never
            dropped. None: as much as its FLOPs.
        trains: whether a step that drops these branches, as bits, leaves something with a gradient.
        together: sets of neighbouring branches, as bits, that nested masks drop all at once.

    Raises:
        ConfigError: rates or options of the mask sampler are outside what is allowed.
    """

    def __init__(
        self,
        config: Config,
        names: Sequence[str],
        blocks: Iterable[int],
        flops: CountsFlops,
        shape: Shape,
        *,
        weights: CountsFlops | None = None,
        trains: Callable[[int], bool] = lambda dropped: True,
        together: Sequence[int] = (),
    ) -> None:
        self.config, self.names, self.blocks = config, tuple(names), tuple(blocks)
        self._reference, self._ranks, self.agreed = shape, False, False
        self._count, self._trains = flops, trains
        self._weigh = flops if weights is None else weights
        self.kind = sampler_kind(config.masks)
        self._together = together if self.kind.prefixes else ()
        self._given = self._initial_rates()
        self._known: dict[Shape, AtShape] = {}
        self._training: dict[int, bool] = {}
        self._fixed = _FixedMasks()
        self.dropping = True
        self.draws = 0
        self.mask: Mask | None = None
        self.current: Mask | None = None
        self.rehearsal: Rehearsal | None = None
        self.statistics = Statistics([0] * len(self.names))
        self.pace = Pace(1 / self.length)
        self.sensitivities: Rates | None = None
        self.own: Rates | None = None
        self.online = Online.new(len(self.names))
        self.shape = shape
        self.seen = self.here = self.at(shape)
        self.check_trains(self.rates)
        if self.here.total:
            _ = self.here.sampler  # what is wrong with the sampler's options is said here, not in the first step
        else:
            logger.warning("No branch has a backward, so there is none to skip: DropBP saves nothing on this model.")

    # -- what is known

    @property
    def rates(self) -> Rates:
        """Each branch's drop rate."""
        return self.here.rates

    @property
    def every(self) -> tuple[Mask, ...] | None:
        """Every mask that can occur, each once, where the mask sampler bounds them."""
        masks = self.here.sampler.distinct_masks
        return None if masks is None else tuple(map(self.here.whole, masks))

    @property
    def anneals(self) -> bool:
        """Whether masks are taken in their order over the run, the deepest first."""
        return self.config.steps is not None and self.kind.annealed_rates is not None and not self.config.mask_options

    @property
    def length(self) -> int:
        """Draws in the whole run, after its warm-up; 1 where that is not known."""
        kept_for = self.config.resample if isinstance(self.config.resample, int) else 1
        return -(-self.config.steps // kept_for) if self.config.steps else 1

    @property
    def fixed(self) -> list[Mask]:
        """The masks of the `with handle.fixed(...)` open in this thread, the innermost last."""
        return self._fixed.masks

    def see(self, shape: Shape, ranks: bool = False) -> None:
        """The next forwards have this shape. `seen` is what follows from it, `here` what masks are drawn by."""
        if shape != self.shape or ranks != self._ranks:
            self.shape, self._ranks = shape, ranks
            self.seen = self.at(shape)
            self.here = self.at(self._reference) if ranks else self.seen

    def agree(self, shape: Shape) -> None:
        """On several ranks all masks are drawn for this shape from now on: the same on each of them."""
        self._reference, self.agreed = shape, True

    def at(self, shape: Shape) -> AtShape:
        """What follows from a shape, worked out once."""
        found = self._known.get(shape)
        if found is None:
            if len(self._known) >= MAX_SHAPES:
                self._known.clear()
            flops, weights = self._count.at(shape), self._weigh.at(shape)
            found = self._known[shape] = AtShape(flops, weights, self._rates(weights), self.config)
        return found

    # -- rates

    @property
    def profile(self) -> str | None:
        """The name of the profile that rates follow from, at each shape; None where they were given."""
        if self._given is not None:
            return None
        auto = self.kind.annealed_rates if self.anneals and self.kind.annealed_rates else self.kind.rates
        return auto if self.config.rates == "auto" else str(self.config.rates)

    def check_trains(self, rates: Sequence[float]) -> None:
        """Raises ConfigError where every step would drop all that is trained."""
        always = bits(tuple(rate >= 1 for rate in rates))
        if always and not self._trains(always):
            raise ConfigError(
                "With these rates every step drops all that is trained, so nothing would train. Give the branches "
                "that hold trained parameters rates below 1, or keep what feeds the stream awake with stem='train'."
            )

    def set_rates(self, rates: Rates | None) -> None:
        """The next mask is drawn from these rates; None: from those of the configuration."""
        self._given = self._initial_rates() if rates is None else rates
        self.reweigh()

    def reweigh(self) -> None:
        """What branches weigh is asked anew: other parameters are trained than before."""
        self._known.clear()
        self._training.clear()
        self.seen = self.at(self.shape)
        self.here = self.at(self._reference) if self._ranks else self.seen

    def allocated(self, sensitivities: Sequence[float]) -> Rates:
        """Rates under the FLOPs budget.

        Under nested masks rates are a distribution over depths and stay so. Sensitivities mostly rise toward the
        input, where rates of nested masks may not fall: the nearest rates that do not are all equal, and a nested mask
        of equal rates drops everything or nothing.
        """
        live = self.here.live
        if self.kind.prefixes or not any(live):
            return self.rates
        scores, weights = list(compress(sensitivities, live)), list(compress(self.here.weights, live))
        return _spread(allocate(scores, weights, self.config.drop_rate, self.config.max_rate), live)

    def _initial_rates(self) -> Rates | None:
        if isinstance(self.config.rates, str):
            return None
        rates = checked_rates(self.config.rates)
        check_lengths("rates", rates, range(len(self.names)))
        return rates

    def _rates(self, weights: Sequence[float]) -> Rates:
        """Attention weighs more in long sequences, so rates of a profile depend on the shape."""
        live = [weight > 0 for weight in weights]
        if not any(live):
            return (0.0,) * len(live)
        together = [_among(bits, live) for bits in self._together]
        if self._given is not None:
            return _spread(level(compress(self._given, live), compress(weights, live), together), live)
        name, rate = self.profile, float(self.config.drop_rate)
        if name is None or name == "uniform":
            return tuple(rate if alive else 0.0 for alive in live)
        cap = 1.0 if self.config.max_rate is None else self.config.max_rate
        return _spread(depth_rates(list(compress(weights, live)), rate, name, cap, together), live)

    def _factors(self) -> Rates:
        if self.config.scaling == "none":
            return ()
        top = self.config.max_scale if self.config.scaling == "clipped" else float("inf")
        return tuple(min(top, 1 / (1 - rate)) if rate < 1 else 1.0 for rate in self.rates)

    # -- a forward

    def next(self, shape: Shape, conditions: Conditions) -> ForwardPlan:
        """What the next training forward does; it is counted as done."""
        self.see(shape, conditions.ranks)
        here, seen = self.here, self.seen
        past = self.dropping and self.statistics.forwards >= self.config.warmup
        mask = self.mask = self._next(past and not conditions.whole, conditions)
        drawn = past and not self.fixed and not conditions.whole
        self.statistics.note(mask, seen.weights, seen.total, seen.planned if drawn else None)
        if drawn:
            self.pace.note(here.planned, sum(compress(here.weights, mask)), here.total)
        return self._plan(mask, past, conditions)

    def progress(self, share: float, dropping: bool) -> None:
        """The training loop says how much of it is done, and whether branches are dropped in the forwards to come."""
        self.dropping = dropping
        self.pace.tell(share)

    def resample(self) -> None:
        """The next mask is a new one."""
        self.current = None

    def checked(self, mask: Sequence[bool]) -> Mask:
        """The mask as a tuple of bools. Raises ConfigError if it has not one entry per branch."""
        checked = checked_mask(mask)
        if len(checked) != len(self.names):
            raise ConfigError(
                f"The mask has {len(checked)} entries, the model {len(self.names)} branches. Give one bool per entry "
                "of handle.branches, True to drop its backward."
            )
        return checked

    def checkpointed(self, dropped: int, limit: float | None, left_alone: int = 0) -> int:
        """Blocks nearest the input whose kept branches are more than a step may keep, as a bit mask of branches."""
        here = self.here
        kept = [f if live else 0 for f, live in zip(here.flops, here.live, strict=True)]
        if limit is None or not any(kept):
            return 0
        blocks = [branches for branches in self.blocks if not branches & left_alone]
        return beyond_limit(blocks, kept, limit, dropped)

    def trains(self, mask: Mask) -> bool:
        """Whether a step under this mask leaves something with a gradient."""
        dropped = bits(mask)
        if dropped not in self._training:
            self._training[dropped] = self._trains(dropped)
        return self._training[dropped]

    def forget_what_trains(self) -> None:
        """Something else is trained from now on.

        Raises:
            ConfigError: every step would drop all of it.
        """
        self._training.clear()
        for at in (*self._known.values(), self.seen, self.here):
            at.course = None
        self.check_trains(self.rates)

    def _plan(self, mask: Mask, scaled: bool, conditions: Conditions) -> ForwardPlan:
        """Worked out once for each mask: few masks come again and again."""
        limit, rests, ends = conditions.limit, conditions.stem_rests, conditions.truncated
        alone = conditions.left_alone
        key, plans = (mask, scaled, limit, rests, ends, alone), self.here.plans
        plan = plans.get(key)
        if plan is None:
            if len(plans) >= MAX_PLANS:
                plans.clear()
            dropped, factors = bits(mask), self._factors() if scaled else ()
            plan = plans[key] = ForwardPlan(dropped, factors, self.checkpointed(dropped, limit, alone), rests, ends)
        return plan

    # -- the mask

    def _next(self, past: bool, conditions: Conditions) -> Mask:
        if self.fixed:
            return self.fixed[-1]
        if conditions.again and not conditions.whole and self.mask is not None:
            return self.mask
        if not past or not self.here.total:
            return (False,) * len(self.names)
        if self.rehearsal is not None and not self.rehearsal.done:
            return self._rehearsed(self.rehearsal, conditions.held())
        if self.current is None or not self._keeps():
            self.current = self._drawn()
        return self.current

    def _keeps(self) -> bool:
        every = self.config.resample
        if isinstance(every, int):
            return (self.statistics.forwards - self.config.warmup) % every != 0
        return every == "step"

    def _drawn(self) -> Mask:
        draw, self.draws = self.draws, self.draws + 1
        self.pace.begin()
        if not self.anneals or self.pace.over:
            return self._trained(draw)
        number = self.pace.number(self._course()[0], self.here.planned / self.here.total)
        # Near an edge between two masks the feedback would go back and forth: the mask stays what it is.
        steady = self._ordered(number - self.pace.width)
        return steady if steady == self.current else self._ordered(number)

    def _trained(self, draw: int) -> Mask:
        """The mask of a draw. Where it would train nothing, another that does is drawn in its place.

        A branch that holds what is trained is then kept more often than its rate says, by as much as such masks are
        likely: nothing where something outside of the branches trains, and little where many branches do.
        """
        here = self.here
        mask = here.whole(here.sampler.draw(draw))
        for attempt in range(1, REDRAWS):
            if self.trains(mask):
                return mask
            mask = here.whole(here.sampler.redraw(draw, attempt))
        return self._with_one_kept(mask)

    def _with_one_kept(self, mask: Mask) -> Mask:
        """The mask without the least often dropped of the branches that would train something."""
        for branch in sorted(range(len(mask)), key=self.rates.__getitem__):
            kept = (*mask[:branch], False, *mask[branch + 1 :])
            if self.trains(kept):
                return kept
        return (False,) * len(mask)

    def _course(self) -> tuple[Curve, tuple[Mask, ...]]:
        """The masks of an annealed run, the one that drops most first; the next deeper one where one trains nothing."""
        here = self.here
        if here.course is None:
            edges, masks = here.sampler.edges or (), [here.whole(mask) for mask in here.sampler.distinct_masks or ()]
            for i in range(len(masks) - 2, -1, -1):
                masks[i] = masks[i] if self.trains(masks[i]) else masks[i + 1]
            here.course = Curve(edges, [here.share(mask) for mask in masks]), tuple(masks)
        return here.course

    def _rehearsed(self, rehearsal: Rehearsal, held: int) -> Mask:
        """A mask for a graph that is not compiled yet, see `dropbp.lazy.warmup`; the usual one where none is left."""
        if self.current is None or not self._keeps():
            dropped = rehearsal.next(held, self._upcoming)
            self.current = self._drawn() if dropped is None else self._in_advance(dropped)
        if not rehearsal.done:
            rehearsal.note(bits(self.current), held)
        return self.current

    def _in_advance(self, dropped: int) -> Mask:
        if self.anneals:  # it takes up a part of the run, whose rest makes good for what it drops
            self.draws += 1
            self.pace.begin()
        return tuple(bool(dropped >> i & 1) for i in range(len(self.names)))

    def _upcoming(self) -> list[int]:
        """Masks to come, as bits of dropped branches; an annealed run's from all of it, as they come late but come."""
        if not self.anneals:
            return [bits(self._trained(draw)) for draw in range(self.draws, self.draws + LOOKAHEAD)]
        spread = [self._ordered((place + 0.5) / LOOKAHEAD) for place in reversed(range(LOOKAHEAD))]
        return [bits(mask) for mask in (*spread, *self._course()[1])]

    def foreseen(self, draw: int) -> Mask:
        """The mask of a draw, where a run of known length goes as it should."""
        return self._ordered(1 - (draw + 0.5) / self.length) if self.anneals else self._trained(draw)

    def _ordered(self, number: float) -> Mask:
        curve, masks = self._course()
        return masks[max(0, bisect_right(curve.edges, number, hi=len(masks)) - 1)]

    # -- how it will go, and how it went

    def out_of_reach(self) -> str | None:
        """What to say beforehand where the masks that meet the drop rate would leave nothing to train."""
        here = self.here
        edges, every = (here.sampler.edges, self.every) if here.total else (None, None)
        if edges is None or every is None:
            return None
        widths = [end - start for start, end in itertools.pairwise((*edges, 1.0))]
        trained = [(width, here.share(mask)) for width, mask in zip(widths, every, strict=True) if self.trains(mask)]
        target = here.planned / here.total
        most = max((share for _, share in trained), default=0.0)
        mean = sum(width * share for width, share in trained) / (sum(width for width, _ in trained) or 1.0)
        found = min(target, most) if self.anneals else mean
        if target - found <= TOLERANCE:
            return None
        return (
            f"A drop rate of {target:g} is out of reach: masks that drop much leave nothing to train here, and others "
            f"are taken in their place. About {found:.2f} of the branches' backward FLOPs will be dropped. Take a "
            "lower drop rate, train parameters in the last branches as well, or take masks='exact'."
        )

    def shortfall(self) -> str | None:
        """What to say at the end of a run that missed its budget."""
        done = self.statistics
        target = done.drawn_planned / max(done.drawn_seen, 1.0)
        if abs(done.drawn_rate - target) <= TOLERANCE:
            return None
        early = self.anneals and not self.pace.over and self.pace.now < 1 - self.pace.width / 2
        advice = (
            f"that were {min(1.0, self.pace.now):.0%} of the run. Annealed masks drop little at first and much at "
            "last: give the run's true length as steps=..., tell handle.progress(share), or leave both out."
            if early
            else "without the warm-up. Longer runs come nearer, and batches that do not grow shorter toward the end."
        )
        return (
            f"{done.drawn_rate:.3f} of the branches' backward FLOPs were dropped, the target was {target:.3f}, in "
            f"{done.forwards} forwards {advice}"
        )

    # -- the state

    def identity(self) -> dict[str, Any]:
        """What a state must share with this schedule to be loaded."""
        return {"branches": list(self.names), "masks": self.config.masks, "seed": self.config.seed}

    def _options(self) -> dict[str, Any]:
        """Options that a resumed run may change."""
        rates = self.config.rates
        options = {
            name: getattr(self.config, name) for name in ("drop_rate", "max_rate", "resample", "steps", "warmup")
        }
        return {**options, "rates": rates if isinstance(rates, str) else list(rates)}

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs to draw the same masks: plain numbers, lists and strings."""
        return {
            "version": STATE_VERSION,
            **self.identity(),
            "options": self._options(),
            "given": _list(self._given),
            "shape": list(dataclasses.astuple(self.shape)),
            "agreed": list(dataclasses.astuple(self._reference)) if self.agreed else None,
            "draws": self.draws,
            "mask": _list(self.mask),
            "current": _list(self.current),
            "pace": dataclasses.asdict(self.pace),
            "statistics": dataclasses.asdict(self.statistics),
            "sensitivities": _list(self.sensitivities),
            "own": _list(self.own),
            "online": self.online.state(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue where another schedule of the same model stopped, by the options of this one.

        Raises:
            StateError: the state is of another version, model, mask sampler or seed, or is damaged; nothing is changed.
        """
        state = checked_state(state, self.identity())
        try:
            saved = _Saved.read(state, self)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise StateError(f"The DropBP state is damaged ({error}); nothing was loaded.") from error
        if self.statistics.forwards < saved.statistics.forwards:
            self.rehearsal = None  # the run that is continued had its own
        self.draws, self.mask, self.current = saved.draws, saved.mask, saved.current
        self.pace, self.statistics = saved.pace, saved.statistics
        self.sensitivities, self.own, self.online = saved.sensitivities, saved.own, saved.online
        if saved.agreed is not None:
            self.agree(saved.agreed)
        self.set_rates(saved.given)
        self.see(saved.shape, self._ranks)
        self._take_over({name for name, mine in self._options().items() if saved.options.get(name) != mine})

    def _take_over(self, changed: set[str]) -> None:
        """Go on by options that the saved run did not have: what is left of the training is the same share of it."""
        if changed & {"steps", "resample"}:
            self.pace.expect(1 / self.length)
        if "resample" in changed:
            self.current = None
        if changed & {"drop_rate", "max_rate", "rates"}:
            self.pace.owed = 0.0
            self.set_rates(None)
            if self.sensitivities is not None and isinstance(self.config.rates, str):
                self.set_rates(self.allocated(self.sensitivities))
        if changed:
            rate = self.here.planned / max(self.here.total, 1.0)
            logger.warning(
                "Resumed at %.0f%% of the run with another %s. The rest follows the new options, with a drop rate of "
                "%g on average; what was dropped so far stays as it is.",
                100 * min(1.0, self.pace.now), ", ".join(sorted(changed)), rate,
            )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Saved:
    """A state, read and checked."""

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

    @classmethod
    def read(cls, state: Mapping[str, Any], schedule: Schedule) -> _Saved:
        """Raises ArithmeticError, AttributeError, LookupError, TypeError or ValueError where it is damaged."""
        count = len(schedule.names)
        given, sensitivities, own = (_numbers(name, state[name], count) for name in ("given", "sensitivities", "own"))
        if given is not None:
            schedule.check_trains(checked_rates(given))
        statistics, pace = _read(Statistics, state["statistics"]), _read(Pace, state["pace"])
        if not pace.width > 0:
            raise ValueError(f"a width of {pace.width:g}")
        _check_length("counts", [_count(each) for each in statistics.counts], count)
        return cls(
            dict(state["options"]),
            given,
            _shape(state["shape"]),
            None if state["agreed"] is None else _shape(state["agreed"]),
            _count(state["draws"]),
            _mask(state["mask"], count),
            _mask(state["current"], count),
            pace,
            statistics,
            sensitivities,
            own,
            Online.from_state(state["online"], count),
        )


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


def beyond_limit(blocks: Iterable[int], flops: Sequence[float], limit: float, dropped: int) -> int:
    """Branches of the blocks nearest the input whose activations are more than a step may keep, as a bit mask.

    Args:
        blocks: the branches, as a bit mask, of each block that may be recomputed, nearest the input first.
        flops: of each branch; activations are taken to be in proportion.
        limit: share of all branches' activations that may be kept. One branch more is allowed.
        dropped: branches that keep nothing, as a bit mask.
    """
    chosen, kept = 0, _flops_of(~dropped, flops)
    allowed = limit * sum(flops) + max(flops)
    for branches in blocks:
        if kept <= allowed:
            break
        share = _flops_of(branches & ~dropped, flops)
        chosen, kept = chosen | (branches if share else 0), kept - share
    return chosen


def _flops_of(branches: int, flops: Sequence[float]) -> float:
    return sum(f for i, f in enumerate(flops) if branches >> i & 1)


def _among(bits: int, live: Sequence[bool]) -> int:
    """A set of branches, as bits, counted among those that have a backward."""
    places = [i for i, alive in enumerate(live) if alive]
    return sum(1 << place for place, i in enumerate(places) if bits >> i & 1)


def _spread(rates: Iterable[float], live: Sequence[bool]) -> Rates:
    """Rates of branches that have a backward as rates of all branches."""
    each = iter(rates)
    return tuple(next(each) if alive else 0.0 for alive in live)


def _list(values: Sequence[Any] | None) -> list[Any] | None:
    return None if values is None else list(values)


def _shape(sizes: Sequence[int]) -> Shape:
    return Shape(*(_count(size) for size in sizes))


def _mask(mask: Any, branches: int) -> Mask | None:
    if mask is None:
        return None
    if not all(isinstance(drop, bool) for drop in mask):
        raise ValueError(f"a mask is {short(mask)}, not a list of bools")
    _check_length("mask", mask, branches)
    return tuple(mask)


def _numbers(name: str, values: Sequence[float] | None, branches: int) -> Rates | None:
    if values is None:
        return None
    _check_length(name, values, branches)
    return tuple(float(value) for value in values)


def _read(kind: type[T], values: Mapping[str, Any]) -> T:
    """A dataclass of counts, sums and lists of counts; each of its fields must be there."""
    fields = {field.name: field.type for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: _READERS[str(type_)](values[name]) for name, type_ in fields.items()})


def _check_length(name: str, values: Sequence[Any], branches: int) -> None:
    check_lengths(name, values, range(branches))


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"a count is {short(value)}, not a number of 0 and above")
    return value


def _number(value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < float("inf"):
        raise ValueError(f"{short(value)} is not a finite number")
    return float(value)


_READERS: Mapping[str, Callable[[Any], Any]] = {"int": _count, "float": _number, "list[int]": list}


class _FixedMasks(threading.local):
    def __init__(self) -> None:
        self.masks: list[Mask] = []
