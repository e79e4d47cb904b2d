"""What a branch weighs in the budget: the FLOPs of the backward that it really has.

The backward of a product costs its forward once for each operand that a gradient flows into. So full fine-tuning counts
twice the forward, a frozen projection inside a trained stream once, and a branch through which no gradient flows (it
holds no trained parameter, nor does anything below it) nothing at all. All of that is read off the recorded graph and
the parameters that are trained now.

Masks that train the top of the model down to a border save a little more: nothing below the border asks for a gradient,
so the lowest kept branch computes none for its input. That is counted as saved by the branch below it, and no longer by
the branch itself once that is dropped as well.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from dropbp.flops import Shape, fitted

if TYPE_CHECKING:
    from dropbp.discovery.graph import Graph
    from dropbp.discovery.trace import Node

BACKWARD = 2  # times the forward, where everything is trained


@dataclasses.dataclass(frozen=True)
class Work:
    """What the backward of a recorded forward would cost.

    Attributes:
        inputs: of every node of the graph, in the order of creation.
        owners: the branch that each node lies in, -1 for none.
        parameters: names of the parameters among the nodes.
        products: FLOPs of nodes inside branches, and the nodes of what they multiply.
        branches: how many there are.
    """

    inputs: tuple[tuple[int, ...], ...]
    owners: tuple[int, ...]
    parameters: Mapping[int, str]
    products: Mapping[int, tuple[int, tuple[int, ...]]]
    branches: int

    def backward(self, trained: Collection[str]) -> tuple[list[int], list[int]]:
        """FLOPs of each branch's backward where these parameters are trained, and those of its input's gradient.

        The first are at least 1 where a gradient flows through the branch, and 0 where none does.
        """
        flows, within = ([False] * len(self.inputs) for _ in range(2))
        costs, to_input = ([0] * self.branches for _ in range(2))
        reached: set[int] = set()
        for node, inputs in enumerate(self.inputs):
            own = self.owners[node]
            flows[node] = self.parameters.get(node) in trained or any(flows[i] for i in inputs)
            within[node] = flows[node] and (not inputs or any(within[i] for i in inputs if self._stays(i, own)))
            if flows[node] and own >= 0:
                reached.add(own)
        for node, (flops, operands) in self.products.items():
            own = self.owners[node]
            costs[own] += flops * sum(flows[i] for i in operands)
            to_input[own] += flops * sum(flows[i] and not (within[i] and self._stays(i, own)) for i in operands)
        return [max(cost, branch in reached) for branch, cost in enumerate(costs)], to_input

    def _stays(self, node: int, branch: int) -> bool:
        """Whether what a branch consumes is of its own making, or a parameter."""
        return self.owners[node] == branch or node in self.parameters


NO_WORK = Work((), (), {}, {}, 0)


def work_of(graph: Graph, need: Sequence[int], branches: int) -> Work:
    """The work in branches, `need` being for each node the branches that must be dropped for it to get no gradient."""
    branch_of, names = {1 << i: i for i in range(branches)}, graph.parameter_names
    owners = tuple(branch_of.get(own, -1) for own in need)
    parameters = {n.index: names[id(n.leaf)] for n in graph.nodes if n.is_leaf and id(n.leaf) in names}
    counted = {n.index: graph.trace.flops.get(n.sequence, 0) for n in graph.nodes if owners[n.index] >= 0}
    products = {i: (flops, _operands(graph.nodes[i])) for i, flops in counted.items() if flops}
    return Work(tuple(node.inputs for node in graph.nodes), owners, parameters, products, branches)


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
        self._stamp: bytes | None = None
        self.renew()

    def counted_from_the_top(self) -> Weights:
        """The same for masks that train the top of the model down to a border."""
        return Weights(self._works, self._parameters, from_the_top=True)

    def renew(self) -> bool:
        """Take over which parameters are trained now; whether that is others than before."""
        stamp = bytes([p.requires_grad for p in self._parameters.values()])
        if stamp == self._stamp:
            return False
        trained = {name for name, parameter in self._parameters.items() if parameter.requires_grad}
        counts = {shape: self._counts(*work.backward(trained)) for shape, work in self._works.items()}
        self._stamp, self._model = stamp, fitted(counts)
        self._live = [count > 0 for count in next(iter(counts.values()))]
        return True

    def _counts(self, costs: Sequence[int], to_input: Sequence[int]) -> list[int]:
        """The lowest branch that has a backward keeps the gradient of its input while it is kept itself."""
        counts, live = list(costs), [i for i, cost in enumerate(costs) if cost]
        if self._from_the_top:
            for branch, above in itertools.pairwise(live):
                counts[branch] += to_input[above]
                counts[above] -= to_input[above]
        return [max(count, cost > 0) for count, cost in zip(counts, costs, strict=True)]

    def at(self, shape: Shape) -> tuple[float, ...]:
        """Of every branch; 0 for one through which no gradient flows."""
        counts = zip(self._model.at(shape), self._live, strict=True)
        return tuple(count / BACKWARD if live else 0.0 for count, live in counts)
