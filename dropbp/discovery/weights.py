"""What a branch weighs in the budget: the FLOPs of the backward that it really has.

The backward of a product costs its forward once for each operand that a gradient flows into. So full fine-tuning counts
twice the forward, a frozen projection inside a trained stream once, and a branch through which no gradient flows (it
holds no trained parameter, nor does anything below it) nothing at all. All of that is read off the recorded graph and
the parameters that are trained now.

Masks that train the top of the model down to a border save more than the branches below it. A parameter outside of them
rests with the lowest branch above it, and where all that feeds an operand is dropped or rests, no gradient flows into
that operand. So a kept branch computes no gradient for its input if nothing below it trains, and a cross-attention none
for the encoder's output once the encoder rests. Such work weighs on the branch whose dropping ends it. What ends
outside of branches, as the share of the head in a tied embedding, is saved besides and weighs nothing.
"""

from __future__ import annotations

import dataclasses
import operator
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from dropbp.flops import Shape, fitted

if TYPE_CHECKING:
    from dropbp.discovery.graph import Graph
    from dropbp.discovery.trace import Node

_is_trained = operator.attrgetter("requires_grad")

BACKWARD = 2  # times the forward, where everything is trained
NEVER = -1

# FLOPs by the branch with which they end and the branch that they lie in: an encoder's may end with work of a decoder,
# which grows with another length.
Costs = Counter[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Work:
    """What the backward of a recorded forward would cost.

    Attributes:
        inputs: of every node of the graph, in the order of creation.
        need: of every node the branches, as bits, that must all be dropped for it to get no gradient.
        parameters: names of the parameters among the nodes.
        products: FLOPs of nodes inside branches, and the nodes of what they multiply.
        branches: how many there are.
        borders: for parameters below a branch the lowest branch above; see `stem`.
    """

    inputs: tuple[tuple[int, ...], ...]
    need: tuple[int, ...]
    parameters: Mapping[int, str]
    products: Mapping[int, tuple[int, tuple[int, ...]]]
    branches: int
    borders: Mapping[str, int]

    def backward(self, trained: Collection[str]) -> Costs:
        """FLOPs of each branch's backward where these parameters are trained.

        At least 1 where a gradient flows through the branch, and none where none does.
        """
        ends = self._ends(lambda name: self.branches if name in trained else NEVER)
        costs, branch_of = Costs(), {1 << i: i for i in range(self.branches)}
        for node, (flops, operands) in self.products.items():
            own = branch_of.get(self.need[node])
            if own is not None:
                costs[own, own] += flops * sum(ends[i] > NEVER for i in operands)
        return self._at_least_one(costs, ends)

    def from_the_top(self, trained: Collection[str]) -> Costs:
        """The same for masks that train the top of the model down to a border: each branch with what ends with it."""
        ends = self._ends(lambda name: self.borders.get(name, self.branches) if name in trained else NEVER)
        costs = Costs()
        for node, (flops, operands) in self.products.items():
            own = self.need[node].bit_length() - 1
            for end in (min(own, ends[i]) for i in operands if ends[i] > NEVER):
                costs[end, own] += flops
        return self._at_least_one(costs, ends)

    def _ends(self, end_of: Callable[[str], int]) -> list[int]:
        """For each node the branch with whose dropping the last gradient into it ends; `NEVER` where none flows."""
        ends = [NEVER] * len(self.inputs)
        for node, inputs in enumerate(self.inputs):
            name = self.parameters.get(node)
            ends[node] = max((ends[i] for i in inputs), default=NEVER) if name is None else end_of(name)
        return ends

    def _at_least_one(self, costs: Costs, ends: Sequence[int]) -> Costs:
        reached = {need for need, end in zip(self.need, ends, strict=True) if end > NEVER}
        reached_alone = (branch for branch in range(self.branches) if 1 << branch in reached)
        return costs | Counter({(branch, branch): 1 for branch in reached_alone})


NO_WORK = Work((), (), {}, {}, 0, {})


def work_of(graph: Graph, need: Sequence[int], branches: int, borders: Mapping[str, int]) -> Work:
    """The work in branches; the arguments are as in `Work`."""
    names = graph.parameter_names
    parameters = {n.index: names[id(n.leaf)] for n in graph.nodes if n.is_leaf and id(n.leaf) in names}
    counted = {n.index: graph.trace.flops.get(n.sequence, 0) for n in graph.nodes if need[n.index] > 0}
    products = {i: (flops, _operands(graph.nodes[i])) for i, flops in counted.items() if flops}
    return Work(tuple(node.inputs for node in graph.nodes), tuple(need), parameters, products, branches, borders)


def _operands(node: Node) -> tuple[int, ...]:
    """Without the bias, whose gradient is a sum."""
    if len(node.inputs) < 3:
        return node.inputs
    return node.inputs[1:3] if node.name.startswith(("Addmm", "Baddbmm")) else node.inputs[:2]


class Weights:
    """What each branch's backward costs, for any shape, with the parameters that are trained now.

    Counted in FLOPs of a forward: a branch that is trained whole weighs as many as its forward has.

    Args:
        works: of the same branches at several shapes.
        parameters: of the model, by name.
        from_the_top: whether steps train the top of the model down to a border, and nothing below it.
    """

    def __init__(
        self, works: Mapping[Shape, Work], parameters: Mapping[str, torch.Tensor], from_the_top: bool = False
    ) -> None:
        self._works, self._parameters, self._from_the_top = works, parameters, from_the_top
        self._each = list(parameters.values())
        self._stamp: bytes | None = None
        self.renew()

    def counted_from_the_top(self) -> Weights:
        """The same for masks that train the top of the model down to a border."""
        return Weights(self._works, self._parameters, from_the_top=True)

    def renew(self) -> bool:
        """Take over which parameters are trained now; whether that is others than before."""
        stamp = bytes(map(_is_trained, self._each))
        if stamp == self._stamp:
            return False
        trained = {name for name, parameter in self._parameters.items() if parameter.requires_grad}
        count = Work.from_the_top if self._from_the_top else Work.backward
        counts = {shape: count(work, trained) for shape, work in self._works.items()}
        self._places = sorted({place for costs in counts.values() for place, cost in costs.items() if cost})
        self._stamp, self._model = stamp, fitted({shape: [c[p] for p in self._places] for shape, c in counts.items()})
        return True

    def at(self, shape: Shape) -> tuple[float, ...]:
        """Of every branch; 0 for one through which no gradient flows."""
        found = [0] * next(iter(self._works.values())).branches
        for (branch, _), count in zip(self._places, self._model.at(shape), strict=True):
            found[branch] += count
        return tuple(count / BACKWARD for count in found)
