"""Finds the modules that can run without recording if a branch is dropped, and whether that drops the branch exactly.

Dropping a branch means that no gradient enters the edge from the addition to the branch's output. Every node that
reaches the outputs only through that edge is then dead, and a module whose nodes are all dead can run without
recording. One pass over the graph, from the outputs to the inputs, gives every node the set of branches that must all
be dropped to make it dead (`ALWAYS_NEEDED` if no set is enough). A norm shared by two parallel branches is dead if both
are dropped, a bias shared by all attention layers if all are.

Sets of branches are bit masks held in Python integers: bit `i` is branch `i`, `ALWAYS_NEEDED` is -1.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Sequence

from dropbp.discovery.graph import Edge, Graph
from dropbp.discovery.trace import Call
from dropbp.discovery.walks import reached

ALWAYS_NEEDED = -1  # no set of branches is enough
Cut = Sequence[Edge]  # the edges that are cut to drop one branch


def exact_cuts(graph: Graph, first: Sequence[Cut]) -> list[Cut | None]:
    """For each branch, the edges to cut so that running modules without recording drops exactly it; None if impossible.

    If the term of an addition mixes a branch with something that stays alive, as in `gate(x) * f(x)`, the cut moves
    back to the outputs of the branch's modules. The gate keeps its gradient, with `f(x)` as a constant.
    """
    cuts: list[Cut | None] = list(first)
    moved: set[int] = set()
    while True:
        possible = [i for i, cut in enumerate(cuts) if cut is not None]
        calls = UnrecordedCalls(graph, needs(graph, [cut for cut in cuts if cut is not None]))
        inexact = [(place, i) for place, i in enumerate(possible) if not calls.is_exact(place, cuts[i] or ())]
        if not inexact:
            return cuts
        for place, i in inexact:
            cuts[i] = None if i in moved else calls.moved_inward(place, cuts[i] or ())
            moved.add(i)


def needs(graph: Graph, cuts: Sequence[Cut]) -> list[int]:
    """For each node, the branches that must all be dropped for it to get no gradient, or `ALWAYS_NEEDED`."""
    cut = {edge: 1 << i for i, edges in enumerate(cuts) for edge in edges}
    need = [0] * len(graph.nodes)
    for root in graph.trace.roots:
        need[root] = ALWAYS_NEEDED
    for node in reversed(graph.nodes):
        for source in node.inputs:
            need[source] |= cut.get((node.index, source), need[node.index])
    return need


def flows(graph: Graph, cuts: Sequence[Cut]) -> list[int]:
    """For each node, the branches that its gradient passes through, its own included; no other branch changes it."""
    cut = {edge: 1 << i for i, edges in enumerate(cuts) for edge in edges}
    flow = [0] * len(graph.nodes)
    for node in reversed(graph.nodes):
        for source in node.inputs:
            flow[source] |= flow[node.index] | cut.get((node.index, source), 0)
    return flow


class UnrecordedCalls:
    """The module calls that can run without recording, and whether that drops each branch exactly."""

    def __init__(self, graph: Graph, need: Sequence[int]) -> None:
        self.graph = graph
        self.need = need
        made = graph.nodes_in_call
        self.call_need = [functools.reduce(operator.or_, (need[n] for n in made[c.index]), 0) for c in graph.calls]
        self.outermost = [call for call in graph.calls if self._is_outermost(call)]
        self.outermost_of = self._outermost_by_node()

    def _is_outermost(self, call: Call) -> bool:
        own = self.call_need[call.index]
        above = self.call_need[call.parent] if call.parent >= 0 else ALWAYS_NEEDED
        return own not in (0, ALWAYS_NEEDED) and above != own

    def _outermost_by_node(self) -> dict[int, list[Call]]:
        calls: dict[int, list[Call]] = {}
        for call in self.outermost:
            for number in self.graph.nodes_in_call[call.index]:
                calls.setdefault(number, []).append(call)
        return calls

    def is_unrecorded(self, number: int, dropped: int) -> bool:
        """Whether the node lies in a module that runs without recording if exactly `dropped` are dropped."""
        return any(not self.call_need[c.index] & ~dropped for c in self.outermost_of.get(number, ()))

    def glue(self, branch: int, heads: Iterable[int]) -> tuple[set[int], set[int], set[int]]:
        """Walk from the heads into the branch: its recorded nodes, the first unrecorded nodes, and the live inputs."""
        dropped, glue = 1 << branch, set[int]()

        def onward(number: int) -> tuple[int, ...]:
            if self.is_unrecorded(number, dropped) or self.need[number] & ~dropped:
                return ()
            glue.add(number)
            return self.graph.nodes[number].inputs

        ends = set(reached(heads, onward)) - glue
        first_unrecorded = {number for number in ends if self.is_unrecorded(number, dropped)}
        return glue, first_unrecorded, ends - first_unrecorded

    def is_exact(self, branch: int, edges: Cut) -> bool:
        """Whether the cut makes dead only recorded glue without live inputs, and modules that run without recording."""
        _, first_unrecorded, leaks = self.glue(branch, [head for _, head in edges])
        return bool(first_unrecorded) and not leaks

    def moved_inward(self, branch: int, edges: Cut) -> Cut | None:
        """The edges from the glue into the branch's modules; None if the branch has no modules of its own."""
        glue, first_unrecorded, _ = self.glue(branch, [head for _, head in edges])
        inward = [(user, n) for n in sorted(first_unrecorded) for user in self.graph.consumers[n] if user in glue]
        return inward or None
