"""From the mask of a step to what its forward does, worked out once for each mask: few masks come again and again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dropbp.engine.checkpointing import beyond_limit
from dropbp.engine.runtime import Plan
from dropbp.masks.books import Mask
from dropbp.masks.drawing import bits

REMEMBERED = 512


class Plans:
    """Makes plans for one model, and remembers those for the present shape and rates.

    Args:
        blocks: each block's branches as a bit mask, nearest the input first.
        flops: of the branches; set anew by `see`.
        factors: of kept branches' gradients; set anew by `see`.
    """

    def __init__(self, blocks: Iterable[int], flops: Sequence[int], factors: Sequence[float]) -> None:
        self.blocks = tuple(blocks)
        self._made: dict[tuple[Mask, bool, float | None, bool, bool], Plan] = {}
        self.see(flops, factors)

    def see(self, flops: Sequence[int], factors: Sequence[float]) -> None:
        """The next forwards are of another shape or at other rates."""
        self._flops, self._factors = flops, factors
        self._made.clear()

    def of(self, mask: Mask, scaled: bool, limit: float | None, stem_rests: bool, stream_ends: bool) -> Plan:
        """The plan of a training forward.

        Args:
            mask: True = backward dropped.
            scaled: whether kept branches' gradients are scaled.
            limit: share of all activations that may be kept; None where nothing is recomputed for its sake.
            stem_rests: whether what feeds a stream rests when the stream's first branch is dropped.
            stream_ends: whether the stream then asks for no gradient below the lowest kept branch.
        """
        key = mask, scaled, limit, stem_rests, stream_ends
        plan = self._made.get(key)
        if plan is None:
            if len(self._made) >= REMEMBERED:
                self._made.clear()
            dropped, factors = bits(mask), self._factors if scaled else ()
            plan = Plan(dropped, factors, self.checkpointed(dropped, limit), stem_rests, stream_ends)
            self._made[key] = plan
        return plan

    def checkpointed(self, dropped: int, limit: float | None) -> int:
        """Blocks nearest the input whose kept branches are more than a step may keep, as a bit mask of branches."""
        return 0 if limit is None else beyond_limit(self.blocks, self._flops, limit, dropped)
