"""Everything that depends on the shape of a forward: FLOPs, rates, the mask sampler, and the recomputed blocks."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import compress
from typing import Any

from dropbp.config import Config
from dropbp.masks.pace import Curve
from dropbp.masks.plan import ForwardPlan
from dropbp.masks.rates import depth_rates, level
from dropbp.masks.registry import Mask
from dropbp.masks.samplers import Sampler

REDRAWS = 64

Rates = tuple[float, ...]


class AtShape:
    """FLOPs, rates and sampler at one shape, and the plans made so far.

    Args:
        flops: forward FLOPs of every branch.
        weights: what the budget counts: the FLOPs of branches that have a backward, 0 for others.
        rates: the name of a profile, or the rate of every branch.
        trains: whether a step under a mask trains anything.
        together: sets of neighbouring branches, as bits, that masks drop together.

    Attributes:
        total: sum of the weights.
        rates: drop rates; 0 for a branch of weight 0.
        planned: FLOPs that these rates drop on average.
        plans: plans by the values they were made from.
    """

    def __init__(
        self,
        config: Config,
        flops: Sequence[float],
        weights: Sequence[float],
        rates: str | Rates,
        trains: Callable[[Mask], bool],
        together: Iterable[int] = (),
    ) -> None:
        self.config, self.flops, self.weights = config, tuple(map(int, flops)), tuple(weights)
        self.total = sum(self.weights)
        self.live = tuple(weight > 0 for weight in self.weights)
        self.trains = trains
        groups = [self._among_live(bits) for bits in together]
        self.rates = self._rates(rates, groups) if self.total else self.spread(())
        self.planned = sum(weight * rate for weight, rate in zip(self.weights, self.rates, strict=True))
        self.plans: dict[tuple[Any, ...], ForwardPlan] = {}

    def _rates(self, rates: str | Rates, together: Sequence[int]) -> Rates:
        """Attention weighs more in long sequences, so the rates of a profile depend on the shape."""
        weights, rate, cap = list(compress(self.weights, self.live)), self.config.drop_rate, self.config.max_rate
        if not isinstance(rates, str):
            return self.spread(level(compress(rates, self.live), weights, together))
        if rates == "uniform":
            return self.spread([float(rate)] * len(weights))
        return self.spread(depth_rates(weights, rate, rates, 1.0 if cap is None else cap, together))

    def _among_live(self, bits: int) -> int:
        """Renumber a set of branches, as bits, to the branches that have a backward."""
        places = [i for i, alive in enumerate(self.live) if alive]
        return sum(1 << place for place, i in enumerate(places) if bits >> i & 1)

    def spread(self, values: Iterable[float]) -> Rates:
        """Extend values of the branches with a backward to all branches, with 0 for the others."""
        each = iter(values)
        return tuple(next(each) if alive else 0.0 for alive in self.live)

    @cached_property
    def sampler(self) -> Sampler:
        """The sampler for the branches that have a backward."""
        rates, weights = compress(self.rates, self.live), compress(self.weights, self.live)
        return Sampler(self.config.masks, rates, weights, self.config.seed, **self.config.mask_options)

    @property
    def factors(self) -> Rates:
        """Factors on the kept branches' gradients; empty if they are not scaled."""
        if self.config.scaling == "none":
            return ()
        top = self.config.max_scale if self.config.scaling == "clipped" else float("inf")
        return tuple(min(top, 1 / (1 - rate)) if rate < 1 else 1.0 for rate in self.rates)

    def whole(self, mask: Mask) -> Mask:
        """Extend a mask of the branches with a backward to all branches."""
        if len(mask) == len(self.live):
            return mask
        drops = iter(mask)
        return tuple(alive and next(drops) for alive in self.live)

    def share(self, mask: Mask) -> float:
        """Share of the FLOPs that a mask drops."""
        return sum(compress(self.weights, mask)) / self.total

    # -- masks

    def drawn(self, draw: int) -> Mask:
        """The mask of a draw. If it would train nothing, another mask is drawn instead.

        A branch with trained parameters is then kept more often than its rate says, in proportion to the probability of
        such masks. That is zero if something outside the branches trains, and small if many branches do.
        """
        mask = self.whole(self.sampler.draw(draw))
        for attempt in range(1, REDRAWS):
            if self.trains(mask):
                return mask
            mask = self.whole(self.sampler.redraw(draw, attempt))
        return self._with_one_kept(mask)

    def _with_one_kept(self, mask: Mask) -> Mask:
        """The mask, with the least often dropped of the branches that would train something kept."""
        for branch in sorted(range(len(mask)), key=self.rates.__getitem__):
            kept = (*mask[:branch], False, *mask[branch + 1 :])
            if self.trains(kept):
                return kept
        return (False,) * len(mask)

    @cached_property
    def course(self) -> tuple[Curve, tuple[Mask, ...]]:
        """The masks of an annealed run, the one that drops most first, and their curve.

        A mask that trains nothing is replaced by the next one that does.
        """
        edges, masks = self.sampler.edges or (), [self.whole(mask) for mask in self.sampler.distinct_masks or ()]
        for i in range(len(masks) - 2, -1, -1):
            masks[i] = masks[i] if self.trains(masks[i]) else masks[i + 1]
        return Curve(edges, [self.share(mask) for mask in masks]), tuple(masks)

    def ordered(self, number: float) -> Mask:
        """The mask of an annealed run at a number from 0, where most is dropped, to 1."""
        curve, masks = self.course
        return masks[max(0, bisect_right(curve.edges, number, hi=len(masks)) - 1)]

    def forget_what_trains(self) -> None:
        """Discard what depends on which parameters are trained."""
        self.__dict__.pop("course", None)

    def beyond_limit(self, blocks: Iterable[int], limit: float, dropped: int) -> int:
        """Branches of the lowest blocks whose activations exceed what a step may keep, as a bit mask.

        Args:
            blocks: for each block that may be recomputed, from the input upwards, its branches as a bit mask.
            limit: share of all branches' activations that may be kept, plus one branch. Activations are assumed to be
                proportional to FLOPs.
            dropped: branches that keep nothing, as a bit mask.
        """
        flops = [f if alive else 0 for f, alive in zip(self.flops, self.live, strict=True)]
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
