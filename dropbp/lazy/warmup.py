"""Warm-up of graphs: chooses the first masks on a lazy device so that every graph is compiled then and none later.

With a graph cut at each block, the recording of a block has few variants. They differ by which of its branches are
kept, which of these already have a gradient (from an earlier micro-batch), whether the block is recomputed, and whether
anything below it is kept: the lowest kept block needs no gradient of its input. The optimizer's work on a branch
depends on whether the branch trained before, because the first step creates the moments. Each variant is compiled once
for all blocks. Common variants occur in the first steps anyway; each rare one would cost seconds of compilation at some
later step. So the first steps use, out of the coming masks, those with new variants, until none is left. The masks stay
those of the run; only their order changes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

from dropbp import branch_sets

logger = logging.getLogger(__name__)

Variant = Hashable
LOOKAHEAD = 400
MAX_FORWARDS = 64


@dataclass(frozen=True)
class Layer:
    """A block, or a stem that is frozen if a branch is dropped; equal kinds share graphs, `branches` are bits."""

    kind: Hashable
    branches: int


class GraphWarmup:
    """Chooses masks, as bit masks of dropped branches, until all variants of the graphs have occurred.

    `layers` are the blocks, from the input upwards; `recomputed` returns the kept branches that are recomputed, for
    given dropped ones.
    """

    def __init__(self, layers: Sequence[Layer], everything: int, recomputed: Callable[[int], int]) -> None:
        self.layers, self.everything, self.recomputed = layers, everything, recomputed
        self.seen: set[Variant] = set()
        self.forwards = 0
        self.done = False
        self._trained = self._in_training = 0
        self._window: list[int] = []
        self._run = self._longest_run = 1

    def next(self, with_gradient: int, upcoming: Callable[[], Sequence[int]]) -> int | None:
        """The dropped branches of the next forward; None once every variant has occurred.

        `with_gradient` are the branches whose parameters have gradients now; `upcoming` draws the coming forwards.
        """
        if self.done:
            return None
        if not with_gradient:
            self._trained |= self._in_training
        self._run = self._run + 1 if with_gradient else 1
        self._longest_run = max(self._longest_run, self._run)
        if not self._window or not with_gradient:
            self._window = self._best_window(upcoming(), with_gradient)
        if not self._window or self.forwards >= MAX_FORWARDS:
            self.done = True
            logger.info("%d graph variants in the first %d forwards", len(self.seen), self.forwards)
            return None
        self.forwards += 1
        return self._window.pop(0)

    def note(self, dropped: int, with_gradient: int) -> None:
        """Remember the variants that the current forward compiles."""
        if self.done:
            return
        self._in_training = with_gradient | self.everything & ~dropped
        self.seen.update(self._variants(dropped, with_gradient))

    def _best_window(self, upcoming: Sequence[int], with_gradient: int) -> list[int]:
        """The consecutive masks with the most new variants, as many as a step has forwards."""
        best: list[int] = []
        most = 0
        for start in range(len(upcoming)):
            window = upcoming[start : start + self._longest_run]
            new = len(self._variants_of_step(window, with_gradient) - self.seen)
            if new > most:
                best, most = list(window), new
        return best

    def _variants_of_step(self, window: Sequence[int], with_gradient: int) -> set[Variant]:
        found: set[Variant] = set()
        for dropped in window:
            found.update(self._variants(dropped, with_gradient))
            with_gradient |= self.everything & ~dropped
        return found

    def _variants(self, dropped: int, with_gradient: int) -> Iterator[Variant]:
        kept = self.everything & ~dropped
        again = self.recomputed(dropped)
        below = 0
        for layer in self.layers:
            mine = layer.branches & kept
            lowest = branch_sets.lowest(layer.branches)
            for branch in branch_sets.each(mine):
                yield layer.kind, branch // lowest, bool(branch & self._trained)
            held = (mine & with_gradient) // lowest
            yield layer.kind, mine // lowest, held, bool(again & layer.branches), bool(below & kept)
            below |= layer.branches
        yield bool(kept)
