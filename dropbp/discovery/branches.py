"""The edges of the graph that are cut to drop each branch."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dropbp.discovery.graph import Edge, Graph, Join, joins, outermost
from dropbp.discovery.liveness import Group, exact_groups
from dropbp.errors import DiscoveryError

if TYPE_CHECKING:
    from dropbp.discovery.structure import Structure


@dataclasses.dataclass(frozen=True)
class Found:
    """A term of an addition to the stream. Cutting `group` drops it exactly; None if that is impossible."""

    edge: Edge
    join: Join
    group: Group | None

    @property
    def whole(self) -> bool:
        """Whether cutting the edge into the addition drops it exactly."""
        return self.group == [self.edge]


def found_in(graph: Graph) -> list[Found]:
    """All branches, in the order in which their outputs were created."""
    pairs = [(edge, join) for join in outermost(graph, joins(graph)) for edge in join.edges]
    pairs.sort(key=lambda pair: graph.nodes[pair[0][1]].sequence)
    groups = exact_groups(graph, [[edge] for edge, _ in pairs])
    return [Found(edge, join, group) for (edge, join), group in zip(pairs, groups, strict=True)]


def together(found: Sequence[Found]) -> tuple[int, ...]:
    """Neighbouring branches that leave the stream at the same point and join it at the same point, as bits."""
    places = [(branch.join.node, dict(branch.join.branches)[branch.edge]) for branch in found]
    runs = [list(run) for _, run in itertools.groupby(range(len(found)), key=places.__getitem__)]
    return tuple(sum(1 << branch for branch in run) for run in runs if len(run) > 1)


def branch_groups(graph: Graph) -> list[Group]:
    """For each branch, the edges that are cut to drop it, in the order of the branches' outputs."""
    return [found.group for found in found_in(graph) if found.group is not None]


def groups_again(graph: Graph, structure: Structure) -> list[Group]:
    """The edges of each branch of a known structure, in the graph of another forward."""
    if not structure.named:
        return branch_groups(graph)
    groups = exact_groups(graph, [edges_leaving(graph, names) for names in structure.named])
    return [group for group in groups if group is not None]


def edges_leaving(graph: Graph, names: Sequence[str]) -> list[Edge]:
    """Every edge from outside the named modules to a node that they created."""
    inside: set[int] = set()
    for call in graph.calls:
        if call.name in names:
            inside |= set(graph.numbers_in_call[call.index])
    if not inside:
        raise DiscoveryError(
            f"branches= names {list(names)}, but the small forward never ran them, or they create nothing "
            "differentiable. Pass example_inputs=... that use them."
        )
    return [(user, n) for n in inside for user in graph.consumers[n] if user not in inside]
