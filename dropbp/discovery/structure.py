"""The results of discovery as data: branches, the modules they run in, and the stem that is frozen with them.

Sets of branches are bit masks held in Python integers: bit `i` is branch `i`; -1 means that no set is enough.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from dropbp.discovery.backward_flops import NO_WORK, BackwardWork

NO_BRANCH_ABOVE = -1  # the gradient passes through no branch: norms and heads after the last branch


@dataclasses.dataclass(frozen=True)
class Branch:
    """A residual branch (sublayer): `stream + branch(stream)`.

    Attributes:
        name: qualified name of the part of the model that forms the branch, such as `model.layers.0.self_attn`.
        modules: qualified names of the modules that run without recording if this branch alone is dropped.
        flops: floating-point operations of one forward of the branch, at the latest input shape.
        rate: probability that a training step skips its backward, 0..1.
        block: qualified name of the repeated block that contains it, such as `model.layers.0`; empty if there is none.
        parameters: number of parameter elements that belong to this branch alone.
    """

    name: str
    modules: tuple[str, ...]
    flops: int
    rate: float = 0.0
    block: str = ""
    parameters: int = 0


@dataclasses.dataclass(frozen=True)
class BranchModule:
    """A module whose i-th call runs without recording if every branch in `needs[i]` is dropped.

    `learned_mask` names the parameters from which it makes an attention mask. PyTorch selects another kernel if such a
    mask requires a gradient. Without recording, the choice must be the same, or the last bits would differ.
    """

    name: str
    needs: tuple[int, ...]
    learned_mask: tuple[str, ...] = ()

    @property
    def per_call(self) -> bool:
        return len(set(self.needs)) > 1


@dataclasses.dataclass(frozen=True)
class ScopedParameter:
    """A parameter used outside every skipped module: frozen while `scope` runs with all branches in `need` dropped."""

    name: str
    scope: str
    need: int


@dataclasses.dataclass(frozen=True)
class BranchOutput:
    """A module that produces the output of branch `branch`. Scaling the output's gradient scales the whole branch's.

    `places`: which of its differentiable outputs belong to the branch; `users`: how many operations use one of them.
    """

    module: str
    calls: tuple[int, ...]
    branch: int
    places: tuple[int, ...] = ()
    users: int = 1


@dataclasses.dataclass(frozen=True)
class Stem:
    """The parameters outside single branches, which are frozen if the lowest branch above them is dropped.

    Attributes:
        modules: modules that run without recording, each with the branch as a bit.
        parameters: parameters that are frozen while the module in `scope` runs, with the branch as a bit.
        lowest_above: for every parameter, the index of the lowest branch above it; `NO_BRANCH_ABOVE` if there is none.
        names: parameters handled here because they do not lie in a single branch.
        shared: those of them that several branches use.
        unused: those of them that the recorded forward did not use. Their position is unknown, so they count as below
            all branches.
    """

    modules: Mapping[str, int] = dataclasses.field(default_factory=dict)
    parameters: tuple[ScopedParameter, ...] = ()
    lowest_above: Mapping[str, int] = dataclasses.field(default_factory=dict)
    names: frozenset[str] = frozenset()
    shared: frozenset[str] = frozenset()
    unused: tuple[str, ...] = ()

    def bits(self) -> dict[str, int]:
        """The parameters of the stem, each with the lowest branch above it, as a bit."""
        return {name: 1 << self.lowest_above[name] for name in self.lowest_above if name in self.names}


@dataclasses.dataclass(frozen=True)
class Structure:
    """Everything needed to drop branches of one model.

    Attributes:
        branches: the branches, from the input upwards.
        branch_modules: the modules of the branches, which run without recording.
        scoped_parameters: parameters of branches that lie in no skipped module.
        branch_outputs: the modules that produce the branches' outputs.
        unscalable: branches whose gradient cannot be scaled exactly at module outputs, each with the reason.
        blocks: for each block, the branches that lie in it.
        parameters: for each parameter, the branches that must all be dropped for it to get no gradient.
        coverage: share of the model's FLOPs that lies in branches.
        stem: what is frozen outside the branches, under masks that drop the bottom of the model.
        parallel: sets of branches, as bits, that leave the stream at one point and are added to it at one point. Masks
            that drop the bottom of the model drop all of them or none.
        named: the modules of branches that the user named.
        work: the cost of the branches' backward.
        outputs: keys of the model's outputs, each with whether it depends on something that trains.
        side_outputs: whether outputs come out of branches in other ways than through the stream.
        repeated: blocks that run more than once in a forward, or share a module with others, each with the reason.
        adds_in_place: whether something is added in place to a view.
        kernel_by_weight: the modules with a product whose kernel depends on whether its weight requires a gradient.
        group_norms: the modules whose own forward computes a group norm.
        inexact: number of branches that can only be dropped in part, or not at all.
        identities: the modules that may return their input (dropout), where it must not count as their output.
        calls_follow_shape: the modules that are called a different number of times at other shapes, as for chunks.
    """

    branches: tuple[Branch, ...]
    branch_modules: tuple[BranchModule, ...]
    scoped_parameters: tuple[ScopedParameter, ...]
    branch_outputs: tuple[BranchOutput, ...]
    unscalable: Mapping[str, str]
    blocks: Mapping[str, int]
    parameters: Mapping[str, int]
    coverage: float
    stem: Stem = dataclasses.field(default_factory=Stem)
    parallel: tuple[int, ...] = ()
    named: tuple[tuple[str, ...], ...] = ()
    work: BackwardWork = NO_WORK
    outputs: Mapping[str, bool] = dataclasses.field(default_factory=dict)
    side_outputs: bool = False
    repeated: Mapping[str, str] = dataclasses.field(default_factory=dict)
    adds_in_place: bool = False
    kernel_by_weight: frozenset[str] = frozenset()
    group_norms: frozenset[str] = frozenset()
    inexact: int = 0
    identities: frozenset[str] = frozenset()
    calls_follow_shape: frozenset[str] = frozenset()
