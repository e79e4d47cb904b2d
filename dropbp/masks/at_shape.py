"""What follows from the shape of a forward: FLOPs, rates, the sampler of masks, and the blocks that are recomputed."""

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
    """What follows from a shape, and plans made so far.

    Args:
        flops: forward FLOPs of every branch.
        weights: those of branches that have a backward, 0 for others: what the budget counts.
        rates: the name of a profile, or every branch's rate.
        trains: whether a step under a mask leaves something with a gradient.
        together: sets of neighbouring branches, as bits, that masks drop all at once.

    Attributes:
        total: sum of the weights.
        rates: drop rates; 0 where the weight is.
        planned: FLOPs that these rates drop on average.
        plans: by what they were made from.
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
        """Attention weighs more in long sequences, so rates of a profile depend on the shape."""
        weights, rate, cap = list(compress(self.weights, self.live)), self.config.drop_rate, self.config.max_rate
        if not isinstance(rates, str):
            return self.spread(level(compress(rates, self.live), weights, together))
        if rates == "uniform":
            return self.spread([float(rate)] * len(weights))
        return self.spread(depth_rates(weights, rate, rates, 1.0 if cap is None else cap, together))

    def _among_live(self, bits: int) -> int:
        """A set of branches, as bits, counted among those that have a backward."""
        places = [i for i, alive in enumerate(self.live) if alive]
        return sum(1 << place for place, i in enumerate(places) if bits >> i & 1)

    def spread(self, values: Iterable[float]) -> Rates:
        """Values of the branches that have a backward as values of all branches, 0 for the others."""
        each = iter(values)
        return tuple(next(each) if alive else 0.0 for alive in self.live)

    @cached_property
    def sampler(self) -> Sampler:
        """Of the branches that have a backward."""
        rates, weights = compress(self.rates, self.live), compress(self.weights, self.live)
        return Sampler(self.config.masks, rates, weights, self.config.seed, **self.config.mask_options)

    @property
    def factors(self) -> Rates:
        """Of the kept branches' gradients; empty where they are not scaled."""
        if self.config.scaling == "none":
            return ()
        top = self.config.max_scale if self.config.scaling == "clipped" else float("inf")
        return tuple(min(top, 1 / (1 - rate)) if rate < 1 else 1.0 for rate in self.rates)

    def whole(self, mask: Mask) -> Mask:
        """A mask of the branches that have a backward as one of all branches."""
        if len(mask) == len(self.live):
            return mask
        drops = iter(mask)
        return tuple(alive and next(drops) for alive in self.live)

    def share(self, mask: Mask) -> float:
        """Share of the FLOPs that a mask drops."""
        return sum(compress(self.weights, mask)) / self.total

    # -- masks

    def drawn(self, draw: int) -> Mask:
        """The mask of a draw. Where it would train nothing, another that does is drawn in its place.

        A branch that holds what is trained is then kept more often than its rate says, by as much as such masks are
        likely: nothing where something outside of the branches trains, and little where many branches do.
        """
        mask = self.whole(self.sampler.draw(draw))
        for attempt in range(1, REDRAWS):
            if self.trains(mask):
                return mask
            mask = self.whole(self.sampler.redraw(draw, attempt))
        return self._with_one_kept(mask)

    def _with_one_kept(self, mask: Mask) -> Mask:
        """The mask without the least often dropped of the branches that would train something."""
        for branch in sorted(range(len(mask)), key=self.rates.__getitem__):
            kept = (*mask[:branch], False, *mask[branch + 1 :])
            if self.trains(kept):
                return kept
        return (False,) * len(mask)

    @cached_property
    def course(self) -> tuple[Curve, tuple[Mask, ...]]:
        """The masks of an annealed run, the one that drops most first, and the curve that they follow.

        In the place of one that trains nothing stands the next that does.
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
        """Something else is trained from now on."""
        self.__dict__.pop("course", None)

    def beyond_limit(self, blocks: Iterable[int], limit: float, dropped: int) -> int:
        """Branches of the blocks nearest the input whose activations are more than a step may keep, as a bit mask.

        Args:
            blocks: the branches, as a bit mask, of each block that may be recomputed, nearest the input first.
            limit: share of all branches' activations that may be kept. One branch more is allowed. Activations are
                taken to be in proportion to FLOPs.
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
