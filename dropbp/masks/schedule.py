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

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import compress
from typing import Any, Protocol

from dropbp.checks import check_lengths, checked_mask, checked_rates
from dropbp.config import Config
from dropbp.errors import ConfigError
from dropbp.flops import Shape
from dropbp.lazy.warmup import LOOKAHEAD, GraphWarmup
from dropbp.masks.at_shape import AtShape, Rates
from dropbp.masks.online import Online
from dropbp.masks.pace import Pace
from dropbp.masks.plan import Conditions, ForwardPlan
from dropbp.masks.rates import allocate
from dropbp.masks.registry import Mask, sampler_kind
from dropbp.masks.samplers import bits
from dropbp.masks.state import read, written
from dropbp.masks.statistics import Statistics

logger = logging.getLogger(__name__)

MAX_SHAPES = 32  # whose rates, sampler and plans are remembered
MAX_PLANS = 512  # of one shape


class CountsFlops(Protocol):
    """FLOPs of every branch at a shape."""

    def at(self, shape: Shape) -> tuple[float, ...]: ...


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
        self._first, self._ranks = shape, False
        self.agreed: Shape | None = None
        self._count, self._trains = flops, trains
        self._weigh = flops if weights is None else weights
        self.kind = sampler_kind(config.masks)
        self._together = together if self.kind.prefixes else ()
        self.given = self._initial_rates()
        self._known: dict[Shape, AtShape] = {}
        self._training: dict[int, bool] = {}
        self._fixed = _FixedMasks()
        self.dropping = True
        self.draws = 0
        self.mask: Mask | None = None
        self.current: Mask | None = None
        self.graph_warmup: GraphWarmup | None = None
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
            logger.warning("No branch has a backward that could be skipped: DropBP saves nothing on this model.")

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
        return self.config.draws or 1

    @property
    def fixed(self) -> list[Mask]:
        """The masks of the `with handle.fixed(...)` open in this thread, the innermost last."""
        return self._fixed.masks

    def see(self, shape: Shape, ranks: bool = False) -> None:
        """The next forwards have this shape. `seen` is what follows from it, `here` what masks are drawn by."""
        if shape != self.shape or ranks != self._ranks:
            self.shape, self._ranks = shape, ranks
            self._look()

    def agree(self, shape: Shape) -> None:
        """On several ranks all masks are drawn for this shape from now on: the same on each of them."""
        self.agreed = shape

    def _look(self) -> None:
        self.seen = self.at(self.shape)
        self.here = self.at(self.agreed or self._first) if self._ranks else self.seen

    def at(self, shape: Shape) -> AtShape:
        """What follows from a shape, worked out once."""
        found = self._known.get(shape)
        if found is None:
            if len(self._known) >= MAX_SHAPES:
                self._known.clear()
            flops, weights = self._count.at(shape), self._weigh.at(shape)
            rates = self.profile or self.given or ()
            found = self._known[shape] = AtShape(self.config, flops, weights, rates, self.trains, self._together)
        return found

    # -- rates

    @property
    def profile(self) -> str | None:
        """The name of the profile that rates follow from, at each shape; None where they were given."""
        if self.given is not None:
            return None
        auto = self.kind.annealed_rates if self.anneals and self.kind.annealed_rates else self.kind.rates
        return auto if self.config.rates == "auto" else str(self.config.rates)

    def check_trains(self, rates: Sequence[float]) -> None:
        """Raises ConfigError where every step would drop all that is trained."""
        always = bits(tuple(rate >= 1 for rate in rates))
        if always and not self._trains(always):
            raise ConfigError(
                "With these rates every step drops all that is trained, so nothing would train. Give the branches "
                "that hold trained parameters rates below 1, or train the input embedding always: stem='train'."
            )

    def set_rates(self, rates: Rates | None) -> None:
        """The next mask is drawn from these rates; None: from those of the configuration."""
        self.given = self._initial_rates() if rates is None else rates
        self.reweigh()

    def reweigh(self) -> None:
        """What branches weigh is asked anew: other parameters are trained than before."""
        self._known.clear()
        self._training.clear()
        self._look()

    def allocated(self, sensitivities: Sequence[float]) -> Rates:
        """Rates under the FLOPs budget.

        Under nested masks rates stay as they are: a distribution over depths. Sensitivities mostly rise toward the
        input, and the nearest rates that do not fall there are all equal: a mask would drop everything or nothing.
        """
        here = self.here
        if self.kind.prefixes or not here.total:
            return self.rates
        scores, weights = list(compress(sensitivities, here.live)), list(compress(here.weights, here.live))
        return here.spread(allocate(scores, weights, self.config.drop_rate, self.config.max_rate))

    def _initial_rates(self) -> Rates | None:
        if isinstance(self.config.rates, str):
            return None
        rates = checked_rates(self.config.rates)
        check_lengths("rates", rates, range(len(self.names)))
        return rates

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
        if limit is None or not self.here.total:
            return 0
        blocks = [branches for branches in self.blocks if not branches & left_alone]
        return self.here.beyond_limit(blocks, limit, dropped)

    def trains(self, mask: Mask) -> bool:
        """Whether a step under this mask leaves something with a gradient: where all is dropped, or only here."""
        return self._trains_under((1 << len(mask)) - 1) or self._trains_under(bits(mask))

    def _trains_under(self, dropped: int) -> bool:
        if dropped not in self._training:
            if len(self._training) >= MAX_PLANS:
                self._training.clear()
            self._training[dropped] = self._trains(dropped)
        return self._training[dropped]

    def forget_what_trains(self) -> None:
        """Something else is trained from now on.

        Raises:
            ConfigError: every step would drop all of it.
        """
        self._training.clear()
        for at in (*self._known.values(), self.seen, self.here):
            at.forget_what_trains()
        self.check_trains(self.rates)

    def _plan(self, mask: Mask, scaled: bool, conditions: Conditions) -> ForwardPlan:
        """Worked out once for each mask: few masks come again and again."""
        asked, plans = conditions, self.here.plans
        key = mask, scaled, asked.limit, asked.stem_rests, asked.truncated, asked.left_alone
        plan = plans.get(key)
        if plan is None:
            if len(plans) >= MAX_PLANS:
                plans.clear()
            dropped, factors = bits(mask), self.here.factors if scaled else ()
            recomputed = self.checkpointed(dropped, asked.limit, asked.left_alone)
            plan = plans[key] = ForwardPlan(dropped, factors, recomputed, asked.stem_rests, asked.truncated)
        return plan

    # -- the mask

    def _next(self, past: bool, conditions: Conditions) -> Mask:
        if self.fixed:
            return self.fixed[-1]
        if conditions.again and not conditions.whole and self.mask is not None:
            return self.mask
        if not past or not self.here.total:
            return (False,) * len(self.names)
        if self.graph_warmup is not None and not self.graph_warmup.done:
            return self._warming_up(self.graph_warmup, conditions.held())
        if self.current is None or not self._keeps():
            self.current = self._drawn()
        return self.current

    def _keeps(self) -> bool:
        every = self.config.resample
        if isinstance(every, int):
            return (self.statistics.forwards - self.config.warmup) % every != 0
        return every == "step"

    def _drawn(self) -> Mask:
        here, draw, self.draws = self.here, self.draws, self.draws + 1
        self.pace.begin()
        if not self.anneals or self.pace.over:
            return here.drawn(draw)
        number = self.pace.number(here.course[0], here.planned / here.total)
        # Near an edge between two masks the feedback would go back and forth: the mask stays what it is.
        steady = here.ordered(number - self.pace.width)
        return steady if steady == self.current else here.ordered(number)

    def _warming_up(self, warmup: GraphWarmup, held: int) -> Mask:
        """A mask for a graph that is not compiled yet, see `dropbp.lazy.warmup`; the usual one where none is left."""
        if self.current is None or not self._keeps():
            dropped = warmup.next(held, self._upcoming)
            self.current = self._drawn() if dropped is None else self._in_advance(dropped)
        if not warmup.done:
            warmup.note(bits(self.current), held)
        return self.current

    def _in_advance(self, dropped: int) -> Mask:
        if self.anneals:  # it takes up a part of the run, whose rest makes good for what it drops
            self.draws += 1
            self.pace.begin()
        return tuple(bool(dropped >> i & 1) for i in range(len(self.names)))

    def _upcoming(self) -> list[int]:
        """Masks to come, as bits of dropped branches; an annealed run's from all of it, as they come late but come."""
        here = self.here
        if not self.anneals:
            return [bits(here.drawn(draw)) for draw in range(self.draws, self.draws + LOOKAHEAD)]
        spread = [here.ordered((place + 0.5) / LOOKAHEAD) for place in reversed(range(LOOKAHEAD))]
        return [bits(mask) for mask in (*spread, *here.course[1])]

    def foreseen(self, draw: int) -> Mask:
        """The mask of a draw, where a run of known length goes as it should."""
        return self.here.ordered(1 - (draw + 0.5) / self.length) if self.anneals else self.here.drawn(draw)

    # -- the state

    @property
    def identity(self) -> dict[str, Any]:
        """What a state must share with this schedule to be loaded."""
        return {"branches": list(self.names), "masks": self.config.masks, "seed": self.config.seed}

    @property
    def options(self) -> dict[str, Any]:
        """Options that a resumed run may change."""
        names = ("drop_rate", "max_rate", "resample", "steps", "warmup")
        rates = self.config.rates if isinstance(self.config.rates, str) else list(self.config.rates)
        return {**{name: getattr(self.config, name) for name in names}, "rates": rates}

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs to draw the same masks: plain numbers, lists and strings."""
        return written(self)

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue where another schedule of the same model stopped, by the options of this one.

        Raises:
            StateError: the state is of another version, model, mask sampler or seed, or is damaged; nothing is changed.
        """
        saved = read(state, self)
        if self.statistics.forwards < saved.statistics.forwards:
            self.graph_warmup = None  # the run that is continued had its own
        self.draws, self.mask, self.current = saved.draws, saved.mask, saved.current
        self.pace, self.statistics = saved.pace, saved.statistics
        self.sensitivities, self.own, self.online = saved.sensitivities, saved.own, saved.online
        self.agreed = saved.agreed or self.agreed
        self.set_rates(saved.given)
        self.see(saved.shape, self._ranks)
        self._take_over({name for name, mine in self.options.items() if saved.options.get(name) != mine})

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
                "Resumed at %.0f%% of the run with a different %s. The rest of the run follows the new options, at a "
                "mean drop rate of %g; the steps before are not made up for.",
                100 * min(1.0, self.pace.now), ", ".join(sorted(changed)), rate,
            )  # fmt: skip


class _FixedMasks(threading.local):
    def __init__(self) -> None:
        self.masks: list[Mask] = []
