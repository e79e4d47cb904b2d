"""What discovery finds, as data: branches, where they run, what rests beside them.

Sets of branches are bit masks held in Python integers: bit `i` is branch `i`; -1 is no set at all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from dropbp.discovery.weights import NO_WORK, Work

EXACT = -1  # the border of a use whose gradient flows through no branch: norms and heads after the last


@dataclasses.dataclass(frozen=True)
class Branch:
    """A residual branch (sublayer): `stream + branch(stream)`.

    Attributes:
        name: qualified name of the part of the model the branch is, `model.layers.0.self_attn`.
        modules: qualified names of the modules that run without recording when this branch alone is dropped.
        flops: floating-point operations of one forward of the branch, for the shapes last seen.
        rate: probability that a training step skips its backward, 0..1.
        block: qualified name of the repeated block it lies in, `model.layers.0`; empty if there is none.
        parameters: number of parameter elements that belong to the branch alone.
    """

    name: str
    modules: tuple[str, ...]
    flops: int
    rate: float = 0.0
    block: str = ""
    parameters: int = 0


@dataclasses.dataclass(frozen=True)
class Site:
    """A module that runs without recording when every branch in `needs[i]` is dropped, `i` being its i-th call.

    `learned_mask`: the parameters from which it makes a mask for attention. PyTorch takes another kernel where such a
    mask requires a gradient; without recording the choice must be the same, or the last bits would differ.
    """

    module: str
    needs: tuple[int, ...]
    learned_mask: tuple[str, ...] = ()

    @property
    def per_call(self) -> bool:
        return len(set(self.needs)) > 1


@dataclasses.dataclass(frozen=True)
class LooseParameter:
    """A parameter used outside every dropped module: frozen while `scope` runs with all branches in `need` dropped."""

    name: str
    scope: str
    need: int


@dataclasses.dataclass(frozen=True)
class BranchOutput:
    """A module whose output is the last of branch `branch`: scaling its gradient scales the branch's whole backward.

    `places`: which of its differentiable outputs those are; `users`: how many operations take one of them.
    """

    module: str
    calls: tuple[int, ...]
    branch: int
    places: tuple[int, ...] = ()
    users: int = 1


@dataclasses.dataclass(frozen=True)
class Rests:
    """What rests when which branch is dropped.

    Attributes:
        modules: that run without recording, each with the branch as a bit.
        parameters: that are frozen while the module in `scope` runs, with the branch as a bit.
        borders: for every parameter the lowest branch above it, as an index; `EXACT` where there is none.
        resting: parameters that are seen to here, as they do not lie in one branch.
        shared: those of them that several branches use.
        unseen: those of them that the recorded forward did not use; where they act is not known, so they count as if
            all branches were above them.
    """

    modules: Mapping[str, int] = dataclasses.field(default_factory=dict)
    parameters: tuple[LooseParameter, ...] = ()
    borders: Mapping[str, int] = dataclasses.field(default_factory=dict)
    resting: frozenset[str] = frozenset()
    shared: frozenset[str] = frozenset()
    unseen: tuple[str, ...] = ()

    def bits(self) -> dict[str, int]:
        """The resting parameters, each with its border as a bit."""
        return {name: 1 << self.borders[name] for name in self.borders if name in self.resting}


@dataclasses.dataclass(frozen=True)
class Structure:
    """All that is needed to drop branches of one model.

    `unscalable` names branches whose gradient cannot be scaled exactly at module outputs, each with the reason;
    `blocks` and `parameters` map a qualified name to the branches that lie in the block, and to those that must all be
    dropped for the parameter to get no gradient; `coverage` is the share of the model's FLOPs that lies in branches;
    `rests` says what rests beside the branches, under masks that drop the bottom of the model; `together` are branches,
    as bits, that leave the stream at one point and join it at one: such masks drop all of them or none; `named` are the
    modules of branches that were given by name; `work` is what their backward would cost; `outputs` are the keys of the
    model's outputs, each with whether something that trains leads to it; `aside`: outputs come out of branches by other
    ways than the stream; `repeated` names blocks that run more than once in a forward, or share a module with others,
    with the reason; `adds_in_place`: something is added in place to a view.
    """

    branches: tuple[Branch, ...]
    sites: tuple[Site, ...]
    loose: tuple[LooseParameter, ...]
    branch_outputs: tuple[BranchOutput, ...]
    unscalable: Mapping[str, str]
    blocks: Mapping[str, int]
    parameters: Mapping[str, int]
    coverage: float
    rests: Rests = dataclasses.field(default_factory=Rests)
    together: tuple[int, ...] = ()
    named: tuple[tuple[str, ...], ...] = ()
    work: Work = NO_WORK
    outputs: Mapping[str, bool] = dataclasses.field(default_factory=dict)
    aside: bool = False
    repeated: Mapping[str, str] = dataclasses.field(default_factory=dict)
    adds_in_place: bool = False
