"""The plan of one forward, and the conditions that only the run knows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class ForwardPlan:
    """The plan of one forward. Sets of branches are bits.

    Attributes:
        dropped: branches whose backward is dropped, which run without recording.
        factors: factors on the kept branches' gradients; empty if they are not scaled.
        checkpointed: branches whose blocks are recomputed in the backward.
        stem_frozen: whether the stem (what feeds the stream, or lies in it) is frozen if a branch above it is dropped.
        truncated: whether the stream then requires no gradient below the lowest kept branch.
        detached: branches whose backward is dropped although they are recorded; see `dropbp.engine.side_outputs`.
        kept: branches that run with recording.
        trained: branches whose backward is not dropped.
    """

    dropped: int = 0
    factors: Sequence[float] = ()
    checkpointed: int = 0
    stem_frozen: bool = False
    truncated: bool = False
    detached: int = 0
    kept: int = dataclasses.field(init=False)
    trained: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kept", ~self.dropped)
        object.__setattr__(self, "trained", ~(self.dropped | self.detached))


KEEP_ALL = ForwardPlan()


@dataclasses.dataclass(frozen=True, slots=True)
class Conditions:
    """What only the run knows about its next forward.

    Attributes:
        limit: share of all activations that may be kept; None: no limit.
        stem_frozen: whether the stem (what feeds the stream, or lies in it) is frozen if a branch above it is dropped.
        truncated: whether the stream then requires no gradient below the lowest kept branch.
        keep_all: whether nothing may be dropped, because an input requires a gradient.
        multi_rank: whether other ranks run the same forward on batches of their own.
        with_gradient: returns the branches, as bits, whose parameters have gradients; for the graph warm-up only.
        never_recomputed: branches, as bits, of the blocks that must not be recomputed.
        repeat_mask: whether the forward must use the mask of the previous one.
    """

    limit: float | None = None
    stem_frozen: bool = False
    truncated: bool = False
    keep_all: bool = False
    multi_rank: bool = False
    with_gradient: Callable[[], int] = int
    never_recomputed: int = 0
    repeat_mask: bool = False
