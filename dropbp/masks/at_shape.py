"""Everything that depends on the shape of a forward: FLOPs, rates, the mask sampler, and the recomputed blocks."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import compress
from typing import Any, Protocol, runtime_checkable

from dropbp import branch_sets
from dropbp.checks import Rates
from dropbp.config import Config
from dropbp.flops import Shape
from dropbp.masks.pace import Curve
from dropbp.masks.plan import ForwardPlan
from dropbp.masks.rates import average_over_parallel, depth_rates
from dropbp.masks.registry import Mask
from dropbp.masks.samplers import Sampler

REDRAWS = 64

Part = tuple[int, int, float]  # the branch whose dropping saves it, the branch that it lies in, FLOPs


class CountsFlops(Protocol):
    """FLOPs of every branch at a shape."""

    def at(self, shape: Shape) -> tuple[float, ...]: ...


@runtime_checkable
class CountsParts(Protocol):
    """Weights by the branch whose dropping saves them and the branch that they lie in."""

    def parts(self, shape: Shape) -> tuple[Part, ...]: ...


class AtShape:
    """FLOPs, rates and sampler at one shape, and the plans made so far, by the values they were made from.

    The budget counts `weights`: the FLOPs of branches that have a backward, 0 for others; `total` is their sum. `rates`
    may be given as the name of a profile; a branch of weight 0 has rate 0. `planned` are the FLOPs that the rates drop
    on average. `trains` tells whether a step under a mask trains anything. Masks drop the sets of neighbouring branches
    in `parallel` (bits) together. `parts` are the weights by the branch that they lie in; empty: each in its own.
    """

    def __init__(
        self,
        config: Config,
        flops: Sequence[float],
        weights: Sequence[float],
        rates: str | Rates,
        trains: Callable[[Mask], bool],
        parallel: Iterable[int] = (),
        parts: tuple[Part, ...] = (),
    ) -> None:
        self.config, self.flops, self.weights = config, tuple(map(int, flops)), tuple(weights)
        self.parts = parts or tuple((i, i, weight) for i, weight in enumerate(self.weights))
        self.total = sum(self.weights)
        self.droppable = tuple(weight > 0 for weight in self.weights)
        self.trains = trains
        groups = [self._renumbered(bits) for bits in parallel]
        self.rates = self._rates(rates, groups) if self.total else self.extend_rates(())
        self.planned = sum(weight * rate for weight, rate in zip(self.weights, self.rates, strict=True))
        self.plans: dict[tuple[Any, ...], ForwardPlan] = {}

    def _rates(self, rates: str | Rates, parallel: Sequence[int]) -> Rates:
        """Attention weighs more in long sequences, so the rates of a profile depend on the shape."""
        weights, rate, cap = list(compress(self.weights, self.droppable)), self.config.drop_rate, self.config.max_rate
        if not isinstance(rates, str):
            return self.extend_rates(average_over_parallel(compress(rates, self.droppable), weights, parallel))
        if rates == "uniform":
            return self.extend_rates([float(rate)] * len(weights))
        return self.extend_rates(depth_rates(weights, rate, rates, 1.0 if cap is None else cap, parallel))

    def _renumbered(self, bits: int) -> int:
        """Renumber a set of branches, as bits, to the branches that have a backward."""
        places = [i for i, droppable in enumerate(self.droppable) if droppable]
        return sum(1 << place for place, i in enumerate(places) if bits >> i & 1)

    def extend_rates(self, values: Iterable[float]) -> Rates:
        """Extend values of the branches with a backward to all branches, with 0 for the others."""
        each = iter(values)
        return tuple(next(each) if droppable else 0.0 for droppable in self.droppable)

    @cached_property
    def sampler(self) -> Sampler:
        """The sampler for the branches that have a backward."""
        rates, weights = compress(self.rates, self.droppable), compress(self.weights, self.droppable)
        return Sampler(self.config.masks, rates, weights, self.config.seed, **self.config.mask_options)

    @property
    def factors(self) -> Rates:
        """Factors on the kept branches' gradients; empty if they are not scaled."""
        if self.config.scaling == "none":
            return ()
        top = self.config.max_scale if self.config.scaling == "clipped" else float("inf")
        return tuple(min(top, 1 / (1 - rate)) if rate < 1 else 1.0 for rate in self.rates)

    def extend_mask(self, mask: Mask) -> Mask:
        """Extend a mask of the branches with a backward to all branches."""
        if len(mask) == len(self.droppable):
            return mask
        drops = iter(mask)
        return tuple(droppable and next(drops) for droppable in self.droppable)

    def share(self, mask: Mask) -> float:
        """Share of the FLOPs that a mask drops."""
        return sum(compress(self.weights, mask)) / self.total

    # -- masks

    def drawn(self, draw: int) -> Mask:
        """The mask of a draw. If it would train nothing, another mask is drawn instead.

        A branch with trained parameters is then kept more often than its rate says, in proportion to the probability of
        such masks. That is zero if something outside the branches trains, and small if many branches do.
        """
        mask = self.extend_mask(self.sampler.draw(draw))
        for attempt in range(1, REDRAWS):
            if self.trains(mask):
                return mask
            mask = self.extend_mask(self.sampler.redraw(draw, attempt))
        return self._with_one_kept(mask)

    def _with_one_kept(self, mask: Mask) -> Mask:
        """The mask, with the least often dropped of the branches that would train something kept."""
        for branch in sorted(range(len(mask)), key=self.rates.__getitem__):
            kept = (*mask[:branch], False, *mask[branch + 1 :])
            if self.trains(kept):
                return kept
        return (False,) * len(mask)

    @cached_property
    def annealing(self) -> tuple[Curve, tuple[Mask, ...]]:
        """The masks of an annealed run, the one that drops most first, and their curve.

        A mask that trains nothing is replaced by the next one that does.
        """
        edges, masks = self.sampler.edges or (), [self.extend_mask(mask) for mask in self.sampler.distinct_masks or ()]
        for i in range(len(masks) - 2, -1, -1):
            masks[i] = masks[i] if self.trains(masks[i]) else masks[i + 1]
        return Curve(edges, [self.share(mask) for mask in masks]), tuple(masks)

    def annealed_mask(self, number: float) -> Mask:
        """The mask of an annealed run at a number from 0, where most is dropped, to 1."""
        curve, masks = self.annealing
        return masks[max(0, bisect_right(curve.edges, number, hi=len(masks)) - 1)]

    def clear_trains_cache(self) -> None:
        """Discard what depends on which parameters are trained."""
        self.__dict__.pop("annealing", None)

    def beyond_limit(self, blocks: Iterable[int], limit: float, dropped: int) -> int:
        """Branches of the lowest blocks whose activations exceed what a step may keep, as a bit mask.

        `blocks` that may be recomputed come from the input upwards. The step may keep the share `limit` of all
        branches' activations, plus one branch; activations are assumed to be proportional to FLOPs.
        """
        flops = [f if droppable else 0 for f, droppable in zip(self.flops, self.droppable, strict=True)]
        chosen, kept = 0, branch_sets.total(~dropped, flops)
        allowed = limit * sum(flops) + max(flops)
        for branches in blocks:
            if kept <= allowed:
                break
            share = branch_sets.total(branches & ~dropped, flops)
            chosen, kept = chosen | (branches if share else 0), kept - share
        return chosen
