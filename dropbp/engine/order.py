"""Notices blocks that run in another order than at `enable`, as with random routes through the layers.

Masks that drop the bottom of the model count on that order. In another one, a kept block may lie below a dropped one
and get the gradient of the residual stream alone. So may one of two branches that run in turn, again and again, if the
recorded forward ran each only once.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from dropbp.engine.wrappers import next_entry

if TYPE_CHECKING:
    from dropbp.discovery.structure import Structure
    from dropbp.engine.wrappers import BranchModuleState

logger = logging.getLogger(__name__)


class BlockOrder:
    """Compares the order in which the blocks of each list were entered with that of the recorded forward."""

    def __init__(self, structure: Structure, modules: Sequence[BranchModuleState]) -> None:
        self._lists: dict[str, list[tuple[str, BranchModuleState]]] = {}
        self._since: int | None = None
        self._modules = modules
        self._warned_of_repeats = False
        first = {module.need: module for module in reversed(modules) if not module.per_call}
        for index, branch in enumerate(structure.branches):
            module = first.get(1 << index)
            if branch.block and module is not None:
                self._lists.setdefault(branch.block.rpartition(".")[0], []).append((branch.block, module))

    def begin(self) -> None:
        """Note that a training forward begins."""
        self._since = next_entry()

    def end(self, outputs: Any, dropped: int) -> None:
        """Warn once if the blocks of a list were entered in another order."""
        since, self._since = self._since, None
        if since is None or not dropped:
            return
        for blocks in self._lists.values():
            ran = [(module.entered, name) for name, module in blocks if module.entered > since]
            swapped = next(
                ((one, other) for one, other in pairwise(ran) if one[0] > other[0] and one[1] != other[1]), None
            )
            if swapped is not None:
                self._warn(*(name for _, name in swapped))
                return

    def note_repeated(self, calls: Sequence[int], dropped: int) -> None:
        """Warn once if a kept branch ran below a dropped one, in a forward that called a module more than recorded.

        If none did, all calls of kept branches come after the last call of a dropped one, and no others.
        """
        ended, each = next_entry(), list(zip(self._modules, calls, strict=False))
        last = max((m.entered for m, count in each if count and not m.per_call and not m.need & ~dropped), default=0)
        kept = [(m, count) for m, count in each if not m.per_call and m.need & ~dropped]
        if not dropped or self._warned_of_repeats or not last or ended - last > sum(count for _, count in kept):
            return
        self._warned_of_repeats = True
        repeated = [(m, count) for m, count in each if count > len(m.needs)]
        module, times = next((pair for pair in repeated if not pair[0].need & ~dropped), repeated[0])
        logger.warning(
            "%s was called %d times in a forward, and %d times when dropbp was enabled. Kept branches that ran before "
            "its last call get the gradient of the residual stream alone there. Enable with a forward that calls it at "
            "least twice (example_inputs=...): then each of these calls is a branch of its own. masks='exact' accepts "
            "such gradients, as the paper does.",
            module.name, times, len(module.needs),
        )  # fmt: skip

    def _warn(self, lower: str, upper: str) -> None:
        self._lists = {}
        logger.warning(
            "%s ran before %s, in another order than when dropbp was enabled. The masks drop the lowest branches in "
            "the order of then, so kept branches that now lie below dropped ones get the gradient of the residual "
            "stream alone. Keep the order of the blocks. masks='exact' accepts such gradients, as the paper does.",
            upper,
            lower,
        )
