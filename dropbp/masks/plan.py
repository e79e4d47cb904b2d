"""What one forward does, and the conditions that only the run knows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class ForwardPlan:
    """What one forward does.

    Attributes:
        dropped: the branches whose backward it drops.
        factors: of the kept branches' gradients; empty where they are not scaled.
        checkpointed: branches whose blocks are recomputed in the backward instead of kept.
        stem_rests: whether what feeds a stream rests when the stream's first branch is dropped.
        truncated: whether the stream then asks for no gradient below the lowest kept branch.
        detached: branches whose backward it drops too, recorded all the same; see `dropbp.engine.calls`.
        kept: the branches that run recorded.
        trained: the branches whose backward it does not drop.
    """

    dropped: int = 0
    factors: Sequence[float] = ()
    checkpointed: int = 0
    stem_rests: bool = False
    truncated: bool = False
    detached: int = 0
    kept: int = dataclasses.field(init=False)
    trained: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kept", ~self.dropped)
        object.__setattr__(self, "trained", ~(self.dropped | self.detached))


WHOLE = ForwardPlan()


@dataclasses.dataclass(frozen=True, slots=True)
class Conditions:
    """What only the run knows about its next forward.

    Attributes:
        limit: share of all activations that may be kept; None where nothing is recomputed for its sake.
        stem_rests: whether what feeds a stream rests when the stream's first branch is dropped.
        truncated: whether the stream then asks for no gradient below the lowest kept branch.
        whole: whether nothing may be dropped, as an input asks for its gradient.
        ranks: whether other ranks run the same forward on batches of their own.
        held: tells which branches' parameters have gradients now, as bits; asked by a warm-up of graphs only.
        left_alone: branches of the blocks that must not be recomputed, as bits.
        again: whether the forward must drop what the one before it dropped.
    """

    limit: float | None = None
    stem_rests: bool = False
    truncated: bool = False
    whole: bool = False
    ranks: bool = False
    held: Callable[[], int] = int
    left_alone: int = 0
    again: bool = False
