"""The weight of a branch in the budget: the FLOPs of its actual backward.

The backward of a product costs as much as its forward for each operand that receives a gradient. So a fully trained
branch counts twice its forward, a frozen projection inside a trained stream once. A branch through which no gradient
flows (neither it nor anything below it has a trained parameter) counts nothing. All of this follows from the recorded
graph and the parameters that are trained now.

Masks that train the top of the model down to a border save more than the branches below it. A parameter outside the
branches is frozen with the lowest branch above it, and if everything that feeds an operand is dropped or frozen, the
operand receives no gradient. So a kept branch computes no gradient for its input if nothing below it trains, and a
cross-attention none for the encoder's output once the encoder is frozen. Such work counts for the branch whose dropping
ends it. Work outside the branches, such as the head's share in a tied embedding, is saved in addition and counts
nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn

from dropbp.discovery.module_paths import prefixes
from dropbp.flops import Shape, fitted

if TYPE_CHECKING:
    from dropbp.discovery.graph import Graph
    from dropbp.discovery.trace import Node

_is_trained = operator.attrgetter("requires_grad")

BACKWARD = 2  # times the forward, if everything is trained
NEVER = -1

# FLOPs by (branch whose dropping ends them, branch that they lie in): an encoder's work may end with a decoder's
# branch, whose cost grows with another length.
Costs = Counter[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class BackwardWork:
    """The cost of the backward of a recorded forward.

    Attributes:
        inputs: for every node of the graph, in the order of creation, its inputs.
        need: for every node, the branches, as bits, that must all be dropped for it to get no gradient.
        parameters: names of the parameters among the nodes.
        products: for products inside branches, the FLOPs and the nodes of the operands.
        branches: number of branches.
        lowest_above: for parameters below a branch, the lowest branch above; see `stem`.
    """

    inputs: tuple[tuple[int, ...], ...]
    need: tuple[int, ...]
    parameters: Mapping[int, str]
    products: Mapping[int, tuple[int, tuple[int, ...]]]
    branches: int
    lowest_above: Mapping[str, int]

    def full(self, trained: Collection[str]) -> Costs:
        """FLOPs of each branch's backward if these parameters are trained.

        At least 1 if a gradient flows through the branch, otherwise none.
        """
        ends = self._ends(trained, lambda name: self.branches)
        costs, branch_of = Costs(), {1 << i: i for i in range(self.branches)}
        for node, (flops, operands) in self.products.items():
            own = branch_of.get(self.need[node])
            if own is not None:
                costs[own, own] += flops * sum(ends[i] > NEVER for i in operands)
        return self._at_least_one(costs, ends)

    def truncated(self, trained: Collection[str]) -> Costs:
        """The same under masks that train the top of the model: each branch with the work that ends with it."""
        ends = self._ends(trained, lambda name: self.lowest_above.get(name, self.branches))
        costs = Costs()
        for node, (flops, operands) in self.products.items():
            own = self.need[node].bit_length() - 1
            for end in (min(own, ends[i]) for i in operands if ends[i] > NEVER):
                costs[end, own] += flops
        return self._at_least_one(costs, ends)

    def _ends(self, trained: Collection[str], end_of: Callable[[str], int]) -> list[int]:
        """For each node, the branch whose dropping ends the last gradient into it; `NEVER` if no gradient flows.

        The recorded forward did not use adapters that were inactive, nor those that were added since. If one is trained
        now, a gradient flows through the product that it belongs to, or from the parameter beside it.
        """
        ends, unused = [NEVER] * len(self.inputs), set(trained).difference(self.parameters.values())
        through: dict[int, int] = {}
        for name in unused:
            for node, beside in self._nodes_of(name).items():
                end = end_of(name if name in self.lowest_above else beside)
                through[node] = max(end, through.get(node, NEVER))
        for node, inputs in enumerate(self.inputs):
            parameter = self.parameters.get(node)
            if parameter is not None:
                ends[node] = max(end_of(parameter) if parameter in trained else NEVER, through.get(node, NEVER))
            else:
                ends[node] = max((*(ends[i] for i in inputs), through.get(node, NEVER)))
        return ends

    def _nodes_of(self, name: str) -> dict[int, str]:
        """The products with a parameter of the nearest module around this one, or its parameters, with their names."""
        for path in reversed(prefixes(name)[:-1]):
            for nodes in (self._weights, self.parameters):
                found = {node: beside for node, beside in nodes.items() if f"{beside}.".startswith(f"{path}.")}
                if found:
                    return found
        return {}

    @functools.cached_property
    def _weights(self) -> dict[int, str]:
        """The products with a parameter, each with its name."""
        leaves = ((node, self._leaf(i)) for node, (_, operands) in self.products.items() for i in operands)
        return {node: self.parameters[leaf] for node, leaf in leaves if leaf in self.parameters}

    def _leaf(self, node: int) -> int:
        """The node without the casts and transpositions applied to it."""
        while node not in self.parameters and len(self.inputs[node]) == 1:
            node = self.inputs[node][0]
        return node

    def _at_least_one(self, costs: Costs, ends: Sequence[int]) -> Costs:
        reached = {need for need, end in zip(self.need, ends, strict=True) if end > NEVER}
        reached_alone = (branch for branch in range(self.branches) if 1 << branch in reached)
        return costs | Counter({(branch, branch): 1 for branch in reached_alone})


NO_WORK = BackwardWork((), (), {}, {}, 0, {})


def backward_work(graph: Graph, need: Sequence[int], branches: int, lowest_above: Mapping[str, int]) -> BackwardWork:
    """The backward work in branches; the arguments are as in `BackwardWork`."""
    names = graph.parameter_names
    parameters = {n.index: names[id(n.leaf)] for n in graph.nodes if n.is_leaf and id(n.leaf) in names}
    counted = {n.index: graph.trace.flops.get(n.sequence, 0) for n in graph.nodes if need[n.index] > 0}
    products = {i: (flops, _operands(graph.nodes[i])) for i, flops in counted.items() if flops}
    return BackwardWork(
        tuple(node.inputs for node in graph.nodes), tuple(need), parameters, products, branches, lowest_above
    )


def _operands(node: Node) -> tuple[int, ...]:
    """The factors of a product, without the bias, whose gradient is only a sum."""
    if len(node.inputs) < 3:
        return node.inputs
    return node.inputs[1:3] if node.name.startswith(("Addmm", "Baddbmm")) else node.inputs[:2]


class BackwardFlops:
    """The cost of each branch's backward at any shape, with the parameters that are trained now, in forward FLOPs.

    `works` is the work of the same branches at several shapes of inputs to `model`. A fully trained branch weighs as
    much as its forward. `truncated`: steps train the top of the model down to a border, and nothing below it.
    """

    def __init__(self, works: Mapping[Shape, BackwardWork], model: nn.Module, truncated: bool = False) -> None:
        self._works, self._model, self._truncated = works, model, truncated
        self._tables: list[Mapping[str, nn.Module | None]] = []
        self._each: list[nn.Parameter] = []
        self._stamp: tuple[bytes, list[int]] | None = None
        self.refresh()

    def of_truncated_backward(self) -> BackwardFlops:
        """The same for masks that train the top of the model down to a border."""
        return BackwardFlops(self._works, self._model, truncated=True)

    def refresh(self, changed: bool = False) -> bool:
        """Recount if the model has `changed`, or other parameters are trained than before; return whether that is so.

        Adapters that are added to the model change the number of modules somewhere in it, or what is trained.
        """
        if not changed and self._stamp == self._stamp_now():
            return False
        parameters = dict(self._model.named_parameters())
        self._tables = [module._modules for module in self._model.modules() if module._modules]
        self._each = list(parameters.values())
        trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
        count = BackwardWork.truncated if self._truncated else BackwardWork.full
        counts = {shape: count(work, trained) for shape, work in self._works.items()}
        self._places = sorted({place for costs in counts.values() for place, cost in costs.items() if cost})
        self._fitted = fitted({shape: [c[p] for p in self._places] for shape, c in counts.items()})
        self._stamp = self._stamp_now()
        return True

    def _stamp_now(self) -> tuple[bytes, list[int]]:
        return bytes(map(_is_trained, self._each)), list(map(len, self._tables))

    def at(self, shape: Shape) -> tuple[float, ...]:
        """The weight of every branch; 0 if no gradient flows through it."""
        found = [0.0] * next(iter(self._works.values())).branches
        for end, _, weight in self.parts(shape):
            found[end] += weight
        return tuple(found)

    def parts(self, shape: Shape) -> tuple[tuple[int, int, float], ...]:
        """The branch whose dropping saves a part of the backward, the branch that the part lies in, and its weight."""
        each = zip(self._places, self._fitted.at(shape), strict=True)
        return tuple((end, own, count / BACKWARD) for (end, own), count in each)
