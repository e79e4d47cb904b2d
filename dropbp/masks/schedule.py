"""The schedule of a run: what each training forward drops. It knows no model.

It alone owns the shape of the forwards, FLOPs, rates, sampler, counters and the saved state. A forward calls `next`
with its shape and with the conditions that only the run knows (`Conditions`), and gets a `ForwardPlan`. The first of
these that applies gives the mask: `with handle.fixed(mask)`; the previous mask, if a forward that waits for its
backward requires the same one; nothing dropped, in the warm-up; the current mask, as long as `resample` keeps it; a
mask for a graph that a lazy device has yet to compile; the mask at this point of an annealed run; a new draw. Given the
state, it is a pure function of seed and step.

Ranks must draw the same masks although each has its own batches. With several ranks, everything that masks depend on is
taken at one shape (`at_draw_shape`): that of rank 0 in the first training forward. Counters take `at_batch_shape`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import compress
from typing import Any

from dropbp.checks import Rates, check_lengths, checked_mask, checked_rates
from dropbp.config import Config
from dropbp.errors import ConfigError
from dropbp.flops import Shape
from dropbp.lazy.warmup import LOOKAHEAD, GraphWarmup
from dropbp.masks.at_shape import AtShape, CountsFlops, CountsParts
from dropbp.masks.online import Online
from dropbp.masks.pace import Pace
from dropbp.masks.plan import Conditions, ForwardPlan
from dropbp.masks.rates import allocate
from dropbp.masks.registry import Mask, sampler_kind
from dropbp.masks.samplers import bits
from dropbp.masks.state import load, written
from dropbp.masks.statistics import Statistics

logger = logging.getLogger(__name__)

MAX_SHAPES = 32  # number of shapes whose rates, sampler and plans are remembered
MAX_PLANS = 512  # per shape


class Schedule:
    """What each training forward of one model drops.

    Args:
        config: the options of `enable`.
        names: names of the branches, from the input upwards.
        blocks: for each block, from the input upwards, its branches as a bit mask.
        flops: counts FLOPs at a shape.
        shape: of the coming forwards; on several ranks, masks are drawn for it until the ranks agree on one.
        weights: counts what dropping a branch saves; 0 without a backward: never dropped. None: its FLOPs.
        trains: whether a step that drops these branches, as bits, trains anything.
        parallel: sets of neighbouring branches, as bits, that nested masks drop together.

    Raises ConfigError if rates or options of the mask sampler have values that are not allowed.
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
        parallel: Sequence[int] = (),
    ) -> None:
        self.config, self.names, self.blocks = config, tuple(names), tuple(blocks)
        self._first_shape, self.multi_rank = shape, False
        self.agreed: Shape | None = None
        self._flops, self._trains = flops, trains
        self._weights = flops if weights is None else weights
        self.kind = sampler_kind(config.masks)
        self._parallel = parallel if self.kind.prefixes else ()
        self.given = self._initial_rates()
        self._values_at: dict[Shape, AtShape] = {}
        self._trains_cache: dict[int, bool] = {}
        self._fixed = _FixedMasks()
        self.dropping, self.draws = True, 0
        self.idle = self.recurring = 0  # branches, as bits, that some forward did not run, or ran more or less often
        self.mask: Mask | None = None
        self.current: Mask | None = None
        self.graph_warmup: GraphWarmup | None = None
        self.statistics = Statistics([0] * len(self.names))
        self.pace = Pace(1 / self.length)
        self.sensitivities: Rates | None = None
        self.own: Rates | None = None
        self.online = Online.new(len(self.names))
        self.shape = shape
        self.at_batch_shape = self.at_draw_shape = self.at(shape)
        self.check_trains(self.rates)
        if self.at_draw_shape.total:
            _ = self.at_draw_shape.sampler  # so that wrong sampler options raise here, not in the first step
        else:
            logger.warning("No branch has a backward that could be skipped: DropBP saves nothing on this model.")

    # -- derived values

    @property
    def rates(self) -> Rates:
        """The drop rate of each branch."""
        return self.at_draw_shape.rates

    @property
    def every(self) -> tuple[Mask, ...] | None:
        """Every mask that can occur, each once; None if the sampler does not bound them."""
        masks = self.at_draw_shape.sampler.distinct_masks
        return None if masks is None else tuple(map(self.at_draw_shape.extend_mask, masks))

    @property
    def anneals(self) -> bool:
        """Whether the run takes the masks in order, the deepest first."""
        return self.config.steps is not None and self.kind.annealed_rates is not None and not self.config.mask_options

    @property
    def length(self) -> int:
        """Number of draws in the run after its warm-up; 1 if unknown."""
        return self.config.draws or 1

    @property
    def fixed(self) -> list[Mask]:
        """The masks of the open `with handle.fixed(...)` blocks of this thread, innermost last."""
        return self._fixed.masks

    def set_shape(self, shape: Shape, multi_rank: bool = False) -> None:
        """Set the shape of the next forwards, and whether other ranks run them too."""
        if shape != self.shape or multi_rank != self.multi_rank:
            self.shape, self.multi_rank = shape, multi_rank
            self._update_values()

    def agree(self, shape: Shape) -> None:
        """Draw all masks for this shape from now on, so that all ranks draw the same ones."""
        self.agreed = shape

    def _update_values(self) -> None:
        self.at_batch_shape = self.at(self.shape)
        self.at_draw_shape = self.at(self.agreed or self._first_shape) if self.multi_rank else self.at_batch_shape

    def at(self, shape: Shape) -> AtShape:
        """The values at a shape, computed once."""
        found = self._values_at.get(shape)
        if found is None:
            if len(self._values_at) >= MAX_SHAPES:
                self._values_at.clear()
            flops, weights = self._flops.at(shape), self._weights.at(shape)
            parts = self._weights.parts(shape) if isinstance(self._weights, CountsParts) else ()
            rates, trains = self.profile or self.given or (), self.trains
            found = self._values_at[shape] = AtShape(self.config, flops, weights, rates, trains, self._parallel, parts)
        return found

    # -- rates

    @property
    def profile(self) -> str | None:
        """The name of the profile that the rates follow at each shape; None if rates were given."""
        if self.given is not None:
            return None
        auto = self.kind.annealed_rates if self.anneals and self.kind.annealed_rates else self.kind.rates
        return auto if self.config.rates == "auto" else str(self.config.rates)

    def check_trains(self, rates: Sequence[float]) -> None:
        """Raises ConfigError if every step would drop all trained parameters."""
        always = bits(tuple(rate >= 1 for rate in rates))
        if always and not self._trains(always):
            raise ConfigError(
                "With these rates every step drops all trained parameters, so nothing would train. Give the branches "
                "that hold them rates below 1, or train the input embedding in every step: stem='train'."
            )

    def set_rates(self, rates: Rates | None) -> None:
        """Draw the next masks from these rates; None: from those of the configuration."""
        self.given = self._initial_rates() if rates is None else rates
        self.recount_weights()

    def recount_weights(self) -> None:
        """Recompute the weights of the branches because other parameters are trained than before."""
        self._values_at.clear()
        self._trains_cache.clear()
        self._update_values()

    def allocated(self, sensitivities: Sequence[float]) -> Rates:
        """Rates under the FLOPs budget.

        Under nested masks the rates, a distribution over depths, do not change. Sensitivities mostly rise toward the
        input, and the nearest rates that do not fall there are all equal: a mask would drop everything or nothing.
        """
        at = self.at_draw_shape
        if self.kind.prefixes or not at.total:
            return self.rates
        scores, weights = list(compress(sensitivities, at.droppable)), list(compress(at.weights, at.droppable))
        return at.extend_rates(allocate(scores, weights, self.config.drop_rate, self.config.max_rate))

    def _initial_rates(self) -> Rates | None:
        if isinstance(self.config.rates, str):
            return None
        rates = checked_rates(self.config.rates)
        check_lengths("rates", rates, range(len(self.names)))
        return rates

    # -- a forward

    def next(self, shape: Shape, conditions: Conditions) -> ForwardPlan:
        """The plan of the next training forward, which is counted as done."""
        self.set_shape(shape, conditions.multi_rank)
        at_draw, at_batch = self.at_draw_shape, self.at_batch_shape
        warmed_up = self.dropping and self.statistics.forwards >= self.config.warmup
        if warmed_up and not self.fixed and (conditions.keep_all or not at_draw.total):
            self._pass_without_mask()
        mask = self.mask = self._next_mask(warmed_up and not conditions.keep_all, conditions)
        drawn = self.mask_drawn = warmed_up and not self.fixed and not conditions.keep_all
        self.statistics.note(mask, at_batch.weights, at_batch.total, at_batch.planned if drawn else None)
        if drawn:
            self.pace.note(at_draw.planned, sum(compress(at_draw.weights, mask)), at_draw.total)
        return self._plan(mask, warmed_up, conditions)

    def progress(self, share: float, dropping: bool) -> None:
        """Take the training loop's report: the share that is done, and whether the coming forwards drop branches."""
        self.dropping = dropping
        self.pace.set_progress(share)

    def resample(self) -> None:
        """Draw a new mask next time."""
        self.current = None

    def checked(self, mask: Sequence[bool]) -> Mask:
        """The mask as a tuple of bools. Raises ConfigError unless it has one entry per branch."""
        checked = checked_mask(mask)
        if len(checked) != len(self.names):
            raise ConfigError(
                f"The mask has {len(checked)} entries, but the model has {len(self.names)} branches. Pass one bool per "
                "entry of handle.branches, True to drop its backward."
            )
        return checked

    def checkpointed(self, dropped: int, limit: float | None, never_recomputed: int = 0) -> int:
        """The lowest blocks whose kept branches exceed what a step may keep, as a bit mask of branches."""
        if limit is None or not self.at_draw_shape.total:
            return 0
        blocks = [branches for branches in self.blocks if not branches & never_recomputed]
        return self.at_draw_shape.beyond_limit(blocks, limit, dropped)

    def trains(self, mask: Mask) -> bool:
        """Whether a step under this mask trains anything: also if everything is dropped, or under this mask only."""
        return self._trains_under((1 << len(mask)) - 1) or self._trains_under(bits(mask))

    def _trains_under(self, dropped: int) -> bool:
        if dropped not in self._trains_cache:
            if len(self._trains_cache) >= MAX_PLANS:
                self._trains_cache.clear()
            self._trains_cache[dropped] = self._trains(dropped)
        return self._trains_cache[dropped]

    def clear_trains_cache(self) -> None:
        """Discard what depends on which parameters are trained.

        Raises ConfigError if every step would drop all of them.
        """
        self._trains_cache.clear()
        for at in (*self._values_at.values(), self.at_batch_shape, self.at_draw_shape):
            at.clear_trains_cache()
        self.check_trains(self.rates)

    def _plan(self, mask: Mask, scaled: bool, conditions: Conditions) -> ForwardPlan:
        """Computed once for each mask, because a few masks occur again and again."""
        plans, limit, stem_frozen = self.at_draw_shape.plans, conditions.limit, conditions.stem_frozen
        key = mask, scaled, limit, stem_frozen, conditions.truncated, conditions.never_recomputed
        plan = plans.get(key)
        if plan is None:
            if len(plans) >= MAX_PLANS:
                plans.clear()
            dropped, factors = bits(mask), self.at_draw_shape.factors if scaled else ()
            recomputed = self.checkpointed(dropped, limit, conditions.never_recomputed)
            plan = plans[key] = ForwardPlan(dropped, factors, recomputed, stem_frozen, conditions.truncated)
        return plan

    # -- the mask

    def _next_mask(self, dropping: bool, conditions: Conditions) -> Mask:
        if self.fixed:
            return self.fixed[-1]
        if conditions.repeat_mask and not conditions.keep_all and self.mask is not None:
            return self.mask
        if not dropping or not self.at_draw_shape.total:
            return (False,) * len(self.names)
        if self.graph_warmup is not None and not self.graph_warmup.done:
            return self._warming_up(self.graph_warmup, conditions.with_gradient())
        if self.current is None or not self._keeps_current():
            self.current = self._next_drawn()
        return self.current

    def _pass_without_mask(self) -> None:
        """Count a forward that can drop nothing as a part of the run, in which it takes the place of a draw."""
        if not self._keeps_current():
            self.pace.begin()

    def _keeps_current(self) -> bool:
        every = self.config.resample
        if isinstance(every, int):
            return (self.statistics.forwards - self.config.warmup) % every != 0
        return every == "step"

    def _next_drawn(self) -> Mask:
        at, draw, self.draws = self.at_draw_shape, self.draws, self.draws + 1
        self.pace.begin()
        if not self.anneals or self.pace.over:
            return at.drawn(draw)
        number = self.pace.number(at.annealing[0], at.planned / at.total)
        # Near an edge between two masks the feedback would oscillate, so the current mask stays.
        steady = at.annealed_mask(number - self.pace.width)
        return steady if steady == self.current else at.annealed_mask(number)

    def _warming_up(self, warmup: GraphWarmup, with_gradient: int) -> Mask:
        """A mask for a graph that is not compiled yet (`dropbp.lazy.warmup`); the usual one if none is left."""
        if self.current is None or not self._keeps_current():
            dropped = warmup.next(with_gradient, self._upcoming_masks)
            self.current = self._next_drawn() if dropped is None else self._in_advance(dropped)
        if not warmup.done:
            warmup.note(bits(self.current), with_gradient)
        return self.current

    def _in_advance(self, dropped: int) -> Mask:
        if self.anneals:  # it takes up a part of the run; the rest compensates for what it drops
            self.draws += 1
            self.pace.begin()
        return tuple(bool(dropped >> i & 1) for i in range(len(self.names)))

    def _upcoming_masks(self) -> list[int]:
        """Coming masks, as bits of dropped branches; for an annealed run, from all of it, late masks included."""
        at = self.at_draw_shape
        if not self.anneals:
            return [bits(at.drawn(draw)) for draw in range(self.draws, self.draws + LOOKAHEAD)]
        spread = [at.annealed_mask((place + 0.5) / LOOKAHEAD) for place in reversed(range(LOOKAHEAD))]
        return [bits(mask) for mask in (*spread, *at.annealing[1])]

    def expected_mask(self, draw: int) -> Mask:
        """The expected mask of a draw, if a run of known length goes as planned."""
        at = self.at_draw_shape
        return at.annealed_mask(1 - (draw + 0.5) / self.length) if self.anneals else at.drawn(draw)

    # -- state

    @property
    def identity(self) -> dict[str, Any]:
        """The values that a saved state must share with this schedule."""
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
        """Continue where another schedule of the same model stopped, with the options of this one.

        Raises StateError if the state is damaged or has another version, model, sampler or seed; nothing is changed.
        """
        load(self, state)


class _FixedMasks(threading.local):
    def __init__(self) -> None:
        self.masks: list[Mask] = []
